"""Cached accumulation: the contrastive gradient of a large batch in the memory of a small one.

Averaging micro-batches is wrong for a contrastive loss, whose every row looks at every column. Here the
features of all micro-batches are computed first without a graph, the contrastive loss is taken over all of
them, and its gradients with respect to the features are handed to each micro-batch when it is computed again
with a graph (gradient cache, arXiv 2101.06983). Images drawn as negatives from other micro-batches get their
gradients the same way, so the result is that of the one big batch, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip.batch import Output

Scale = Callable[[Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]
Seed = Callable[[int], None]


@runtime_checkable
class Cacheable(Protocol):
    """The steps of a contrastive model's forward pass that cached accumulation runs one by one."""

    def objectives(self) -> frozenset[str]:
        """The losses to compute: `itc`, `itm`, `lm`, or some of them."""
        ...

    def image_states(self, batch: dict[str, Any]) -> Tensor:
        """States of the vision tower (B, P, D_image)."""
        ...

    def trains_states(self, batch: dict[str, Any]) -> bool:
        """Whether those states have a gradient."""
        ...

    def represent(self, batch: dict[str, Any], states: Tensor) -> Any:
        """The uni-modal passes; `feats` is a named tuple of features, or None where nothing is contrasted."""
        ...

    def pool(self, batch: dict[str, Any], feats: Any, states: Tensor, **how: Any) -> Any:
        """The global batch."""
        ...

    def contrast(self, batch: dict[str, Any], feats: Any, pool: Any) -> tuple[Output, Any]:
        """The contrastive loss where wanted, and the negatives where wanted, else None."""
        ...

    def match(self, batch: dict[str, Any], seen: Any, pool: Any, negatives: Any) -> Output:
        """The matching loss."""
        ...

    def narrate(self, batch: dict[str, Any], seen: Any) -> Output:
        """The language-modelling loss."""
        ...


class Contrasted(NamedTuple):
    """What the contrast of the whole step leaves for its micro-batches."""

    output: Output
    feats: list[Tensor]
    """Of all rows of this rank; they have gradients, scaled, where the contrastive loss is wanted."""
    pool: Any
    negatives: Any


def cached_step(
    model: Cacheable, batches: list[dict[str, Any]], scale: Scale, autocast: Autocast, seed: Seed
) -> Output:
    """Gradients of one optimizer step over all micro-batches as one batch; returns its losses and figures.

    Args:
        model: unwrapped; the caller averages the gradients over the ranks afterwards.
        batches: micro-batches with `text_ids`, `text_mask`, `rows`, `batch_total`, and `loss_rows` and
            `loss_tokens` of the whole step.
        scale: loss scaling, the identity where none is used.
        autocast: context of the forward passes.
        seed: seeds dropout for a micro-batch, so that it draws the same both times.
    """
    trained_tower = model.trains_states(batches[0])
    with autocast():
        states, feats = _without_graph(model, batches, seed)
        all_states = torch.cat(states).requires_grad_(trained_tower)
        whole = _contrast(model, batches, feats, all_states)
    if "loss_itc" in whole.output:
        scale(whole.output.loss_itc).backward()

    parts = []
    for i, (batch, rows) in enumerate(_with_rows(batches)):
        seed(i)
        with autocast():
            seen = model.represent(batch, all_states[rows])
            part = _losses(model, batch, seen, rows, whole)
        _target(part, seen, rows, whole, scale).backward()
        parts.append(Output({k: v.detach() for k, v in part.items()}))

    if trained_tower:
        assert all_states.grad is not None
        for i, (batch, rows) in enumerate(_with_rows(batches)):
            seed(-1 - i)
            with autocast():
                state = model.image_states(batch)
            state.backward(all_states.grad[rows].to(state.dtype))
    return _total(whole.output, parts, [len(batch["rows"]) for batch in batches])


def _without_graph(
    model: Cacheable, batches: list[dict[str, Any]], seed: Seed
) -> tuple[list[Tensor], list[Any]]:
    """The tower's states and the features of every micro-batch."""
    states, feats = [], []
    contrasts = not model.objectives().isdisjoint({"itc", "itm"})
    for i, batch in enumerate(batches):
        with torch.no_grad():
            seed(-1 - i)
            states.append(model.image_states(batch))
            if contrasts:
                seed(i)
                feats.append(model.represent(batch, states[-1]).feats)
    return states, feats


def _contrast(
    model: Cacheable, batches: list[dict[str, Any]], feats: list[Any], all_states: Tensor
) -> Contrasted:
    """The contrastive loss over all micro-batches, with the features as leaves."""
    if not feats:
        return Contrasted(Output(), [], None, None)
    joined = [torch.cat(parts).requires_grad_() for parts in zip(*feats, strict=True)]
    whole, all_feats = _join(batches), type(feats[0])(*joined)
    pool = model.pool(whole, all_feats, all_states, in_row_order=False)
    output, negatives = model.contrast(whole, all_feats, pool)
    return Contrasted(output, joined, pool, negatives)


def _losses(model: Cacheable, batch: dict[str, Any], seen: Any, rows: slice, whole: Contrasted) -> Output:
    """A micro-batch's own losses and figures, in the order of the model's forward pass."""
    part = model.narrate(batch, seen) if "lm" in model.objectives() else Output()
    if whole.negatives is not None:
        own = whole.pool._replace(columns=whole.pool.columns[rows])
        part.update(model.match(batch, seen, own, whole.negatives.of(rows)))
    return part


def _target(part: Output, seen: Any, rows: slice, whole: Contrasted, scale: Scale) -> Tensor:
    """The scalar whose gradient is the micro-batch's share of the step's."""
    losses = [value for name, value in part.items() if name.startswith("loss")]
    terms = [scale(torch.stack(losses).sum())] if losses else []
    if "loss_itc" in whole.output:
        for feats, leaf in zip(seen.feats, whole.feats, strict=True):
            assert leaf.grad is not None
            terms.append((feats * leaf.grad[rows]).sum())  # scaled already
    return torch.stack(terms).sum()


def _with_rows(batches: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], slice]]:
    """Each micro-batch with its rows in the step's own rows."""
    start = 0
    for batch in batches:
        stop = start + len(batch["rows"])
        yield batch, slice(start, stop)
        start = stop


def _join(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The micro-batches as one batch; texts are padded to the longest."""
    whole = {k: v for k, v in batches[0].items() if not isinstance(v, Tensor | list)}
    for name in ("rows", "image_id"):
        if name in batches[0]:
            whole[name] = torch.cat([batch[name] for batch in batches])
    for name in ("text_ids", "text_mask"):
        whole[name] = pad_sequence([row for batch in batches for row in batch[name]], batch_first=True)
    whole["batch_total"] = sum(batch["batch_total"] for batch in batches)
    whole["loss_rows"] = batches[0]["loss_rows"]
    return whole


def _total(output: Output, parts: list[Output], rows: list[int]) -> Output:
    """Losses are shares of the whole batch's and add up; accuracies are averaged over the rows."""
    total = Output({name: value.detach() for name, value in output.items()})
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        if name.startswith("loss"):
            total[name] = values.sum()
        else:
            total[name] = (values * values.new_tensor(rows)).sum() / max(sum(rows), 1)
    total["loss"] = torch.stack([value for name, value in total.items() if name.startswith("loss")]).sum()
    return total
