"""Sizes and switches of BLIP-2: what its models have in common, and those of stage 1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from blip.config.schema import ModelConfig
from blip.errors import hint
from blip.models.llm_config import LLMConfig
from blip.models.llm_presets import sizes_of_llm
from blip.models.qformer import QFormerConfig
from blip.models.vision import RecomputeMode, VisionConfig

OBJECTIVES = ("itc", "itm", "lm")
"""The losses of stage 1, by name."""

BESIDE = {
    "vit_model": "vit_model",
    "image_size": "image_size",
    "drop_path_rate": "drop_path_rate",
    "precision": "vit_precision",
    "freeze": "freeze_vit",
    "train_steps": "vit_train_steps",
    "init_from": "vit_init_from",
}
"""Keys of the tower's section -> the model's keys, which decide in their place."""


@dataclass
class Blip2Config(ModelConfig):
    """Vision tower and Q-Former of a BLIP-2 model; names and defaults are LAVIS's."""

    vit_model: str = "eva_clip_g"
    """Vision tower: eva_clip_g, clip_L, vit_base, vit_large, or timm/<name of a timm ViT>."""
    image_size: int = 224
    """Side of the input, in pixels."""
    drop_path_rate: float = 0.0
    """Drop path of the vision tower's last block; grows linearly from 0."""
    use_grad_checkpoint: bool = False
    """Recompute the tower's activations in the backward pass; `vit.checkpoint` may choose another way than
    torch's."""
    vit_precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Weights of the frozen tower."""
    freeze_vit: bool = True
    """Keep the tower's weights as they are."""
    vit_train_steps: int = 0
    """Optimizer steps for which a tower that is to be frozen is trained first; 0: frozen from the start."""
    vit_init_from: str | None = None
    """Weights of the tower: a safetensors or .pth file (as given, else below the data root), or `timm` for
    timm's pretrained ones; null = random."""
    vit: VisionConfig = field(default_factory=VisionConfig)
    """Sizes of the tower that differ from the named one's."""
    ln_vision_eps: float = 1e-5
    """Epsilon of `ln_vision`, the norm behind the tower; transformers' models have the tower's there."""
    num_query_token: int = 32
    """Learned queries per image (Q)."""
    cross_attention_freq: int = 2
    """Every n-th layer of the Q-Former looks at the image, from the first."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """Sizes of the Q-Former."""
    max_txt_len: int = 32
    """Longest text, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    tokenizer: str = "bert-base-uncased"
    """`scenes` (embedded), a vocab.txt or a folder (as given, else below the data root), or a Hugging Face
    name."""
    vocab_size: int | None = None
    """Rows of the word embeddings; null = what the tokenizer has."""
    dropout: float = 0.1
    """Dropout of the Q-Former."""

    def problems(self) -> list[str]:
        """Sizes that cannot be built, and switches that contradict each other."""
        found = super().problems() + self._at_least(1, "num_query_token", "cross_attention_freq")
        found += self._at_least(1, "image_size", "vocab_size") + self._at_least(3, "max_txt_len")
        found += self._at_least(0, "vit_train_steps") + self._within(0, 0.9, "dropout", "drop_path_rate")
        if self.ln_vision_eps <= 0:
            found.append(f"ln_vision_eps: {self.ln_vision_eps} is not above 0")
        if self.vit_train_steps and not self.freeze_vit:
            found.append(
                "vit_train_steps: only for a tower that is frozen afterwards; set freeze_vit: true, or 0"
            )
        found += self._tower_problems()
        # The named tower's sizes mean something only where the keys they are made of do.
        return found or self.tower().size_problems()

    def _text_problems(self) -> list[str]:
        """Of a Q-Former that reads texts."""
        most = self.qformer.max_positions
        if self.max_txt_len <= most:
            return []
        return [f"max_txt_len: {self.max_txt_len} exceeds qformer.max_positions, which is {most}"]

    def _tower_problems(self) -> list[str]:
        found = self.vit.overruled(BESIDE, VisionConfig())
        if self.vit_precision not in ("fp32", "fp16", "bf16"):
            found.append(
                f"vit_precision: {self.vit_precision!r} is no precision; choose from bf16, fp16, fp32"
            )
        return found

    def tower(self) -> VisionConfig:
        """The tower's own section, with the switches that stand beside it."""
        values = {key: getattr(self, ours) for key, ours in BESIDE.items()}
        if not self.freeze_vit:
            values["precision"] = "fp32"
        return replace(self.vit, **values)

    def recompute(self) -> tuple[RecomputeMode, int | None]:
        """The tower's way, or torch's if `use_grad_checkpoint` asks for it; and the last how many blocks."""
        mode = self.vit.checkpoint
        return ("torch" if mode == "none" and self.use_grad_checkpoint else mode), self.vit.checkpoint_last


@dataclass
class Blip2QformerConfig(Blip2Config):
    """Sizes and switches of BLIP-2 stage 1; names and defaults are LAVIS's."""

    objectives: list[str] = field(default_factory=lambda: list(OBJECTIVES))
    """Losses that are trained: itc, itm, lm (table 6 fine-tunes for retrieval with and without the last)."""
    vit_train_objectives: list[str] = field(default_factory=lambda: list(OBJECTIVES))
    """Losses of the first `vit_train_steps`; then come those of `objectives`."""
    embed_dim: int = 256
    """Width of the contrastive space (E)."""
    label_smoothing: float = 0.1
    """Of the ITC targets and the LM loss."""
    temp: float = 0.07
    """Initial temperature of the ITC loss (learned)."""
    min_temp: float = 0.0
    """The learned temperature is kept at or above this; LAVIS has no bound."""
    image_id_targets: bool = True
    """Use `image_id` where a batch has it: the same picture's texts are positives, never negatives."""
    hard_negatives: bool = True
    """Draw the negatives of the ITM loss by their similarity; false: all equally often."""
    gather_with_grad: bool = True
    """Let ITC gradients flow to the features of other ranks; LAVIS does not."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        found = super().problems() + self._at_least(1, "embed_dim") + self._within(0, 0.9, "label_smoothing")
        if self.temp <= 0:
            found.append(f"temp: {self.temp} is not above 0")
        return found + self._text_problems() + self._objective_problems()

    def _objective_problems(self) -> list[str]:
        for key in ("objectives", "vit_train_objectives"):
            given = getattr(self, key)
            if not given:
                return [f"{key}: empty; name at least one of {', '.join(OBJECTIVES)}"]
            if unknown := [name for name in given if name not in OBJECTIVES]:
                return [f"{key}: unknown objective {name!r}{hint(name, OBJECTIVES)}" for name in unknown]
        if set(given) != set(OBJECTIVES) and not self.vit_train_steps:
            return [f"{key}: only while the tower is trained first; set vit_train_steps, or leave this out"]
        return []


@dataclass
class Blip2LlmConfig(Blip2Config):
    """Sizes and switches of BLIP-2 with a language model; LAVIS's names where it has them."""

    may_read: ClassVar[bool] = False
    """Whether presets name a BERT, in case the Q-Former reads text."""

    llm_model: str | None = None
    """Language model: a folder (as given, else below the data root) or a Hugging Face name; null: `llm.sizes`
    with random weights."""
    load_llm: bool = True
    """Start from the weights of `llm_model`; false: from random ones."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """How it is built and used."""
    prompt: str = ""
    """What a text begins with: put before what is to be generated, and no target in training. With a place
    `{}`: what questions stand in."""
    soft_tokens: Literal["linear", "words"] = "linear"
    """How large soft tokens are before training: `linear`, as torch's linear layer makes them (LAVIS); or
    `words`, as large as the language model's word embeddings, which some read much sooner."""
    qformer_text_input: bool = False
    """Let the Q-Former read the question or instruction beside its queries, too."""
    max_output_txt_len: int | None = None
    """Longest text to be learned where it continues another, in tokens; longer ones are cut; null:
    `max_txt_len`."""
    beam_lengths: Literal["start", "new"] = "start"
    """What the scores of beams are divided by, to the power of the length penalty: `start`, the new tokens
    and what a decoder starts with, without the end, as in the transformers that LAVIS runs; `new`, the new
    tokens, the end included, as in today's."""
    apply_lemmatizer: bool = False
    """Reduce nouns and verbs of answers to their lemmas, by spaCy, which has to be installed besides."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        found = super().problems() + self._at_least(1, "max_output_txt_len")
        if self.qformer_text_input:
            found += self._text_problems()
        elif self.qformer.init_from and not self.may_read:
            found.append(
                "qformer.init_from: a BERT starts a Q-Former that reads text, and this one reads none; start"
                " from stage 1 with model.init_from, or set qformer_text_input"
            )
        return found

    def language_model(self) -> LLMConfig:
        """The section of the language model, with the sizes that are known by its name."""
        return replace(self.llm, sizes=sizes_of_llm(self.llm_model, self.llm.sizes))
