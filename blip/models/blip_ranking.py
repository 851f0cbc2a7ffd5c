"""What retrieval (tasks/retrieval.py) asks of BLIP's models: features to compare, and a judge of pairs.

Mixins beside `BlipBase`: the model makes the parts that are named here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layers.attention import ImageKeys
from blip.losses import at_least_float32, similarity
from blip.models.med import Med
from blip.models.vision import VisionTower


class Comparing:
    """Images and texts are compared by the features of their first tokens."""

    vision: VisionTower
    text: Med
    vision_proj: nn.Linear
    text_proj: nn.Linear
    image_states: Callable[..., Tensor]

    def image_feats(self, states: Tensor, proj: nn.Module | None = None) -> Tensor:
        """(B, 1, E), unit norm, from [CLS]; of a video, from the mean over its frames.

        Args:
            states: (B, P, D_image), or (B, F * P, D_image).
            proj: another projection than the model's own, that of its twin.
        """
        proj = self.vision_proj if proj is None else proj
        frames = states.unflatten(1, (-1, self.vision.num_tokens))[:, :, 0]  # (B, F, D_image)
        return F.normalize(at_least_float32(proj(at_least_float32(frames))).mean(dim=1, keepdim=True), dim=-1)

    def text_feats(self, batch: dict[str, Any]) -> Tensor:
        """(B, E), unit norm, from [CLS]."""
        states = self.text.unimodal(batch["text_ids"], batch["text_mask"], first_only=True)
        return F.normalize(at_least_float32(self.text_proj(states[:, 0])), dim=-1)

    def retrieval_images(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Image features (B, 1, E), and the tower's states (B, P, D_image) for `Judging.retrieval_keys`.

        Under autocast the states come in its type, in which the cross-attention reads them anyhow.
        """
        states = self.image_states(batch)
        kind, kept = states.device.type, states
        if torch.is_autocast_enabled(kind) and states.dtype == torch.float32:
            kept = states.to(torch.get_autocast_dtype(kind))
        return self.image_feats(states), kept

    def retrieval_texts(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Text features (B, E)."""
        return self.text_feats({"text_ids": text_ids, "text_mask": text_mask})

    def retrieval_scores(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        """ITC similarities without temperature, (images, texts)."""
        return similarity(image_feats, text_feats)


class Reranking:
    """Texts are judged by what they see in an image; BLIP-2's stage 1 does it in the same way."""

    itm_logits: Callable[..., Tensor]

    def rerank(self, keys: ImageKeys, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Matching logits (K, B) of B images with K texts each.

        Args:
            keys: of the B images, from `retrieval_keys`.
            text_ids: int64 (K, B, T).
            text_mask: bool (K, B, T).
        """
        copies, num_images = text_ids.shape[:2]
        logits = self.itm_logits([(keys, copies)], text_ids.flatten(0, 1), text_mask.flatten(0, 1))
        return logits[:, 1].view(copies, num_images)


class Judging(Comparing, Reranking):
    """Besides, the matching head judges texts that look at an image, which re-ranks the most similar ones."""

    itm_head: nn.Linear

    def itm_logits(self, images: list[tuple[ImageKeys, int]], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(R, 2): the head on the [ENC] state of texts that look at images."""
        states = self.text.grounded(text_ids, text_mask, images, first_only=True)
        return self.itm_head(states[:, 0])

    def retrieval_keys(self, states: Tensor) -> ImageKeys:
        """What all texts look at that B images of `retrieval_images` are matched with, computed once."""
        return self.text.image_keys(states)
