"""Image-text contrastive, matching and language-modelling losses, for all three families.

Functions of tensors: no module, no configuration, no tokenizer. Similarities and softmax are computed in
float32 (or float64) whatever the surrounding autocast, since a similarity over a temperature of 0.07 and a
smoothed cross-entropy are too coarse in half precision.

`sampler` is the one place where chance enters (which hard negative to take). It is any function
`(weights, rows, stream) -> index`; `argmax_sampler` makes the losses deterministic, for comparisons.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blip import keyed


class NegativeSampler(Protocol):
    """Chooses one column per row.

    Args:
        weights: (B, N), non-negative, unnormalised; 0 = never. A row of zeros may get any column.
        rows: int64 (B,), number of each row in the global batch of the optimizer step.
        stream: name of the draw, so that two draws of one step are independent.

    Returns:
        int64 (B,).
    """

    def __call__(self, weights: Tensor, rows: Tensor, stream: str) -> Tensor: ...


def argmax_sampler(weights: Tensor, rows: Tensor, stream: str) -> Tensor:
    """The heaviest column of each row: no chance at all."""
    return weights.argmax(dim=1)


class KeyedSampler:
    """One multinomial draw per row, a function of (seed, step, stream, row) and the weights alone.

    No host synchronisation: the draw inverts the cumulative weights at a keyed uniform number.
    """

    def __init__(self, seed: int, step: int) -> None:
        self.seed = seed
        self.step = step

    def __call__(self, weights: Tensor, rows: Tensor, stream: str) -> Tensor:
        cumulative = weights.double().cumsum(dim=1)
        point = keyed.uniform(rows, self.seed, "negative", stream, self.step) * cumulative[:, -1]
        index = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
        return index.clamp(max=weights.shape[1] - 1)


class Candidates(NamedTuple):
    """What a local batch is contrasted with: N columns and which of them are right."""

    image_feats: Tensor
    """(N, Q, E), unit norm."""
    text_feats: Tensor
    """(N, E), unit norm."""
    target_i2t: Tensor
    """(B, N), rows sum to 1."""
    target_t2i: Tensor
    """(B, N), rows sum to 1."""


class ItcOutput(NamedTuple):
    """Result of `itc_loss`."""

    loss: Tensor
    sim_i2t: Tensor
    """(B, N), divided by the temperature."""
    sim_t2i: Tensor
    """(B, N), divided by the temperature."""


def similarity(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """Cosine of each image's best-matching query with each text: one matrix product, then a maximum.

    Args:
        image_feats: (B, Q, E), unit norm.
        text_feats: (N, E), unit norm.

    Returns:
        (B, N), float32 (float64 for float64 input).
    """
    num_images, num_query, _ = image_feats.shape
    with torch.autocast(image_feats.device.type, enabled=False):
        image_feats, text_feats = at_least_float32(image_feats), at_least_float32(text_feats)
        product = image_feats.flatten(0, 1) @ text_feats.T  # (B*Q, N)
    return product.view(num_images, num_query, -1).max(dim=1).values


def same_picture(rows: Tensor, columns: int, ids: Tensor | None, ids_all: Tensor | None) -> Tensor:
    """bool (B, N): True where the column shows the picture of the row.

    Args:
        rows: int64 (B,), the column that belongs to each row.
        columns: N.
        ids: int64 (B,) picture numbers of the rows; None when every picture is its own.
        ids_all: int64 (N,) picture numbers of the columns.
    """
    if ids is None or ids_all is None:
        return F.one_hot(rows, columns).bool()
    return ids[:, None] == ids_all[None, :]


def smoothed_targets(positive: Tensor, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal shares over the positives, mixed with the uniform distribution (LAVIS `Blip2Qformer`).

    With one positive per row this is cross-entropy's usual label smoothing.

    Args:
        positive: bool (B, N), at least one True per row.
        smoothing: share of the uniform distribution.
        dtype: of the result.

    Returns:
        (B, N), rows sum to 1.
    """
    share = positive.to(dtype)
    return (1 - smoothing) * share / share.sum(dim=1, keepdim=True) + smoothing / positive.shape[1]


def soft_targets(sim_m: Tensor, hard: Tensor, alpha: float) -> Tensor:
    """Targets of momentum distillation: the twin's opinion mixed with the truth (BLIP, section 3.2).

    Args:
        sim_m: (B, N), similarities of the momentum features, divided by the temperature.
        hard: (B, N), rows sum to 1.
        alpha: share of the twin's opinion.

    Returns:
        (B, N), rows sum to 1, without gradient.
    """
    with torch.no_grad():
        return alpha * torch.softmax(sim_m, dim=1) + (1 - alpha) * hard


def itc_loss(
    image_feats: Tensor,
    text_feats: Tensor,
    candidates: Candidates,
    temp: Tensor,
    num_rows: float | None = None,
) -> ItcOutput:
    """Image-text contrastive loss (BLIP and BLIP-2, section 3.2).

    The families differ in the candidates only: the global batch with smoothed targets in BLIP-2;
    momentum features, queues and soft targets in BLIP.

    Args:
        image_feats: (B, Q, E), unit norm; Q = 1 in BLIP. The best-matching query speaks for the image.
        text_feats: (B, E), unit norm.
        candidates: what to contrast with. The same tensors as the first two arguments mean that the batch
            is its own candidates, and one product serves both directions.
        temp: scalar; similarities are divided by it.
        num_rows: what the sum over rows is divided by; None = B. (Mean rows per rank of the global batch,
            so that the mean over ranks is the mean over the global batch even where ranks are uneven.)

    Returns:
        The loss, and the similarities that the ITM loss draws its hard negatives from.
    """
    itself = candidates.image_feats is image_feats and candidates.text_feats is text_feats
    sim_i2t = similarity(image_feats, candidates.text_feats) / temp
    sim_t2i = sim_i2t.T if itself else similarity(candidates.image_feats, text_feats).T / temp
    num_rows = max(len(image_feats), 1) if num_rows is None else num_rows
    loss_i2t = F.cross_entropy(sim_i2t, candidates.target_i2t.to(sim_i2t), reduction="sum")
    loss_t2i = F.cross_entropy(sim_t2i, candidates.target_t2i.to(sim_t2i), reduction="sum")
    return ItcOutput((loss_i2t + loss_t2i) / (2 * num_rows), sim_i2t, sim_t2i)


def hard_negatives(
    sim: Tensor, positive: Tensor, rows: Tensor, sampler: NegativeSampler, stream: str, floor: float = 0.0
) -> Tensor:
    """One negative column per row, drawn with the softmax of the similarities over the negatives.

    Args:
        sim: (B, N), divided by the temperature.
        positive: bool (B, N), columns that must not be drawn.
        rows: int64 (B,), row numbers for the sampler.
        sampler: makes the choice.
        stream: name of the draw.
        floor: added to the weight of every negative; weights are then a softmax over all columns, as in
            BLIP's pre-training, which adds 1e-4.

    Returns:
        int64 (B,). A row whose columns are all positive gets an arbitrary column; the caller must leave it
        out of the loss.
    """
    with torch.no_grad():
        if floor:
            weights = (torch.softmax(sim.detach(), dim=1) + floor).masked_fill(positive, 0.0)
            return sampler(weights, rows, stream)
        weights = torch.softmax(sim.detach().masked_fill(positive, -torch.inf), dim=1)
        return sampler(torch.nan_to_num(weights, nan=0.0), rows, stream)


def itm_loss(logits: Tensor, labels: Tensor, weight: Tensor, total: Tensor | float) -> Tensor:
    """Image-text matching loss: cross-entropy over pairs, some of which may not count.

    Args:
        logits: (R, 2); class 1 = the pair matches.
        labels: int64 (R,).
        weight: float (R,); 0 leaves a pair out.
        total: what the weighted sum is divided by.
    """
    losses = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    return (losses * weight).sum() / total


def lm_loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.1, total: Tensor | float | None = None
) -> Tensor:
    """Language-modelling loss with label smoothing (BLIP and BLIP-2: 0.1), over target tokens.

    Args:
        logits: (M, V) at the positions that predict; already shifted.
        labels: int64 (M,); -100 = not a target.
        smoothing: label smoothing.
        total: what the sum over tokens is divided by; None = number of targets here.
    """
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="sum", label_smoothing=smoothing)
    total = (labels != -100).sum().clamp(min=1) if total is None else total
    return loss / total


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
