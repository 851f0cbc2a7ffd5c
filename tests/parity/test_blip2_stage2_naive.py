"""Our stage-2 step against the one the benchmark calls transformers': equal losses and gradients in float64.

The same comparison with more models and texts is in `test_blip2_llm_hf.py`; this one is of what is timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from blip.formats import hf
from blip.weights import load_into
from run_scripts.bench.stage2 import BENCH, Sizes, Transformers, opt, t5

# Language models' norms, and transformers' loss of decoders, are float32 whatever the weights are.
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
SIZES = Sizes(
    image_size=24,
    patch=8,
    vit_width=24,
    vit_depth=2,
    vit_heads=3,
    vit_mlp=40,
    width=32,
    depth=3,
    heads=2,
    mlp=28,
    queries=3,
)
LLMS = {"opt": opt(32, 2, 2, vocab=320), "t5": t5(32, 48, 2, 2, vocab=320)}


def pair(sizes: Sizes) -> tuple[Transformers, Any]:
    """Their model with random weights at which nothing is negligible, and our model with the same ones."""
    torch.manual_seed(0)
    theirs = Transformers(sizes, None).double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("qkv.bias"):  # that of the keys is zero in every released checkpoint
                continue
            noise = torch.randn_like(parameter)
            if "language_model" in name and parameter.ndim == 2:
                parameter.copy_(noise * 0.7 / parameter.shape[1] ** 0.5)  # T5 does not scale its scores
            else:
                parameter.add_(0.1 * noise)
    ours: Any = BENCH.library(sizes, None)
    load_into(ours, BENCH.to_ours(sizes, theirs.state_dict()), source="the other")
    ours.double().train()
    ours.llm.model.double()
    return theirs, ours


@pytest.mark.parametrize("kind", LLMS)
def test_losses_and_gradients_are_those_of_the_other_step(kind: str) -> None:
    sizes = replace(SIZES, llm=LLMS[kind])
    theirs, ours = pair(sizes)
    batch = BENCH.batch(sizes, 5, 1)
    assert not bool(batch["llm_mask"].all())  # some texts are shorter
    batch["image"] = batch["image"].double()
    expected = theirs(*batch.values())
    expected["loss"].backward()
    found = ours(BENCH.for_ours(batch))
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected["loss"], **CLOSE, check_dtype=False)

    given = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    wanted = hf.table("blip2_t5" if kind == "t5" else "blip2_opt").to_ours(given).state
    trained = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert trained.keys() == wanted.keys()
    assert trained.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 1e-4 for name, grad in wanted.items() if not name.endswith("key.bias"))
    for name, grad in wanted.items():
        torch.testing.assert_close(trained[name], grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
