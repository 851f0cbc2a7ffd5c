"""BLIP-2's stage-1 losses and masks in plain loops, for comparison (BLIP-2, sections 3.1 and 3.2).

Nothing here is shared with the library and nothing is fast: every probability is written out. Tests import it
as `tests.reference.stage1`; pytest's `pythonpath = ["."]` makes that a namespace package.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = -10000.0


def log_softmax(row: Tensor) -> Tensor:
    """log(exp(x_j) / sum_k exp(x_k)) of one row, (N,)."""
    shifted = row - row.max()
    return shifted - shifted.exp().sum().log()


def smoothed_cross_entropy(row: Tensor, label: int, smoothing: float) -> Tensor:
    """Cross-entropy of one row with the label's share 1 - s + s/N and s/N for every other class."""
    log_probs = log_softmax(row)
    num_classes = len(row)
    loss = row.new_zeros(())
    for j in range(num_classes):
        share = smoothing / num_classes + (1 - smoothing if j == label else 0.0)
        loss = loss - share * log_probs[j]
    return loss


def best_query(queries: Tensor, text: Tensor) -> Tensor:
    """The largest of the products of an image's queries (Q, E) with a text (E,)."""
    best = torch.dot(queries[0], text)
    for query in queries[1:]:
        best = torch.maximum(best, torch.dot(query, text))
    return best


def itc_similarities(image_feats: Tensor, text_feats: Tensor, temp: Tensor) -> tuple[Tensor, Tensor]:
    """image_feats (B, Q, E), text_feats (B, E) -> sim_i2t, sim_t2i (B, B), divided by the temperature."""
    rows = range(len(text_feats))
    i2t = torch.stack([torch.stack([best_query(image_feats[i], text_feats[j]) for j in rows]) for i in rows])
    t2i = torch.stack([torch.stack([best_query(image_feats[j], text_feats[i]) for j in rows]) for i in rows])
    return i2t / temp, t2i / temp


def soft_target(ids: list[int], row: int, smoothing: float) -> list[float]:
    """Equal shares for the columns with the row's picture, and the rest spread over all columns."""
    same = [float(other == ids[row]) for other in ids]
    return [(1 - smoothing) * s / sum(same) + smoothing / len(ids) for s in same]


def itc_loss(
    image_feats: Tensor,
    text_feats: Tensor,
    temp: Tensor,
    smoothing: float = 0.1,
    image_id: list[int] | None = None,
) -> Tensor:
    """Mean over rows and both directions; with `image_id` all texts of a picture are right."""
    total = text_feats.new_zeros(())
    num_rows = len(text_feats)
    for sim in itc_similarities(image_feats, text_feats, temp):
        for i in range(num_rows):
            if image_id is None:
                total = total + smoothed_cross_entropy(sim[i], i, smoothing)
                continue
            log_probs = log_softmax(sim[i])
            for share, log_prob in zip(soft_target(image_id, i, smoothing), log_probs, strict=True):
                total = total - share * log_prob
    return total / (2 * num_rows)


def negative_weights(sim: Tensor, image_id: list[int] | None = None) -> Tensor:
    """(B, B) probabilities of drawing each column as a row's negative."""
    ids = list(range(len(sim))) if image_id is None else image_id
    rows = []
    for i, row in enumerate(sim):
        masked = [row.new_tensor(NEVER) if ids[j] == ids[i] else row[j] for j in range(len(row))]
        rows.append(log_softmax(torch.stack(masked)).exp())
    return torch.stack(rows)


def itm_loss(logits: Tensor, labels: list[int]) -> Tensor:
    """Mean cross-entropy of (R, 2) logits."""
    losses = [smoothed_cross_entropy(row, label, 0.0) for row, label in zip(logits, labels, strict=True)]
    return torch.stack(losses).mean()


def itm_logits(query_output: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The matching head on every query (R, Q, D), then the mean over queries: (R, 2)."""
    rows = [torch.stack([weight @ query + bias for query in queries]).mean(dim=0) for queries in query_output]
    return torch.stack(rows)


def lm_loss(logits: Tensor, text_ids: Tensor, text_mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """Each real token from the logits one place before it; mean over tokens. logits (B, T, V)."""
    losses = []
    for row in range(len(text_ids)):
        for t in range(1, text_ids.shape[1]):
            if text_mask[row, t]:
                losses.append(smoothed_cross_entropy(logits[row, t - 1], int(text_ids[row, t]), smoothing))
    return torch.stack(losses).mean()


def mask(objective: str, num_query: int, text_mask: list[list[bool]]) -> list[list[list[bool]]]:
    """May position `i` see position `j`? Queries first, then the text; one table per row of the batch."""
    tables = []
    for real in text_mask:
        total = num_query + len(real)
        table = [[False] * total for _ in range(total)]
        for i in range(total):
            for j in range(total):
                i_is_query, j_is_query = i < num_query, j < num_query
                if not j_is_query and not real[j - num_query]:
                    continue
                if objective == "itc":
                    table[i][j] = i_is_query == j_is_query
                elif objective == "itm":
                    table[i][j] = True
                elif i_is_query:
                    table[i][j] = j_is_query
                else:
                    table[i][j] = j_is_query or j <= i
        tables.append(table)
    return tables
