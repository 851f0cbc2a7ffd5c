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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip.batch import Output

Scale = Callable[[Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]
Seed = Callable[[int], None]


class Cacheable(Protocol):
    """The steps of a contrastive model's forward pass that cached accumulation runs one by one."""

    def image_states(self, batch: dict[str, Any]) -> Tensor:
        """States of the vision tower (B, P, D_image)."""
        ...

    def trains_states(self, batch: dict[str, Any]) -> bool:
        """Whether those states have a gradient."""
        ...

    def represent(self, batch: dict[str, Any], states: Tensor) -> Any:
        """The uni-modal passes; has `image_feats` and `text_feats`."""
        ...

    def pool(
        self, batch: dict[str, Any], image_feats: Tensor, text_feats: Tensor, states: Tensor, **how: Any
    ) -> Any:
        """The global batch."""
        ...

    def contrast(self, batch: dict[str, Any], image_feats: Tensor, text_feats: Tensor, pool: Any) -> Any:
        """The contrastive loss and the negatives."""
        ...

    def match(self, batch: dict[str, Any], seen: Any, pool: Any, negatives: Any) -> Output:
        """The matching loss."""
        ...

    def narrate(self, batch: dict[str, Any], seen: Any) -> Output:
        """The language-modelling loss."""
        ...


def cached_step(
    model: Cacheable, batches: list[dict[str, Any]], scale: Scale, autocast: Autocast, seed: Seed
) -> Output:
    """Gradients of one optimizer step over all micro-batches as one batch; returns its losses and figures.

    Args:
        model: unwrapped; the caller averages the gradients over the ranks afterwards.
        batches: micro-batches with `text_ids`, `text_mask`, `rows`, `batch_total`, `loss_rows` of the whole step.
        scale: loss scaling, the identity where none is used.
        autocast: context of the forward passes.
        seed: seeds dropout for a micro-batch, so that it draws the same both times.
    """
    with autocast():
        states, image_feats, text_feats = _without_graph(model, batches, seed)
        trained_tower = model.trains_states(batches[0])
        all_states = torch.cat(states).requires_grad_(trained_tower)
        all_image = torch.cat(image_feats).requires_grad_()
        all_text = torch.cat(text_feats).requires_grad_()
        whole = _join(batches)
        pool = model.pool(whole, all_image, all_text, all_states, in_row_order=False)
        output, negatives = model.contrast(whole, all_image, all_text, pool)
    scale(output.loss_itc).backward()
    assert all_image.grad is not None
    assert all_text.grad is not None

    parts: list[Output] = []
    for i, (batch, rows) in enumerate(_with_rows(batches)):
        seed(i)
        with autocast():
            seen = model.represent(batch, all_states[rows])
            part = model.narrate(batch, seen)
            own = pool._replace(columns=pool.columns[rows])
            part.update(model.match(batch, seen, own, negatives.of(rows)))
        # The features' gradients carry the loss scale already.
        towards = (seen.image_feats * all_image.grad[rows]).sum() + (
            seen.text_feats * all_text.grad[rows]
        ).sum()
        (scale(part.loss_itm + part.loss_lm) + towards).backward()
        parts.append(Output({k: v.detach() for k, v in part.items()}))

    if trained_tower:
        assert all_states.grad is not None
        for i, (batch, rows) in enumerate(_with_rows(batches)):
            seed(-1 - i)
            with autocast():
                state = model.image_states(batch)
            state.backward(all_states.grad[rows].to(state.dtype))
    return _total(output, parts)


def _with_rows(batches: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], slice]]:
    """Each micro-batch with its rows in the step's own rows."""
    start = 0
    for batch in batches:
        stop = start + len(batch["rows"])
        yield batch, slice(start, stop)
        start = stop


def _without_graph(
    model: Cacheable, batches: list[dict[str, Any]], seed: Seed
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    states, image_feats, text_feats = [], [], []
    for i, batch in enumerate(batches):
        with torch.no_grad():
            seed(-1 - i)
            state = model.image_states(batch)
            seed(i)
            seen = model.represent(batch, state)
        states.append(state)
        image_feats.append(seen.image_feats)
        text_feats.append(seen.text_feats)
    return states, image_feats, text_feats


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


def _total(output: Output, parts: list[Output]) -> Output:
    """Losses are shares of the whole batch's and add up; figures such as accuracies are averaged."""
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        output[name] = values.sum() if name.startswith("loss") else values.mean()
    output["loss"] = output.loss_itc.detach() + output.loss_itm + output.loss_lm
    output["loss_itc"] = output.loss_itc.detach()
    return output
