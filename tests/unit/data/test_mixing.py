"""The plan of a run: which source, epoch and rows every micro-batch has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from blip import keyed
from blip.data.mixing import Draw, MapSource, Plan, Share, global_id, mixture_weights
from blip.errors import ConfigError


class Numbers:
    """A dataset whose samples are their own number and epoch."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def __len__(self) -> int:
        return self.size

    def sample_or_substitute(self, index: int, epoch: int, seed: int) -> tuple[Any, list[Any]]:
        return (self.name, index, epoch), []


def plan(*sizes: int | None, weights: tuple[float, ...] = (), **options: Any) -> Plan:
    total = sum(size or 100 for size in sizes)
    defaults = {"seed": 1, "global_batch": 4, "accum": 1, "drop_last": True}
    return Plan(
        **(defaults | options), sizes=sizes, weights=weights or (1.0,) * len(sizes), epoch_samples=total
    )


def draws(a_plan: Plan, count: int) -> list[Draw]:
    counts = [0] * len(a_plan.sizes)
    found = []
    for number in range(count):
        found.append(a_plan.draw(number, counts))
        counts[found[-1].source] += 1
    return found


def test_step_t_has_the_positions_from_t_a_g() -> None:
    a_plan = plan(20, global_batch=3, accum=2)
    found = draws(a_plan, 8)
    assert a_plan.steps_per_epoch == 3
    assert [(d.epoch, d.step, d.micro, d.start, d.total) for d in found] == [
        (0, 0, 0, 0, 3),
        (0, 0, 1, 3, 3),
        (0, 1, 0, 6, 3),
        (0, 1, 1, 9, 3),
        (0, 2, 0, 12, 3),
        (0, 2, 1, 15, 3),
        (1, 3, 0, 0, 3),
        (1, 3, 1, 3, 3),
    ]
    assert {d.num_micro for d in found} == {2}


def test_an_epoch_that_is_not_cut_ends_short() -> None:
    a_plan = plan(14, global_batch=3, accum=3, drop_last=False)
    assert a_plan.steps_per_epoch == 2
    assert [(d.step, d.micro, d.num_micro, d.start, d.total) for d in draws(a_plan, 6)] == [
        (0, 0, 3, 0, 3),
        (0, 1, 3, 3, 3),
        (0, 2, 3, 6, 3),
        (1, 0, 2, 9, 3),
        (1, 1, 2, 12, 2),
        (2, 0, 3, 0, 3),
    ]


def test_the_kth_batch_of_a_mixed_source_is_the_next_of_its_own_passes() -> None:
    found = draws(plan(9, 13), 60)
    for source, batches in ((0, 2), (1, 3)):
        mine = [d for d in found if d.source == source]
        assert [(d.source_epoch, d.start) for d in mine] == [
            (k // batches, k % batches * 4) for k in range(len(mine))
        ]
    assert {d.total for d in found} == {4}


def test_sources_are_drawn_in_proportion_to_their_weights() -> None:
    weights = (1.0, 2.0, 5.0)
    count = 8000
    shares = Counter(d.source for d in draws(plan(50, 50, None, weights=weights), count))
    for source, weight in enumerate(weights):
        p = weight / 8
        # Five standard deviations of a binomial count.
        assert abs(shares[source] - count * p) < 5 * (count * p * (1 - p)) ** 0.5


def test_a_draw_is_a_function_of_seed_and_number_alone() -> None:
    a_plan = plan(50, 50)
    sources = [d.source for d in draws(a_plan, 40)]
    assert [a_plan.draw(n, [7, 7]).source for n in reversed(range(40))] == sources[::-1]
    assert [d.source for d in draws(plan(50, 50, seed=2), 40)] != sources


def test_whole_steps_have_one_source_and_never_straddle_a_pass() -> None:
    found = draws(plan(11, 30, accum=2, whole_steps=True), 40)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.source == second.source
        assert (first.source_epoch, first.start + 4) == (second.source_epoch, second.start)


def test_epochs_of_a_mixture_count_the_samples_of_all_sources() -> None:
    a_plan = plan(9, 13, None)
    assert a_plan.steps_per_epoch == (9 + 13 + 100) // 4
    assert [d.epoch for d in draws(a_plan, 61)] == [0] * 30 + [1] * 30 + [2]


def test_a_concatenation_is_one_permutation_of_all_samples() -> None:
    source = MapSource({0: Numbers("a", 5), 2: Numbers("b", 3)})
    assert source.name == "a+b"
    reader = source.reader(Share(0, 1, 0, 1), 1, [])
    reads = reader.read(Draw(0, 0, 0, 1, 0, 6, 0, 8))
    everything = [("a", i, 6) for i in range(5)] + [("b", i, 6) for i in range(3)]
    order = keyed.permutation(8, 1, "order", 6, "a+b")
    assert [read.sample for read in reads] == [everything[i] for i in order]
    assert {(read.number, read.name) for read in reads} == {(0, "a"), (2, "b")}


def test_shares_are_contiguous_in_rank_and_worker_order() -> None:
    for total in range(1, 14):
        for world in (1, 2, 3):
            for workers in (1, 2, 5):
                shares = [Share(r, world, w, workers) for r in range(world) for w in range(workers)]
                assert [row for share in shares for row in share.of(total)] == list(range(total))


def test_sampling_makes_weights_of_sizes_and_a_ratio_a_factor() -> None:
    sizes, none = {"a": 100, "b": 400, "c": 900}, dict.fromkeys("abc")
    table = {"proportional": [1, 4, 9], "sqrt": [1, 2, 3], "uniform": [1, 1, 1]}  # sqrt: InstructBLIP, 2.4
    for sampling, expected in table.items():
        found = mixture_weights(none, sampling, sizes)
        assert found is not None
        np.testing.assert_allclose(np.array(list(found.values())) / found["a"], expected)
    assert mixture_weights({"a": None, "b": 0.5, "c": 0.0}, "sqrt", sizes) == {"a": 10.0, "b": 10.0}
    assert mixture_weights({"a": 2.0, "b": 3.0}, None, sizes) == {"a": 2.0, "b": 3.0}  # LAVIS: the ratios
    with pytest.raises(ConfigError, match="sample_ratio is 0 for a, b"):
        mixture_weights({"a": 0.0, "b": 0.0}, "uniform", sizes)


def test_weights_are_the_ratios_that_are_not_zero() -> None:
    assert mixture_weights({"a": None, "b": None}) is None
    assert mixture_weights({"a": 2, "b": 0.0, "c": 0.5}) == {"a": 2.0, "c": 0.5}
    with pytest.raises(ConfigError, match=r"datasets\.b\.sample_ratio: not given, but given for a, c"):
        mixture_weights({"a": 1.0, "b": None, "c": 0.0})


def test_global_ids_are_unique_over_datasets() -> None:
    ids = [-1, 0, 1, (1 << 48) - 1, 1 << 48, (1 << 63) - 1, 1 << 70]
    found = [global_id(dataset, i) for dataset in range(3) for i in ids]
    assert len(set(found)) == len(found)
    assert [global_id(0, i) for i in ids[1:4]] == ids[1:4]
    assert all(0 <= i < 1 << 63 for i in found)
