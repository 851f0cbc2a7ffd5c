"""Cached accumulation gives the gradients of the one big batch (float64, 1e-10)."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from blip.batch import Output
from blip.engine.cached import cached_step
from blip.models.blip2_qformer import Blip2Qformer
from tests.reference.small_stage1 import assert_same, global_batch, gradients, losses, part_of, small_model

CUTS = {"even": (0, 4, 8), "uneven": (0, 4, 7), "three": (0, 3, 6, 7), "one": (0, 5)}
TOWERS: dict[str, dict[str, Any]] = {
    "frozen tower": {},
    "trained tower": {"freeze_vit": False},
    "tower trained first": {"vit_train_steps": 2},
}


def by_parts(model: Blip2Qformer, cuts: tuple[int, ...], ids: bool, scale: float = 1.0) -> Output:
    batch = global_batch(cuts[-1], ids)
    parts = [part_of(batch, start, end) for start, end in itertools.pairwise(cuts)]
    return cached_step(model, parts, lambda loss: loss * scale, nullcontext, lambda number: None)


def at_once(model: Blip2Qformer, total: int, ids: bool) -> Output:
    output = model(part_of(global_batch(total, ids), 0, total))
    output.loss.backward()
    return output


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "repeated pictures"])
@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_micro_batches_give_the_big_batch_s_losses_and_gradients(
    tower: dict[str, Any], ids: bool, cuts: tuple[int, ...]
) -> None:
    parts, whole = small_model(**tower), small_model(**tower)
    got, expected = by_parts(parts, cuts, ids), at_once(whole, cuts[-1], ids)
    assert_same(losses(got), losses(expected))
    assert_same(gradients(parts), gradients(whole))
    assert any(name.startswith("vision.") for name in gradients(parts)) == bool(tower)


@pytest.mark.parametrize("grad", [False, True], ids=["columns detached", "columns with gradient"])
def test_columns_without_gradient_stay_without(grad: bool) -> None:
    parts, whole = small_model(gather_with_grad=grad), small_model(gather_with_grad=grad)
    by_parts(parts, CUTS["uneven"], ids=True)
    at_once(whole, 7, ids=True)
    assert_same(gradients(parts), gradients(whole))


@pytest.mark.parametrize(
    "objectives", [["itc"], ["itm"], ["lm"], ["itc", "lm"], ["itm", "lm"], ["itc", "itm"]], ids="+".join
)
def test_losses_that_are_left_out_are_left_out_here_too(objectives: list[str]) -> None:
    first: dict[str, Any] = {"vit_train_steps": 2, "vit_train_objectives": objectives}
    parts, whole = small_model(**first), small_model(**first)
    got, expected = by_parts(parts, CUTS["uneven"], ids=True), at_once(whole, 7, ids=True)
    assert got.keys() == expected.keys()
    assert_same(losses(got), losses(expected))
    assert_same(gradients(parts), gradients(whole))


def test_loss_scaling_scales_every_gradient_alike() -> None:
    plain, scaled = small_model(freeze_vit=False), small_model(freeze_vit=False)
    by_parts(plain, CUTS["uneven"], ids=True)
    output = by_parts(scaled, CUTS["uneven"], ids=True, scale=8.0)
    assert_same({n: g / 8 for n, g in gradients(scaled).items()}, gradients(plain))
    assert not output.loss.requires_grad


def test_both_passes_of_a_micro_batch_draw_the_same_dropout() -> None:
    """With dropout the features that are contrasted must be those that the gradients flow into."""
    model = small_model(dropout=0.3)
    features: dict[int, list[torch.Tensor]] = {}
    current: list[int] = []
    represent = model.represent

    def noted(batch: dict[str, Any], states: torch.Tensor) -> Any:
        seen = represent(batch, states)
        features.setdefault(current[-1], []).append(seen.feats.image.detach())
        return seen

    model.represent = noted  # type: ignore[method-assign]
    batch = global_batch(7, ids=False)

    def seed(number: int) -> None:
        current.append(number)
        torch.manual_seed(100 + number)

    cached_step(model, [part_of(batch, 0, 4), part_of(batch, 4, 7)], lambda loss: loss, nullcontext, seed)
    assert sorted(features) == [0, 1]
    for first, second in features.values():
        assert torch.equal(first, second)
