"""BLIP as it is used without training: features of images, texts and pairs, and whether a pair matches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.batch import Output
from blip.errors import UsageError, hint
from blip.layers.attention import ImageKeys
from blip.losses import at_least_float32
from blip.models.base import BlipModel
from blip.models.blip_config import BlipConfig
from blip.models.med import Med
from blip.models.tokenizer import DEC, ENC
from blip.models.vision import VisionTower
from blip.registry import MODELS

MODES = ("image", "text", "multimodal")
HEADS = ("itm", "itc")


@dataclass
class BlipFeaturesConfig(BlipConfig):
    """Sizes of BLIP's encoders and projections."""

    embed_dim: int = 256
    """Width of the contrastive space (E)."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        return super().problems() + self._at_least(1, "embed_dim")


@MODELS.register("blip_feature_extractor")
class BlipFeatureExtractor(BlipModel):
    """A tower, a text encoder and the projections of both into the contrastive space."""

    config_class: ClassVar[type[BlipFeaturesConfig]] = BlipFeaturesConfig
    presets: ClassVar = {"base": {"image_size": 224}}
    added_tokens = (DEC, ENC)

    def __init__(self, config: BlipFeaturesConfig) -> None:
        super().__init__(config)
        self.vision = VisionTower(config.tower())
        vocab_size = config.vocab_size or self.word_pieces.vocab_size
        self.text = Med(config.med, vocab_size, self.vision.width, config.dropout)
        self.vision_proj = nn.Linear(self.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.med.width, config.embed_dim)
        self.add_head()

    def add_head(self) -> None:
        """The temperature of the contrastive loss, for similarities as probabilities."""
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, samples: dict[str, Any]) -> Any:
        """Features of pairs, as `extract_features` gives them."""
        return self.extract_features(samples)

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Features of images, texts or pairs, as LAVIS names them; token 0 stands for the whole.

        Args:
            samples: `image` and/or `text_input` (or `text_ids`, `text_mask`).
            mode: `image`: `image_embeds` (B, P, D_image), `image_embeds_proj` (B, P, E) unit norm; `text`:
                `text_embeds` (B, T, D), `text_embeds_proj` (B, T, E) unit norm; `multimodal`:
                `multimodal_embeds` (B, T, D), of texts that look at their images.

        Raises:
            UsageError: unknown mode.
        """
        if mode not in MODES:
            raise UsageError(f"extract_features: unknown mode {mode!r}{hint(mode, MODES)}")
        if mode == "image":
            states = self.image_states(samples)
            return Output(image_embeds=states, image_embeds_proj=_unit(self.vision_proj(states)))
        samples = self.with_text(samples, self.config.med.max_positions)
        ids, mask = samples["text_ids"], samples["text_mask"]
        if mode == "text":
            states = self.text.unimodal(ids, mask)
            return Output(text_embeds=states, text_embeds_proj=_unit(self.text_proj(states)))
        images = [(self.text.image_keys(self.image_states(samples)), 1)]
        return Output(multimodal_embeds=self.text.grounded(ids, mask, images))

    def blocks(self) -> list[nn.Module]:
        """The tower's blocks and the text encoder's layers."""
        return [*self.vision.blocks(), *self.text.blocks()]


@dataclass
class BlipMatchingConfig(BlipFeaturesConfig):
    """Sizes and switches of BLIP for image-text matching."""

    image_size: int = 384
    """Side of the input, in pixels."""
    itm_token: Literal["enc", "cls"] = "enc"
    """First token of a text whose match is judged: [ENC], as in training, or [CLS], as the original code and
    Hugging Face leave it at inference."""


@MODELS.register("blip_image_text_matching")
class BlipImageTextMatching(BlipFeatureExtractor):
    """A judge of pairs.

    Shape:
        samples: `image` and `text_input` (or `text_ids`, `text_mask`).
        returns: `match_head="itm"`: (B, 2) logits of aligned pairs, class 1 = they match; `"itc"`: (images,
            texts) cosines.
    """

    config_class = BlipMatchingConfig
    presets: ClassVar = {
        "base": {"image_size": 384},
        "large": {"image_size": 384, "vit_type": "large", "vit_drop_path_rate": 0.1},
    }

    def add_head(self) -> None:
        """The matching head."""
        self.itm_head = nn.Linear(self.config.med.width, 2)

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Any:
        """Logits or cosines.

        Raises:
            UsageError: unknown head.
        """
        if match_head not in HEADS:
            raise UsageError(f"match_head: unknown head {match_head!r}{hint(match_head, HEADS)}")
        samples = self.with_text(samples)
        ids, mask = samples["text_ids"], samples["text_mask"]
        states = self.image_states(samples)
        if match_head == "itm":
            return self.itm_logits([(self.text.image_keys(states), 1)], ids, mask)
        text = self.text.unimodal(ids, mask, first_only=True)
        return _unit(self.vision_proj(states[:, 0])) @ _unit(self.text_proj(text[:, 0])).T

    def compute_itm(self, image_inputs: Tensor, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        """(B,) raw matching logits of aligned pairs.

        Args:
            image_inputs: (B, P, D_image), the tower's states.
            text_ids: int64 (B, T).
            text_atts: bool or 0/1 (B, T).
        """
        images = [(self.text.image_keys(image_inputs), 1)]
        return self.itm_logits(images, text_ids, text_atts.bool())[:, 1]

    def itm_logits(self, images: list[tuple[ImageKeys, int]], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(R, 2): the head on the first token of texts that look at images."""
        first = None if self.config.itm_token == "enc" else int(self.word_pieces.cls_id)
        states = self.text.grounded(text_ids, text_mask, images, first_only=True, first_id=first)
        return self.itm_head(states[:, 0])


def _unit(states: Tensor) -> Tensor:
    return F.normalize(at_least_float32(states), dim=-1)
