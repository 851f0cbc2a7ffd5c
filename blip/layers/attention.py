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


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a batch that attend to the same B sources: row r looks at source r % B.

    Several rows per source cost no copy of its keys and values: their queries are laid side by side.
    """

    source: KeyValue
    copies: int = 1

    @property
    def rows(self) -> int:
        """Number of rows of the segment."""
        return self.source.key.shape[0] * self.copies


def attend(query: Tensor, source: KeyValue, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(QK^T / sqrt(d)) V, (B, H, T, D / H); mask is bool, True = may attend, or None for all."""
    return F.scaled_dot_product_attention(query, source.key, source.value, attn_mask=mask, dropout_p=dropout)


def attend_segments(query: Tensor, segments: list[Segment], dropout: float) -> Tensor:
    """Cross-attention without a mask, segment by segment. (R, H, T, D / H) -> same."""
    parts = []
    for part, segment in zip(query.split([s.rows for s in segments]), segments, strict=True):
        copies, source = segment.copies, segment.source
        if copies == 1:
            parts.append(attend(part, source, None, dropout))
            continue
        num_heads, length, width = part.shape[1:]
        # (B, H, copies * T, D / H)
        side_by_side = part.unflatten(0, (copies, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        context = attend(side_by_side, source, None, dropout)
        parts.append(context.view(-1, num_heads, copies, length, width).permute(2, 0, 1, 3, 4).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Attention(nn.Module):
    """One attention sub-block of BERT: attend, project, drop, add, normalise (post-norm).

    Args:
        width: D, of the states that look.
        num_heads: H; must divide D.
        kv_width: width of what is looked at; D when None.
        dropout: of the attention probabilities and of the output.
        norm_eps: of the LayerNorm after the residual.

    Shape:
        hidden: (B, T, D).
        source: keys and values to look at, or segments of them (cross-attention without a mask).
        mask: bool, broadcastable to (B, 1, T, S), True = may attend.
        returns: (B, T, D).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kv_width: int | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        kv_width = width if kv_width is None else kv_width
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(kv_width, width)
        self.value = nn.Linear(kv_width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

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
        merged = context.transpose(1, 2).flatten(2)  # (B, T, D)
        return self.norm(hidden + F.dropout(self.out(merged), self.dropout, self.training))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
