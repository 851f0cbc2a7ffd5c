"""Captioning: one caption per picture, scored with the COCO caption metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from blip import dist
from blip.batch import EvalContext, to_device
from blip.errors import ConfigError, hint
from blip.metrics.caption import JAVA_SCORES, caption_scores, score_names, unavailable
from blip.registry import TASKS
from blip.tasks.base import EvalData, Evaluation, Prediction, Task, WritingRun
from blip.tasks.submissions import captions
from blip.together import on_main

log = logging.getLogger(__name__)

DOMAINS = ("in", "near", "out")
"""NoCaps's: pictures of things that COCO names only, some of them, and none."""
BY_DOMAIN = ("CIDEr", "SPICE")
"""Metrics that are computed for each of them."""


class CaptionData(EvalData, Protocol):
    """Pictures and what people wrote about them.

    A dataset of several domains also has `domain(index)`: the one of a picture, such as `near`, or None. A
    dataset that knows what is in its pictures also has `judge(index, caption)`: None, or how many of a
    caption's statements are `right` of those `stated`, and whether it is right as a `whole` (0 or 1).
    """

    def image_id(self, index: int) -> int | str:
        """The annotation's own name of a picture."""
        ...

    def references(self, index: int) -> list[str]:
        """What people wrote about a picture, as it stands in the annotations; may be empty."""
        ...


@dataclass
class CaptioningRun(WritingRun):
    """Run keys of captioning."""

    use_nucleus_sampling: bool = False
    """Draw the words, with `top_p`, `top_k` and `temperature`, instead of following beams."""
    top_p: float = 0.9
    """Draw among the fewest tokens that have this probability together."""
    top_k: int = 50
    """Draw among so many most likely tokens; 0 = all."""
    temperature: float = 1.0
    """Logits are divided by it before drawing."""
    repetition_penalty: float | None = None
    """Above 1, words that are there become less likely; None: the model's own. LAVIS's task had 1.15."""
    length_penalty: float | None = None
    """Scores of beams are divided by the length to this power; None: the model's own. LAVIS's task had 0."""
    report_metric: bool = True
    """Score the captions, where there is something to compare them with."""
    java_metrics: list[str] | None = None
    """Which of METEOR and SPICE to compute; None: those that this machine can. METEOR takes some 20 s."""
    img_ids: list[int] = field(default_factory=list)
    """Keep and score the captions of these images only; empty: of all."""

    def problems(self) -> list[str]:
        """Settings of generation that make no sense."""
        found = super().problems() + self._at_least(0, "top_k") + self._within(1e-6, 1.0, "top_p")
        found += self._at_least(1e-6, "temperature", "repetition_penalty")
        found += [
            f"java_metrics: there is no {name!r}{hint(name, JAVA_SCORES)}"
            for name in self.java_metrics or ()
            if name not in JAVA_SCORES
        ]
        return found

    def generation(self) -> dict[str, Any]:
        """Arguments of the model's `generate`; what is left to the model is not among them."""
        given: dict[str, Any] = {
            "max_length": self.max_len,
            "min_length": self.min_len,
            "repetition_penalty": self.repetition_penalty,
            "length_penalty": self.length_penalty,
        }
        if self.use_nucleus_sampling:
            given |= {"use_nucleus_sampling": True, "top_p": self.top_p, "top_k": self.top_k}
            given |= {"temperature": self.temperature, "seed": self.seed}
        else:
            given["num_beams"] = self.num_beams
        return {name: value for name, value in given.items() if value is not None}


@TASKS.register("captioning")
class Captioning(Task):
    """`Bleu_1` to `Bleu_4`, `METEOR`, `ROUGE_L`, `CIDEr` and `SPICE`, with pycocoevalcap's scale.

    `agg_metrics`, CIDEr + BLEU-4, decides the best checkpoint, as in BLIP and LAVIS. Where the dataset knows
    what is in its pictures: `attr_acc`, the percentage of captions' statements that are right, and
    `caption_acc`, that of captions that are right as a whole.

    Of NoCaps, `CIDEr_in`, `SPICE_near`, ... of each domain. As on its server a domain is a corpus of its own,
    so that CIDEr weighs words by how rare they are in that domain.
    """

    run_config_class = CaptioningRun
    needs = ("generate",)
    monitor: ClassVar[str] = "agg_metrics"
    data_kind: ClassVar[str] = "caption"

    def check(self, model: Any) -> None:
        """Also says which metrics this machine cannot compute, before anything is trained.

        Raises:
            ConfigError: a method is missing, or a metric that `run.java_metrics` names.
        """
        super().check(model)
        if not self.config.report_metric:
            return
        absent = unavailable()
        for name in self.config.java_metrics or ():
            if name in absent:
                raise ConfigError(
                    f"run.java_metrics: {name} is not available: {absent[name]}; or leave it out"
                )
        if self.config.java_metrics is None and dist.is_main():
            for name, reason in absent.items():
                log.info("%s will not be computed: %s", name, reason)

    def scores(self, data: CaptionData | None = None) -> list[str]:
        """Those that need references, and those that need a judge, as far as `data` has them."""
        if not self.config.report_metric:
            return []
        wanted = self.config.java_metrics
        skip = unavailable() if wanted is None else set(JAVA_SCORES) - set(wanted)
        written = [] if data is None else [i for i in range(len(data)) if data.references(i)]
        found = [*score_names(skip), "agg_metrics"] if data is None or written else []
        domains = DOMAINS if data is None else sorted(_domains(data, written))
        found += [f"{name}_{part}" for part in domains for name in BY_DOMAIN if name in found]
        return found + (["attr_acc", "caption_acc"] if data is None or _judged(data) else [])

    def submission(self, data: CaptionData, predictions: Sequence[Prediction]) -> list[dict[str, Any]] | None:
        """COCO's and NoCaps's `[{image_id, caption}]`, where captions are not scored here."""
        if self.config.report_metric and all(p["truth"] for p in predictions):
            return None
        return captions(data, predictions)

    def evaluate(self, model: Any, data: CaptionData, context: EvalContext) -> Evaluation:
        """What the model writes about every picture of this rank's share."""
        generation = self.config.generation()
        kept = set(self.config.img_ids)
        predictions: list[Prediction] = []
        for batch in data.batches():
            samples = to_device(dict(batch), context.device)
            samples["source"] = data.name  # with `index` it names the random numbers of a picture
            with context.autocast():
                captions = model.generate(samples, **generation)
            for index, caption in zip(batch["index"].tolist(), captions, strict=True):
                if not kept or data.image_id(index) in kept:
                    predictions.append(_prediction(data, index, caption))
        return Evaluation(predictions, lambda: self._metrics(data, predictions))

    def _metrics(self, data: CaptionData, predictions: list[Prediction]) -> dict[str, float]:
        """Scores of all ranks' captions; rank 0 computes them, since CIDEr looks at the whole corpus."""
        if not self.config.report_metric:
            return {}
        own: list[tuple[Any, ...]] = [
            (p["index"], p["caption"], p.get("stated_right"), p.get("stated"), p.get("right"))
            for p in predictions
        ]
        every = dist.gather_lists(own)
        found = on_main(lambda: self._score(data, {index: caption for index, caption, *_ in every}))
        judged = [row for row in every if row[3] is not None]
        if judged:
            found["attr_acc"] = 100.0 * sum(row[2] for row in judged) / max(sum(row[3] for row in judged), 1)
            found["caption_acc"] = 100.0 * sum(row[4] for row in judged) / len(judged)
        return found

    def _score(self, data: CaptionData, captions: dict[int, str]) -> dict[str, float]:
        """Metrics of the pictures that people wrote about."""
        references = {index: data.references(index) for index in sorted(captions)}
        scored = [index for index, texts in references.items() if texts]
        if not scored:
            return {}
        if len(scored) < len(captions):
            log.warning("%s: %d of %d pictures have references", data.name, len(scored), len(captions))
        found = caption_scores(
            [captions[index] for index in scored],
            [references[index] for index in scored],
            self.config.java_metrics,
        )
        found["agg_metrics"] = found["CIDEr"] + found["Bleu_4"]
        for domain, members in sorted(_domains(data, scored).items()):
            own = caption_scores(
                [captions[index] for index in members],
                [references[index] for index in members],
                ["SPICE"] if "SPICE" in found else [],
            )
            found |= {f"{name}_{domain}": own[name] for name in BY_DOMAIN if name in own}
        return found


def _domains(data: CaptionData, indices: Iterable[int]) -> dict[str, list[int]]:
    """The pictures of each domain, by their numbers; empty for a dataset without domains."""
    domain_of = getattr(data, "domain", lambda index: None)
    found: dict[str, list[int]] = {}
    for index in indices:
        if (domain := domain_of(index)) is not None:
            found.setdefault(domain, []).append(index)
    return found


def _judged(data: CaptionData) -> bool:
    """Whether it is known what is in any of the pictures."""
    judge = getattr(data, "judge", None)
    return judge is not None and any(judge(i, "") is not None for i in range(len(data)))


def _prediction(data: CaptionData, index: int, caption: str) -> Prediction:
    found: Prediction = {
        "index": index,
        "instance_id": data.instance_id(index),
        "image_id": data.image_id(index),
        "image": data.picture(index),
        "caption": caption,
        "truth": data.references(index),
    }
    judge = getattr(data, "judge", None)
    verdict = judge(index, caption) if judge is not None else None
    if verdict is not None:
        found |= {"stated": int(verdict["stated"]), "stated_right": int(verdict["right"])}
        found["right"] = bool(verdict["whole"])
    return found
