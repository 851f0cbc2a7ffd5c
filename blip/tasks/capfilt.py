"""What CapFilt's configuration says beside `datasets`: two models, how they write and judge, what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from blip.config.schema import CommandRun, Section
from blip.registry import TASKS


@dataclass
class StartConfig(Section):
    """CapFilt's section `model`: what captioner and filter are fine-tuned from."""

    section: ClassVar[str] = "model"

    init_from: str | None = None
    """The pre-trained model: run folder, checkpoint or weight file; null where recipes name their own."""


@dataclass
class ExpertConfig(Section):
    """The captioner, or the filter: a recipe that makes it, or weights that are there."""

    section: ClassVar[str] = "run"

    recipe: str | None = None
    """Fine-tune by this recipe of `blip train`, from `model.init_from`."""
    options: list[str] = field(default_factory=list)
    """Changes of the recipe, `key=value` each, such as datasets.coco_caption=null."""
    checkpoint: str | None = None
    """Or take these weights, which win over a recipe: run folder, LAVIS's .pth, Hugging Face folder or id."""
    arch: str | None = None
    """Registry name of the model; None: the checkpoint's. Without a checkpoint, its published weights."""
    model_type: str | None = None
    """Preset of the model."""

    @property
    def given(self) -> bool:
        """Whether weights are named."""
        return self.checkpoint is not None or self.arch is not None

    @property
    def tuned_by(self) -> str | None:
        """The recipe that makes it; None: weights are named, or nothing is."""
        return None if self.given else self.recipe


@dataclass
class CaptionsConfig(Section):
    """How synthetic captions are written. BLIP, section 4.3: one per picture, nucleus sampling, p = 0.9."""

    section: ClassVar[str] = "run.captions"

    num: int = 1
    """Captions per picture; 0: none are written, and web texts are filtered only."""
    use_nucleus_sampling: bool = True
    """Draw the words, with `top_p`, `top_k` and `temperature`; else follow beams."""
    top_p: float = 0.9
    """Draw among the fewest tokens that have this probability together."""
    top_k: int = 50
    """Draw among so many most likely tokens; 0 = all."""
    temperature: float = 1.0
    """Logits are divided by it before drawing."""
    num_beams: int = 3
    """Captions that are followed at once where nothing is drawn."""
    max_length: int = 30
    """Longest caption, in tokens, those of the prompt included."""
    min_length: int = 5
    """Shortest caption, likewise."""
    repetition_penalty: float | None = None
    """Above 1, words that are there become less likely; None: the model's own."""
    length_penalty: float | None = None
    """Scores of beams are divided by the length to this power; None: the model's own."""
    prompt: str | None = None
    """What captions begin with, which is no part of them; None: the model's own."""

    def problems(self) -> list[str]:
        """Settings that make no sense."""
        found = self._at_least(0, "num", "top_k", "min_length") + self._at_least(1, "num_beams", "max_length")
        found += self._within(1e-6, 1.0, "top_p") + self._at_least(1e-6, "temperature", "repetition_penalty")
        if self.min_length > self.max_length:
            found.append(f"min_length: {self.min_length} is above max_length ({self.max_length})")
        if not self.use_nucleus_sampling and self.num > self.num_beams:
            found.append(
                f"num: {self.num}, but num_beams {self.num_beams} ends in no more captions than that"
            )
        return super().problems() + found

    def generation(self, seed: int) -> dict[str, Any]:
        """Arguments of the captioner's `generate`; what is left to the model is not among them."""
        given: dict[str, Any] = {
            "num_captions": self.num,
            "max_length": self.max_length,
            "min_length": self.min_length,
            "repetition_penalty": self.repetition_penalty,
            "length_penalty": self.length_penalty,
        }
        if self.use_nucleus_sampling:
            given |= {"use_nucleus_sampling": True, "top_p": self.top_p, "top_k": self.top_k}
            given |= {"temperature": self.temperature, "seed": seed}
        else:
            given["num_beams"] = self.num_beams
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class KeepConfig(Section):
    """Which texts are kept: those that fulfil all of it. BLIP keeps what the ITM head calls a match."""

    section: ClassVar[str] = "run.keep"

    itm: float | None = 0.5
    """Least probability of a match, of the ITM head; 0.5 is BLIP's rule."""
    itc: float | None = None
    """Least cosine of picture and text, as ITC compares them."""
    itm_quantile: float | None = None
    """Drop this share of the texts, the least probable ones; of web and synthetic texts separately, of all
    datasets together."""
    itc_quantile: float | None = None
    """The same by cosine."""
    best: int | None = None
    """Then keep the best so many of each picture, best first (BLIP-2: two of eleven, by cosine)."""
    best_by: Literal["itm", "itc"] = "itm"
    """What the best ones are by."""

    def problems(self) -> list[str]:
        """Thresholds out of range."""
        found = self._within(0.0, 1.0, "itm", "itm_quantile", "itc_quantile") + self._within(-1.0, 1.0, "itc")
        return super().problems() + found + self._at_least(1, "best")

    @property
    def needs_scores(self) -> bool:
        """Whether anything is asked of a filter."""
        rules = (self.itm, self.itc, self.itm_quantile, self.itc_quantile, self.best)
        return any(rule is not None for rule in rules)


@dataclass
class CapFiltRun(CommandRun):
    """Run keys of CapFilt (BLIP, section 3.3)."""

    captioner: ExpertConfig = field(default_factory=ExpertConfig)
    """What writes captions."""
    filter: ExpertConfig = field(default_factory=ExpertConfig)
    """What judges texts."""
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    """How captions are written."""
    keep: KeepConfig = field(default_factory=KeepConfig)
    """Which texts stay."""
    web_texts: bool = True
    """Judge the texts that the pictures come with; false: leave them all out."""
    human: list[str] = field(default_factory=list)
    """Datasets whose texts people wrote: they stay as they are and join what is trained on next."""
    pretrain: ExpertConfig = field(default_factory=ExpertConfig)
    """The recipe of pre-training for the bootstrapped data: `train.yaml` is made of it, and further rounds
    begin with it."""
    rounds: int = 1
    """Rounds of bootstrapping: a further one pre-trains anew on what the one before has kept, and fine-tunes
    captioner and filter from that."""
    part_size: int = 1024
    """Pictures that are a unit of work, where they do not lie in shards, each of which is one."""

    def problems(self) -> list[str]:
        """What does not go together."""
        found = super().problems() + self._at_least(1, "rounds", "part_size")
        if self.resume not in (None, "auto"):
            found.append(f"resume: {self.resume!r}; give auto, which goes on with run.output_dir")
        if not self.captions.num and not self.keep.needs_scores:
            found.append("captions.num: 0, and run.keep asks for nothing either, so nothing would change")
        if not self.captions.num and not self.web_texts:
            found.append("web_texts: false, and run.captions.num is 0, so there would be no text at all")
        for name, wanted in (("captioner", bool(self.captions.num)), ("filter", self.keep.needs_scores)):
            found += self._expert_problems(name, wanted)
        if self.pretrain.given:
            found.append("pretrain: it is trained, by a recipe; weights are named in model.init_from")
        if self.rounds > 1:
            found += self._round_problems()
        return found

    def _expert_problems(self, name: str, wanted: bool) -> list[str]:
        expert: ExpertConfig = getattr(self, name)
        if expert.options and expert.recipe is None:
            return [f"{name}.options: they change a recipe, and there is none"]
        if wanted and expert.recipe is None and not expert.given:
            return [f"{name}.checkpoint: nothing says what to use; give weights, or a recipe to fine-tune by"]
        return []

    def _round_problems(self) -> list[str]:
        if self.pretrain.recipe is None:
            return [f"pretrain.recipe: {self.rounds} rounds need one"]
        tuned = [expert for expert in (self.captioner, self.filter) if expert.tuned_by is not None]
        if not tuned:
            return [
                f"rounds: {self.rounds}, but captioner and filter are given weights, so a further round would"
                " be the same; give recipes to fine-tune by"
            ]
        return []


@TASKS.register("capfilt")
class CapFilt:
    """Captioning and filtering of web data, which `blip capfilt` carries out."""

    run_config_class = CapFiltRun
    model_config_class = StartConfig
    command: ClassVar[str] = "capfilt"
