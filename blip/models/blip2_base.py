"""What BLIP-2's models have in common: a vision tower, its last norm, and a Q-Former that looks at it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layers.attention import ImageKeys
from blip.models.base import BlipModel
from blip.models.bert_init import load_bert
from blip.models.blip2_config import Blip2Config
from blip.models.qformer import QFormer
from blip.models.vision import VisionTower


class Blip2Base(BlipModel):
    """Tower, `ln_vision` and Q-Former.

    Args:
        config: sizes.
        data_root: where the tokenizer may lie; None: the environment variable BLIP_DATA, else `data`.
        with_text: whether the Q-Former reads text, too.
    """

    freezable: ClassVar[tuple[str, ...]] = ("vision.",)
    on_cpu: ClassVar = {"vit_precision": "fp32"}

    def __init__(
        self, config: Blip2Config, data_root: str | Path | None = None, with_text: bool = False
    ) -> None:
        super().__init__(config, data_root)
        self.vision = VisionTower(config.tower())
        self.ln_vision = nn.LayerNorm(self.vision.width, eps=config.ln_vision_eps)
        self.qformer = QFormer(
            config.qformer,
            config.num_query_token,
            self.vision.width,
            self.word_rows if with_text else None,
            config.cross_attention_freq,
            config.dropout,
        )

    @classmethod
    def build(cls, config: Any, data_root: str | Path | None = None) -> Self:
        """A model with random weights; tokenizers and the language model's sizes may be read from files."""
        return cls(config, data_root)

    def image_keys(self, states: Tensor) -> ImageKeys:
        """Keys and values of tower states (B, P, D_image) after `ln_vision`, whose norm is in float32."""
        norm = self.ln_vision
        plain = F.layer_norm(states.to(norm.weight.dtype), norm.normalized_shape, eps=norm.eps)
        device = plain.device.type
        if torch.is_autocast_enabled(device):  # once here, not in (and kept for) every projection
            plain = plain.to(torch.get_autocast_dtype(device))
        return self.qformer.image_keys(plain, norm)

    def normed(self, states: Tensor) -> Tensor:
        """`ln_vision` in float32, whatever the tower's precision. (B, P, D_image) -> same."""
        norm = self.ln_vision
        return F.layer_norm(
            states.to(norm.weight.dtype), norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )

    # Freezing, checkpoints, optimizer

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load the tower from `vit_init_from` and the Q-Former from `qformer.init_from`."""
        report = self.vision.load_initial(data_root)
        bert = self.config.qformer.init_from
        if bert and self.qformer.blocks()[0].text_ffn is not None:
            head = getattr(self, "lm_head", None)
            report.append(load_bert(self.qformer.bert_parts(), head, bert, data_root))
            self.qformer.copy_text_ffn()
            if self.config.qformer.query_init == "words":
                self.qformer.begin_as_words()
        return report

    def load_frozen(self, prefixes: Collection[str], data_root: str | Path | None = None) -> list[str]:
        """Load the tower from `vit_init_from`, if it is wanted."""
        return self.vision.load_initial(data_root) if "vision." in prefixes else []

    def frozen_parts(self) -> dict[str, str]:
        """A tower that was loaded from elsewhere and never trained here: it can be fetched again."""
        never_trained = self.config.freeze_vit and self.config.vit_train_steps == 0
        source = self.vision.loaded_from
        return {"vision.": source} if never_trained and source else {}
