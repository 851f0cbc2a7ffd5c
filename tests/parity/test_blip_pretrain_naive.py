"""Our lean pre-training step against the benchmark's straightforward one, in float64, over several steps.

The other one pads texts to a fixed length, projects image keys and values once per pass, takes pairs and
negatives apart, computes logits everywhere, and moves its whole twin and its queues inside the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.losses import argmax_sampler
from blip.models.blip_pretrain import BlipPretrain
from blip.weights import load_into
from run_scripts.bench.blip_pretrain import library_config, to_ours
from run_scripts.bench.naive_pretrain import NaivePretrain, Sizes

EXACT: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-7}
STEPS = 4
ROWS = 5
SIZES = Sizes(
    image_size=24,
    patch=8,
    vit_width=24,
    vit_depth=2,
    vit_heads=3,
    vit_mlp=40,
    width=16,
    depth=3,
    heads=2,
    mlp=28,
    positions=16,
    embed_dim=8,
    vocab=40,
    text_length=12,
    queue=15,
    momentum=0.9,
)


def pair() -> tuple[NaivePretrain, BlipPretrain]:
    """The straightforward model with random weights, and our model with the same ones."""
    torch.manual_seed(0)
    naive = NaivePretrain(SIZES).double()
    with torch.no_grad():
        for parameter in naive.parameters():
            if parameter is not naive.temp:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = BlipPretrain(library_config(SIZES)).double()
    load_into(ours, to_ours(SIZES, naive.state_dict()), source="the other", allow_missing=["queue.ids"])
    # It moves its twin at the start of a step, we ours at the end of the one before.
    ours.twin.follow(ours, SIZES.momentum)
    ours.negative_sampler = argmax_sampler
    return naive, ours


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (ROWS, 3, SIZES.image_size, SIZES.image_size)
    image = torch.randn(shape, generator=generator, dtype=torch.double)
    mask = torch.arange(SIZES.text_length) < torch.tensor([[4], [9], [3], [7], [5]])
    ids = torch.randint(1, SIZES.vocab - SIZES.specials, mask.shape, generator=generator)
    return image, ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("length", [9, 12], ids=["longest of the batch", "fixed length"])
def test_steps_are_those_of_the_straightforward_model(length: int) -> None:
    naive, ours = pair()
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for model in (naive, ours)
    ]
    for step in range(STEPS):
        image, ids, mask = inputs(step)
        expected = naive(image, ids, mask)
        got = ours({"image": image, "text_ids": ids[:, :length], "text_mask": mask[:, :length]})
        for name in ("loss_itc", "loss_itm", "loss_lm", "loss"):
            torch.testing.assert_close(got[name], expected[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")
        got.loss.backward()
        expected["loss"].backward()
        grads = {name: p.grad for name, p in naive.named_parameters() if p.grad is not None}
        wanted = to_ours(SIZES, grads)
        same({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, wanted)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ours.after_step([got])
    # The straightforward model's twin has yet to follow the last step, as it does at the next one's start.
    naive._follow()
    state = ours.state_dict()
    state.pop("queue.ids")
    same(state, to_ours(SIZES, naive.state_dict()))
    assert int(ours.queue.pointer) == STEPS * ROWS % SIZES.queue


def same(got: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Equal names, equal values."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
