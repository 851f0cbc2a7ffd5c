from __future__ import annotations

import torch
from torch import Tensor

from blip.layers.attention import Attention, ImageKeys, KeyValue
from blip.layers.cache import TokenCache, keep_image_keys

WIDTH, HEADS, ITEMS = 12, 3, 4


class Plain:
    """Rows of states, each with all of its own past, moved at every reordering."""

    def __init__(self, states: Tensor, mask: Tensor) -> None:
        self.rows = [row[real] for row, real in zip(states, mask, strict=True)]

    def reorder(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows]

    def step(self, layer: Attention, new: Tensor) -> Tensor:
        self.rows = [torch.cat([row, state]) for row, state in zip(self.rows, new, strict=True)]
        looks = [
            layer(state[None], layer.keys_values(row[None]))
            for row, state in zip(self.rows, new, strict=True)
        ]
        return torch.cat(looks)


def random_rows(copies: int, before: int, num_items: int, items: Tensor) -> Tensor:
    """Any beam of the same item, copy by copy."""
    beams = torch.randint(0, before, (copies, len(items)))
    return (beams * num_items + items).flatten()


def test_beams_look_at_what_they_would_look_at_with_keys_of_their_own() -> None:
    torch.manual_seed(0)
    layers = [Attention(WIDTH, HEADS).double() for _ in range(2)]
    states = torch.randn(ITEMS, 5, WIDTH, dtype=torch.double)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    with torch.no_grad():
        plain = [Plain(states, mask) for _ in layers]
        cache = TokenCache([layer.keys_values(states) for layer in layers], mask)
        copies, num_items = 1, ITEMS
        leaving = {3: torch.tensor([0, 3, 2]), 6: torch.tensor([1])}  # item 1 leaves and 3 takes its place
        for step in range(9):
            after = 3 if step else 1
            items = leaving.get(step)
            rows = random_rows(after, copies, num_items, torch.arange(num_items) if items is None else items)
            cache.reorder(rows, items)
            for row in plain:
                row.reorder(rows)
            copies, num_items = after, num_items if items is None else len(items)
            assert cache.lengths().tolist() == [len(row) for row in plain[0].rows]
            new = torch.randn(copies * num_items, 1, WIDTH, dtype=torch.double)
            cache.advance()
            for i, layer in enumerate(layers):
                seen = layer(new, cache.add(i, layer.keys_values(new)))
                torch.testing.assert_close(seen, plain[i].step(layer, new))


def test_the_prompt_is_kept_once_whatever_the_number_of_beams() -> None:
    torch.manual_seed(0)
    prompt = KeyValue(torch.randn(ITEMS, HEADS, 5, 4), torch.randn(ITEMS, HEADS, 5, 4))
    cache = TokenCache([prompt], torch.ones(ITEMS, 5, dtype=torch.bool))
    cache.reorder(torch.arange(ITEMS).repeat(3), None)
    cache.advance()
    own = KeyValue(torch.randn(3 * ITEMS, HEADS, 1, 4), torch.randn(3 * ITEMS, HEADS, 1, 4))
    (segment,) = cache.add(0, own)
    assert segment.copies == 3
    assert segment.source.key.shape == (ITEMS, HEADS, 5 + 3, 4)
    assert torch.equal(segment.source.value[:, :, :5], prompt.value)
    assert segment.mask is not None
    assert segment.mask[0, 0].int().tolist() == [
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 1, 0, 0, 1],
    ]


def test_images_that_stay_are_not_moved() -> None:
    torch.manual_seed(0)
    layer = KeyValue(torch.randn(5, HEADS, 2, 4), torch.randn(5, HEADS, 2, 4))
    mask = torch.rand(5, 2) > 0.5
    keys = ImageKeys([layer, None], mask)
    items = torch.tensor([0, 4, 2])
    expected = keys.select(items)
    kept = keep_image_keys(keys, items)
    assert kept.rows == 3
    assert kept.layers[1] is None
    assert kept.layers[0] is not None
    assert expected.layers[0] is not None
    assert kept.mask is not None
    for ours, theirs in zip(kept.layers[0], expected.layers[0], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(kept.mask, mask[items])
    assert kept.layers[0].key.data_ptr() == layer.key.data_ptr()
