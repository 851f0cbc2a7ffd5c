"""Sizes and switches that BLIP's models have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from blip.config.schema import ModelConfig
from blip.models.med import MedConfig
from blip.models.vision import RecomputeMode, VisionConfig

TOWERS = {"base": "vit_base", "large": "vit_large"}
"""LAVIS's `vit_type` -> vision tower."""

BESIDE = {
    "vit_model": "vit_type",
    "image_size": "image_size",
    "drop_path_rate": "vit_drop_path_rate",
    "init_from": "vit_init_from",
}
"""Keys of the tower's section -> the model's keys, which decide in their place."""


@dataclass
class BlipConfig(ModelConfig):
    """Vision tower and text transformer of a BLIP model; names and defaults are LAVIS's."""

    vit_type: str = "base"
    """Vision tower: base or large (BLIP's ViT-B/16 and ViT-L/16), or a tower's own name: vit_base, vit_large,
    eva_clip_g, clip_L, timm/<name of a timm ViT>."""
    image_size: int = 224
    """Side of the input, in pixels."""
    vit_drop_path_rate: float = 0.0
    """Drop path of the tower's last block; grows linearly from 0."""
    vit_grad_ckpt: bool = False
    """Recompute activations of the last `vit_ckpt_layer` blocks of the tower in the backward pass."""
    vit_ckpt_layer: int = 0
    """How many blocks that is."""
    vit_init_from: str | None = None
    """Weights of the tower: a safetensors or .pth file (as given, else below the data root), or timm/<name>
    for timm's pretrained ones; null = random."""
    vit: VisionConfig = field(default_factory=lambda: VisionConfig(vit_model="vit_base"))
    """Sizes of the tower that differ from the named one's."""
    med: MedConfig = field(default_factory=MedConfig)
    """Sizes of the text transformer."""
    max_txt_len: int = 35
    """Longest text, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    tokenizer: str = "bert-base-uncased"
    """`scenes` (embedded), a vocab.txt or a folder (as given, else below the data root), or a Hugging Face
    name."""
    vocab_size: int | None = None
    """Rows of the word embeddings; null = what the tokenizer has. [DEC] and [ENC] are the tokenizer's; where
    none is read, since texts are given as ids, the last two rows."""
    dropout: float = 0.1
    """Dropout of the text transformer."""

    def problems(self) -> list[str]:
        """Sizes that cannot be built, and switches that contradict each other."""
        found = super().problems() + self._at_least(1, "image_size") + self._at_least(3, "max_txt_len")
        found += self._at_least(0, "vit_ckpt_layer") + self._at_least(3, "vocab_size")
        found += self._within(0, 0.9, "dropout", "vit_drop_path_rate")
        if self.max_txt_len > self.med.max_positions:
            most = self.med.max_positions
            found.append(f"max_txt_len: {self.max_txt_len} exceeds med.max_positions, which is {most}")
        if self.vit_grad_ckpt and self.vit.checkpoint != "none":
            found.append("vit_grad_ckpt: vit.checkpoint says it already; set one of them")
        found += self.vit.overruled(BESIDE, VisionConfig(vit_model="vit_base"))
        return found or [p.replace("vit_model:", "vit_type:") for p in self.tower().size_problems()]

    def tower(self) -> VisionConfig:
        """The tower's own section, with the switches that stand beside it."""
        values = {key: getattr(self, ours) for key, ours in BESIDE.items()}
        values["vit_model"] = TOWERS.get(self.vit_type, self.vit_type)
        return replace(self.vit, **values)

    def recompute(self) -> tuple[RecomputeMode, int | None]:
        """LAVIS's `vit_grad_ckpt` and `vit_ckpt_layer`, else what `vit` says."""
        if self.vit_grad_ckpt:
            return "torch", self.vit_ckpt_layer
        return self.vit.checkpoint, self.vit.checkpoint_last


@dataclass
class WritingConfig(BlipConfig):
    """A decoder that writes."""

    label_smoothing: float = 0.1
    """Of the loss, and of the scores of candidates, as in BLIP."""
    beam_lengths: Literal["whole", "new"] = "whole"
    """What the scores of beams are divided by, to the power of the length penalty: the tokens of the `whole`
    text, with its prompt and without its end, as when BLIP and LAVIS were written, or the `new` ones, the
    end included, as in Hugging Face's models today."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        return super().problems() + self._within(0, 0.9, "label_smoothing")


@dataclass
class MomentumConfig(BlipConfig):
    """Contrastive learning with a momentum twin."""

    embed_dim: int = 256
    """Width of the contrastive space (E)."""
    queue_size: int = 57600
    """Pairs of features that the queue keeps (K)."""
    momentum: float = 0.995
    """The twin keeps this share of itself at each step."""
    twin_dropout: bool = True
    """Dropout and drop path also act in the twin while training, as in BLIP; false: its opinion and what it
    puts into the queue are free of that noise."""
    alpha: float = 0.4
    """Share of the twin's opinion in the ITC targets, after a linear ramp from 0."""
    alpha_ramp_epochs: float = 2.0
    """Length of that ramp, in epochs."""
    temp: float = 0.07
    """Initial temperature of the ITC loss (learned)."""
    min_temp: float = 0.001
    """The learned temperature is kept at or above this."""
    max_temp: float = 0.5
    """The learned temperature is kept at or below this."""
    itc_all_rank: bool = False
    """Contrast with the current batch of all ranks; BLIP: of the own rank, and the queue."""
    negative_all_rank: bool = False
    """Draw the hard negatives of the ITM loss from all ranks; otherwise from the own one."""
    hard_negatives: bool = True
    """Draw the negatives of the ITM loss by their similarity (section 3.2); false: all equally often."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        found = super().problems() + self._at_least(1, "embed_dim") + self._at_least(0, "queue_size")
        found += self._within(0, 1, "momentum", "alpha") + self._at_least(0, "alpha_ramp_epochs")
        if not 0 < self.min_temp <= self.temp <= self.max_temp:
            found.append(
                f"temp: {self.temp} is not between min_temp ({self.min_temp}) and max_temp ({self.max_temp})"
            )
        return found
