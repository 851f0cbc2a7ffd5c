"""The tables for BLIP's weights, against the official key lists and our models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import CheckpointError
from blip.formats import lavis, lavis_blip
from blip.formats.source import recognise
from blip.models.blip_caption import BlipCaption, BlipCaptionConfig
from blip.models.blip_classification import (
    BlipClassification,
    BlipClassificationConfig,
    BlipNlvr,
    BlipNlvrConfig,
)
from blip.models.blip_features import BlipFeatureExtractor, BlipFeaturesConfig
from blip.models.blip_pretrain import BlipPretrain, BlipPretrainConfig
from blip.models.blip_retrieval import BlipRetrieval, BlipRetrievalConfig
from blip.models.blip_vqa import BlipVqa, BlipVqaConfig
from blip.models.med import DECODER_HAS
from blip.weights import save_safetensors
from blip.zoo import from_pretrained
from tests.reference.small_blip import small_blip

ARCH = {
    "retrieval": "blip_retrieval",
    "caption": "blip_caption",
    "vqa": "blip_vqa",
    "classification": "blip_classification",
    "nlvr": "blip_nlvr",
    "features": "blip_feature_extractor",
    "matching": "blip_image_text_matching",
}
PARTS = ("weight", "bias")
SECOND = "text_encoder_m.encoder.layer.1.crossattention.output.dense.weight"


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def saved(kind: str, **values: Any) -> dict[str, Tensor]:
    """Our names; without what BLIP's pre-training does not keep."""
    return {
        n: t
        for n, t in small_blip(kind, **values).state_dict().items()
        if (kind, n) != ("pretrain", "queue.ids")
    }


def exported(kind: str, **values: Any) -> dict[str, Tensor]:
    arch = ARCH.get(kind, "blip_pretrain")
    return lavis.table(arch, values.get("share", "")).to_theirs(saved(kind, **values)).state


# The official lists at full size, as `reference` names and shapes


def linear(name: str, out: int, given: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, given), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for part in PARTS}


def tower(name: str, width: int, depth: int, tokens: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.cls_token": (1, 1, width),
        f"{name}.pos_embed": (1, tokens, width),
        f"{name}.patch_embed.proj.weight": (width, 3, 16, 16),
        f"{name}.patch_embed.proj.bias": (width,),
        **norm(f"{name}.norm", width),
    }
    for block in (f"{name}.blocks.{i}" for i in range(depth)):
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes


def looks(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return (
        linear(f"{name}.query", 768, 768)
        | linear(f"{name}.key", 768, width)
        | linear(f"{name}.value", 768, width)
    )


def text(name: str, width: int, pair: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.embeddings.word_embeddings.weight": (30524, 768),
        f"{name}.embeddings.position_embeddings.weight": (512, 768),
        f"{name}.embeddings.position_ids": (1, 512),
        **norm(f"{name}.embeddings.LayerNorm", 768),
    }
    for i in range(12):
        layer = f"{name}.encoder.layer.{i}"
        shapes |= looks(f"{layer}.attention.self", 768)
        for part in ("attention", "crossattention"):
            shapes |= norm(f"{layer}.{part}.output.LayerNorm", 768)
        shapes |= linear(f"{layer}.attention.output.dense", 768, 768)
        for which in ("0", "1") if pair else ("",):
            shapes |= looks(f"{layer}.crossattention.self{which}", width)
            shapes |= linear(f"{layer}.crossattention.output.dense{which}", 768, 768)
        if pair and i >= 6:
            shapes |= linear(f"{layer}.crossattention.output.merge_layer", 768, 1536)
        shapes |= linear(f"{layer}.intermediate.dense", 3072, 768) | linear(
            f"{layer}.output.dense", 768, 3072
        )
        shapes |= norm(f"{layer}.output.LayerNorm", 768)
    return shapes


def decoder(width: int) -> dict[str, tuple[int, ...]]:
    head = "text_decoder.cls.predictions"
    return {
        **text("text_decoder.bert", width),
        f"{head}.bias": (30524,),
        **linear(f"{head}.transform.dense", 768, 768),
        **norm(f"{head}.transform.LayerNorm", 768),
        **linear(f"{head}.decoder", 30524, 768),
    }


def contrastive(width: int, suffix: str = "") -> dict[str, tuple[int, ...]]:
    return linear(f"vision_proj{suffix}", 256, width) | linear(f"text_proj{suffix}", 256, 768)


def momentum(width: int, depth: int, tokens: int, ids: bool) -> dict[str, tuple[int, ...]]:
    queues: dict[str, tuple[int, ...]] = {
        "image_queue": (256, 57600),
        "text_queue": (256, 57600),
        "queue_ptr": (1,),
    }
    twin = tower("visual_encoder_m", width, depth, tokens) | text("text_encoder_m", width)
    return twin | contrastive(width, "_m") | queues | ({"idx_queue": (1, 57600)} if ids else {})


HEAD: dict[str, tuple[int, ...]] = {**linear("itm_head", 2, 768), "temp": ()}
BASE, LARGE = (768, 12), (1024, 24)


def of(sizes: tuple[int, int], image: int) -> tuple[int, int, int]:
    return (*sizes, (image // 16) ** 2 + 1)


OFFICIAL: dict[str, tuple[str, Any, dict[str, tuple[int, ...]]]] = {
    "pretrain base": (
        "blip_pretrain",
        lambda: BlipPretrain(BlipPretrainConfig(vocab_size=30524)),
        tower("visual_encoder", *of(BASE, 224))
        | text("text_encoder", 768)
        | decoder(768)
        | contrastive(768)
        | HEAD
        | momentum(*of(BASE, 224), ids=False),
    ),
    "retrieval large": (
        "blip_retrieval",
        lambda: BlipRetrieval(BlipRetrievalConfig(vocab_size=30524, vit_type="large", image_size=384)),
        tower("visual_encoder", *of(LARGE, 384))
        | text("text_encoder", 1024)
        | contrastive(1024)
        | HEAD
        | momentum(*of(LARGE, 384), ids=True),
    ),
    "caption large": (
        "blip_caption",
        lambda: BlipCaption(BlipCaptionConfig(vocab_size=30524, vit_type="large", image_size=384)),
        tower("visual_encoder", *of(LARGE, 384)) | decoder(1024),
    ),
    "vqa": (
        "blip_vqa",
        lambda: BlipVqa(BlipVqaConfig(vocab_size=30524, image_size=480)),
        tower("visual_encoder", *of(BASE, 480)) | text("text_encoder", 768) | decoder(768),
    ),
    "nlvr": (
        "blip_nlvr",
        lambda: BlipNlvr(BlipNlvrConfig(vocab_size=30524, image_size=384)),
        tower("visual_encoder", *of(BASE, 384))
        | text("text_encoder", 768, pair=True)
        | linear("cls_head.0", 768, 768)
        | linear("cls_head.2", 2, 768),
    ),
    "classification": (
        "blip_classification",
        lambda: BlipClassification(BlipClassificationConfig(vocab_size=30524, image_size=384)),
        {
            name.replace(part, part + suffix, 1): shape
            for suffix in ("", "_m")
            for part, shapes in (
                ("visual_encoder", tower("visual_encoder", *of(BASE, 384))),
                ("text_encoder", text("text_encoder", 768)),
                ("cls_head", linear("cls_head.0", 768, 768) | linear("cls_head.2", 3, 768)),
            )
            for name, shape in shapes.items()
        },
    ),
    "features": (
        "blip_feature_extractor",
        lambda: BlipFeatureExtractor(BlipFeaturesConfig(vocab_size=30524)),
        tower("visual_encoder", *of(BASE, 224)) | text("text_encoder", 768) | contrastive(768) | {"temp": ()},
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_are_the_official_ones_at_full_size(name: str) -> None:
    arch, build, expected = OFFICIAL[name]
    with torch.device("meta"):
        ours = build().state_dict()
        theirs = {name: torch.empty(shape) for name, shape in expected.items()}
    shapes = {n: tuple(t.shape) for n, t in lavis.table(arch).to_theirs(ours).state.items()}
    assert shapes == expected
    back = {n: tuple(t.shape) for n, t in lavis.table(arch).to_ours(_countable(theirs)).state.items()}
    absent = {"queue.ids"} if arch == "blip_pretrain" else set()
    assert back == {n: tuple(t.shape) for n, t in ours.items() if n not in absent}


def _countable(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.arange(512)[None] if n.endswith("position_ids") else t for n, t in theirs.items()}


# Over and back


@pytest.mark.parametrize("kind", ARCH)
def test_every_weight_goes_over_and_back(kind: str) -> None:
    theirs = exported(kind)
    assert_equal(lavis.table(ARCH[kind]).to_ours(theirs).state, saved(kind))
    found = recognise(theirs)
    assert (found.arch, found.absent) == (ARCH[kind], [])
    assert_equal(found.tensors, saved(kind))


@pytest.mark.parametrize("share", DECODER_HAS)
def test_what_encoder_and_decoder_share_is_written_twice_and_recognised(share: str) -> None:
    theirs = exported("pretrain", share=share)
    names = {n.removeprefix("text_decoder.bert.") for n in theirs if n.startswith("text_decoder.bert.")}
    assert names == {n.removeprefix("text_encoder.") for n in theirs if n.startswith("text_encoder.")}
    found = recognise(theirs)
    assert (found.arch, found.absent) == ("blip_pretrain", ["queue.ids"])
    assert_equal(found.tensors, saved("pretrain", share=share))
    assert lavis_blip.DECODER_HAS == DECODER_HAS


def test_two_views_that_differ_where_they_should_not_are_refused() -> None:
    theirs = exported("pretrain")
    name = "text_decoder.bert.encoder.layer.1.output.dense.bias"
    theirs[name] = theirs[name] + 1
    with pytest.raises(
        CheckpointError, match=r"output\.dense\.bias would be dropped \(encoder and decoder share it\)"
    ):
        lavis.table("blip_pretrain").to_ours(theirs)


def test_the_twin_s_unused_cross_attention_is_given_up_and_filled_with_the_model_s() -> None:
    theirs = exported("retrieval")
    assert torch.equal(theirs[SECOND], theirs[SECOND.replace("_m.", ".")])
    theirs[SECOND] = theirs[SECOND] + 1
    ours, report = lavis.table("blip_retrieval").to_ours(theirs)
    assert_equal(ours, saved("retrieval"))
    notes = {line.source[0]: line.note for line in report if not line.target}
    assert "never uses" in notes[SECOND]


def test_the_queue_lies_on_its_side_there() -> None:
    ours, theirs = saved("retrieval"), exported("retrieval")
    assert torch.equal(theirs["image_queue"], ours["queue.image"].T)
    shapes = {n: tuple(t.shape) for n, t in theirs.items() if "queue" in n}
    assert shapes == {"image_queue": (8, 10), "text_queue": (8, 10), "queue_ptr": (1,), "idx_queue": (1, 10)}


def test_the_original_name_of_the_pointer_is_read() -> None:
    theirs = exported("retrieval")
    theirs["ptr_queue"] = theirs.pop("queue_ptr") + 7
    assert int(lavis.table("blip_retrieval").to_ours(theirs).state["queue.pointer"]) == 7


def test_numbers_of_positions_and_the_second_bias_may_be_there_or_not() -> None:
    theirs = exported("vqa")
    spare = [n for n in theirs if n.endswith(("position_ids", "decoder.bias", "decoder.weight"))]
    assert len(spare) == 4
    bare = {n: t for n, t in theirs.items() if n not in spare}
    assert_equal(recognise(bare).tensors, saved("vqa"))
    theirs["text_encoder.embeddings.position_ids"] += 1
    with pytest.raises(CheckpointError, match=r"position_ids would be dropped \(the numbers 0, 1, 2"):
        lavis.table("blip_vqa").to_ours(theirs)


def test_a_retrieval_file_without_momentum_is_one_for_both(tmp_path: Path) -> None:
    theirs = {
        n: t for n, t in exported("retrieval").items() if "_m." not in n and "queue" not in n
    }  # as LAVIS's runner saves it
    assert recognise(theirs).arch == "blip_retrieval"
    bare = {name: tensor for name, tensor in theirs.items() if name != "temp"}
    assert recognise(bare).arch == "blip_image_text_matching"
    assert recognise(bare, "blip_retrieval").arch == "blip_image_text_matching"  # its names are the same
    save_safetensors(theirs, tmp_path / "without.safetensors")
    sizes = {"vit": {"heads": 2}, "med": {"num_heads": 2}}
    for arch in (None, "blip_retrieval", "blip_image_text_matching"):
        model = from_pretrained(tmp_path / "without.safetensors", arch=arch, **sizes)
        assert torch.equal(model.itm_head.weight, theirs["itm_head.weight"].float())


def test_a_model_takes_weights_of_its_family_only() -> None:
    assert recognise(exported("pretrain"), "blip_caption").arch == "blip_pretrain"
    with pytest.raises(CheckpointError, match="no rule for"):
        recognise(exported("pretrain"), "blip2")


def test_an_unknown_name_is_reported_for_the_model_that_comes_nearest() -> None:
    theirs = exported("caption") | {"text_decoder.bert.pooler.dense.weight": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"BLIP captioning: no rule for 'text_decoder\.bert\.pooler\.dense"
    ):
        recognise(theirs)
