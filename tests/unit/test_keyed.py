"""Keyed randomness: a function of its key, the same everywhere, and as random as it has to be."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from blip import keyed


def test_keys_tell_order_types_and_borders_of_their_parts_apart() -> None:
    parts: list[tuple[int | str, ...]] = [
        (1, 2),
        (2, 1),
        (12,),
        ("1", 2),
        (1, "2"),
        ("12",),
        ("1", "2"),
        ("ab", "c"),
        ("a", "bc"),
    ]
    assert len({keyed.key(*p) for p in parts}) == len(parts)


def test_keys_have_64_bits_and_stay_what_they_are() -> None:
    # Written down once: a change would silently change every order and negative of a resumed run.
    assert keyed.key(42, "order", 0, "scenes") == 10369279337700493348
    assert keyed.permutation(6, 42, "order", 0, "scenes").tolist() == [0, 2, 5, 3, 1, 4]
    found = keyed.uniform(torch.arange(3), 42, "negative", 0)
    torch.testing.assert_close(
        found,
        torch.tensor([0.4609274304355646, 0.03234431968160245, 0.5835385681112416], dtype=torch.float64),
        rtol=0,
        atol=0,
    )


def test_values_are_the_same_in_another_process() -> None:
    script = "from blip import keyed; print(keyed.key('a', 1), keyed.permutation(9, 'b').tolist())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{keyed.key('a', 1)} {keyed.permutation(9, 'b').tolist()}"


def test_a_permutation_holds_each_number_once_and_depends_on_its_key() -> None:
    found = [keyed.permutation(50, 1, "order", epoch) for epoch in range(3)]
    assert all(sorted(p.tolist()) == list(range(50)) for p in found)
    assert found[0].dtype == np.int64
    assert not (found[0] == found[1]).all()
    assert keyed.permutation(0, 1).shape == (0,)


def test_generators_of_equal_keys_agree_and_of_others_do_not() -> None:
    a, b, c = (keyed.generator("x", i).random(5) for i in (1, 1, 2))
    assert (a == b).all()
    assert (a != c).all()


def test_a_uniform_number_depends_on_its_row_not_on_the_other_rows() -> None:
    whole = keyed.uniform(torch.arange(100), 3, "negative")
    some = torch.tensor([7, 93, 7, 0])
    assert torch.equal(keyed.uniform(some, 3, "negative"), whole[some])
    assert not torch.equal(keyed.uniform(torch.arange(100), 4, "negative"), whole)


def test_uniform_numbers_are_uniform_and_rows_are_independent() -> None:
    count = 100_000
    found = keyed.uniform(torch.arange(count), 5, "negative")
    assert found.dtype == torch.float64
    assert found.min() >= 0
    assert found.max() < 1
    # Bins of a hundredth: five standard deviations of a binomial count.
    bins = torch.histc(found, 100, 0, 1)
    assert (bins - count / 100).abs().max() < 5 * (count / 100) ** 0.5
    following = torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1]
    assert following.abs() < 5 / count**0.5


def test_uniform_is_splitmix64_in_exact_integers() -> None:
    def reference(row: int, key: int) -> float:
        mask = (1 << 64) - 1
        z = (row * 0x9E3779B97F4A7C15 + key) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    rows = torch.tensor([0, 1, 2, 1000, (1 << 62) + 5, -3])
    expected = [reference(row, keyed.key("k", 9)) for row in rows.tolist()]
    assert keyed.uniform(rows, "k", 9).tolist() == expected


def test_seeding_torch_makes_what_it_draws_a_function_of_the_key() -> None:
    draws = []
    before = torch.get_rng_state()
    for step in (1, 2, 1):
        keyed.seed_torch(7, "dropout", step)
        draws.append(torch.rand(4))
    torch.set_rng_state(before)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
