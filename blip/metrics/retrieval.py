"""Measures of rankings: recall at k of image-text retrieval, with LAVIS's names, and ROC-AUC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip.errors import DataError

RECALL_AT = (1, 5, 10)
NOT_FOUND = 1 << 40
"""Rank of an answer that is not among the candidates."""

_CHUNK = 1 << 22
"""Scores that are compared at once."""


def recalls(scores_i2t: Any, scores_t2i: Any, txt2img: Sequence[int]) -> dict[str, float]:
    """Recalls of both directions from score matrices.

    Args:
        scores_i2t: (images, texts), tensor or array; what images find among texts.
        scores_t2i: (texts, images); what texts find among images.
        txt2img: the image that each text belongs to; an image may have several texts or none.

    Returns:
        As `recalls_from_ranks`; images without a text are left out.
    """
    truth = torch.as_tensor(np.asarray(txt2img, dtype=np.int64))
    image_ranks = ranks_of_images(torch.as_tensor(scores_i2t), truth)
    text_ranks = ranks_of_texts(torch.as_tensor(scores_t2i), truth)
    has_text = torch.bincount(truth, minlength=len(image_ranks)) > 0
    return recalls_from_ranks(image_ranks[has_text].numpy(), text_ranks.numpy())


def ranks_of_images(scores: Tensor, txt2img: Tensor) -> Tensor:
    """Rank of each image's best own text: how many texts of other images score at least as high.

    A tie counts against the model, so a constant score finds nothing and no order of the data helps. A
    score of -inf or NaN means that a pair is no candidate; an image without one gets `NOT_FOUND`.

    Args:
        scores: (images, texts), any device.
        txt2img: int64 (texts,), the image that each text belongs to.

    Returns:
        int64 (images,), on the CPU, from 0.
    """
    found = []
    owner = txt2img.to(scores.device)
    for start, rows in _row_blocks(scores):
        own = owner[None, :] == torch.arange(start, start + len(rows), device=rows.device)[:, None]
        best = rows.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        found.append(_count(rows, best, ~own))
    return torch.cat(found)


def ranks_of_texts(scores: Tensor, txt2img: Tensor) -> Tensor:
    """Rank of each text's image: how many other images score at least as high; ties and gaps as above.

    Args:
        scores: (texts, images), any device.
        txt2img: int64 (texts,), the image that each text belongs to.

    Returns:
        int64 (texts,), on the CPU, from 0.
    """
    found = []
    owner = txt2img.to(scores.device)
    for start, rows in _row_blocks(scores):
        mine = owner[start : start + len(rows), None]
        others = torch.arange(rows.shape[1], device=rows.device)[None, :] != mine
        found.append(_count(rows, rows.gather(1, mine), others))
    return torch.cat(found)


def recalls_from_ranks(
    image_ranks: np.ndarray, text_ranks: np.ndarray, medians: bool = False
) -> dict[str, float]:
    """LAVIS's recall table, in percent.

    Args:
        image_ranks: one per image, from 0: rank of its best own text.
        text_ranks: one per text, from 0: rank of its image.
        medians: add `txt_mdR` and `img_mdR`, the median ranks, from 1, as they are reported for videos; the
            second is BLIP's `vid_mdR`. What is not found counts as the last of all.

    Returns:
        `txt_r1 txt_r5 txt_r10 txt_r_mean` (images find texts), `img_r1 img_r5 img_r10 img_r_mean` (texts find
        images), `r_mean` (mean of the two means).
    """
    table: dict[str, float] = {}
    for name, ranks in (("txt", image_ranks), ("img", text_ranks)):
        ranks = np.asarray(ranks)
        values = [100.0 * float((ranks < k).sum()) / max(len(ranks), 1) for k in RECALL_AT]
        table |= {f"{name}_r{k}": value for k, value in zip(RECALL_AT, values, strict=True)}
        table[f"{name}_r_mean"] = sum(values) / len(values)
        if medians:
            last = len(text_ranks if name == "txt" else image_ranks)
            table[f"{name}_mdR"] = float(np.median(np.minimum(ranks + 1, last))) if len(ranks) else 0.0
    table["r_mean"] = (table["txt_r_mean"] + table["img_r_mean"]) / 2
    return table


def _row_blocks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows with their first row's number; NaN becomes -inf, since no comparison would count it."""
    rows = max(_CHUNK // max(scores.shape[1], 1), 1)
    for start in range(0, len(scores), rows):
        block = scores[start : start + rows]
        yield start, block.masked_fill(block.isnan(), -torch.inf)


def _count(rows: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """How many wrong candidates score at least as high as the right one (rows, 1)."""
    ranks = ((rows >= right) & wrong).sum(dim=1)
    return ranks.masked_fill(right[:, 0] == -torch.inf, NOT_FOUND).cpu()


def ndcg(ranks: Sequence[int], relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain of one ranking, 0 to 1, as VisDial measures it.

    Gains are counted down to as many places as there are relevant candidates.

    Args:
        ranks: place of each candidate, from 1.
        relevance: of each candidate; some are above 0.

    Raises:
        DataError: not of the same candidates, or nothing is relevant.
    """
    gains = np.asarray(relevance, dtype=np.float64)
    places = np.asarray(ranks, dtype=np.int64)
    if len(places) != len(gains) or not gains.any():
        raise DataError(
            f"{len(places)} candidates are ranked and {np.count_nonzero(gains)} of {len(gains)} relevant"
        )
    count = int(np.count_nonzero(gains))
    discounts = 1 / np.log2(np.arange(count) + 2)
    ranked = gains[np.argsort(places, kind="stable")]
    return float(ranked[:count] @ discounts / (np.sort(gains)[::-1][:count] @ discounts))


def rank_scores(ranks: Sequence[int]) -> dict[str, float]:
    """VisDial's measures of where the right candidate stands, from 1.

    Returns:
        `MRR`, `R_1`, `R_5`, `R_10` in percent, and `mean_rank`; nothing where there are no ranks.
    """
    places = np.asarray(ranks, dtype=np.float64)
    if not len(places):
        return {}
    found = {"MRR": 100 * math.fsum(1 / places) / len(places)}
    found |= {f"R_{k}": 100 * float((places <= k).mean()) for k in RECALL_AT}
    return found | {"mean_rank": math.fsum(places) / len(places)}


def roc_auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a positive one scores above a negative one, ties half.

    Args:
        scores: of N items; a higher one says positive.
        positive: which they are; some of each kind.

    Returns:
        Share of the pairs, 0 to 1 (Mann and Whitney's U, divided by their number).
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    negative = np.sort(values[~truth])
    below = np.searchsorted(negative, values[truth], side="left")
    up_to = np.searchsorted(negative, values[truth], side="right")
    return float((below + up_to).sum() / (2 * len(negative) * truth.sum()))
