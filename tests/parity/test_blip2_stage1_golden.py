"""Stage 1 against recorded outputs of LAVIS's own `Blip2Qformer`, at a tiny size with random weights.

The recording drew negatives by arg-max and had no dropout. It ran in a process group, so its ITC columns
carry no gradient (`gather_with_grad: false`; `test_blip2_stage1_naive.py` has the gradient of both sides).
Tolerances are those of its float32 sums: losses and features 1e-5 absolute and 1e-4 relative, gradient norms
and the three optimizer steps 1e-3 relative.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip.formats import lavis
from blip.losses import argmax_sampler
from blip.models.blip2_qformer import Blip2Qformer, Blip2QformerConfig
from blip.models.qformer import QFormerConfig
from blip.models.vision import VisionConfig
from blip.weights import load_into

GOLDEN = Path(__file__).parent / "goldens" / "blip2_stage1.pt"
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
ROUGH = 1e-3
ZERO = 1e-5
"""Norm of a gradient that is zero by construction (of key biases), but for rounding."""
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


def build(golden: dict[str, Any], **values: Any) -> Blip2Qformer:
    """Our model with the recorded weights; every key of both sides is accounted for."""
    sizes = golden["meta"]["config"]
    vit = VisionConfig(
        patch_size=sizes["patch"],
        width=sizes["vit_dim"],
        depth=sizes["vit_depth"],
        heads=sizes["vit_heads"],
        mlp_dim=int(sizes["vit_mlp"] * sizes["vit_dim"]),
    )
    qformer = QFormerConfig(
        width=sizes["hidden"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_dim=sizes["inter"],
        max_positions=sizes["max_pos"],
    )
    config = Blip2QformerConfig(
        image_size=sizes["image"],
        vit_precision="fp32",
        vit=vit,
        num_query_token=sizes["queries"],
        qformer=qformer,
        embed_dim=sizes["embed_dim"],
        max_txt_len=sizes["max_txt"],
        vocab_size=len(golden["state_dict"]["Qformer.bert.embeddings.word_embeddings.weight"]),
        dropout=0.0,
        gather_with_grad=False,
        **values,
    )
    model = Blip2Qformer(config)
    weights = lavis.table("blip2", config.vit_model).to_ours(golden["state_dict"]).state
    report = load_into(model, weights, source="the recording")
    assert (report.missing, report.unexpected) == ([], [])
    model.negative_sampler = argmax_sampler
    return model.train()


@pytest.fixture
def model(golden: dict[str, Any]) -> Blip2Qformer:
    return build(golden)


def text(golden: dict[str, Any], padding: str) -> dict[str, Tensor]:
    """The recorded token ids, padded to the longest of the batch or to `max_txt_len` as LAVIS trains."""
    calls = {str(call["kwargs"]["padding"]): call for call in golden["tokenizer_calls"]}
    call = calls["True" if padding == "longest" else "max_length"]
    return {"text_ids": call["input_ids"], "text_mask": call["attention_mask"].bool()}


def batch(golden: dict[str, Any], padding: str = "longest", ids: bool = False) -> dict[str, Any]:
    image_id = {"image_id": golden["inputs"]["image_id"]} if ids else {}
    return {"image": golden["inputs"]["image"], **text(golden, padding), **image_id}


def names(golden: dict[str, Any]) -> dict[str, str]:
    """LAVIS's name -> ours."""
    report = lavis.table("blip2").to_ours(golden["state_dict"]).report
    return {line.source[0]: line.target[0] for line in report if line.target}


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "image_id"])
def test_losses_are_lavis_s(golden: dict[str, Any], model: Blip2Qformer, ids: bool, padding: str) -> None:
    output = model(batch(golden, padding, ids))
    expected = golden["outputs"]["with_image_id"] if ids else golden["outputs"]
    for name in LOSSES:
        torch.testing.assert_close(output[name], expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_readme_tells_how_to_compare() -> None:
    readme = (GOLDEN.parents[3] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Comparing with LAVIS")[1]
    code = section.split("```python\n")[1].split("```")[0].replace("tests/parity/goldens", str(GOLDEN.parent))
    names: dict[str, Any] = {}
    exec(code, names)
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        torch.testing.assert_close(names["found"][name].detach(), names["theirs"]["outputs"][name], **CLOSE)


def test_the_two_sets_of_losses_differ(golden: dict[str, Any]) -> None:
    plain, soft = golden["outputs"], golden["outputs"]["with_image_id"]
    assert abs(plain["loss_itc"] - soft["loss_itc"]) > 0.1
    assert abs(plain["loss_itm"] - soft["loss_itm"]) > 0.001


def test_gradients_are_lavis_s(golden: dict[str, Any], model: Blip2Qformer) -> None:
    model(batch(golden)).loss.backward()
    ours = dict(model.named_parameters())
    renamed = names(golden)
    assert {renamed[name] for name in golden["grads"]} == {n for n, p in ours.items() if p.grad is not None}
    for name, expected in golden["grads"].items():
        grad = ours[renamed[name]].grad
        assert grad is not None
        assert float(grad.norm()) == pytest.approx(expected["norm"], rel=ROUGH, abs=ZERO), name
        near = {"atol": max(1e-4 * expected["norm"], ZERO), "rtol": ROUGH}
        torch.testing.assert_close(
            grad.flatten()[:8], expected["head"], **near, msg=lambda m, n=name: f"{n}: {m}"
        )
        # A sum cancels, so it is only as exact as its terms.
        slack = 1e-4 * expected["norm"] * grad.numel() ** 0.5 + ZERO
        assert float(grad.sum()) == pytest.approx(expected["sum"], rel=ROUGH, abs=slack), name


def test_three_adamw_steps_are_lavis_s(golden: dict[str, Any], model: Blip2Qformer) -> None:
    train, renamed = golden["train"], names(golden)
    ours = dict(model.named_parameters())
    groups = [
        {"params": [ours[renamed[name]] for name in group["names"]], "weight_decay": group["weight_decay"]}
        for group in train["groups"]
    ]
    optimizer = torch.optim.AdamW(groups, lr=train["lr"])
    for expected in train["losses"]:
        output = model(batch(golden))
        for name in LOSSES:
            assert float(output[name].detach()) == pytest.approx(expected[name], rel=ROUGH, abs=1e-5), name
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert len(train["losses"]) == train["steps"] == 3

    saved = lavis.table("blip2").to_theirs(model.state_dict()).state
    assert saved.keys() == golden["state_dict"].keys() >= train["end_digest"].keys()
    for name, (total, norm, count) in train["end_digest"].items():
        assert saved[name].numel() == count
        # Adam moves an entry by about lr even where its gradient is nothing but rounding (biases of keys).
        noise = golden["grads"].get(name, {"norm": 1.0})["norm"] < ZERO
        slack = train["steps"] * train["lr"] * count**0.5 if noise else 1e-5
        assert float(saved[name].norm()) == pytest.approx(norm, rel=ROUGH, abs=slack), name
        slack = train["steps"] * train["lr"] * count if noise else ROUGH * norm * count**0.5
        assert float(saved[name].double().sum()) == pytest.approx(total, abs=slack + 1e-5), name


def test_tower_states_are_lavis_s(golden: dict[str, Any], model: Blip2Qformer) -> None:
    raw = model.image_states(batch(golden))
    torch.testing.assert_close(raw, golden["outputs"]["vit_raw"], **CLOSE)
    torch.testing.assert_close(model.normed(raw), golden["outputs"]["vit_ln"], **CLOSE)


@pytest.mark.parametrize("mode", ["image", "text", "multimodal"])
def test_features_are_lavis_s(golden: dict[str, Any], model: Blip2Qformer, mode: str) -> None:
    features = model.extract_features(batch(golden), mode=mode)
    expected = golden["features"][mode]
    assert features.keys() == expected.keys()
    mask = text(golden, "longest")["text_mask"]
    for name, value in expected.items():
        got = features[name]
        if mode == "text":
            got, value = got[mask], value[mask]
        torch.testing.assert_close(got, value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_unimodal_states_are_lavis_s(golden: dict[str, Any], model: Blip2Qformer) -> None:
    image = model.extract_features(batch(golden), mode="image").image_embeds
    torch.testing.assert_close(image, golden["outputs"]["forward_image"], **CLOSE)
    states = model.extract_features(batch(golden, "max_length"), mode="text").text_embeds
    torch.testing.assert_close(states[:, 0], golden["outputs"]["forward_text"], **CLOSE)
    feats = F.normalize(model.text_proj(states[:, 0]), dim=-1)
    torch.testing.assert_close(model.text_feats(text(golden, "longest")), feats, **CLOSE)


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_compute_itm_is_lavis_s(golden: dict[str, Any], model: Blip2Qformer, padding: str) -> None:
    tokens = text(golden, padding)
    scores = model.compute_itm(golden["outputs"]["vit_ln"], tokens["text_ids"], tokens["text_mask"])
    torch.testing.assert_close(scores, golden["outputs"]["compute_itm"], **CLOSE)


@pytest.mark.parametrize("how", ["beam3", "greedy", "nucleus"])
def test_captions_are_lavis_s(golden: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording drew the likeliest of the kept tokens, for which `top_k` of one stands here."""
    model = build(golden, tokenizer=str(GOLDEN.parent / "vocab.txt")).eval()
    expected = golden["generate"][how]
    written: list[Tensor] = []
    decode = model.word_pieces.decode
    monkeypatch.setattr(model.word_pieces, "decode", lambda ids: written.append(ids) or decode(ids))

    one = {"top_k": 1} if how == "nucleus" else {}
    captions = model.generate({"image": golden["inputs"]["image"]}, **expected["kwargs"], **one)

    assert [[model.dec_id, *row] for row in written[0].tolist()] == expected["ids"]
    assert captions == [text.strip() for text in expected["text"]]
