"""Losses and masks against plain loops, in values and gradients (float64, 1e-8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip.layers.masks import causal_mask, padding_mask, qformer_mask
from blip.losses import (
    Candidates,
    hard_negatives,
    itc_loss,
    itm_loss,
    lm_loss,
    same_picture,
    smoothed_targets,
)
from tests.reference import stage1 as reference

EXACT: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}
IDS = [None, [5, 5, 6, 8, 6, 5]]
ROWS, QUERIES, EMBED = 6, 3, 8


@pytest.fixture
def feats() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "image_feats": F.normalize(torch.randn(ROWS, QUERIES, EMBED, dtype=torch.double), dim=-1),
        "text_feats": F.normalize(torch.randn(ROWS, EMBED, dtype=torch.double), dim=-1),
        "temp": torch.tensor(0.07, dtype=torch.double),
    }


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def assert_same(
    ours: Tensor, plain: Tensor, our_inputs: dict[str, Tensor], plain_inputs: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(ours, plain, **EXACT)
    got = torch.autograd.grad(ours, list(our_inputs.values()))
    expected = torch.autograd.grad(plain, list(plain_inputs.values()))
    for name, a, b in zip(our_inputs, got, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


def positives(image_id: list[int] | None) -> Tensor:
    ids = None if image_id is None else torch.tensor(image_id)
    return same_picture(torch.arange(ROWS), ROWS, ids, ids)


@pytest.mark.parametrize("itself", [True, False], ids=["one product", "two products"])
@pytest.mark.parametrize("image_id", IDS, ids=["no ids", "repeated pictures"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itc_loss_is_the_plain_loop(
    feats: dict[str, Tensor], smoothing: float, image_id: list[int] | None, itself: bool
) -> None:
    a, b = leaves(feats), leaves(feats)
    target = smoothed_targets(positives(image_id), smoothing, torch.double)
    columns = (a["image_feats"], a["text_feats"])
    if not itself:
        columns = (columns[0].clone(), columns[1].clone())
    ours = itc_loss(a["image_feats"], a["text_feats"], Candidates(*columns, target, target), a["temp"])
    plain = reference.itc_loss(b["image_feats"], b["text_feats"], b["temp"], smoothing, image_id)
    assert_same(ours.loss, plain, a, b)


def test_itc_similarities_are_those_of_the_best_query(feats: dict[str, Tensor]) -> None:
    eye = torch.eye(ROWS, dtype=torch.double)
    candidates = Candidates(feats["image_feats"], feats["text_feats"], eye, eye)
    ours = itc_loss(feats["image_feats"], feats["text_feats"], candidates, feats["temp"])
    sim_i2t, sim_t2i = reference.itc_similarities(**feats)
    torch.testing.assert_close(ours.sim_i2t, sim_i2t, **EXACT)
    torch.testing.assert_close(ours.sim_t2i, sim_t2i, **EXACT)


@pytest.mark.parametrize("image_id", IDS, ids=["no ids", "repeated pictures"])
def test_negatives_are_drawn_with_the_softmax_over_other_pictures(
    feats: dict[str, Tensor], image_id: list[int] | None
) -> None:
    seen: dict[str, Tensor] = {}

    def sampler(weights: Tensor, rows: Tensor, stream: str) -> Tensor:
        seen[stream] = weights
        return weights.argmax(dim=1)

    for stream, sim in zip(("text", "image"), reference.itc_similarities(**feats), strict=True):
        expected = reference.negative_weights(sim, image_id)
        index = hard_negatives(sim, positives(image_id), torch.arange(ROWS), sampler, stream)
        torch.testing.assert_close(seen[stream], expected, **EXACT)
        assert index.tolist() == expected.argmax(dim=1).tolist()


def test_itm_loss_is_the_plain_loop_over_pairs_and_queries() -> None:
    torch.manual_seed(0)
    inputs = {
        "query_output": torch.randn(3 * ROWS, QUERIES, EMBED, dtype=torch.double),
        "weight": torch.randn(2, EMBED, dtype=torch.double),
        "bias": torch.randn(2, dtype=torch.double),
    }
    labels = [1] * ROWS + [0] * 2 * ROWS
    a, b = leaves(inputs), leaves(inputs)
    # The head is linear, so the model applies it once, to the mean of the queries.
    logits = F.linear(a["query_output"].mean(dim=1), a["weight"], a["bias"])
    ones = torch.ones(len(labels), dtype=torch.double)
    ours = itm_loss(logits, torch.tensor(labels), ones, len(labels))
    assert_same(ours, reference.itm_loss(reference.itm_logits(**b), labels), a, b)


def test_a_pair_of_weight_zero_is_not_there() -> None:
    torch.manual_seed(0)
    inputs = {"logits": torch.randn(4, 2, dtype=torch.double)}
    a, b = leaves(inputs), leaves(inputs)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.double)
    ours = itm_loss(a["logits"], torch.tensor([1, 1, 0, 0]), weight, 3)
    assert_same(ours, reference.itm_loss(b["logits"][[0, 2, 3]], [1, 0, 0]), a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_loss_is_the_plain_loop_over_real_tokens(smoothing: float) -> None:
    torch.manual_seed(0)
    inputs = {"logits": torch.randn(3, 5, 7, dtype=torch.double)}
    text_ids = torch.randint(7, (3, 5))
    text_mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    a, b = leaves(inputs), leaves(inputs)
    labels = text_ids.masked_fill(~text_mask, -100)[:, 1:]
    ours = lm_loss(a["logits"][:, :-1].flatten(0, 1), labels.flatten(), smoothing)
    assert_same(ours, reference.lm_loss(b["logits"], text_ids, text_mask, smoothing), a, b)


TEXT_MASK = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize("objective", ["itc", "itm", "itg"])
def test_masks_are_the_plain_tables(objective: Any) -> None:
    ours = qformer_mask(objective, QUERIES, TEXT_MASK)
    assert ours.shape == (3, 1, QUERIES + 4, QUERIES + 4)
    assert ours[:, 0].tolist() == reference.mask(objective, QUERIES, TEXT_MASK.tolist())


def test_the_passes_of_one_objective_use_blocks_of_its_table() -> None:
    itc = torch.tensor(reference.mask("itc", QUERIES, TEXT_MASK.tolist()))
    itm = torch.tensor(reference.mask("itm", QUERIES, TEXT_MASK.tolist()))
    itg = torch.tensor(reference.mask("itg", QUERIES, TEXT_MASK.tolist()))
    everyone = torch.cat([torch.ones(3, QUERIES, dtype=torch.bool), TEXT_MASK], dim=1)
    assert torch.equal(padding_mask(TEXT_MASK)[:, 0].expand(-1, 4, -1), itc[:, QUERIES:, QUERIES:])
    assert torch.equal(padding_mask(everyone)[:, 0].expand(-1, QUERIES + 4, -1), itm)
    assert torch.equal(causal_mask(TEXT_MASK, QUERIES)[:, 0], itg[:, QUERIES:])
