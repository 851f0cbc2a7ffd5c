"""BLIP pre-training against recorded outputs of LAVIS's own `BlipPretrain`, tiny and with random weights.

The recording drew negatives by arg-max and had no dropout. LAVIS moves the momentum twin at the start of the
forward pass, the library after the step: one move stands before everything that is compared. Tolerances are
those of its float32 sums: losses and features 1e-5 absolute and 1e-4 relative, gradient norms and the three
optimizer steps 1e-3 relative.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.formats import lavis
from blip.losses import argmax_sampler
from blip.models import contrast
from blip.models.blip_pretrain import BlipPretrain, BlipPretrainConfig
from blip.models.med import MedConfig
from blip.models.narrate import decoder_labels
from blip.models.vision import VisionConfig
from blip.weights import load_into

GOLDEN = Path(__file__).parent / "goldens" / "blip_pretrain.pt"
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
ROUGH = 1e-3
ZERO = 1e-5
"""Norm of a gradient that is zero by construction (of key biases), but for rounding."""
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm")
MOMENTUM = 0.995
DECODER_NAME = ("text_decoder.bert.", "text_encoder.")
"""What the decoder shares has its gradient under the encoder's name."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


def build(golden: dict[str, Any]) -> BlipPretrain:
    """Our model with the recorded weights, its twin moved once; every key of both sides is accounted for."""
    sizes, state = golden["meta"]["config"], golden["state_dict"]
    vit = VisionConfig(
        vit_model="vit_base",
        patch_size=sizes["patch"],
        width=sizes["vit_dim"],
        depth=sizes["vit_depth"],
        heads=sizes["vit_heads"],
        mlp_dim=int(sizes["vit_mlp"] * sizes["vit_dim"]),
    )
    med = MedConfig(
        width=sizes["hidden"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_dim=sizes["inter"],
        max_positions=sizes["max_pos"],
    )
    config = BlipPretrainConfig(
        image_size=sizes["image"],
        vit=vit,
        med=med,
        embed_dim=sizes["embed_dim"],
        queue_size=sizes["queue"],
        momentum=MOMENTUM,
        max_txt_len=sizes["max_txt"],
        vocab_size=len(state["text_encoder.embeddings.word_embeddings.weight"]),
        dropout=0.0,
    )
    model = BlipPretrain(config)
    weights = lavis.table("blip_pretrain", config.share).to_ours(state).state
    report = load_into(model, weights, source="the recording", allow_missing=["queue.ids"])
    assert (report.missing, report.unexpected) == (["queue.ids"], [])
    model.negative_sampler = argmax_sampler
    model.twin.follow(model, MOMENTUM)
    return model.train()


@pytest.fixture
def model(golden: dict[str, Any]) -> BlipPretrain:
    return build(golden)


def batch(golden: dict[str, Any], padding: str = "max_length") -> dict[str, Any]:
    """The recorded batch; texts padded as LAVIS does, or to the longest."""
    call = next(c for c in golden["tokenizer_calls"] if c["kwargs"]["padding"] == "max_length")
    ids, mask = call["input_ids"], call["attention_mask"].bool()
    longest = ids.shape[1] if padding == "max_length" else int(mask.sum(dim=1).max())
    place = {key: golden["inputs"][key] for key in ("epoch", "iters", "num_iters_per_epoch")}
    return {
        "image": golden["inputs"]["image"],
        "text_ids": ids[:, :longest],
        "text_mask": mask[:, :longest],
        **place,
    }


def exported(model: BlipPretrain) -> dict[str, Tensor]:
    return lavis.table("blip_pretrain").to_theirs(model.state_dict()).state


def our_names(golden: dict[str, Any]) -> dict[str, str]:
    """LAVIS's name -> ours."""
    report = lavis.table("blip_pretrain").to_ours(golden["state_dict"]).report
    return {line.source[0]: line.target[0] for line in report if line.target}


def unused(name: str) -> bool:
    """A tensor of LAVIS's momentum twin that ours has not, since nothing reads it."""
    return name.startswith("text_encoder_m.") and ".crossattention." in name


def assert_digest(state: Mapping[str, Tensor], name: str, expected: list[float], slack: float = 0.0) -> None:
    """Sum, norm and size of a tensor; `slack` is what an entry may differ by, for another reason."""
    total, norm, count = expected
    assert state[name].numel() == count, name
    assert float(state[name].norm()) == pytest.approx(norm, rel=ROUGH, abs=slack * count**0.5 + 1e-5), name
    near = slack * count if slack else ROUGH * norm * count**0.5
    assert float(state[name].double().sum()) == pytest.approx(total, abs=near + 1e-5), name


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_losses_are_lavis_s(golden: dict[str, Any], model: BlipPretrain, padding: str) -> None:
    output = model(batch(golden, padding))
    for name in LOSSES:
        expected = golden["outputs"][name]
        torch.testing.assert_close(output[name], expected, **CLOSE, msg=name)
    assert float(output.alpha) == pytest.approx(0.1)


def test_similarities_and_soft_targets_are_lavis_s(
    golden: dict[str, Any], model: BlipPretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    itc_loss, soft_targets = contrast.itc_loss, contrast.soft_targets

    def watched_loss(image: Any, text: Any, candidates: Any, *rest: Any) -> Any:
        found = itc_loss(image, text, candidates, *rest)
        targets = {"sim_i2t_targets": candidates.target_i2t, "sim_t2i_targets": candidates.target_t2i}
        seen.update(sim_i2t=found.sim_i2t, sim_t2i=found.sim_t2i, **targets)
        return found

    def watched_targets(opinion: Tensor, *rest: Any) -> Tensor:
        seen["sim_t2i_m" if "sim_i2t_m" in seen else "sim_i2t_m"] = opinion
        return soft_targets(opinion, *rest)

    monkeypatch.setattr(contrast, "itc_loss", watched_loss)
    monkeypatch.setattr(contrast, "soft_targets", watched_targets)
    model(batch(golden))
    expected = golden["outputs"]["sims"]
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, **CLOSE, msg=name)


@torch.no_grad()
def test_states_of_model_and_twin_are_lavis_s(golden: dict[str, Any], model: BlipPretrain) -> None:
    rows, expected = batch(golden), golden["outputs"]
    real, twin = rows["text_mask"], model.twin
    text, text_m = (m.unimodal(rows["text_ids"], real) for m in (model.text, twin["text"]))  # type: ignore[operator]
    torch.testing.assert_close(model.image_states(rows), expected["image_embeds"], **CLOSE)
    torch.testing.assert_close(twin["vision"](rows["image"]), expected["image_embeds_m"], **CLOSE)
    torch.testing.assert_close(text[real], expected["text_embeds"][real], **CLOSE)
    torch.testing.assert_close(text_m[real], expected["text_embeds_m"][real], **CLOSE)


def test_matching_logits_of_the_hard_negatives_are_lavis_s(
    golden: dict[str, Any], model: BlipPretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    itm_loss = contrast.itm_loss

    def watched(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        seen.extend((logits, labels))
        return itm_loss(logits, labels, *rest)

    monkeypatch.setattr(contrast, "itm_loss", watched)
    model(batch(golden))
    logits, labels = seen
    torch.testing.assert_close(labels, golden["outputs"]["itm_labels"])
    right, wrong_text, wrong_image = logits.chunk(3)  # LAVIS puts the wrong images first
    ordered = torch.cat([right, wrong_image, wrong_text])
    torch.testing.assert_close(ordered, golden["outputs"]["itm_logits"], **CLOSE)


@torch.no_grad()
def test_decoder_logits_are_lavis_s(golden: dict[str, Any], model: BlipPretrain) -> None:
    rows = batch(golden)
    ids, mask = rows["text_ids"], rows["text_mask"]
    labels = decoder_labels(ids, mask)
    expected = golden["outputs"]["decoder_labels"][:, 1:]
    torch.testing.assert_close(labels, expected)
    hidden = model.text.decode(ids, mask, [(model.text.image_keys(model.image_states(rows)), 1)])
    logits = model.lm_head(hidden, model.text.embedding.word.weight)
    asked = labels != -100
    torch.testing.assert_close(logits[asked], golden["outputs"]["decoder_logits"][:, :-1][asked], **CLOSE)


def test_the_queue_takes_what_lavis_s_takes(golden: dict[str, Any], model: BlipPretrain) -> None:
    assert int(model.queue.pointer) == 16
    digest, before = golden["digest_after_forward"], golden["state_dict"]
    twin = {name: tensor for name, tensor in exported(model).items() if "_m." in name}
    output = model(batch(golden))
    model.after_step([output])
    state = exported(model)
    assert int(model.queue.pointer) == 20
    for kind in ("image", "text"):
        newest = golden["outputs"][f"{kind}_queue_16_20"]
        torch.testing.assert_close(state[f"{kind}_queue"][:, 16:20], newest, **CLOSE)
        older = before[f"{kind}_queue"][:, 20:]
        torch.testing.assert_close(state[f"{kind}_queue"][:, 20:], older, rtol=0, atol=0)
        assert_digest(state, f"{kind}_queue", digest[f"{kind}_queue"])
    for name, tensor in twin.items():
        if name in digest and not unused(name):
            assert_digest({name: tensor}, name, digest[name])


def test_gradients_are_lavis_s(golden: dict[str, Any], model: BlipPretrain) -> None:
    model(batch(golden)).loss.backward()
    ours, renamed = dict(model.named_parameters()), our_names(golden)
    assert {renamed[name] for name in golden["grads"]} == {n for n, p in ours.items() if p.grad is not None}
    for name, expected in golden["grads"].items():
        grad = ours[renamed[name]].grad
        assert grad is not None
        assert float(grad.norm()) == pytest.approx(expected["norm"], rel=ROUGH, abs=ZERO), name
        near = {"atol": max(1e-4 * expected["norm"], ZERO), "rtol": ROUGH}
        torch.testing.assert_close(grad.flatten()[:8], expected["head"], **near, msg=name)
        # A sum cancels, so it is only as exact as its terms.
        slack = 1e-4 * expected["norm"] * grad.numel() ** 0.5 + ZERO
        assert float(grad.sum()) == pytest.approx(expected["sum"], rel=ROUGH, abs=slack), name


def test_three_adamw_steps_are_lavis_s(golden: dict[str, Any], model: BlipPretrain) -> None:
    train, renamed = golden["train"], our_names(golden)
    ours = dict(model.named_parameters())
    groups = [
        {"params": [ours[renamed[name]] for name in group["names"]], "weight_decay": group["weight_decay"]}
        for group in train["groups"]
    ]
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in ours.values())
    optimizer = torch.optim.AdamW(groups, lr=train["lr"])
    twin: dict[str, Tensor] = {}
    for step, expected in enumerate(train["losses"]):
        rows = batch(golden)
        output = model(rows | {"iters": rows["iters"] + step})
        for name in LOSSES:
            assert float(output[name].detach()) == pytest.approx(expected[name], rel=ROUGH, abs=1e-5), name
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        twin = {name: tensor.clone() for name, tensor in exported(model).items() if "_m." in name}
        model.after_step([output])
    assert len(train["losses"]) == train["steps"] == 3

    saved = exported(model) | twin  # LAVIS moves it with the next step
    assert saved.keys() == golden["state_dict"].keys() >= train["end_digest"].keys()
    assert saved["queue_ptr"].tolist() == golden["outputs"]["queue_ptr"].tolist() == [28]
    for name, expected in train["end_digest"].items():
        # Adam moves an entry by about lr even where its gradient is nothing but rounding (biases of keys).
        grad = golden["grads"].get(name) or golden["grads"].get(name.replace(*DECODER_NAME))
        noise = grad is not None and grad["norm"] < ZERO
        if not unused(name):
            assert_digest(saved, name, expected, train["steps"] * train["lr"] if noise else 0.0)


def test_every_key_goes_over_and_back(golden: dict[str, Any]) -> None:
    table = lavis.table("blip_pretrain")
    back = table.to_theirs(table.to_ours(golden["state_dict"]).state).state
    assert back.keys() == golden["state_dict"].keys()
    for name, tensor in golden["state_dict"].items():
        if unused(name):
            tensor = golden["state_dict"][name.replace("_m.", ".", 1)]
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, msg=name)
