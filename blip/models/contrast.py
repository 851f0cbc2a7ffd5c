"""What a batch is contrasted with, gathered from all ranks, and the hard negatives found there.

Shared by every model with an ITC and an ITM loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip import dist
from blip.batch import Output
from blip.layers.attention import ImageKeys
from blip.layers.momentum import FeatureQueue
from blip.losses import (
    Candidates,
    KeyedSampler,
    NegativeSampler,
    hard_negatives,
    itc_loss,
    itm_loss,
    same_picture,
    similarity,
    smoothed_targets,
    soft_targets,
)


class Features(NamedTuple):
    """What is contrasted."""

    image: Tensor
    """(B, Q, E), unit norm."""
    text: Tensor
    """(B, E), unit norm."""


class Pool(NamedTuple):
    """The global batch that rows are contrasted with, in global row order."""

    image_feats: Tensor
    """(N, Q, E)."""
    text_feats: Tensor
    """(N, E)."""
    text_ids: Tensor
    """int64 (N, T), padded to the longest text of all ranks."""
    text_mask: Tensor
    """bool (N, T)."""
    image_id: Tensor | None
    """int64 (N,)."""
    columns: Tensor
    """int64 (B,): the column of each local row."""
    order: Tensor | None
    """int64 (N,): gathered row of each column; None = the same order."""
    states: Tensor
    """(B, P, D_image), this rank's, to fetch other ranks' from."""
    keys: ImageKeys | None
    """Keys of all N images where they are at hand (one process, one micro-batch; or a local pool)."""
    total: int

    def fetch_states(self, columns: Tensor) -> Tensor:
        """The tower's states of the images in `columns` (M,), (M, P, D_image); only those travel."""
        index = columns if self.order is None else self.order[columns]
        return dist.fetch_rows(self.states, index, self.total, grad=self.states.requires_grad)


class Negatives(NamedTuple):
    """Hard negatives of the local rows, as columns of the pool."""

    image: Tensor
    """int64 (B,): for each text, an image that does not belong to it."""
    text: Tensor
    """int64 (B,): for each image, a text that does not belong to it."""
    valid: Tensor
    """bool (B,): False where the pool has no negative for the row."""
    share_valid: Tensor
    """Scalar: mean of `valid` over all N rows."""

    def of(self, rows: slice) -> Negatives:
        """Those of some of the rows."""
        return Negatives(self.image[rows], self.text[rows], self.valid[rows], self.share_valid)


def gather_pool(
    batch: dict[str, Any],
    feats: Features,
    states: Tensor,
    keys: ImageKeys | None = None,
    use_ids: bool = True,
    grad: bool = True,
    in_row_order: bool = True,
) -> Pool:
    """The global batch, gathered from all ranks.

    Args:
        batch: `text_ids`, `text_mask`, optional `image_id`, `rows`, `batch_total` of the local rows.
        feats: of the local rows.
        states: (B, P, D_image) of the local rows.
        keys: of the local images, reused where this process holds the whole batch.
        use_ids: read `image_id` where the batch has it.
        grad: let gradients flow to the features that rows are contrasted with. Without it only the row side
            of the similarities has a gradient, whatever the number of ranks, as LAVIS trains
            (`concat_all_gather`).
        in_row_order: gathered rows already stand in global row order (one micro-batch).
    """
    total = batch.get("batch_total") or len(feats.text) * dist.world_size()
    image_id = batch.get("image_id") if use_ids else None
    ids, mask = batch["text_ids"], batch["text_mask"]
    if not grad:
        feats = Features(feats.image.detach(), feats.text.detach())
    if dist.world_size() == 1 and in_row_order:
        columns = torch.arange(total, device=ids.device)
        return Pool(*feats, ids, mask, image_id, columns, None, states, keys, total)
    ids, mask = _pad_to_longest(ids, mask)
    parts: list[Any] = [
        dist.gather_rows(feats.image, total, grad),
        dist.gather_rows(feats.text, total, grad),
        dist.gather_rows(ids, total),
        dist.gather_rows(mask.to(torch.uint8), total).bool(),
        None if image_id is None else dist.gather_rows(image_id, total),
    ]
    start, end = dist.slices(total)[dist.rank()]
    columns = torch.arange(start, end, device=ids.device)
    order = None
    if not in_row_order:
        order = torch.argsort(dist.gather_rows(batch["rows"], total))
        columns = torch.argsort(order)[start:end]
        parts = [part if part is None else part[order] for part in parts]
    image_feats, text_feats, ids, mask, image_id = parts
    return Pool(image_feats, text_feats, ids, mask, image_id, columns, order, states, None, total)


def local_pool(
    batch: dict[str, Any], feats: Features, states: Tensor, keys: ImageKeys, use_ids: bool = True
) -> Pool:
    """This rank's rows alone, as BLIP contrasts; arguments as of `gather_pool`."""
    ids, total = batch["text_ids"], len(feats.text)
    image_id = batch.get("image_id") if use_ids else None
    columns = torch.arange(total, device=ids.device)
    return Pool(*feats, ids, batch["text_mask"], image_id, columns, None, states, keys, total)


class Contrasted(NamedTuple):
    """Local rows beside the pool."""

    loss: Tensor
    """The ITC loss."""
    sim_i2t: Tensor
    """(B, N), divided by the temperature."""
    sim_t2i: Tensor
    """(B, N), divided by the temperature."""
    positive: Tensor
    """bool (B, N): columns that show the row's picture."""

    def figures(self, temp: Tensor) -> Output:
        """`loss_itc`; `itc_acc`, the share of images whose best text is right; `temp`."""
        best = self.sim_i2t.detach().argmax(dim=1, keepdim=True)
        right = self.positive.gather(1, best).float().sum() / max(len(best), 1)
        return Output(loss_itc=self.loss, itc_acc=right, temp=temp.detach().clone())


def contrast(
    batch: dict[str, Any], feats: Features, pool: Pool, temp: Tensor, smoothing: float
) -> Contrasted:
    """BLIP-2's ITC loss of the local rows, and the similarities.

    Args:
        batch: optional `loss_rows`.
        feats: of the local rows.
        pool: what they are contrasted with.
        temp: temperature.
        smoothing: label smoothing of the targets.
    """
    own_id = None if pool.image_id is None else pool.image_id[pool.columns]
    positive = same_picture(pool.columns, pool.total, own_id, pool.image_id)
    target = smoothed_targets(positive, smoothing, temp.dtype)
    candidates = Candidates(pool.image_feats, pool.text_feats, target, target)
    found = itc_loss(feats.image, feats.text, candidates, temp, batch.get("loss_rows"))
    return Contrasted(*found, positive)


class TwinFeatures(NamedTuple):
    """Features of the momentum twin."""

    own: Features
    """Of the local rows, (B, 1, E) and (B, E)."""
    columns: Features
    """Of the rows that are contrasted with: those of the pool."""


def momentum_contrast(
    batch: dict[str, Any],
    feats: Features,
    twin: TwinFeatures,
    pool: Pool,
    queue: FeatureQueue,
    temp: Tensor,
    alpha: float,
) -> Contrasted:
    """BLIP's ITC loss of the local rows (section 3.2), and their similarities with the pool.

    Columns are the twin's features of the pool, then the queue; targets are mixed with the twin's opinion.

    Args:
        batch: optional `loss_rows`.
        feats: of the local rows.
        twin: without gradient.
        pool: whose rows are the first columns; its `image_id` decides what is positive, also in the queue.
        queue: further columns.
        temp: temperature.
        alpha: share of the twin's opinion in the targets.
    """
    image_id = pool.image_id
    own_id = None if image_id is None else image_id[pool.columns]
    positive = same_picture(pool.columns, pool.total, own_id, image_id)  # (B, N)
    if own_id is None:
        queued = positive.new_zeros(len(positive), len(queue))
    else:
        queued = own_id[:, None] == queue.ids[None, :]
    hard = torch.cat([positive, queued], dim=1).to(temp.dtype)
    hard = hard / hard.sum(dim=1, keepdim=True)
    images = torch.cat([twin.columns.image, queue.image[:, None].to(twin.columns.image.dtype)])
    texts = torch.cat([twin.columns.text, queue.text.to(twin.columns.text.dtype)])
    with torch.no_grad():
        target_i2t = soft_targets(similarity(twin.own.image, texts) / temp, hard, alpha)
        target_t2i = soft_targets(similarity(images, twin.own.text).T / temp, hard, alpha)
    candidates = Candidates(images, texts, target_i2t, target_t2i)
    found = itc_loss(feats.image, feats.text, candidates, temp, batch.get("loss_rows"))
    return Contrasted(found.loss, found.sim_i2t[:, : pool.total], found.sim_t2i[:, : pool.total], positive)


@torch.no_grad()
def online_similarities(feats: Features, pool: Pool, temp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sim_i2t`, `sim_t2i` and `positive` of the local rows and the pool, all of the model's own features."""
    own_id = None if pool.image_id is None else pool.image_id[pool.columns]
    sim_i2t = similarity(feats.image.detach(), pool.text_feats.detach()) / temp
    sim_t2i = similarity(pool.image_feats.detach(), feats.text.detach()).T / temp
    return sim_i2t, sim_t2i, same_picture(pool.columns, pool.total, own_id, pool.image_id)


def draw_negatives(
    batch: dict[str, Any],
    seen: Contrasted,
    pool: Pool,
    sampler: NegativeSampler | None,
    floor: float = 0.0,
    hard: bool = True,
) -> Negatives:
    """The hard negatives that the similarities suggest.

    Args:
        batch: optional `rows`, and `seed`, `step` for the keyed draw.
        seen: similarities of the local rows.
        pool: where the negatives are.
        sampler: chooses them; None = the keyed draw.
        floor: as of `hard_negatives`.
        hard: False draws all negatives equally often instead.
    """
    rows = batch.get("rows", pool.columns)
    sims = (seen.sim_t2i, seen.sim_i2t)
    of_text, of_image = sims if hard else map(torch.zeros_like, sims)
    sampler = sampler or KeyedSampler(batch.get("seed", 0), batch.get("step", 0))
    return Negatives(
        hard_negatives(of_text, seen.positive, rows, sampler, "image", floor),
        hard_negatives(of_image, seen.positive, rows, sampler, "text", floor),
        ~seen.positive.all(dim=1),
        _share_with_negatives(pool),
    )


def matching(
    batch: dict[str, Any], pool: Pool, negatives: Negatives, judge: Callable[[Tensor, Tensor], Tensor]
) -> Output:
    """The ITM loss: B pairs, then each image with a wrong text, then each text with a wrong image.

    Args:
        batch: optional `loss_rows`.
        pool: where the texts are.
        negatives: of the local rows.
        judge: ids (3B, T) and mask (3B, T) in this order -> matching logits (3B, 2).

    Returns:
        `loss_itm`; `itm_acc`, the share of pairs judged rightly.
    """
    ids, mask = pool.text_ids[pool.columns], pool.text_mask[pool.columns]
    text_ids = torch.cat([ids, pool.text_ids[negatives.text], ids])
    text_mask = torch.cat([mask, pool.text_mask[negatives.text], mask])
    logits = judge(text_ids, text_mask)
    num_rows = len(ids)
    labels = torch.cat([ids.new_ones(num_rows), ids.new_zeros(2 * num_rows)])
    valid = negatives.valid.float()
    weight = torch.cat([torch.ones_like(valid), valid, valid])
    total = batch.get("loss_rows", max(num_rows, 1)) * (1 + 2 * negatives.share_valid)
    right = ((logits.detach().argmax(1) == labels) * weight).sum() / weight.sum().clamp(min=1)
    return Output(loss_itm=itm_loss(logits, labels, weight, total), itm_acc=right)


def _share_with_negatives(pool: Pool) -> Tensor:
    """Mean over all N rows of whether the pool has a picture other than the row's."""
    if pool.image_id is None:
        return torch.full((), float(pool.total > 1), device=pool.columns.device)  # is not copied there
    same = (pool.image_id[:, None] == pool.image_id[None, :]).sum(dim=1)
    return (same < pool.total).float().mean()


def _pad_to_longest(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pad texts to the longest of all ranks; columns of padding are 0 and False."""
    if dist.world_size() == 1:
        return ids, mask
    longest = dist.max_int(ids.shape[1], ids.device)
    extra = (0, longest - ids.shape[1])
    return F.pad(ids, extra), F.pad(mask, extra)
