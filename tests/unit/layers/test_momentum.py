"""The twin follows the model; the queue is a ring that takes any number of pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blip.layers.momentum import FeatureQueue, MomentumTwin

WIDTH = 4


class Pair(nn.Module):
    """A model of two parts, one of which the twin lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(3, 2).double()
        self.unseen = nn.Linear(2, 2).double()


def twin_of(model: Pair) -> MomentumTwin:
    return MomentumTwin({"seen": nn.Linear(3, 2).double()})


# The twin


def test_following_is_a_weighted_mean_of_own_and_the_models_values() -> None:
    model = Pair()
    twin = twin_of(model)
    before = {name: value.clone() for name, value in twin.named_parameters()}
    twin.follow(model, 0.9)
    for name, value in twin.named_parameters():
        wanted = 0.9 * before[name] + 0.1 * dict(model.named_parameters())[name]
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_extremes_are_a_copy_and_no_change(momentum: float) -> None:
    model = Pair()
    twin = twin_of(model)
    before = twin.seen.weight.clone()
    twin.follow(model, momentum)
    assert torch.equal(twin.seen.weight, before if momentum else model.seen.weight)


def test_following_keeps_the_tensors_and_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pair()
    twin = twin_of(model)
    places, calls = [p.data_ptr() for p in twin.parameters()], []
    fused = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), fused(*args)))
    twin.follow(model, 0.5)
    assert calls == [2]
    assert [p.data_ptr() for p in twin.parameters()] == places


def test_a_twin_never_has_gradients_and_copies_what_is_asked_for() -> None:
    model = Pair()
    twin = twin_of(model)
    assert not any(p.requires_grad for p in twin.parameters())
    before = twin.seen.bias.clone()
    twin.copy_from(model, ["seen.weight"])
    assert torch.equal(twin.seen.weight, model.seen.weight)
    assert torch.equal(twin.seen.bias, before)
    twin.copy_from(model)
    assert torch.equal(twin.seen.bias, model.seen.bias)
    model.seen.bias.data.add_(1)
    assert not torch.equal(twin.seen.bias, model.seen.bias)  # a copy, not the same memory


# The queue


def rows(first: int, count: int) -> Tensor:
    """Rows that tell their number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, WIDTH)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("batches", [[1], [3, 3, 3], [4, 4, 1], [8, 8], [20], [5, 20, 2], [0, 2], [7, 7]])
def test_the_queue_holds_the_newest_pairs_whatever_the_batches(size: int, batches: list[int]) -> None:
    queue = FeatureQueue(size, WIDTH)
    start, plain = queue.image.clone(), [(-1, -100)] * size
    number = 0
    for count in batches:
        queue.enqueue(rows(number, count), -rows(number, count), torch.arange(count) + 10 * number)
        for i in range(count):
            plain[(number + i) % size] = (number + i, 10 * number + i)
        number += count
    for place, (wanted, picture) in enumerate(plain):
        expected = rows(wanted, 1)[0] if wanted >= 0 else start[place]
        assert torch.equal(queue.image[place], expected)
        assert wanted < 0 or torch.equal(queue.text[place], -expected)
        assert int(queue.ids[place]) == picture
    assert int(queue.pointer) == number % size


def test_pairs_without_numbers_are_nobodys_picture() -> None:
    queue = FeatureQueue(3, WIDTH)
    queue.enqueue(rows(0, 2), rows(0, 2), torch.tensor([5, 6]))
    queue.enqueue(rows(2, 2), rows(2, 2))
    assert queue.ids.tolist() == [FeatureQueue.NO_ID, 6, FeatureQueue.NO_ID]


def test_a_new_queue_is_random_of_unit_length_and_numbered_by_nobody() -> None:
    torch.manual_seed(0)
    queue = FeatureQueue(50, WIDTH)
    torch.testing.assert_close(queue.image.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(queue.text.norm(dim=1), torch.ones(50))
    assert not torch.equal(queue.image, queue.text)
    assert set(queue.ids.tolist()) == {FeatureQueue.NO_ID}


def test_a_queue_of_size_0_stays_empty() -> None:
    queue = FeatureQueue(0, WIDTH)
    queue.enqueue(rows(0, 3), rows(0, 3), torch.arange(3))
    assert len(queue) == 0
    assert int(queue.pointer) == 0


def test_all_of_the_queue_is_state() -> None:
    queue, other = FeatureQueue(5, WIDTH), FeatureQueue(5, WIDTH)
    queue.enqueue(rows(0, 3), rows(3, 3), torch.arange(3))
    assert set(queue.state_dict()) == {"image", "text", "ids", "pointer"}
    other.load_state_dict(queue.state_dict())
    for both in (queue, other):
        both.enqueue(rows(6, 4), rows(9, 4), torch.arange(4))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_features_in_half_precision_are_kept_in_the_queues_own() -> None:
    queue = FeatureQueue(4, WIDTH)
    queue.enqueue(rows(1, 2).bfloat16(), rows(1, 2).bfloat16())
    assert queue.image.dtype == queue.text.dtype == torch.float32
    assert torch.equal(queue.image[:2], rows(1, 2))
