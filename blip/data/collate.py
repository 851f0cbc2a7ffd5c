"""Samples to batches, and parts of a batch to the whole: typed by value, never by luck."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip.errors import DataError

Tokenize = Callable[[list[str]], dict[str, Tensor]]
"""B texts -> `text_ids` int64 and `text_mask` bool, both (B, T)."""
TokenizeColumns = Mapping[str, Tokenize]
"""Text column -> its tokenizer."""


class Flat(list[Any]):
    """Values of one sample of which there may be any number; in a batch those of all samples stand flat."""


def collate(
    samples: Sequence[dict[str, Any]], tokenize: Tokenize | TokenizeColumns | None = None
) -> dict[str, Any]:
    """One batch of samples that have the same keys.

    Tensors and arrays are stacked; truth values, integers and floats become bool, int64 and float32 tensors
    (B,); strings and everything else a list of B values. Of `Flat` values, A in all samples together, become
    a tensor (A,) or a list.

    Args:
        samples: of B rows.
        tokenize: what adds `text_ids` and `text_mask` of `text_input`, and `X_ids` and `X_mask` of another
            column X; a single tokenizer is for `text_input`. Columns that the samples lack are skipped.

    Raises:
        DataError: samples with different keys, or tensors of different shape.
    """
    keys = set(samples[0])
    for sample in samples[1:]:
        if set(sample) != keys:
            raise DataError(_difference("keys", samples[0], sample, sorted(keys ^ set(sample))))
    batch = {key: _stack(key, [sample[key] for sample in samples], samples) for key in samples[0]}
    columns = {"text_input": tokenize} if callable(tokenize) else tokenize or {}
    for column, encode in columns.items():
        if column in batch:
            name = column.removesuffix("_input")
            tokens = encode(batch[column])
            batch.update({key.replace("text", name, 1): value for key, value in tokens.items()})
    return batch


def _stack(key: str, values: list[Any], samples: Sequence[dict[str, Any]]) -> Any:
    if isinstance(values[0], Flat):
        values = [value for several in values for value in several]
        if not values:
            return values
    first = values[0]
    if isinstance(first, np.ndarray):
        values = [torch.from_numpy(value) for value in values]
        first = values[0]
    if isinstance(first, Tensor):
        for value, sample in zip(values, samples, strict=True):
            if value.shape != first.shape:
                shapes = [f"{key} {tuple(value.shape)}", f"{key} {tuple(first.shape)}"]
                raise DataError(_difference("shapes", samples[0], sample, shapes))
        return torch.stack(values)
    kinds = {type(value) for value in values}
    if kinds <= {bool, np.bool_}:
        return torch.tensor(values, dtype=torch.bool)
    if all(issubclass(kind, int | np.integer) for kind in kinds):
        return torch.tensor([int(value) for value in values], dtype=torch.int64)
    if all(issubclass(kind, int | float | np.number) for kind in kinds):
        return torch.tensor([float(value) for value in values], dtype=torch.float32)
    return values


def _difference(what: str, a: dict[str, Any], b: dict[str, Any], details: list[str]) -> str:
    names = " and ".join(repr(sample.get("instance_id", "?")) for sample in (a, b))
    return (
        f"samples {names} of one batch have different {what} ({', '.join(details)}); give their datasets the"
        " same columns and image size, or a sample_ratio each, so that every batch comes from one of them"
    )


def merge(parts: Sequence[dict[str, Any]], pad_id: int = 0, pin: bool = False) -> dict[str, Any]:
    """One batch of the parts that the workers made, rows in order.

    Args:
        parts: batches with the same keys. Two-dimensional tensors are texts: they are padded on the right
            to the longest part, ids with `pad_id`, masks with False.
        pad_id: id of the padding token.
        pin: give the tensors page-locked memory, for asynchronous copies to a GPU.
    """
    merged: dict[str, Any] = {}
    for part in parts[1:]:
        if part.keys() != parts[0].keys():
            one, other = ({"instance_id": p.get("instance_id", "?")[0]} for p in (parts[0], part))
            raise DataError(_difference("keys", one, other, sorted(parts[0].keys() ^ part.keys())))
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, Tensor):
            merged[key] = _concatenate(values, pad_id, pin)
        else:
            merged[key] = [item for value in values for item in value]
    return merged


def _concatenate(values: list[Tensor], pad_id: int, pin: bool) -> Tensor:
    first = values[0]
    if len(values) == 1:
        return first.pin_memory() if pin else first
    rows = sum(len(value) for value in values)
    if first.ndim != 2:
        return torch.cat(values, out=torch.empty((rows, *first.shape[1:]), dtype=first.dtype, pin_memory=pin))
    width = max(value.shape[1] for value in values)
    fill = False if first.dtype == torch.bool else pad_id
    whole = torch.full((rows, width), fill, dtype=first.dtype, pin_memory=pin)
    start = 0
    for value in values:
        whole[start : start + len(value), : value.shape[1]] = value
        start += len(value)
    return whole
