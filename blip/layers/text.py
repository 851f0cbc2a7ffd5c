"""BERT's embeddings, feed-forward and language-model head, for MED and Q-Former alike."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

INIT_STD = 0.02
MOST_ADDED = 1024
"""Rows that a vocabulary may have more than the weights; beyond that it is another one."""


class TextEmbedding(nn.Module):
    """Word plus position embeddings; no token types. What goes in front of the text passes `finish` too.

    Shape:
        text_ids: int64 (B, T).
        start: position of the first token; int64 (B,) where the rows differ.
        returns: (B, T, D), normalised and dropped out.
    """

    def __init__(
        self, vocab_size: int, width: int, num_positions: int, dropout: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(num_positions, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout
        let_rows_be_added(self.word, "weight")

    def forward(self, text_ids: Tensor, start: int | Tensor = 0) -> Tensor:
        length = text_ids.shape[1]
        if isinstance(start, Tensor):
            position = self.position(start[:, None] + torch.arange(length, device=start.device))
        else:
            position = self.position.weight[start : start + length]
        return self.finish(self.word(text_ids) + position)

    def finish(self, states: Tensor) -> Tensor:
        """LayerNorm and dropout, which learned queries also pass (B, Q, D)."""
        return F.dropout(self.norm(states), self.dropout, self.training)


class FeedForward(nn.Module):
    """BERT's feed-forward: expand, GELU (erf), contract, drop, add, normalise. (B, T, D) -> same."""

    def __init__(self, width: int, inner: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        inner = _GeluLinear.apply(self.expand(hidden), self.contract.weight, self.contract.bias)
        return self.norm(hidden + F.dropout(inner, self.dropout, self.training))


class _GeluLinear(torch.autograd.Function):
    """`linear(gelu(inner))` that keeps `inner` only; the GELU, as wide, is computed again, elementwise.

    Under autocast `inner` comes in half precision and the parameters in float32, as to `nn.Linear`.
    """

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(inner, weight)
        ctx.bias_dtype = bias.dtype
        return F.linear(F.gelu(inner), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, weight = ctx.saved_tensors
        wants_inner, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (B * T, D)
        grad_inner = grad_weight = grad_bias = None
        if wants_inner:
            grad_inner = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), inner.to(grad.dtype))
            grad_inner = grad_inner.to(inner.dtype)
        if wants_weight:
            active = F.gelu(inner).flatten(0, -2).to(grad.dtype)
            grad_weight = (rows.T @ active).to(weight.dtype)
        if wants_bias:
            grad_bias = rows.sum(dim=0).to(ctx.bias_dtype)
        return grad_inner, grad_weight, grad_bias


class LMHead(nn.Module):
    """BERT's transform and a vocabulary projection tied to the word embeddings, with a bias of its own.

    The matrix is handed in at each call, so the parameter exists once.

    Shape:
        hidden: (..., D).
        word_weight: (V, D), the word embeddings.
        returns: logits (..., V).
    """

    def __init__(self, width: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        let_rows_be_added(self, "bias")

    def forward(self, hidden: Tensor, word_weight: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_weight, self.bias)


def let_rows_be_added(module: nn.Module, name: str) -> None:
    """Let `module.load_state_dict` take a parameter that lacks the rows of tokens which were added.

    They keep the values that they begin with. A vocabulary with many more rows is another one, and refused.

    Args:
        module: owner.
        name: of a parameter whose first dimension is the vocabulary.
    """

    def complete(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        given, own = state.get(prefix + name), getattr(module, name).detach()
        if given is None or given.shape[1:] != own.shape[1:] or not 0 < len(own) - len(given) <= MOST_ADDED:
            return
        log.warning("%s%s: %d rows were added and begin anew", prefix, name, len(own) - len(given))
        added = own[len(given) :]
        added = torch.zeros_like(added, device=given.device) if own.is_meta else added.to(given)
        state[prefix + name] = torch.cat([given, added.to(given.dtype)])

    module.register_load_state_dict_pre_hook(complete)


def init_bert(module: nn.Module, std: float = INIT_STD) -> None:
    """BERT's initial values: normal matrices and embeddings, zero biases, unit LayerNorms.

    Args:
        module: all of its parts are set.
        std: of the matrices; embeddings have BERT's 0.02.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std if isinstance(part, nn.Linear) else INIT_STD)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
