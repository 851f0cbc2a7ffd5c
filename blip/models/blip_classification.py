"""BLIP for classification: of an image with a text, and of two images with a text (NLVR2, section 5.5)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.batch import Output
from blip.layers.momentum import MomentumTwin
from blip.losses import at_least_float32, soft_targets
from blip.models.blip_base import BlipBase, ramp
from blip.models.blip_config import BlipConfig
from blip.models.med import Med
from blip.models.published import starts_of, weights_of
from blip.models.vision import VisionTower
from blip.registry import MODELS


def _head(width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))


@dataclass
class BlipClassificationConfig(BlipConfig):
    """Sizes and switches of BLIP for classification."""

    num_classes: int = 3
    """Classes."""
    max_txt_len: int = 40
    """Longest text, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    text_token: Literal["enc", "cls"] = "cls"
    """First token of a text: [CLS], as LAVIS leaves it, or [ENC], as in pre-training and for NLVR2."""
    use_distill: bool = True
    """Mix the targets with the opinion of a momentum twin."""
    momentum: float = 0.995
    """The twin keeps this share of itself at each step."""
    twin_dropout: bool = True
    """Dropout and drop path also act in the twin while training, as in LAVIS."""
    alpha: float = 0.4
    """Share of the twin's opinion in the targets, after a linear ramp from 0 over the first epoch."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        found = super().problems() + self._at_least(2, "num_classes")
        return found + self._within(0, 1, "momentum", "alpha")


@MODELS.register("blip_classification")
class BlipClassification(BlipBase):
    """A tower, a text encoder that looks at the image, and a head; with a momentum twin where it distils.

    Shape:
        batch: `image` (B, 3, H, W), `text_input` (or `text_ids`, `text_mask`), `label` int64 (B,).
        returns: `loss`, `acc`; `logits` (B, C), detached.
    """

    config_class: ClassVar[type[BlipClassificationConfig]] = BlipClassificationConfig
    presets: ClassVar = {"base": {"image_size": 384}}
    published: ClassVar = weights_of("blip_classification")
    starts: ClassVar = starts_of("blip_classification")
    replaceable = ("twin.",)
    num_images: ClassVar[Any] = 1

    def __init__(self, config: BlipClassificationConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.cls_head = _head(config.med.width, config.num_classes)
        self.twin: MomentumTwin | None = None
        if config.use_distill:
            tower, head = VisionTower(config.tower()), _head(config.med.width, config.num_classes)
            parts = {"vision": tower, "text": self._text(), "cls_head": head}
            self.twin = MomentumTwin(parts, config.twin_dropout)
            self.twin.copy_from(self)

    def _text(self) -> Med:
        return self._med(self.vision.width, num_images=self.num_images)

    def forward(self, batch: dict[str, Any], is_train: bool = True) -> Output:
        """The loss; with `is_train=False`, LAVIS's way to ask for `predict`."""
        if not is_train:
            return self.predict(batch)
        batch = self.with_text(batch)
        logits, labels = self.logits(batch), batch["label"]
        hard = F.one_hot(labels, self.config.num_classes).to(logits.dtype)
        target = hard
        if self.twin is not None:
            target = soft_targets(self.twin_logits(batch), hard, self.alpha(batch))
        loss = F.cross_entropy(logits, target, reduction="sum") / batch.get("loss_rows", max(len(labels), 1))
        right = (logits.detach().argmax(dim=1) == labels).float().mean()
        return Output(loss=loss, acc=right, logits=logits.detach())

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """(B, C)."""
        return self._judge(batch, self.vision, self.text, self.cls_head)

    @torch.no_grad()
    def twin_logits(self, batch: dict[str, Any]) -> Tensor:
        """The twin's, (B, C)."""
        twin: Any = self.twin
        return self._judge(batch, twin["vision"], twin["text"], twin["cls_head"])

    def _judge(self, batch: dict[str, Any], vision: nn.Module, text: Med, head: nn.Module) -> Tensor:
        states = self.image_states(batch, vision)
        images = [(text.image_keys(states), 1)]
        as_is = self.config.text_token == "cls"
        found = text.grounded(batch["text_ids"], batch["text_mask"], images, first_only=True, as_is=as_is)
        return at_least_float32(head(found[:, 0]))

    def alpha(self, batch: dict[str, Any]) -> float:
        """Share of the twin's opinion at this step."""
        return ramp(batch, self.config.alpha, epochs=1.0)

    def predict(self, samples: dict[str, Any]) -> Output:
        """`predictions` (B, C), logits; `targets` (B,), where the samples have labels."""
        samples = self.with_text(samples)
        found = Output(predictions=self.logits(samples))
        if "label" in samples:
            found["targets"] = samples["label"]
        return found

    def count_targets(self, batch: dict[str, Any]) -> int:
        """No token is a target here."""
        return 0

    def after_step(self, outputs: Sequence[Output]) -> None:
        """The twin follows."""
        if self.twin is not None:
            self.twin.follow(self, self.config.momentum)

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load tower and text transformer; the twin starts as their copy."""
        report = super().load_parts(data_root)
        if self.twin is not None:
            self.twin.copy_from(self)
        return report

    def replace(self, names: Collection[str]) -> list[str]:
        """The twin starts as a copy where weights lack it."""
        if self.twin is None or not names:
            return []
        self.twin.copy_from(self, {name.removeprefix("twin.") for name in names})
        return [f"momentum twin: {len(names)} tensors copied from the model"]


@dataclass
class BlipNlvrConfig(BlipClassificationConfig):
    """Sizes and switches of BLIP for NLVR2."""

    num_classes: int = 2
    """Classes."""
    text_token: Literal["enc", "cls"] = "enc"
    """First token of a sentence."""
    max_txt_len: int = 512
    """Longest sentence, in tokens, [CLS] and [SEP] included: NLVR2's are not cut."""
    use_distill: bool = False
    """Mix the targets with the opinion of a momentum twin."""
    merge_from: int | None = None
    """First layer that joins what is seen of the two images by a matrix; those before it average. null:
    half-way, which is BLIP's 6. LAVIS has 6 whatever the depth: none where there are fewer layers."""
    merge_init: Literal["random", "mean"] = "random"
    """How the matrices that join what is seen of the two images start: random, as in BLIP, or averaging, with
    which a pre-trained text transformer begins with what it has learned."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        return super().problems() + self._at_least(0, "merge_from")


@MODELS.register("blip_nlvr")
class BlipNlvr(BlipClassification):
    """A sentence about two images; each has a cross-attention of its own.

    Shape:
        batch: `image0`, `image1` (B, 3, H, W), or `image0_embeds`, `image1_embeds` (B, P, D_image) of a
            frozen tower; `text_input` (or `text_ids`, `text_mask`), `label` int64 (B,).
        returns: as `BlipClassification`.
    """

    config_class = BlipNlvrConfig
    config: BlipNlvrConfig
    presets: ClassVar = {"nlvr": {"image_size": 384}}
    published: ClassVar = weights_of("blip_nlvr")
    starts: ClassVar = starts_of("blip_nlvr")
    num_images = 2

    def _text(self) -> Med:
        text = self._med(self.vision.width, num_images=2, merge_from=self.config.merge_from)
        if self.config.merge_init == "mean":
            for layer in text.blocks():
                layer.part("cross_attn", "encode").merge_as_mean()
        return text

    def _judge(self, batch: dict[str, Any], vision: nn.Module, text: Med, head: nn.Module) -> Tensor:
        if "image0_embeds" in batch:
            states = torch.cat([batch["image0_embeds"], batch["image1_embeds"]])
        else:
            states = vision(torch.cat([batch["image0"], batch["image1"]]))
        images = [(text.image_keys(some, which=i), 1) for i, some in enumerate(states.chunk(2))]
        as_is = self.config.text_token == "cls"
        found = text.grounded(batch["text_ids"], batch["text_mask"], images, first_only=True, as_is=as_is)
        return at_least_float32(head(found[:, 0]))
