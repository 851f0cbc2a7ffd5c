import pytest
import torch

from blip.layers.attention import Attention, KeyValue, Segment, attend, attend_segments


def test_rows_side_by_side_attend_as_if_keys_were_repeated() -> None:
    torch.manual_seed(0)
    source = KeyValue(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4))
    foreign = source.select(torch.tensor([2, 0, 1]))
    query = torch.randn(9, 2, 6, 4)
    got = attend_segments(query, [Segment(source, 2), Segment(foreign)], 0.0)
    key = torch.cat([source.key, source.key, foreign.key])
    value = torch.cat([source.value, source.value, foreign.value])
    torch.testing.assert_close(got, attend(query, KeyValue(key, value), None, 0.0))


@pytest.mark.parametrize("kv_width", [None, 10])
def test_attention_is_the_formula(kv_width: int | None) -> None:
    torch.manual_seed(0)
    block = Attention(8, 2, kv_width=kv_width).double()
    hidden = torch.randn(2, 3, 8, dtype=torch.double)
    states = hidden if kv_width is None else torch.randn(2, 5, kv_width, dtype=torch.double)
    mask = torch.rand(2, 1, 3, states.shape[1]) > 0.4
    mask[..., 0] = True
    got = block(hidden, block.keys_values(states), mask)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = block.query(hidden)[..., part], block.key(states)[..., part], block.value(states)[..., part]
        scores = (q @ k.transpose(1, 2) / 2).masked_fill(~mask[:, 0], -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = block.norm(hidden + block.out(torch.cat(heads, -1)))
    torch.testing.assert_close(got, expected)
