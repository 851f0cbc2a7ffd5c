"""Keys and values of the tokens written so far, for generation: kept per item, shared by its beams.

Beams of an item that have words in common look at the same columns. Which columns a beam sees is a mask, so
following other beams moves no keys, and what all beams see (the prompt, the Q-Former's queries) exists once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip.layers.attention import ImageKeys, KeyValue, Segment


class TokenCache:
    """Self-attention keys and values, (B, H, S, D / H) per layer; rows lie copy by copy (row r: item r % B).

    Args:
        prompt: keys and values of the prompts, per layer, P columns.
        mask: bool (B, P), True = may be seen.
    """

    def __init__(self, prompt: list[KeyValue], mask: Tensor) -> None:
        self._layers = prompt
        self._seen = mask[:, None]  # (B, copies, S)

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        """Continue other rows (`StepDecoder.reorder`)."""
        num_items = self._seen.shape[0]
        copies = (rows // num_items).unflatten(0, (-1, num_items if items is None else len(items))).T
        if items is not None:
            self._layers = [_keep(layer, items) for layer in self._layers]
            self._seen = self._seen[items]
        self._seen = self._seen.take_along_dim(copies[:, :, None], dim=1)

    def lengths(self) -> Tensor:
        """int64 (R,): columns that each row sees so far; without queries, the position of its next token."""
        return self._seen.sum(dim=2).T.flatten()

    def advance(self) -> None:
        """Make room for the next token of every row, once, before the layers `add` theirs."""
        items, copies, start = self._seen.shape
        itself = torch.eye(copies, dtype=torch.bool, device=self._seen.device).expand(items, -1, -1)
        self._seen = torch.cat([self._seen, itself], dim=2)
        end = start + copies
        if end > self._layers[0].key.shape[2]:
            # Twice the room each time, so that a column is moved about once.
            self._layers = [KeyValue(*(_longer(x, 2 * end) for x in layer)) for layer in self._layers]

    def add(self, layer: int, own: KeyValue) -> list[Segment]:
        """Write a layer's keys and values of the new tokens, (R, H, 1, D / H). -> what these look at."""
        copies, end = self._seen.shape[1:]
        for kept, new in zip(self._layers[layer], own, strict=True):
            columns = new.squeeze(2).unflatten(0, (copies, -1)).permute(1, 2, 0, 3)  # (B, H, copies, D / H)
            kept[:, :, end - copies : end] = columns
        key, value = (x[:, :, :end] for x in self._layers[layer])
        return [Segment(KeyValue(key, value), copies, self._seen[:, None])]


def keep_image_keys(keys: ImageKeys, items: Tensor) -> ImageKeys:
    """The images `items` (B',) of `StepDecoder.reorder`, in the memory of `keys`, which is used up."""
    mask = None if keys.mask is None else keys.mask.index_select(0, items)
    return ImageKeys([kv and _keep(kv, items) for kv in keys.layers], mask)


def _keep(kv: KeyValue, items: Tensor) -> KeyValue:
    """Some items' keys and values, in place: only those that change places are copied."""
    moved = (items != torch.arange(len(items), device=items.device)).nonzero()[:, 0]
    for x in kv:
        x[moved] = x[items[moved]]
    return KeyValue(kv.key[: len(items)], kv.value[: len(items)])


def _longer(x: Tensor, room: int) -> Tensor:
    """(B, H, S, D / H) with room for more columns."""
    longer = x.new_empty(*x.shape[:2], room, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer
