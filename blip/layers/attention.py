"""Multi-head attention on SDPA, with BERT's post-norm residual: self, cross and cached attention.

Keys and values are values of their own (`KeyValue`), so that those of an image are computed once per layer
and reused by every pass that looks at the image, and those of the queries by the text that follows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValue(NamedTuple):
    """Projected keys and values, each (B, H, S, D / H)."""

    key: Tensor
    value: Tensor

    def select(self, index: Tensor) -> KeyValue:
        """Those of the rows `index` (M,), in that order."""
        return KeyValue(self.key.index_select(0, index), self.value.index_select(0, index))

    def behind(self, past: KeyValue | None) -> KeyValue:
        """The same behind cached ones, along S."""
        if past is None:
            return self
        return KeyValue(torch.cat([past.key, self.key], dim=2), torch.cat([past.value, self.value], dim=2))


class ImageKeys(NamedTuple):
    """What is looked at, as cross-attention keys and values: an entry per layer, None where none looks.

    Computed once per image and layer, and reused, with gradients, by every pass that looks at the image.
    """

    layers: list[KeyValue | None]
    mask: Tensor | None = None
    """bool (B, S), True = may be seen; None: everything, as in images."""

    @property
    def rows(self) -> int:
        """B."""
        return next(kv for kv in self.layers if kv is not None).key.shape[0]

    def select(self, index: Tensor) -> ImageKeys:
        """Those of the images `index` (M,), in that order."""
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return ImageKeys([kv and kv.select(index) for kv in self.layers], mask)

    def segment(self, layer: int, copies: int) -> Segment:
        """What `copies` rows per image look at in a layer."""
        entry = self.layers[layer]
        assert entry is not None
        return Segment(entry, copies, None if self.mask is None else self.mask[:, None, None, :])


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a batch that attend to the same B sources: row r looks at source r % B.

    Several rows per source cost no copy of its keys and values: their queries are laid side by side.
    """

    source: KeyValue
    copies: int = 1
    mask: Tensor | None = None
    """bool (B, 1, 1, S), or (B, 1, copies, S) for rows of one token each; True = may be seen, None = all."""

    @property
    def rows(self) -> int:
        """Number of rows of the segment."""
        return self.source.key.shape[0] * self.copies


def attend(query: Tensor, source: KeyValue, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(QK^T / sqrt(d)) V, (B, H, T, D / H); mask is bool, True = may attend, or None for all."""
    return F.scaled_dot_product_attention(query, source.key, source.value, attn_mask=mask, dropout_p=dropout)


def attend_segments(query: Tensor, segments: list[Segment], dropout: float) -> Tensor:
    """Cross-attention, segment by segment. (R, H, T, D / H) -> same."""
    parts = []
    for part, segment in zip(query.split([s.rows for s in segments]), segments, strict=True):
        copies, source = segment.copies, segment.source
        if copies == 1:
            parts.append(attend(part, source, segment.mask, dropout))
            continue
        num_heads, length, width = part.shape[1:]
        # (B, H, copies * T, D / H)
        side_by_side = part.unflatten(0, (copies, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        context = attend(side_by_side, source, segment.mask, dropout)
        parts.append(context.view(-1, num_heads, copies, length, width).permute(2, 0, 1, 3, 4).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class MultiHead(nn.Module):
    """Multi-head attention: project, attend, project.

    Args:
        width: D, of the states that look.
        num_heads: H; must divide D.
        kv_width: width of what is looked at; D when None.
        dropout: of the attention probabilities.

    Shape:
        hidden: (B, T, D).
        source: keys and values to look at, or segments of them (cross-attention, with masks of their own).
        mask: bool, broadcastable to (B, 1, T, S), True = may attend.
        returns: (B, T, D).
    """

    def __init__(self, width: int, num_heads: int, kv_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        kv_width = width if kv_width is None else kv_width
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(kv_width, width)
        self.value = nn.Linear(kv_width, width)
        self.out = nn.Linear(width, width)

    def keys_values(self, states: Tensor, norm: nn.LayerNorm | None = None) -> KeyValue:
        """Keys and values of `states` (B, S, kv_width).

        With `norm`, those of `states * norm.weight + norm.bias`. The matrices are scaled in place of the
        states: where these carry no gradient (a frozen tower), none is computed with respect to them.
        """
        if norm is None:
            return KeyValue(self._heads(self.key(states)), self._heads(self.value(states)))
        key, value = (
            F.linear(states, part.weight * norm.weight, F.linear(norm.bias, part.weight, part.bias))
            for part in (self.key, self.value)
        )
        return KeyValue(self._heads(key), self._heads(value))

    def forward(self, hidden: Tensor, source: KeyValue | list[Segment], mask: Tensor | None = None) -> Tensor:
        query = self._heads(self.query(hidden))
        dropout = self.dropout if self.training else 0.0
        if isinstance(source, list):
            context = attend_segments(query, source, dropout)
        else:
            context = attend(query, source, mask, dropout)
        return self.out(context.transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Attention(MultiHead):
    """One attention sub-block of BERT: attend, drop, add, normalise (post-norm).

    Args:
        width, num_heads, kv_width: as of `MultiHead`.
        dropout: of the attention probabilities and of the output.
        norm_eps: of the LayerNorm after the residual.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kv_width: int | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__(width, num_heads, kv_width, dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, hidden: Tensor, source: KeyValue | list[Segment], mask: Tensor | None = None) -> Tensor:
        seen = super().forward(hidden, source, mask)
        return self.norm(hidden + F.dropout(seen, self.dropout, self.training))

    def with_weights(self, hidden: Tensor, source: KeyValue) -> tuple[Tensor, Tensor]:
        """As `forward` without mask and dropout, and the attention probabilities (B, H, T, S) beside it."""
        query = self._heads(self.query(hidden))
        weights = torch.softmax(query @ source.key.mT / query.shape[-1] ** 0.5, dim=-1)
        seen = self.out((weights @ source.value).transpose(1, 2).flatten(2))
        return self.norm(hidden + seen), weights


class PairAttention(nn.Module):
    """Cross-attention to two images at once, in one sub-block of BERT (BLIP for NLVR2, section 5.5).

    Each image has an attention of its own. What they see is averaged or, with `merge`, joined by a matrix.

    Args:
        merge: join by a matrix.
        others: as of `Attention`.

    Shape:
        hidden: (B, T, D).
        sources: the first images' keys and values, and the second ones'; B rows each.
        returns: (B, T, D).
    """

    def __init__(
        self, width: int, num_heads: int, kv_width: int, dropout: float, norm_eps: float, merge: bool
    ) -> None:
        super().__init__()
        self.looks = nn.ModuleList(MultiHead(width, num_heads, kv_width, dropout) for _ in range(2))
        self.merge = nn.Linear(2 * width, width) if merge else None
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    @torch.no_grad()
    def merge_as_mean(self) -> None:
        """Set the matrix to average what the two see, as the layers without one do."""
        if self.merge is not None:
            half = torch.eye(self.merge.out_features) / 2
            self.merge.weight.copy_(torch.cat([half, half], dim=1))
            self.merge.bias.zero_()

    def forward(self, hidden: Tensor, sources: list[Segment]) -> Tensor:
        first, second = (look(hidden, [source]) for look, source in zip(self.looks, sources, strict=True))
        both = torch.cat([first, second], dim=-1)
        seen = (first + second) / 2 if self.merge is None else self.merge(both)
        return self.norm(hidden + F.dropout(seen, self.dropout, self.training))
