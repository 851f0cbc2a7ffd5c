"""Our lean training step against the benchmark's straightforward one: equal losses and gradients in float64.

The twin repeats image tokens, projects keys and values once per pass, pads texts to a fixed length and
computes logits everywhere; ours does none of it. ITC columns carry gradients on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.formats import lavis
from blip.losses import argmax_sampler
from blip.models.blip2_qformer import Blip2Qformer
from blip.weights import load_into
from run_scripts.bench.naive_stage1 import NaiveStage1, Sizes
from run_scripts.bench.stage1 import library_config

EXACT: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-7}
SIZES = Sizes(
    image_size=24,
    patch=8,
    vit_width=24,
    vit_depth=2,
    vit_heads=3,
    vit_mlp=40,
    width=16,
    depth=5,
    heads=2,
    mlp=28,
    positions=16,
    queries=3,
    embed_dim=8,
    vocab=40,
    text_length=12,
)


def pair(eva: bool) -> tuple[NaiveStage1, Blip2Qformer]:
    """The twin with random weights, and our model with the same ones."""
    torch.manual_seed(0)
    sizes = replace(SIZES, eva=eva)
    twin = NaiveStage1(sizes).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter is not twin.temp:
                parameter.add_(0.1 * torch.randn_like(parameter))
    config = library_config(sizes)
    ours = Blip2Qformer(config).double()
    weights = lavis.table("blip2", config.vit_model).to_ours(twin.state_dict()).state
    load_into(ours, weights, source="the twin")
    ours.negative_sampler = argmax_sampler
    return twin, ours


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(5, 3, SIZES.image_size, SIZES.image_size, generator=generator, dtype=torch.double)
    mask = torch.arange(SIZES.text_length) < torch.tensor([[4], [9], [3], [7], [5]])
    ids = torch.randint(1, SIZES.vocab - 1, mask.shape, generator=generator).masked_fill(~mask, 0)
    return image, ids, mask


@pytest.mark.parametrize("eva", [False, True], ids=["BLIP's tower", "EVA's tower"])
@pytest.mark.parametrize("length", [9, 12], ids=["longest of the batch", "fixed length"])
def test_losses_and_gradients_are_those_of_the_straightforward_step(eva: bool, length: int) -> None:
    twin, ours = pair(eva)
    image, ids, mask = inputs()
    expected = twin(image, ids, mask)
    got = ours({"image": image, "text_ids": ids[:, :length], "text_mask": mask[:, :length]})
    for name in ("loss_itc", "loss_itm", "loss_lm", "loss"):
        torch.testing.assert_close(got[name], expected[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")

    got.loss.backward()
    expected["loss"].backward()
    grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    wanted = lavis.table("blip2", ours.config.vit_model).to_ours(grads).state
    trained = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert trained.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(trained[name], grad, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
