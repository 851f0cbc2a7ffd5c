"""BLIP as it is used without training: features of images, texts and pairs, and whether a pair matches.

Both can be evaluated as retrieval, the former by similarity alone (`run.k_test: 0`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.batch import FeatureOutput, Output
from blip.errors import UsageError, hint
from blip.layers.attention import ImageKeys
from blip.layers.masks import padding_mask
from blip.losses import at_least_float32
from blip.models.blip_base import BlipBase
from blip.models.blip_config import BlipConfig
from blip.models.blip_ranking import Comparing, Judging
from blip.models.published import weights_of
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
class BlipFeatureExtractor(Comparing, BlipBase):
    """A tower, a text encoder and the projections of both into the contrastive space."""

    config_class: ClassVar[type[BlipFeaturesConfig]] = BlipFeaturesConfig
    presets: ClassVar = {"base": {"image_size": 224}}
    published: ClassVar = weights_of("blip_feature_extractor")

    def __init__(self, config: BlipFeaturesConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.vision_proj = nn.Linear(self.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.med.width, config.embed_dim)
        self.add_head()

    def add_head(self) -> None:
        """The temperature of the contrastive loss, for similarities as probabilities."""
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, samples: dict[str, Any]) -> Any:
        """Features of pairs, as `extract_features` gives them."""
        return self.extract_features(samples)

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Features of images, texts or pairs, as LAVIS names them; token 0 stands for the whole.

        Args:
            samples: `image` and/or `text_input` (or `text_ids`, `text_mask`).
            mode: `image`: `image_embeds` (B, P, D_image), `image_embeds_proj` (B, P, E) unit norm; `text`:
                `text_embeds` (B, T, D), `text_embeds_proj` (B, T, E) unit norm; `multimodal`:
                `multimodal_embeds` (B, T, D), of texts that look at their images, and `image_embeds`.

        Returns:
            What the mode names, without gradients; the others of LAVIS's five names are None.

        Raises:
            UsageError: unknown mode.
        """
        if mode not in MODES:
            raise UsageError(f"extract_features: unknown mode {mode!r}{hint(mode, MODES)}")
        if mode == "image":
            states = at_least_float32(self.image_states(samples))
            return FeatureOutput(image_embeds=states, image_embeds_proj=_unit(self.vision_proj(states)))
        samples = self.with_text(samples, self.config.med.max_positions)
        ids, mask = samples["text_ids"], samples["text_mask"]
        if mode == "text":
            states = self.text.unimodal(ids, mask)
            return FeatureOutput(text_embeds=states, text_embeds_proj=_unit(self.text_proj(states)))
        states = at_least_float32(self.image_states(samples))
        found = self.text.grounded(ids, mask, [(self.text.image_keys(states), 1)])
        return FeatureOutput(image_embeds=states, multimodal_embeds=found)


@dataclass
class BlipMatchingConfig(BlipFeaturesConfig):
    """Sizes and switches of BLIP for image-text matching."""

    image_size: int = 384
    """Side of the input, in pixels."""
    itm_token: Literal["enc", "cls"] = "enc"
    """First token of a text whose match is judged: [ENC], as in training, or [CLS], as the original code and
    Hugging Face leave it at inference."""


@MODELS.register("blip_image_text_matching")
class BlipImageTextMatching(Judging, BlipFeatureExtractor):
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
    published: ClassVar = weights_of("blip_image_text_matching")

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
        states = self.image_states(samples)
        if match_head == "itm":
            images = [(self.retrieval_keys(states), 1)]
            return self.itm_logits(images, samples["text_ids"], samples["text_mask"])
        return self.image_feats(states)[:, 0] @ self.text_feats(samples).T

    def compute_itm(self, image_inputs: Tensor, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        """(B,) raw matching logits of aligned pairs.

        Args:
            image_inputs: (B, P, D_image), the tower's states.
            text_ids: int64 (B, T).
            text_atts: bool or 0/1 (B, T).
        """
        images = [(self.retrieval_keys(image_inputs), 1)]
        return self.itm_logits(images, text_ids, text_atts.bool())[:, 1]

    def itm_logits(self, images: list[tuple[ImageKeys, int]], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(R, 2): the head on the first token of texts that look at images."""
        as_is = self.config.itm_token == "cls"
        states = self.text.grounded(text_ids, text_mask, images, first_only=True, as_is=as_is)
        return self.itm_head(states[:, 0])

    def compute_gradcam(self, samples: dict[str, Any], block_num: int = 6) -> tuple[list[Tensor], Tensor]:
        """Where each text looks while it is judged: attention times its gradient (Grad-CAM, as LAVIS has it).

        Args:
            samples: `image` and `text_input` (or `text_ids`, `text_mask`) of B pairs.
            block_num: layer of the text transformer, from 0; its cross-attention is shown.

        Returns:
            For each pair of n tokens maps (1 + n, h, w) over the patches: that of [ENC], the mean over the
            words, those of the words, and that of [SEP]; and the matching logits (B, 2).

        Raises:
            UsageError: no such layer.
        """
        samples = self.with_text(samples)
        with torch.enable_grad():
            logits, weights = self._watch(samples, block_num)
            (slope,) = torch.autograd.grad(logits[:, 1].sum(), weights)
        side = isqrt(weights.shape[-1])  # what is more than a square is [CLS] and the like, in front
        seen = (weights * slope.clamp(min=0))[..., weights.shape[-1] - side**2 :]
        seen = seen.detach().mean(dim=1).unflatten(-1, (side, side))  # (B, T, h, w)
        maps = []
        for each, length in zip(seen, samples["text_mask"].sum(dim=1).tolist(), strict=True):
            words = each[1 : length - 1].sum(dim=0) / max(length - 2, 1)
            maps.append(torch.cat([each[:1], words[None], each[1:length]]))
        return maps, logits.detach()

    def _watch(self, samples: dict[str, Any], block_num: int) -> tuple[Tensor, Tensor]:
        """Matching logits (B, 2), and the cross-attention (B, H, T, P) of a layer on the way to them."""
        layers = self.text.blocks()
        if not 0 <= block_num < len(layers):
            raise UsageError(f"block_num: {block_num}, where layers are 0 to {len(layers) - 1}")
        ids, mask = samples["text_ids"].clone(), padding_mask(samples["text_mask"])
        ids[:, 0] = self.text.enc_id
        keys = self.text.image_keys(self.image_states(samples))
        hidden = self.text.embedding(ids)
        weights = hidden
        for i, layer in enumerate(layers):
            cross, segment = layer.part("cross_attn", "encode"), keys.segment(i, 1)
            hidden = layer.part("self_attn", "encode")(hidden, layer.keys_values(hidden, "encode"), mask)
            if i == block_num:
                hidden, weights = cross.with_weights(hidden, segment.source)
            else:
                hidden = cross(hidden, [segment])
            hidden = layer.part("ffn", "encode")(hidden)
        return self.itm_head(hidden[:, 0]), weights


def _unit(states: Tensor) -> Tensor:
    return F.normalize(at_least_float32(states), dim=-1)
