"""Classification of pictures with texts, with a twin or without, and of pairs of pictures (float64, 1e-8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from blip.models.blip_classification import BlipNlvr
from tests.reference import blip as reference
from tests.reference.small_blip import small_blip
from tests.reference.small_stage1 import assert_same, global_batch, gradients, part_of

ROWS = 5
NEAR: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}
LABELS = torch.tensor([0, 2, 1, 1, 0])


def batch_of(kind: str) -> dict[str, Any]:
    batch = global_batch(ROWS, ids=False) | {"label": LABELS.clamp(max=1) if kind == "nlvr" else LABELS}
    if kind == "nlvr":
        batch["image0"] = batch.pop("image")
        batch["image1"] = batch["image0"].flip(0) + 1
    return batch


def plain_logits(model: Any, weights: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """One text at a time; of `weights`, which may be the twin's."""
    pictures = [batch[key] for key in ("image", "image0", "image1") if key in batch]
    states = [functional_call(model.vision, reference.part(weights, "vision"), some) for some in pictures]
    text, rows = reference.part(weights, "text"), []
    for row in range(ROWS):
        ids = reference.real(batch, row)
        if model.config.text_token == "enc":
            ids = [model.text.enc_id, *ids[1:]]
        enc = reference.med(text, ids, [some[row] for some in states])[0]
        inner = reference.linear(enc, weights, "cls_head.0").clamp(min=0)
        rows.append(reference.linear(inner, weights, "cls_head.2"))
    return torch.stack(rows)


def plain_loss(model: Any, batch: dict[str, Any], alpha: float) -> Tensor:
    """(1 - alpha) * cross-entropy - alpha * sum of the twin's chances times the log chances (LAVIS)."""
    logits, total = plain_logits(model, dict(model.named_parameters()), batch), torch.zeros(()).double()
    chances = torch.zeros_like(logits)
    if model.twin is not None:
        with torch.no_grad():
            chances = plain_logits(model, dict(model.twin.named_parameters()), batch).softmax(dim=1)
    for row, label in enumerate(batch["label"].tolist()):
        log_probs = reference.log_softmax(logits[row])
        total = total - (1 - alpha) * log_probs[label] - alpha * (chances[row] * log_probs).sum()
    return total / ROWS


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("classification", {"use_distill": True}),
        ("classification", {"use_distill": False}),
        ("classification", {"text_token": "enc"}),
        ("nlvr", {"use_distill": False}),
        ("nlvr", {"use_distill": True}),
        ("nlvr", {"text_token": "cls"}),
    ],
)
def test_loss_and_gradients_are_those_of_plain_loops(kind: str, values: dict[str, Any]) -> None:
    ours, plain = (small_blip(kind, **values) for _ in range(2))
    distil = ours.config.use_distill
    assert ours.config.text_token == values.get("text_token", {"nlvr": "enc"}.get(kind, "cls"))
    batch = batch_of(kind) | {"step": 3, "num_iters_per_epoch": 4}
    got, expected = ours(batch), plain_loss(plain, batch, 0.4 * 0.75 if distil else 0.0)
    torch.testing.assert_close(got.loss, expected, **NEAR)
    logits = plain_logits(plain, dict(plain.named_parameters()), batch)
    right = (logits.argmax(dim=1) == batch["label"]).double().mean()
    assert float(got.acc) == pytest.approx(float(right))
    torch.testing.assert_close(got.logits, logits.detach())
    got.loss.backward()
    expected.backward()
    assert_same(gradients(ours), gradients(plain), 1e-8)
    assert set(gradients(ours)) == {n for n, _ in ours.named_parameters() if not n.startswith("twin.")}
    assert (ours.twin is not None) == distil


def test_alpha_grows_over_the_first_epoch() -> None:
    model = small_blip("classification")
    steps = [model.alpha({"step": step, "num_iters_per_epoch": 10}) for step in (0, 5, 10, 90)]
    assert steps == pytest.approx([0, 0.2, 0.4, 0.4])
    named = [model.alpha({"epoch": e, "iters": i, "num_iters_per_epoch": 10}) for e, i in ((0, 5), (1, 0))]
    assert named == pytest.approx([0.2, 0.4])
    assert model.alpha({}) == 0.4


def test_the_twin_follows_after_a_step_and_forward_changes_nothing() -> None:
    model, batch = small_blip("classification"), batch_of("classification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(batch)
    output.loss.backward()
    assert_same(model.state_dict(), before, 0.0)
    model.after_step([output])
    for name, value in model.twin.named_parameters():
        wanted = 0.9 * before[f"twin.{name}"] + 0.1 * before[name]
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0)
    small_blip("nlvr").after_step([])  # has no twin


@pytest.mark.parametrize("kind", ["classification", "nlvr"])
def test_predictions_are_logits_beside_the_labels(kind: str) -> None:
    model, batch = small_blip(kind).eval(), batch_of(kind)
    found = model.predict(batch)
    torch.testing.assert_close(found.predictions, plain_logits(model, dict(model.named_parameters()), batch))
    assert torch.equal(found.targets, batch["label"])
    assert torch.equal(model(batch, is_train=False).predictions, found.predictions)
    assert "targets" not in model.predict({k: v for k, v in batch.items() if k != "label"})


@pytest.mark.parametrize("kind", ["classification", "nlvr"])
def test_parts_of_a_batch_add_up_and_a_batch_of_one_is_one(kind: str) -> None:
    model, batch = small_blip(kind), batch_of(kind) | {"image": torch.zeros(ROWS, 1)}
    batch = batch if kind == "nlvr" else batch | batch_of(kind)
    parts = [part_of(batch, *cut, shares=2) for cut in ((0, 1), (1, ROWS))]
    losses = torch.stack([model(part).loss for part in parts])
    torch.testing.assert_close(losses.mean(), model(batch).loss)
    assert model.predict(parts[0])["predictions"].shape == (1, model.config.num_classes)
    assert model.count_targets(batch) == 0


def test_the_order_of_two_pictures_matters_and_their_texts_padding_does_not() -> None:
    model, batch = small_blip("nlvr").eval(), batch_of("nlvr")
    found = model.predict(batch).predictions
    turned = model.predict(batch | {"image0": batch["image1"], "image1": batch["image0"]}).predictions
    assert not torch.allclose(found, turned)
    padded = batch | {"text_ids": batch["text_ids"].masked_fill(~batch["text_mask"], 17)}
    torch.testing.assert_close(model.predict(padded).predictions, found, **NEAR)


def test_a_pair_starts_with_the_same_weights_for_both_pictures_only_if_it_is_told_so() -> None:
    model = small_blip("nlvr")
    first, second = model.text.layers[0].cross_attn.looks
    assert not torch.equal(first.query.weight, second.query.weight)
    merged = [layer.cross_attn.merge is not None for layer in model.text.layers]
    assert merged == [False, True]


def test_a_twin_that_weights_lack_is_a_copy() -> None:
    model = small_blip("classification")
    lacking = [name for name in model.state_dict() if name.startswith("twin.")]
    assert model.replace(lacking) == [f"momentum twin: {len(lacking)} tensors copied from the model"]
    state = model.state_dict()
    assert_same({n: state[n] for n in lacking}, {n: state[n.removeprefix("twin.")] for n in lacking}, 0.0)
    assert small_blip("nlvr").replace([]) == []


def test_pairs_may_begin_with_the_mean_of_what_is_seen() -> None:
    """Also in the twin."""
    config = replace(small_blip("nlvr").config, merge_init="mean", use_distill=True)
    model = BlipNlvr(config)
    matrices = [(n, p) for n, p in model.named_parameters() if "cross_attn.merge.weight" in n]
    assert [name.startswith("twin.") for name, _ in matrices] == [False, True]
    for name, matrix in matrices:
        first, second = torch.randn(2, 3, len(matrix))
        assert torch.equal(torch.cat([first, second], dim=1) @ matrix.T, (first + second) / 2)
        assert not model.get_parameter(name.replace("weight", "bias")).any()
    plain = dict(BlipNlvr(replace(config, merge_init="random")).named_parameters())
    assert not torch.equal(plain[matrices[0][0]], matrices[0][1])
