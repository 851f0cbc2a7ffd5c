import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


def norm_of(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight, 1, 0.5)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("trained", [False, True], ids=["frozen tower", "trained tower"])
def test_a_norm_in_the_matrices_is_the_norm_of_the_states(trained: bool) -> None:
    torch.manual_seed(0)
    block, norm = Attention(8, 2, kv_width=6).double(), norm_of(6).double()
    states = torch.randn(2, 5, 6, dtype=torch.double, requires_grad=trained)
    leaves = [block.key.weight, block.key.bias, block.value.weight, block.value.bias, norm.weight, norm.bias]
    leaves += [states] if trained else []
    out = torch.randn(2, 2, 2, 5, 4, dtype=torch.double)

    plain = F.layer_norm(states, (6,))
    folded = torch.stack(block.keys_values(plain, norm))
    apart = torch.stack(block.keys_values(norm(states)))
    torch.testing.assert_close(folded, apart, atol=1e-12, rtol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(folded, leaves, out), torch.autograd.grad(apart, leaves, out), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_under_autocast_a_norm_in_the_matrices_rounds_no_more_than_apart() -> None:
    torch.manual_seed(0)
    block, norm = Attention(64, 4, kv_width=96), norm_of(96)
    states = torch.randn(4, 50, 96)
    plain = F.layer_norm(states, (96,))
    exact = torch.stack(block.keys_values(norm(states)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded, apart = (
            torch.stack(block.keys_values(plain, norm)),
            torch.stack(block.keys_values(norm(states))),
        )
    assert folded.dtype == apart.dtype == torch.bfloat16
    assert (folded - exact).square().mean() < 1.2 * (apart - exact).square().mean()
