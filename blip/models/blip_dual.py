"""transformers' `BlipModel`: a tower and a text encoder whose pooled states are contrasted as in CLIP.

BLIP's papers and LAVIS have no such model, and no weights are published for it; it is here so that what was
trained with transformers can be used, and go back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.batch import FeatureOutput, Output
from blip.errors import UsageError, hint
from blip.losses import at_least_float32
from blip.models.blip_base import BlipBase
from blip.models.blip_features import MODES, BlipFeaturesConfig
from blip.registry import MODELS

LOGIT_SCALE = 2.6592
"""ln(1 / 0.07), CLIP's initial inverse temperature."""


@MODELS.register("blip_dual_encoder")
class BlipDualEncoder(BlipBase):
    """A tower, a text encoder with a pooler, and projections of both.

    Shape:
        batch: `image` and `text_input` (or `text_ids`, `text_mask`) of B pairs.
        returns: `loss`, the mean of both directions' cross-entropy over this batch; `logits_per_image`,
            `logits_per_text` (B, B); `image_embeds`, `text_embeds` (B, E), unit norm.
    """

    config_class: ClassVar[type[BlipFeaturesConfig]] = BlipFeaturesConfig
    presets: ClassVar = {"base": {"image_size": 384, "embed_dim": 512}}

    def __init__(self, config: BlipFeaturesConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.pooler = nn.Linear(config.med.width, config.med.width)
        self.vision_proj = nn.Linear(self.vision.width, config.embed_dim, bias=False)
        self.text_proj = nn.Linear(config.med.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    def forward(self, batch: dict[str, Any]) -> Output:
        """Loss, similarities and embeddings."""
        batch = self.with_text(batch)
        image = F.normalize(at_least_float32(self.image_feats(batch)), dim=-1)
        text = F.normalize(at_least_float32(self.text_feats(batch)), dim=-1)
        logits = text @ image.T * self.logit_scale.exp()
        right = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        return Output(
            loss=loss,
            loss_itc=loss,
            logits_per_image=logits.T,
            logits_per_text=logits,
            image_embeds=image,
            text_embeds=text,
        )

    def image_feats(self, batch: dict[str, Any]) -> Tensor:
        """(B, E), not normalised. transformers norms [CLS] a second time."""
        return self.vision_proj(self.vision.vit.norm(at_least_float32(self.image_states(batch))[:, 0]))

    def text_feats(self, batch: dict[str, Any]) -> Tensor:
        """(B, E), not normalised."""
        return self._pooled(self.text.unimodal(batch["text_ids"], batch["text_mask"]))

    def _pooled(self, states: Tensor) -> Tensor:
        return self.text_proj(self.pooler(states[:, 0]).tanh())

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Features under LAVIS's names.

        Args:
            samples: `image` and/or `text_input` (or `text_ids`, `text_mask`).
            mode: `image`: `image_embeds` (B, P, D_image), `image_embeds_proj` (B, 1, E) unit norm; `text`:
                `text_embeds` (B, T, D), `text_embeds_proj` (B, 1, E) unit norm; `multimodal`:
                `multimodal_embeds` (B, 1, E), projected but not normalised, as transformers gives it.

        Raises:
            UsageError: unknown mode.
        """
        if mode not in MODES:
            raise UsageError(f"extract_features: unknown mode {mode!r}{hint(mode, MODES)}")
        if mode == "image":
            feats = F.normalize(self.image_feats(samples), dim=-1)[:, None]
            return FeatureOutput(image_embeds=self.image_states(samples), image_embeds_proj=feats)
        samples = self.with_text(samples)
        ids, mask = samples["text_ids"], samples["text_mask"]
        if mode == "text":
            states = self.text.unimodal(ids, mask)
            feats = F.normalize(self._pooled(states), dim=-1)[:, None]
            return FeatureOutput(text_embeds=states, text_embeds_proj=feats)
        states = at_least_float32(self.image_states(samples))
        found = self.text.grounded(ids, mask, [(self.text.image_keys(states), 1)], as_is=True)
        return FeatureOutput(image_embeds=states, multimodal_embeds=self._pooled(found)[:, None])
