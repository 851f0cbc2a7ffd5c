"""What a batch is contrasted with, gathered from all ranks, and the hard negatives found there.

Shared by every model with an ITC and an ITM loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip import dist
from blip.batch import Output
from blip.losses import (
    Candidates,
    ItcOutput,
    KeyedSampler,
    NegativeSampler,
    hard_negatives,
    itc_loss,
    same_picture,
    smoothed_targets,
)
from blip.models.qformer import ImageKeys


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
    """Keys of all N images where they are at hand (one process, one micro-batch)."""
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


class Contrasted(NamedTuple):
    """Local rows beside the pool."""

    itc: ItcOutput
    positive: Tensor
    """bool (B, N): columns that show the row's picture."""

    def figures(self, temp: Tensor) -> Output:
        """`loss_itc`; `itc_acc`, the share of images whose best text is right; `temp`."""
        best = self.itc.sim_i2t.detach().argmax(dim=1, keepdim=True)
        right = self.positive.gather(1, best).float().sum() / max(len(best), 1)
        return Output(loss_itc=self.itc.loss, itc_acc=right, temp=temp.detach().clone())


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
    return Contrasted(itc_loss(feats.image, feats.text, candidates, temp, batch.get("loss_rows")), positive)


def draw_negatives(
    batch: dict[str, Any], seen: Contrasted, pool: Pool, sampler: NegativeSampler | None
) -> Negatives:
    """The hard negatives that the similarities suggest.

    Args:
        batch: optional `rows`, and `seed`, `iters` for the keyed draw.
        seen: similarities of the local rows.
        pool: where the negatives are.
        sampler: chooses them; None = the keyed draw.
    """
    rows = batch.get("rows", pool.columns)
    sampler = sampler or KeyedSampler(batch.get("seed", 0), batch.get("iters", 0))
    return Negatives(
        hard_negatives(seen.itc.sim_t2i, seen.positive, rows, sampler, "image"),
        hard_negatives(seen.itc.sim_i2t, seen.positive, rows, sampler, "text"),
        ~seen.positive.all(dim=1),
        _share_with_negatives(pool),
    )


def targets_only(hidden: Tensor, labels: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Rows that have a target, so that no logits are computed for padding.

    Args:
        hidden: (M, D).
        labels: int64 (M,), -100 = no target.
        count: number of targets, where the host knows it. Without it a GPU keeps all rows, since counting
            them would make it wait.
    """
    if labels.device.type == "cpu":
        index = (labels != -100).nonzero()[:, 0]
    elif count is not None:
        index = torch.nonzero_static(labels != -100, size=count)[:, 0]
    else:
        return hidden, labels
    return hidden.index_select(0, index), labels.index_select(0, index)


def _share_with_negatives(pool: Pool) -> Tensor:
    """Mean over all N rows of whether the pool has a picture other than the row's."""
    if pool.image_id is None:
        return torch.tensor(float(pool.total > 1), device=pool.columns.device)
    same = (pool.image_id[:, None] == pool.image_id[None, :]).sum(dim=1)
    return (same < pool.total).float().mean()


def _pad_to_longest(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pad texts to the longest of all ranks; columns of padding are 0 and False."""
    if dist.world_size() == 1:
        return ids, mask
    longest = dist.max_int(ids.shape[1], ids.device)
    extra = (0, longest - ids.shape[1])
    return F.pad(ids, extra), F.pad(mask, extra)
