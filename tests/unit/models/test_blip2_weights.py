"""What the tensors of a stage-1 model tell of its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip.models.blip2_opt import Blip2Opt, Blip2T5
from blip.models.blip2_weights import adopt_stage2, stage1_sizes
from blip.models.instructblip import Blip2T5Instruct, Blip2VicunaInstruct


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"vit_model": "eva_clip_g"}),
        ({"ln_vision.weight": (1024,)}, {"vit_model": "clip_L"}),
        (
            {
                "vision.vit.patch_embed.proj.weight": (1408, 3, 14, 14),
                "vision.vit.blocks.0.attn.q_bias": (1408,),
                "vision.vit.blocks.38.norm1.weight": (1408,),
                "vision.vit.pos_embed": (1, 677, 1408),
            },
            {"vit_model": "eva_clip_g", "image_size": 364, "vit": {"depth": 1}},
        ),
        (
            {
                "vision.vit.patch_embed.proj.weight": (1024, 3, 14, 14),
                "vision.vit.norm_pre.weight": (1024,),
                "vision.vit.pos_embed": (1, 257, 1024),
            },
            {"vit_model": "clip_L", "image_size": 224, "vit": {"depth": 0}},
        ),
    ],
)
def test_published_sizes_leave_nothing_open(
    change: dict[str, tuple[int, ...]], expected: dict[str, Any]
) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "ln_vision.weight": (1408,),
        "qformer.query_tokens": (1, 32, 768),
        "vision_proj.weight": (256, 768),
        "qformer.embedding.word.weight": (30523, 768),
        "qformer.embedding.position.weight": (512, 768),
        "qformer.layers.0.query_ffn.expand.weight": (3072, 768),
        "qformer.layers.0.self_attn.query.weight": (768, 768),
        "qformer.layers.0.cross_attn.query.weight": (768, 768),
        "qformer.layers.1.self_attn.query.weight": (768, 768),
        "qformer.layers.2.self_attn.query.weight": (768, 768),
        "qformer.layers.2.cross_attn.query.weight": (768, 768),
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in {**shapes, **change}.items()}
    values, unknown = stage1_sizes(tensors)
    sizes = {"width": 768, "depth": 3, "mlp_dim": 3072, "max_positions": 512}
    common = {"num_query_token": 32, "vocab_size": 30523, "embed_dim": 256, "cross_attention_freq": 2}
    assert (values, unknown) == ({**common, "qformer": sizes, **expected}, [])


STAGE2: dict[str, tuple[int, ...]] = {
    "ln_vision.weight": (1408,),
    "qformer.query_tokens": (1, 32, 768),
    "qformer.layers.0.query_ffn.expand.weight": (3072, 768),
    "qformer.layers.0.self_attn.query.weight": (768, 768),
    "qformer.layers.0.cross_attn.query.weight": (768, 768),
}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("cls", "width", "text", "expected"),
    [
        (Blip2Opt, 2560, False, "facebook/opt-2.7b"),
        (Blip2Opt, 4096, False, "facebook/opt-6.7b"),
        (Blip2T5, 4096, False, "google/flan-t5-xxl"),
        (Blip2T5Instruct, 2048, True, "google/flan-t5-xl"),
        (Blip2VicunaInstruct, 5120, True, "llm/vicuna-13b"),
        (Blip2Opt, 1024, False, None),
    ],
)
def test_the_width_of_the_projection_tells_the_language_model(
    cls: Any, width: int, text: bool, expected: str | None
) -> None:
    shapes = {**STAGE2, "llm_proj.weight": (width, 768)}
    shapes |= {"qformer.embedding.word.weight": (30523, 768)} if text else {}
    values, unknown = cls.sizes_of(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    assert (values.get("llm_model"), values["qformer_text_input"], unknown) == (expected, text, [])


@pytest.mark.parametrize(
    ("cls", "name", "width", "rows", "found"),
    [
        (Blip2VicunaInstruct, "model.embed_tokens", 4096, 32000, {"sizes": {"vocab_size": 32000}}),
        (Blip2VicunaInstruct, "model.embed_tokens", 4096, 32001, None),
        (Blip2Opt, "model.decoder.embed_tokens", 2560, 50304, {"sizes": {"vocab_size": 50304}}),
        (Blip2Opt, "model.decoder.embed_tokens", 2560, 50272, None),
        (Blip2T5, "shared", 4096, 32100, {"sizes": {"vocab_size": 32100}}),
        (Blip2T5, "shared", 4096, 32128, None),
        (Blip2Opt, "model.decoder.embed_tokens", 1024, 32128, None),
    ],
)
def test_another_number_of_words_than_the_published_one_shows(
    cls: Any, name: str, width: int, rows: int, found: dict[str, Any] | None
) -> None:
    shapes = {**STAGE2, "llm_proj.weight": (width, 768), f"llm.model.{name}.weight": (rows, width)}
    values, _ = cls.sizes_of(on_meta(shapes))
    assert values.get("llm") == found


def test_weights_of_stage_1_do_not_tell_whether_the_qformer_of_stage_2_reads() -> None:
    shapes = {**STAGE2, "qformer.embedding.word.weight": (30523, 768), "temp": ()}
    values, _ = Blip2Opt.sizes_of(on_meta(shapes))
    assert not {"qformer_text_input", "llm_model", "embed_dim"} & values.keys()


def tensors(*names: str, width: int = 4) -> dict[str, Any]:
    return {name: torch.zeros(width, 2) for name in names}


WORDS, FFN = "qformer.embedding.word.weight", "qformer.layers.0.text_ffn.expand.weight"
OWN = ("qformer.query_tokens", "llm_proj.weight", "llm.model.head", "llm.lora.a")


@pytest.mark.parametrize(
    ("given", "wanted", "left_out", "kept"),
    [
        (("qformer.query_tokens", "temp", WORDS), OWN, {"temp", WORDS}, {"llm_proj.weight", "llm.lora.a"}),
        (("qformer.query_tokens", "temp", WORDS, FFN), (*OWN, WORDS, FFN), {"temp"}, {*OWN[1:2], OWN[3]}),
        (("qformer.query_tokens", "llm_proj.weight"), (*OWN, WORDS, FFN), set(), {WORDS, FFN, OWN[3]}),
        (("qformer.query_tokens", "llm_proj.weight", WORDS), (*OWN, WORDS, FFN), set(), {OWN[3]}),
        (("qformer.query_tokens",), OWN, set(), {OWN[3]}),
    ],
    ids=["stage 1", "stage 1 for a reader", "stage 2 for a reader", "half a reader", "without projection"],
)
def test_what_may_be_missing_depends_on_where_the_weights_are_from(
    given: tuple[str, ...], wanted: tuple[str, ...], left_out: set[str], kept: set[str]
) -> None:
    found = adopt_stage2(tensors(*given), tensors(*wanted))
    assert found.left_out.keys() == left_out
    assert set(found.kept) == kept
    assert found.tensors.keys() == set(given) - left_out


def test_a_random_language_model_may_stay_beside_weights_of_stage_1_only() -> None:
    wanted = tensors(*OWN)
    kept = adopt_stage2(tensors("temp"), wanted, llm_may_stay=True).kept
    assert "llm.model.head" in kept
    assert "llm.model.head" not in adopt_stage2(tensors("llm_proj.weight"), wanted, llm_may_stay=True).kept


def test_a_projection_of_another_width_is_left_out() -> None:
    found = adopt_stage2(tensors("llm_proj.weight", width=8), tensors(*OWN))
    assert list(found.left_out) == ["llm_proj.weight"]
    assert set(found.kept) == {"llm_proj.weight", "llm.lora.a"}
