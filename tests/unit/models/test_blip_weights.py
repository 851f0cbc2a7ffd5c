"""BLIP's weights: sizes read off them, and one model of the family from another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.models.blip_caption import BlipCaptionConfig
from blip.models.blip_classification import BlipClassificationConfig, BlipNlvrConfig
from blip.models.blip_pretrain import BlipPretrainConfig
from blip.models.blip_retrieval import BlipRetrievalConfig
from blip.models.blip_weights import adopt, blip_sizes
from blip.models.med import DECODER_HAS
from blip.models.vision import VisionConfig
from blip.registry import MODELS
from blip.weights import load_into
from tests.reference.small_blip import MODELS as KINDS
from tests.reference.small_blip import small_blip

QUERY = "text.layers.1.{}query.weight"


def state(kind: str, **values: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in small_blip(kind, **values).state_dict().items()}


def started(
    kind: str, tensors: dict[str, Tensor], **values: Any
) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """State of a model that adopts weights, the beginnings of what it keeps, and of what was left out."""
    model = small_blip(kind, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tensors, left_out, kept = adopt(tensors, model.state_dict())
    report = load_into(model, tensors, allow_missing=kept)
    assert set(report.missing) == set(kept)
    return model.state_dict(), {n.split(".")[0] for n in kept}, {n.split(".")[0] for n in left_out}


def assert_from(found: dict[str, Tensor], source: dict[str, Tensor], names: dict[str, str]) -> None:
    """Tensors under the name `ours` are those of `source` under `theirs`."""
    for ours, theirs in names.items():
        torch.testing.assert_close(found[ours], source[theirs], rtol=0, atol=0, msg=ours)


SELF, CROSS = (QUERY.format(f"{part}_attn.") for part in ("self", "cross"))
OWN = QUERY.format("decode.self_attn.")
FFN = "text.layers.0.ffn.expand.bias"


def test_a_captioner_starts_from_the_decoder_of_pre_training() -> None:
    source = state("pretrain")
    found, kept, left_out = started("caption", source)
    same = {name: name for name in (CROSS, FFN, "text.embedding.word.weight", "lm_head.bias")}
    assert_from(found, source, {SELF: OWN, **same})
    assert kept == set()
    assert left_out == {"text", "itm_head", "vision_proj", "text_proj", "temp", "twin", "queue"}


def test_question_answering_starts_from_both_views_of_pre_training() -> None:
    source = state("pretrain", share="none")
    found, kept, _ = started("vqa", source)
    words = "text.embedding.word.weight"
    assert_from(found, source, {SELF: SELF, CROSS: CROSS, FFN: FFN, words: words})
    decoder = {
        FFN: "text.layers.0.decode.ffn.expand.bias",
        words: "text.decode_embedding.word.weight",
        SELF: OWN,
    }
    assert_from(found, source, {k.replace("text", "answer_decoder", 1): v for k, v in decoder.items()})
    # Answers look at states of the text transformer, which is not as wide as the tower here.
    assert kept == {"answer_decoder"}
    query = CROSS.replace("text", "answer_decoder", 1)
    assert torch.equal(found[query], source[QUERY.format("decode.cross_attn.")])
    assert not found[query.replace("query", "key")].any()


def test_retrieval_takes_momentum_twin_and_queue_along() -> None:
    source = state("pretrain")
    source["queue.pointer"].fill_(4)
    found, kept, left_out = started("retrieval", source)
    assert (kept, left_out) == (set(), {"text", "lm_head"})
    assert_from(found, source, {name: name for name in found})
    lavis = {n: t for n, t in source.items() if n not in ("queue.ids", "queue.pointer")}
    found, kept, _ = started("retrieval", lavis)
    assert (kept, found["queue.ids"].unique().tolist(), int(found["queue.pointer"])) == (set(), [-100], 0)


@pytest.mark.parametrize(
    ("values", "parts"), [({"queue_size": 5}, {"queue"}), ({"queue_size": 0}, {"queue"})]
)
def test_a_queue_of_another_size_is_left_out(values: dict[str, Any], parts: set[str]) -> None:
    _, kept, left_out = started("retrieval", state("retrieval"), **values)
    assert (kept, left_out) == (parts, parts)


def test_half_a_twin_is_left_out() -> None:
    source = state("retrieval")
    del source["twin.text.layers.1.ffn.expand.bias"]
    _, kept, left_out = started("retrieval", source)
    assert (kept, left_out) == ({"twin"}, {"twin"})


def test_both_cross_attentions_of_nlvr_start_from_the_one() -> None:
    source = state("retrieval")
    found, kept, _ = started("nlvr", source)
    assert_from(found, source, {QUERY.format(f"cross_attn.looks.{i}."): CROSS for i in (0, 1)})
    out, norm = "text.layers.1.cross_attn.{}weight", "text.layers.1.cross_attn.norm.bias"
    assert_from(found, source, {out.format("looks.1.out."): out.format("out."), norm: norm, SELF: SELF})
    assert kept == {"cls_head", "text"}
    assert not found[out.format("merge.")].any()


def test_classification_starts_with_a_head_and_a_twin_of_its_own() -> None:
    _, kept, left_out = started("classification", state("pretrain"))
    assert kept == {"cls_head", "twin"}
    assert {"twin", "lm_head", "itm_head"} <= left_out
    _, kept, left_out = started("classification", state("classification", num_classes=5))
    assert (kept, left_out) == ({"cls_head", "twin"}, {"cls_head", "twin"})


def test_features_and_matching_take_the_encoder_and_its_heads() -> None:
    source = state("pretrain")
    found, kept, _ = started("features", source)
    assert kept == set()
    assert_from(found, source, {name: name for name in found})
    found, kept, left_out = started("matching", state("retrieval"))
    assert (kept, left_out) == (set(), {"temp", "twin", "queue"})


def test_the_encoder_of_a_captioner_s_decoder_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    source = state("caption")
    found, kept, left_out = started("retrieval", source)
    assert_from(found, source, {SELF: SELF, CROSS: CROSS})
    assert kept == {"itm_head", "vision_proj", "text_proj", "temp", "twin", "queue"}
    assert left_out == {"lm_head"}
    assert "starts from the weights of a decoder" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_own_weights_are_all_taken(kind: str) -> None:
    source = state(kind)
    found, kept, left_out = started(kind, source)
    assert (kept, left_out) == (set(), set())
    assert_from(found, source, {name: name for name in found})


def test_positions_of_another_picture_size_are_interpolated_in_the_twin_too() -> None:
    source = state("pretrain")
    found, kept, _ = started("retrieval", source, image_size=24)
    assert kept == set()
    for name in ("vision.vit.pos_embed", "twin.vision.vit.pos_embed"):
        assert (source[name].shape[1], found[name].shape[1]) == (5, 10)
        assert torch.equal(found[name][:, 0], source[name][:, 0])
        assert torch.allclose(found[name][:, 1:].mean(), source[name][:, 1:].mean(), atol=0.05)


def test_what_has_no_counterpart_stays_and_is_refused_when_loaded() -> None:
    deeper = {QUERY.format("self_attn.").replace(".1.", ".2."): torch.zeros(16, 16)}
    for kind, source in (
        ("caption", state("pretrain") | deeper),
        ("retrieval", state("pretrain") | {"ln_vision.weight": torch.zeros(1)}),
        ("classification", state("nlvr")),
    ):
        wanted = small_blip(kind).state_dict()
        found = adopt(source, wanted)
        assert set(found.tensors) - set(wanted) or set(wanted) - set(found.tensors) - set(found.kept)


# Sizes


def test_sizes_are_read_off_the_weights() -> None:
    found, unknown = blip_sizes(state("pretrain"), BlipPretrainConfig)
    assert found == {
        "vit_type": "base",
        "vit": {"patch_size": 8, "width": 12, "depth": 2, "mlp_dim": 20},
        "image_size": 16,
        "med": {"width": 16, "depth": 2, "mlp_dim": 24, "max_positions": 16},
        "vocab_size": 40,
        "embed_dim": 8,
        "queue_size": 10,
        "share": "all_but_sa",
        "max_txt_len": 16,  # the default, 30, has no positions
    }
    assert unknown == ["vit.heads", "med.num_heads"]
    found, _ = blip_sizes(state("pretrain"), BlipRetrievalConfig)
    assert (found["queue_size"], found["max_txt_len"]) == (10, 16)  # it would be 35, with 16 positions
    assert "share" not in found
    assert not {"embed_dim", "queue_size"} & set(blip_sizes(state("pretrain"), BlipCaptionConfig).values)
    found, _ = blip_sizes(state("classification", num_classes=5, use_distill=False), BlipClassificationConfig)
    assert (found["num_classes"], found["use_distill"]) == (5, False)


@pytest.mark.parametrize(("merge_from", "found"), [(None, 1), (0, 0), (1, 1), (2, 2), (6, 2)])
def test_where_two_images_are_joined_is_read_off_the_weights(merge_from: int | None, found: int) -> None:
    weights = state("nlvr", merge_from=merge_from)  # two layers
    merged = {name.split(".cross_attn.")[0] for name in weights if ".cross_attn.merge." in name}
    assert merged == {f"text.layers.{layer}" for layer in range(found, 2)}
    assert blip_sizes(weights, BlipNlvrConfig).values["merge_from"] == found
    assert "merge_from" not in blip_sizes(state("classification"), BlipClassificationConfig).values


def test_a_stem_is_read_off_the_weights() -> None:
    vit = {"patch_size": 8, "width": 12, "depth": 2, "mlp_dim": 20, "stem_width": 6, "stem_stride": 4}
    tower = VisionConfig(vit_model="vit_base", heads=2, **vit)
    found = blip_sizes(state("pretrain", vit=tower), BlipPretrainConfig).values
    assert found["vit"] == vit
    assert found["image_size"] == 16


@pytest.mark.parametrize("share", DECODER_HAS)
def test_what_is_shared_is_read_off_the_weights(share: str) -> None:
    assert blip_sizes(state("pretrain", share=share), BlipPretrainConfig).values["share"] == share


@pytest.mark.parametrize("vit_type", ["base", "large"])
def test_published_sizes_leave_nothing_open(vit_type: str) -> None:
    cls = MODELS.get("blip_retrieval")
    config = {"vit_type": vit_type, "image_size": 384, "vocab_size": 30524}
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    found, unknown = blip_sizes(model.state_dict(), cls.config_class)
    med = {"width": 768, "depth": 12, "mlp_dim": 3072, "max_positions": 512}
    assert found == {**config, "med": med, "embed_dim": 256, "queue_size": 57600}
    assert unknown == []
