"""The whole training step against plain loops over pairs, tokens and queries (float64, 1e-8).

Each loss is put together from single forward passes of the same network, one per pair for ITM and one over
[queries ; text] with the drawn mask for LM, so that nothing of the step's reuse (kept keys and values,
trimmed last layer, targets only) is in the expected value. Values and gradients of every weight must agree.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.layers.masks import qformer_mask
from blip.losses import argmax_sampler
from blip.models.blip2_qformer import Blip2Qformer
from tests.reference import stage1 as reference
from tests.reference.small_stage1 import assert_same, global_batch, gradients, small_model

ROWS = 6


def found(model: Blip2Qformer, batch: dict[str, Any], mode: str) -> Any:
    """`extract_features` with gradients."""
    return Blip2Qformer.extract_features.__wrapped__(model, batch, mode=mode)  # type: ignore[attr-defined]


def features(model: Blip2Qformer, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    image = found(model, batch, "image").image_embeds_proj
    return image, found(model, batch, "text").text_embeds_proj[:, 0]


def plain_itc(model: Blip2Qformer, batch: dict[str, Any], ids: list[int] | None) -> Tensor:
    return reference.itc_loss(*features(model, batch), model.temp, model.config.label_smoothing, ids)


def plain_itm(model: Blip2Qformer, batch: dict[str, Any], ids: list[int] | None) -> Tensor:
    sim_i2t, sim_t2i = reference.itc_similarities(*features(model, batch), model.temp)
    wrong_text = reference.negative_weights(sim_i2t, ids).argmax(dim=1).tolist()
    wrong_image = reference.negative_weights(sim_t2i, ids).argmax(dim=1).tolist()
    rows = range(ROWS)
    pairs = [(i, i) for i in rows]
    pairs += [(i, wrong_text[i]) for i in rows] + [(wrong_image[i], i) for i in rows]
    logits = []
    for image, text in pairs:
        length = int(batch["text_mask"][text].sum())
        pair = {
            "image": batch["image"][image : image + 1],
            "text_ids": batch["text_ids"][text : text + 1, :length],
            "text_mask": batch["text_mask"][text : text + 1, :length],
        }
        queries = found(model, pair, "multimodal").multimodal_embeds
        logits.append(reference.itm_logits(queries, model.itm_head.weight, model.itm_head.bias))
    return reference.itm_loss(torch.cat(logits), [1] * ROWS + [0] * 2 * ROWS)


def plain_lm(model: Blip2Qformer, batch: dict[str, Any], ids: list[int] | None) -> Tensor:
    text_ids, mask = batch["text_ids"], batch["text_mask"]
    started = text_ids.clone()
    started[:, 0] = model.dec_id
    embedding = model.qformer.embedding
    attention = qformer_mask("itg", model.config.num_query_token, mask)
    keys = model.qformer.image_keys(model.normed(model.image_states(batch)))
    states = model.qformer(embedding(started), attention, [(keys, 1)]).text
    logits = model.lm_head(states, embedding.word.weight)
    return reference.lm_loss(logits, text_ids, mask, model.config.label_smoothing)


PLAIN = {"loss_itc": plain_itc, "loss_itm": plain_itm, "loss_lm": plain_lm}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "repeated pictures"])
@pytest.mark.parametrize("name", PLAIN)
def test_each_loss_and_its_gradients_are_those_of_plain_loops(name: str, ids: bool, smoothing: float) -> None:
    batch = global_batch(ROWS, ids)
    image_id = batch["image_id"].tolist() if ids else None
    ours, plain = (small_model(freeze_vit=False, label_smoothing=smoothing) for _ in range(2))
    ours.negative_sampler = argmax_sampler
    got, expected = ours(batch)[name], PLAIN[name](plain, batch, image_id)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)
    got.backward()
    expected.backward()
    wanted = gradients(plain)
    # What the loss does not read (LM: the last layer's queries) has no gradient in ours, else zeros.
    unread = {n: torch.zeros_like(g) for n, g in wanted.items() if n not in gradients(ours)}
    assert_same({**gradients(ours), **unread}, wanted, 1e-8)


def test_padding_changes_nothing() -> None:
    longer, shorter = global_batch(ROWS, ids=True), global_batch(ROWS, ids=True)
    longest = int(longer["text_mask"].sum(dim=1).max())
    assert longest < longer["text_ids"].shape[1]
    for key in ("text_ids", "text_mask"):
        shorter[key] = shorter[key][:, :longest]
    longer["text_ids"] = longer["text_ids"].masked_fill(~longer["text_mask"], 17)
    losses = []
    for batch in (longer, shorter):
        model = small_model()
        model(batch).loss.backward()
        losses.append(gradients(model))
    assert_same(losses[0], losses[1], 1e-10)
