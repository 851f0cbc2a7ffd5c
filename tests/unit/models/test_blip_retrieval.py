"""BLIP for retrieval: picture numbers, the passes of an evaluation, and what weights may lack.

That the losses are right is shown in `tests/parity/test_blip_pretrain_reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.losses import argmax_sampler
from blip.models.blip_retrieval import BlipRetrieval, BlipRetrievalConfig
from tests.reference import blip as reference
from tests.reference.small_blip import small_blip
from tests.reference.small_stage1 import assert_same, global_batch, gradients

NEAR: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}
ROWS = 5


# Picture numbers


def drawn(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that each negative is drawn with."""
    seen: dict[str, Tensor] = {}

    def noted(weights: Tensor, rows: Tensor, stream: str) -> Tensor:
        seen[stream] = weights
        return argmax_sampler(weights, rows, stream)

    model.negative_sampler = noted
    model(batch)
    return seen


def test_negatives_are_drawn_by_the_models_own_similarities_among_other_pictures() -> None:
    model, batch = small_blip("retrieval"), global_batch(8, ids=True)
    seen, views = drawn(model, batch), model.views(batch)
    other = batch["image_id"][:, None] != batch["image_id"]
    sim = views.feats.image[:, 0] @ views.feats.text.T / model.temp
    for stream, one in (("text", sim), ("image", sim.T)):
        weights = torch.softmax(one, dim=1) * other  # LAVIS's, which multinomial normalises
        torch.testing.assert_close(seen[stream], weights / weights.sum(dim=1, keepdim=True), **NEAR)
        assert torch.equal(seen[stream] > 0, other)


def test_similarities_that_leave_nothing_still_give_a_negative() -> None:
    """LAVIS takes the softmax first: where the pair itself is certain, all other weights are 0."""
    model, batch = small_blip("retrieval", min_temp=1e-5, temp=1e-4), global_batch(4, ids=False)
    for weights in drawn(model, batch).values():
        assert (weights.sum(dim=1) > 0.99).all()
        assert weights.diagonal().tolist() == [0] * 4


def test_a_batch_of_one_picture_has_pairs_only() -> None:
    for kind in ("retrieval", "pretrain"):
        model = small_blip(kind, image_id_targets=True)
        batch = global_batch(4, ids=True) | {"image_id": torch.tensor([7, 7, 7, 7])}
        output = model(batch)
        output.loss.backward()
        views = model.views(batch)
        logits = model.itm_logits([(views.keys, 1)], batch["text_ids"], batch["text_mask"])
        wanted = torch.nn.functional.cross_entropy(logits, torch.ones(4, dtype=torch.int64))
        torch.testing.assert_close(output.loss_itm, wanted, **NEAR)
        assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_picture_numbers_enter_the_queue_and_are_right_answers_later() -> None:
    model, batch = small_blip("retrieval"), global_batch(4, ids=True)
    model.after_step([model(batch)])
    assert model.queue.ids.tolist() == [*batch["image_id"].tolist(), *[-100] * 6]
    known = float(model(batch).loss_itc.detach())
    model.queue.ids.fill_(-100)
    assert abs(float(model(batch).loss_itc.detach()) - known) > 1e-3


def test_picture_numbers_can_be_ignored() -> None:
    with_ids, without = global_batch(ROWS, ids=True), global_batch(ROWS, ids=False)
    model = small_blip("retrieval", image_id_targets=False)
    torch.testing.assert_close(model(with_ids).loss, model(without).loss)
    assert "image_id" not in model(with_ids)
    assert not torch.allclose(small_blip("retrieval")(with_ids).loss, model(with_ids).loss)


# Evaluation


def test_the_passes_of_an_evaluation_are_those_of_plain_loops() -> None:
    model, batch = small_blip("retrieval").eval(), global_batch(ROWS, ids=False)
    with torch.no_grad():
        image_feats, states = model.retrieval_images(batch)
        text_feats = model.retrieval_texts(batch["text_ids"], batch["text_mask"])
        sim = model.retrieval_scores(image_feats, text_feats)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    text = reference.part(weights, "text")
    for i in range(ROWS):
        feat = reference.unit(reference.linear(states[i, 0], weights, "vision_proj"))
        torch.testing.assert_close(image_feats[i, 0], feat, **NEAR)
        own = reference.med(text, reference.real(batch, i), [])[0]
        feat = reference.unit(reference.linear(own, weights, "text_proj"))
        torch.testing.assert_close(text_feats[i], feat, **NEAR)
        for j in range(ROWS):  # no temperature
            torch.testing.assert_close(sim[i, j], torch.dot(image_feats[i, 0], text_feats[j]), **NEAR)

    # Two pictures, three texts each.
    chosen = torch.tensor([[0, 4], [2, 1], [3, 3]])
    with torch.no_grad():
        keys = model.retrieval_keys(states[:2])
        logits = model.rerank(keys, batch["text_ids"][chosen], batch["text_mask"][chosen])
    for k, texts in enumerate(chosen.tolist()):
        for image, row in enumerate(texts):
            ids = [model.text.enc_id, *reference.real(batch, row)[1:]]
            first = reference.med(text, ids, [states[image]])[0]
            wanted = reference.linear(first, weights, "itm_head")[1]
            torch.testing.assert_close(logits[k, image], wanted, **NEAR)


def test_a_batch_of_one_keeps_its_dimensions() -> None:
    model, batch = small_blip("retrieval").eval(), global_batch(1, ids=False)
    feats, states = model.retrieval_images(batch)
    text = model.retrieval_texts(batch["text_ids"], batch["text_mask"])
    assert model.retrieval_scores(feats, text).shape == (1, 1)
    ids, mask = batch["text_ids"][None], batch["text_mask"][None]
    assert model.rerank(model.retrieval_keys(states), ids, mask).shape == (1, 1)


def test_states_in_autocast_s_type_give_the_same_scores_bit_by_bit() -> None:
    model, batch = small_blip("retrieval").eval().float(), global_batch(ROWS, ids=False)
    batch["image"] = batch["image"].float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        full = model.image_states(batch)
        feats, kept = model.retrieval_images(batch)
        assert (full.dtype, kept.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(feats, model.image_feats(full))
        texts = batch["text_ids"][None], batch["text_mask"][None]
        one, other = (model.rerank(model.retrieval_keys(states), *texts) for states in (kept, full))
        assert torch.equal(one, other)


# Videos


def test_a_video_of_equal_frames_trains_and_is_found_as_the_picture_is() -> None:
    pictures = global_batch(5, ids=True)
    videos = pictures | {"image": pictures["image"][:, None].expand(-1, 3, -1, -1, -1)}
    models = [small_blip("retrieval") for _ in range(2)]
    losses = [model(batch) for model, batch in zip(models, (pictures, videos), strict=True)]
    losses[0].loss.backward()
    losses[1].loss.backward()
    found, expected = ({k: v for k, v in output.items() if k.startswith("loss")} for output in losses[::-1])
    assert_same(found, expected)
    assert_same(gradients(models[1]), gradients(models[0]), 1e-8)
    torch.testing.assert_close(losses[1]["image_feats_m"], losses[0]["image_feats_m"], **NEAR)
    model = models[0].eval()
    feats = [model.retrieval_images(batch)[0] for batch in (pictures, videos)]
    torch.testing.assert_close(feats[1], feats[0], **NEAR)


def test_a_video_is_the_mean_of_its_frames_projections_and_all_their_tokens() -> None:
    model = small_blip("retrieval").eval()
    frames = global_batch(6, ids=False)["image"].unflatten(0, (2, 3))  # two videos of three frames
    feats, states = model.retrieval_images({"image": frames})
    each = model.vision(frames.flatten(0, 1))
    for video in range(2):
        own = each[3 * video : 3 * video + 3]
        mean = model.vision_proj(own[:, 0]).mean(dim=0)
        torch.testing.assert_close(feats[video, 0], mean / mean.norm(), **NEAR)
        torch.testing.assert_close(states[video], torch.cat(list(own)), **NEAR)


# Weights


def test_weights_without_a_twin_start_it_as_a_copy() -> None:
    model = small_blip("retrieval")
    lacking = [name for name in model.state_dict() if name.startswith(("twin.", "queue."))]
    lines = model.replace(lacking)
    twins = [name for name in lacking if name.startswith("twin.")]
    assert lines == [
        f"momentum twin: {len(twins)} tensors copied from the model",
        "queue: starts with random features",
    ]
    state = model.state_dict()
    assert_same({n: state[n] for n in twins}, {n: state[n.removeprefix("twin.")] for n in twins}, 0.0)


def test_a_twin_that_is_given_in_part_keeps_that_part() -> None:
    model = small_blip("retrieval")
    kept = {n: v.clone() for n, v in model.state_dict().items() if n.startswith("twin.vision.")}
    model.replace([n for n in model.state_dict() if n.startswith("twin.") and n not in kept])
    state = model.state_dict()
    assert_same({n: state[n] for n in kept}, kept, 0.0)
    assert torch.equal(state["twin.text_proj.weight"], state["text_proj.weight"])
    assert model.replace([]) == []


def test_retrieval_continues_pre_training_but_for_the_decoder() -> None:
    given, model = small_blip("pretrain").state_dict(), small_blip("retrieval")
    own = set(model.state_dict())
    left = {name for name in given if name not in own}
    assert own <= set(given)
    assert all(name.startswith("lm_head.") or ".decode." in name for name in left)


# Configuration


def test_presets_are_lavis_recipes() -> None:
    coco, flickr = (BlipRetrieval.presets[name] for name in ("coco", "flickr"))
    assert coco == {**flickr, "negative_all_rank": True}
    assert flickr == {"image_size": 384, "vit_grad_ckpt": True, "vit_ckpt_layer": 4}
    large = {"vit_type": "large", "vit_drop_path_rate": 0.1}  # the original code's
    assert BlipRetrieval.presets["large_coco"] == {**coco, **large, "vit_ckpt_layer": 12}
    assert BlipRetrieval.presets["large_flickr"] == {**flickr, **large, "vit_ckpt_layer": 10}
    config = BlipRetrievalConfig()
    assert (config.queue_size, config.max_txt_len, config.image_id_targets) == (57600, 35, True)
    assert not config.negative_all_rank


def test_itc_chooses_from_the_batch_and_the_queue() -> None:
    assert small_blip("retrieval").num_contrasted(8) == 8 + 10
    assert small_blip("caption").num_contrasted(8) == 8
