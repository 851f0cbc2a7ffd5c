"""BLIP's training step against plain loops over pairs, tokens and columns (float64, 1e-8).

The reference goes in LAVIS's order: the twin moves at the start of a step, before its features are computed;
the library moves it at the end of the step before. Nothing of the step's reuse (keys and values of an image
for all passes, one pass for all pairs, trimmed last layer, targets only) is in the expected values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip.losses import argmax_sampler
from tests.reference.blip import PlainBlip
from tests.reference.small_blip import small_blip, steps_of
from tests.reference.small_stage1 import assert_same, global_batch, gradients

ROWS = 5
NEAR = 1e-8


def one_step(kind: str, batch: dict[str, Any], **values: Any) -> None:
    """Losses and the gradient of every weight agree."""
    ours, plain = (small_blip(kind, **values) for _ in range(2))
    ours.negative_sampler = argmax_sampler
    ours.twin.follow(ours, ours.config.momentum)  # as LAVIS does first
    for model in (ours, plain):
        for place, picture in ((2, 9), (5, 4)):  # of the batch
            model.queue.ids[place : place + 1] = picture
    reference = PlainBlip(plain)
    expected, got = reference.step([batch], ours.alpha(batch)), ours(batch)
    assert_same({k: got[k].detach() for k in expected}, {k: v.detach() for k, v in expected.items()}, NEAR)
    got.loss.backward()
    expected["loss"].backward()
    assert_same(gradients(ours), gradients(plain), NEAR)
    assert set(gradients(ours)) == {n for n, _ in ours.named_parameters() if not n.startswith("twin.")}


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
def test_pre_training_is_that_of_plain_loops_whatever_is_shared(share: str) -> None:
    one_step("pretrain", global_batch(ROWS, ids=True) | {"step": 3, "num_iters_per_epoch": 4}, share=share)


@pytest.mark.parametrize(
    "values",
    [
        {"queue_size": 0},
        {"queue_size": 3},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"temp": 0.4, "label_smoothing": 0.0},
        {"image_id_targets": True},
    ],
    ids=str,
)
def test_pre_training_is_that_of_plain_loops_with_other_switches(values: dict[str, Any]) -> None:
    one_step("pretrain", global_batch(ROWS, ids=True), **values)


@pytest.mark.parametrize("ids", [True, False], ids=["repeated pictures", "no ids"])
def test_retrieval_is_that_of_plain_loops(ids: bool) -> None:
    one_step("retrieval", global_batch(ROWS, ids) | {"step": 1, "num_iters_per_epoch": 4})


def test_a_batch_of_one_is_that_of_plain_loops() -> None:
    for kind in ("pretrain", "retrieval"):
        one_step(kind, global_batch(1, ids=True))


@pytest.mark.parametrize("kind", ["pretrain", "retrieval"])
def test_lavis_order_gives_the_same_losses_over_steps(kind: str) -> None:
    """Batches of 5, 3, 1 and 8 rows in a queue of 7, pictures that come again, the ramp, and AdamW."""
    ours, plain = (small_blip(kind, queue_size=7) for _ in range(2))
    for model in (ours, plain):
        model.twin.copy_from(model)  # as at the start of a run
    ours.negative_sampler = argmax_sampler
    reference = PlainBlip(plain)
    rules = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.05)
        for m in (ours, plain)
    ]
    alphas = []
    for batch in steps_of(6, rows=[5, 3, 1, 8]):
        got = ours(batch)
        alphas.append(float(got.alpha))
        expected = reference.step([batch], float(0.4 * min(1, batch["step"] / 8)))
        assert_same(
            {k: got[k].detach() for k in expected}, {k: v.detach() for k, v in expected.items()}, NEAR
        )
        for loss, rule in zip((got.loss, expected["loss"]), rules, strict=True):
            rule.zero_grad()
            loss.backward()
            rule.step()
        ours.after_step([got])
    assert alphas == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25])
    reference.move_twin()  # what LAVIS does at the next step
    assert_same(dict(ours.twin.named_parameters()), reference.twin, NEAR)
    for key, kind_of in (("image", ours.queue.image), ("text", ours.queue.text)):
        wanted = torch.stack([entry[key] for entry in reference.queue])
        torch.testing.assert_close(kind_of, wanted, atol=NEAR, rtol=NEAR)
    assert ours.queue.ids.tolist() == [entry["id"] for entry in reference.queue]
    assert int(ours.queue.pointer) == reference.pointer == (5 + 3 + 1 + 8 + 5 + 3) % 7
