"""Features and matching: what comes out is what plain loops compute (float64, 1e-8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import UsageError
from blip.layers.attention import Attention, KeyValue
from blip.models.blip_features import BlipFeatureExtractor, BlipImageTextMatching
from blip.models.med import MedConfig
from tests.reference import blip as reference
from tests.reference.small_blip import SIZES, small_blip
from tests.reference.small_stage1 import global_batch

NEAR: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}
ROWS = 4


def projected(model: Any, states: Tensor, name: str) -> Tensor:
    """Every state in the contrastive space, (T, E), of unit length."""
    weights = dict(model.named_parameters())
    return torch.stack([reference.unit(reference.linear(state, weights, name)) for state in states])


def med_states(
    model: Any, batch: dict[str, Any], row: int, image: Tensor | None, first: int | None
) -> Tensor:
    ids = reference.real(batch, row)
    ids = ids if first is None else [first, *ids[1:]]
    text = reference.part(dict(model.named_parameters()), "text")
    return reference.med(text, ids, [] if image is None else [image])


@torch.no_grad()
def test_features_of_the_three_modes_are_those_of_plain_loops() -> None:
    model, batch = small_blip("features").eval(), global_batch(ROWS, ids=False)
    image, text, both = (model.extract_features(batch, mode=m) for m in ("image", "text", "multimodal"))
    assert list(image) == ["image_embeds", "image_embeds_proj"]
    assert list(text) == ["text_embeds", "text_embeds_proj"]
    assert list(both) == ["image_embeds", "multimodal_embeds"]
    assert text.multimodal_embeds is None
    with pytest.raises(AttributeError, match="output has no 'embeds'; it has text_embeds"):
        _ = text.embeds
    assert torch.equal(both.image_embeds, image.image_embeds)
    torch.testing.assert_close(image.image_embeds, model.vision(batch["image"]))
    for row in range(ROWS):
        states = image.image_embeds[row]
        torch.testing.assert_close(
            image.image_embeds_proj[row], projected(model, states, "vision_proj"), **NEAR
        )
        alone = med_states(model, batch, row, None, None)
        torch.testing.assert_close(text.text_embeds[row, : len(alone)], alone, **NEAR)
        proj = projected(model, alone, "text_proj")
        torch.testing.assert_close(text.text_embeds_proj[row, : len(alone)], proj, **NEAR)
        looking = med_states(model, batch, row, states, model.text.enc_id)
        torch.testing.assert_close(both.multimodal_embeds[row, : len(looking)], looking, **NEAR)
    with torch.enable_grad():
        again = model(batch).multimodal_embeds
    assert torch.equal(again, both.multimodal_embeds)
    assert not again.requires_grad


@torch.no_grad()
def test_lavis_samples_give_features_of_all_their_words() -> None:
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})
    model = small_blip("features", tokenizer="scenes", vocab_size=None, max_txt_len=5, med=med).eval()
    samples = {
        "image": torch.randn(1, 3, 16, 16, dtype=torch.double),
        "text_input": "a red circle and a star",
    }
    assert model.extract_features(samples, mode="text").text_embeds.shape == (1, 8, 16)  # not cut at 5
    assert model.extract_features(samples).multimodal_embeds.shape == (1, 8, 16)
    with pytest.raises(UsageError, match="unknown mode 'multi'"):
        model.extract_features(samples, mode="multi")


# Matching


@pytest.mark.parametrize(("token", "first"), [("enc", 39), ("cls", None)])
@torch.no_grad()
def test_pairs_are_judged_by_the_first_token(token: str, first: int | None) -> None:
    """[ENC], as in training; the original code and transformers leave [CLS] at inference."""
    model, batch = small_blip("matching", itm_token=token).eval(), global_batch(ROWS, ids=False)
    if first is None:
        model._word_pieces = Pieces
        batch["text_ids"][:, 0] = Pieces.cls_id
    states, weights = model.vision(batch["image"]), dict(model.named_parameters())
    logits = model(batch)
    scores = model.compute_itm(states, batch["text_ids"], batch["text_mask"].long())
    for row in range(ROWS):
        seen = med_states(model, batch, row, states[row], first)
        wanted = reference.linear(seen[0], weights, "itm_head")
        torch.testing.assert_close(logits[row], wanted, **NEAR)
        torch.testing.assert_close(scores[row], wanted[1], **NEAR)


class Pieces:
    """Stands for a tokenizer of the small vocabulary."""

    cls_id = 5
    vocab_size = 40


@torch.no_grad()
def test_cosines_are_those_of_all_pictures_with_all_texts() -> None:
    model, batch = small_blip("matching").eval(), global_batch(ROWS, ids=False)
    states, sims = model.vision(batch["image"]), model(batch, match_head="itc")
    for i in range(ROWS):
        for j in range(ROWS):
            image = projected(model, states[i, :1], "vision_proj")[0]
            text = projected(model, med_states(model, batch, j, None, None)[:1], "text_proj")[0]
            torch.testing.assert_close(sims[i, j], torch.dot(image, text), **NEAR)
    with pytest.raises(UsageError, match="unknown head 'itn'"):
        model(batch, match_head="itn")


@torch.no_grad()
def test_texts_of_different_lengths_are_judged_as_each_alone() -> None:
    model, batch = small_blip("matching").eval(), global_batch(ROWS, ids=False)
    together = model(batch)
    for row in range(ROWS):
        length = int(batch["text_mask"][row].sum())
        alone = {
            "image": batch["image"][row : row + 1],
            "text_ids": batch["text_ids"][row : row + 1, :length],
            "text_mask": batch["text_mask"][row : row + 1, :length],
        }
        torch.testing.assert_close(model(alone), together[row : row + 1], **NEAR)
        assert model(alone, match_head="itc").shape == (1, 1)


def test_matching_is_retrieval_without_what_trains_it() -> None:
    given, own = small_blip("retrieval").state_dict(), small_blip("matching").state_dict()
    assert set(given) - set(own) == {n for n in given if n.startswith(("twin.", "queue.")) or n == "temp"}
    assert set(own) <= set(given)
    features = small_blip("features").state_dict()
    assert set(features) - set(own) == {"temp"}


@torch.no_grad()
def test_matching_ranks_as_retrieval_does() -> None:
    """The same features, states and scores, whose plain loops stand in test_blip_retrieval."""
    retrieval, matching = small_blip("retrieval").eval(), small_blip("matching").eval()
    matching.load_state_dict({n: t for n, t in retrieval.state_dict().items() if n in matching.state_dict()})
    batch = global_batch(ROWS, ids=False)
    found = []
    for model in (retrieval, matching):
        feats, states = model.retrieval_images(batch)
        text = model.retrieval_texts(batch["text_ids"], batch["text_mask"])
        keys = model.retrieval_keys(states)
        logits = model.rerank(keys, batch["text_ids"][None], batch["text_mask"][None])
        found.append((model.retrieval_scores(feats, text), logits))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[1][1][0], matching(batch)[:, 1])


def test_presets_are_lavis() -> None:
    assert BlipFeatureExtractor.presets == {"base": {"image_size": 224}}
    assert BlipImageTextMatching.presets["base"] == {"image_size": 384}
    assert BlipImageTextMatching.presets["large"]["vit_type"] == "large"


def test_grad_cam_is_attention_times_its_positive_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of the matching logit is found by moving single attention weights."""
    model, batch = small_blip("matching").eval(), global_batch(ROWS, ids=False)
    maps, logits = model.compute_gradcam(batch, block_num=0)
    torch.testing.assert_close(logits, model(batch).detach(), **NEAR)
    assert [len(found) for found in maps] == (batch["text_mask"].sum(dim=1) + 1).tolist()
    plain = Attention.with_weights
    row, token, patch, step = 1, 2, 0, 1e-5

    def moved(head: int) -> float:
        def with_weights(self: Attention, hidden: Tensor, source: KeyValue) -> tuple[Tensor, Tensor]:
            _, weights = plain(self, hidden, source)
            shift = torch.zeros_like(weights)
            shift[row, head, token, 1 + patch] = step  # behind [CLS]
            seen = ((weights + shift) @ source.value).transpose(1, 2).flatten(2)
            return self.norm(hidden + self.out(seen)), weights

        monkeypatch.setattr(Attention, "with_weights", with_weights)
        _, changed = model.compute_gradcam(batch, block_num=0)
        monkeypatch.setattr(Attention, "with_weights", plain)
        return float(changed[row, 1] - logits[row, 1]) / step

    with torch.no_grad():
        _, weights = model._watch(model.with_text(batch), 0)
    slopes = [moved(head) for head in range(weights.shape[1])]
    assert max(slopes) > 0
    expected = sum(
        float(weights[row, head, token, 1 + patch]) * max(slope, 0.0) for head, slope in enumerate(slopes)
    ) / len(slopes)
    assert float(maps[row][1 + token].flatten()[patch]) == pytest.approx(expected, rel=1e-4)
    words = maps[row][2:-1]
    torch.testing.assert_close(maps[row][1], words.mean(dim=0))
    with pytest.raises(UsageError, match="block_num: 9, where layers are 0 to"):
        model.compute_gradcam(batch, block_num=9)
