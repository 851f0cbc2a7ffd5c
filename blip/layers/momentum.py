"""The momentum twin of some modules, and the queue of the features it has given (BLIP, section 3.2; MoCo)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MomentumTwin(nn.ModuleDict):
    """Copies of some parts of a model that follow it slowly and have no gradient.

    Args:
        parts: name of a part of the model -> module to hold its copy. It may lack parameters that the twin's
            passes do not need; those that it has bear the same names as the model's.
        dropout: let dropout and drop path act in the twin as in the model, as BLIP trains; else they rest.
    """

    def __init__(self, parts: dict[str, nn.Module], dropout: bool = True) -> None:
        super().__init__(parts)
        self.requires_grad_(False)
        self._dropout = dropout
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode, where its dropout acts at all."""
        return super().train(mode and self._dropout)

    @torch.no_grad()
    def copy_from(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Take the model's values, of all parameters or of those in `names`."""
        theirs = dict(model.named_parameters())
        for name, own in self.named_parameters():
            if names is None or name in names:
                own.copy_(theirs[name])

    @torch.no_grad()
    def follow(self, model: nn.Module, momentum: float) -> None:
        """Move towards the model: momentum * own + (1 - momentum) * the model's, in one fused operation."""
        theirs = dict(model.named_parameters())
        names, own = zip(*self.named_parameters(), strict=True)
        torch._foreach_lerp_(list(own), [theirs[name] for name in names], 1.0 - momentum)


class FeatureQueue(nn.Module):
    """The newest K pairs of features, in a ring: further columns to contrast with.

    All of it is state: it is saved with the model, and every rank holds the same.

    Args:
        size: K; 0 makes an empty queue.
        width: E of the features.
    """

    image: Tensor
    """(K, E), unit norm; random at first."""
    text: Tensor
    """(K, E), unit norm; random at first."""
    ids: Tensor
    """int64 (K,): number of each pair's picture; `NO_ID` where it is not known."""
    pointer: Tensor
    """int64 (): where the next pair goes."""

    NO_ID = -100

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("image", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("text", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("ids", torch.full((size,), self.NO_ID))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def forget_ids(self) -> None:
        """Keep the features, not which pictures they are of."""
        self.ids.fill_(self.NO_ID)
        self.pointer.zero_()

    @torch.no_grad()
    def enqueue(self, image_feats: Tensor, text_feats: Tensor, ids: Tensor | None = None) -> None:
        """Write pairs over the oldest ones; any number of them, also one that does not divide K.

        Args:
            image_feats: (N, E), of all ranks, the same on each.
            text_feats: (N, E).
            ids: int64 (N,).
        """
        size = len(self)
        if not size:
            return
        count = len(image_feats)
        newest = slice(max(count - size, 0), count)
        place = (self.pointer + torch.arange(count, device=self.pointer.device)[newest]) % size
        self.image[place] = image_feats[newest].to(self.image.dtype)
        self.text[place] = text_feats[newest].to(self.text.dtype)
        self.ids[place] = self.NO_ID if ids is None else ids[newest]
        self.pointer.copy_((self.pointer + count) % size)
