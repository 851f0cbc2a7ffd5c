"""The language-modelling loss of the BERT-like decoders: what goes in, what is asked for, and the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.layers.text import LMHead
from blip.losses import at_least_float32, lm_loss


def decoder_input(text_ids: Tensor, text_mask: Tensor, dec_id: int) -> tuple[Tensor, Tensor]:
    """[DEC] in the place of [CLS], without the last token, which predicts nothing.

    Args:
        text_ids: int64 (B, T).
        text_mask: bool (B, T).
        dec_id: id of [DEC].

    Returns:
        ids and mask, (B, T - 1).
    """
    start = torch.full_like(text_ids[:, :1], dec_id)
    return torch.cat([start, text_ids[:, 1:-1]], dim=1), text_mask[:, :-1]


def decoder_labels(text_ids: Tensor, text_mask: Tensor, prompt_length: int = 0) -> Tensor:
    """What each position of `decoder_input` is to predict: the next token.

    Args:
        text_ids: int64 (B, T).
        text_mask: bool (B, T).
        prompt_length: tokens at the start, [DEC] included, that nobody is to predict.

    Returns:
        int64 (B, T - 1); -100 = not a target.
    """
    labels = text_ids.masked_fill(~text_mask, -100)
    if prompt_length:
        labels[:, :prompt_length] = -100
    return labels[:, 1:]


def caption_loss(
    hidden: Tensor, labels: Tensor, lm_head: LMHead, words: Tensor, batch: dict[str, Any], smoothing: float
) -> Tensor:
    """The mean loss over target tokens; logits are computed for targets only.

    Args:
        hidden: (B, T - 1, D), states at the positions of `decoder_input`.
        labels: as `decoder_labels` makes them.
        lm_head: states -> logits.
        words: (V, D), the word embeddings.
        batch: optional `num_targets`, `loss_tokens`.
        smoothing: label smoothing.
    """
    rows, targets = targets_only(hidden.flatten(0, 1), labels.flatten(), batch.get("num_targets"))
    return lm_loss(lm_head(rows, words), targets, smoothing, batch.get("loss_tokens"))


def answer_loss(
    hidden: Tensor, labels: Tensor, lm_head: LMHead, words: Tensor, batch: dict[str, Any], smoothing: float
) -> Tensor:
    """The loss of weighted answers (BLIP, section 5.3): their token sums, weighted, per question.

    Args:
        hidden: (A, L - 1, D).
        labels: int64 (A, L - 1), -100 = not a target.
        lm_head: states -> logits.
        words: (V, D), the word embeddings.
        batch: `weight` (A,), `n_answers` (B,); optional `num_targets`, `loss_rows`.
        smoothing: label smoothing.
    """
    each = batch["weight"][:, None].expand_as(labels).flatten()
    index = target_rows(labels.flatten(), batch.get("num_targets"))
    rows, targets = hidden.flatten(0, 1), labels.flatten()
    if index is not None:
        rows, targets, each = rows[index], targets[index], each[index]
    logits = at_least_float32(lm_head(rows, words))
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return (losses * each.to(losses)).sum() / batch.get("loss_rows", len(batch["n_answers"]))


def targets_only(hidden: Tensor, labels: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Rows that have a target, so that no logits are computed for padding.

    Args:
        hidden: (M, D).
        labels: int64 (M,), -100 = no target.
        count: number of targets, where the host knows it. Without it a GPU keeps all rows, since counting
            them would make it wait.
    """
    index = target_rows(labels, count)
    if index is None:
        return hidden, labels
    return hidden.index_select(0, index), labels.index_select(0, index)


def target_rows(labels: Tensor, count: int | None) -> Tensor | None:
    """Numbers of the rows of `labels` (M,) that are targets; None for all rows, as of `targets_only`."""
    if labels.device.type == "cpu":
        return (labels != -100).nonzero()[:, 0]
    if count is not None:
        return torch.nonzero_static(labels != -100, size=count)[:, 0]
    return None
