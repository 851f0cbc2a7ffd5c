from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip.layers.text import FeedForward, LMHead, TextEmbedding, _GeluLinear, init_bert


def apart(block: FeedForward, hidden: Tensor) -> Tensor:
    """The feed-forward as `nn.Linear` and autograd compute it."""
    return block.norm(hidden + block.contract(F.gelu(block.expand(hidden))))


def grads(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(7)
    return torch.autograd.grad(output, leaves, torch.randn_like(output))


def test_gelu_linear_passes_gradcheck_twice_differentiated() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(_GeluLinear.apply, inputs)
    assert torch.autograd.gradgradcheck(_GeluLinear.apply, inputs)


def test_the_feed_forward_is_linear_gelu_linear() -> None:
    torch.manual_seed(0)
    block = FeedForward(6, 10, 0.0, 1e-12).double()
    hidden = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    leaves = [hidden, *block.parameters()]
    got, expected = block(hidden), apart(block, hidden)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    for a, b in zip(grads(got, leaves), grads(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_under_autocast_it_rounds_as_nn_linear_does() -> None:
    torch.manual_seed(0)
    block = FeedForward(16, 32, 0.0, 1e-12)
    hidden = torch.randn(3, 5, 16, requires_grad=True)
    leaves = [hidden, *block.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = block(hidden), apart(block, hidden)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    for leaf, a, b in zip(leaves, grads(got, leaves), grads(expected, leaves), strict=True):
        assert a.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.02 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("weight",), ("bias",)], ids=str)
def test_frozen_weights_get_no_gradient_and_pass_it_on(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    block = FeedForward(6, 10, 0.0, 1e-12).double()
    for name in frozen:
        getattr(block.contract, name).requires_grad_(False)
    hidden = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    block(hidden).square().sum().backward()
    expected = torch.autograd.grad(apart(block, hidden).square().sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, atol=1e-12, rtol=1e-12)
    for name, parameter in block.contract.named_parameters():
        assert (parameter.grad is None) == (name in frozen)


def test_the_wide_activation_is_kept_once() -> None:
    block = FeedForward(4, 64, 0.0, 1e-12)
    hidden = torch.randn(2, 8, 4, requires_grad=True)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(hidden)
    wide = {tensor.data_ptr() for tensor in kept if tensor.shape[-1] == 64 and tensor.dim() == 3}
    assert len(wide) == 1


def test_positions_count_from_start_and_queries_pass_the_same_norm() -> None:
    torch.manual_seed(0)
    embedding = TextEmbedding(9, 4, 6, 0.0, 1e-12)
    ids = torch.tensor([[3, 1], [8, 8]])
    whole = embedding.norm(embedding.word(ids) + embedding.position.weight[2:4])
    torch.testing.assert_close(embedding(ids, start=2), whole)
    queries = torch.randn(2, 3, 4)
    torch.testing.assert_close(embedding.finish(queries), embedding.norm(queries))


def test_the_head_reads_the_word_embeddings_it_is_handed() -> None:
    torch.manual_seed(0)
    head, words, hidden = LMHead(4, 7, 1e-12), torch.randn(7, 4), torch.randn(2, 3, 4)
    init_bert(head)
    torch.nn.init.normal_(head.bias)
    expected = head.norm(F.gelu(head.transform(hidden))) @ words.T + head.bias
    torch.testing.assert_close(head(hidden, words), expected)
    assert [name for name, _ in head.named_parameters()] == [
        "bias",
        "transform.weight",
        "transform.bias",
        "norm.weight",
        "norm.bias",
    ]
