"""The tables for models with a language model, against the names that LAVIS and our models really have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.errors import CheckpointError
from blip.formats import hf, lavis
from blip.formats.load import load_any
from blip.formats.source import recognise
from blip.weights import save_safetensors
from tests.reference.small_stage2 import LLMS, SIZES, small_stage2

CASES = {
    "blip2_opt": ("opt", "opt"),
    "blip2_t5": ("t5", "t5"),
    "blip2_llm": ("llama", "llm"),
    "blip2_t5_instruct": ("t5", "t5"),
    "blip2_vicuna_instruct": ("llama", "llm"),
    "blip2_llm_instruct": ("opt", "llm"),
}
"""Registry name -> kind of the language model, what LAVIS calls it."""
FIRST = {"blip2_llm_instruct": "blip2_vicuna_instruct"}
"""What weights alone are taken for."""


def model(arch: str, **values: Any) -> Any:
    own = {"llm_model": None, "vit_init_from": None, "vit_model": "eva_clip_g"}
    return small_stage2(CASES[arch][0], arch, **{**own, **values})


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def trimmed(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L", "vit_base"])
@pytest.mark.parametrize("arch", CASES)
def test_every_weight_of_our_model_goes_to_lavis_and_back(arch: str, vit_model: str) -> None:
    table, ours = lavis.table(arch, vit_model), model(arch, vit_model=vit_model).state_dict()
    theirs = table.to_theirs(ours).state
    assert lavis.looks_like(theirs)
    assert_equal(table.to_ours(theirs).state, ours)


@pytest.mark.parametrize("arch", CASES)
def test_every_weight_of_our_model_goes_to_transformers_and_back(arch: str) -> None:
    table, ours = hf.table(arch), model(arch).state_dict()
    theirs = table.to_theirs(ours).state
    assert hf.looks_like(theirs)
    assert_equal(table.to_ours(theirs).state, ours)


def test_names_and_shapes_are_lavis_s() -> None:
    theirs = lavis.table("blip2_opt").to_theirs(model("blip2_opt").state_dict()).state
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    expected = {
        "query_tokens": (1, 3, 16),
        "ln_vision.weight": (12,),
        "Qformer.bert.embeddings.LayerNorm.weight": (16,),
        "Qformer.bert.encoder.layer.1.intermediate_query.dense.weight": (24, 16),
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight": (16, 12),
        "opt_proj.weight": (16, 16),
        "opt_proj.bias": (16,),
        "opt_model.model.decoder.layers.1.self_attn.k_proj.weight": (16, 16),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    text = ("Qformer.cls.", "Qformer.bert.embeddings.word", "Qformer.bert.embeddings.position", "temp")
    assert not [name for name in shapes if name.startswith(text) or ".intermediate.dense." in name]


def test_names_and_shapes_of_instructblip_are_lavis_s() -> None:
    theirs = lavis.table("blip2_vicuna_instruct").to_theirs(model("blip2_vicuna_instruct").state_dict()).state
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    words = shapes["Qformer.bert.embeddings.word_embeddings.weight"][0]
    expected = {
        "Qformer.bert.embeddings.word_embeddings.weight": (words, 16),
        "Qformer.bert.embeddings.position_ids": (1, 48),
        "Qformer.bert.encoder.layer.1.intermediate.dense.weight": (24, 16),
        "llm_proj.weight": (16, 16),
        "llm_model.model.layers.0.mlp.gate_proj.weight": (32, 16),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not [name for name in shapes if name.startswith("Qformer.cls.")]


@pytest.mark.parametrize("arch", CASES)
def test_published_files_have_neither_tower_nor_language_model(arch: str) -> None:
    """And numbers of positions also where there are none, of which stage 2 is one case."""
    llm = CASES[arch][1]
    ours = model(arch).state_dict()
    theirs = lavis.table(arch).to_theirs(ours).state
    file = trimmed(theirs, "visual_encoder.", f"{llm}_model.")
    file["Qformer.bert.embeddings.position_ids"] = torch.arange(48)[None]
    found = recognise(file)
    assert found.arch == FIRST.get(arch, arch)
    assert_equal(found.tensors, trimmed(ours, "vision.", "llm.model."))


def test_numbers_of_positions_that_are_others_are_refused() -> None:
    file = {
        "opt_proj.bias": torch.zeros(3),
        "Qformer.bert.embeddings.position_ids": torch.arange(8)[None] + 1,
    }
    with pytest.raises(CheckpointError, match="say something else"):
        lavis.table("blip2_opt").to_ours(file)


@pytest.mark.parametrize("theirs", ["llm_model", "language_model"])
def test_frequencies_of_rotary_positions_are_left_out_with_the_reason(theirs: str) -> None:
    name = f"{theirs}.model.layers.3.self_attn.rotary_emb.inv_freq"
    table = lavis.table("blip2_llm") if theirs == "llm_model" else hf.table("blip2_llm")
    state, report = table.to_ours({name: torch.ones(2), f"{theirs}.lm_head.weight": torch.ones(2, 2)})
    assert list(state) == ["llm.model.lm_head.weight"]
    assert [line.note for line in report] == [
        "the frequencies of rotary positions, which follow from the sizes",
        "renamed",
    ]


def test_the_language_model_s_tensors_are_not_copied() -> None:
    tensor = torch.ones(3)
    found = lavis.table("blip2_t5").to_ours({"t5_model.encoder.final_layer_norm.weight": tensor}).state
    assert found["llm.model.encoder.final_layer_norm.weight"] is tensor


@pytest.mark.parametrize("arch", CASES)
def test_hugging_face_s_weights_are_recognised_by_their_names(arch: str) -> None:
    ours = model(arch).state_dict()
    found = recognise(hf.table(arch).to_theirs(ours).state, arch)
    assert found.arch == arch
    assert_equal(found.tensors, ours)


@pytest.mark.parametrize("layout", ["LAVIS", "Hugging Face"])
def test_instruction_tuning_starts_from_stage_2_of_others(layout: str, tmp_path: Path) -> None:
    source = model("blip2_t5").state_dict()
    table = lavis.table("blip2_t5") if layout == "LAVIS" else hf.table("blip2_t5")
    save_safetensors(table.to_theirs(source).state, tmp_path / "x.safetensors")
    started = model("blip2_t5_instruct")
    load_any(started, tmp_path / "x.safetensors")
    after = started.state_dict()
    assert all(torch.equal(after[name], value) for name, value in source.items())


def saved_llm(folder: Path, kind: str) -> str:
    llm = small_stage2(kind).llm
    llm.model.save_pretrained(folder)
    llm.tokenizer._tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_published_file_gets_tower_and_language_model_from_where_the_arguments_say(tmp_path: Path) -> None:
    source = model("blip2_t5_instruct")
    theirs = lavis.table("blip2_t5_instruct").to_theirs(source.state_dict()).state
    file = tmp_path / "instruct_blip_small_trimmed.pth"
    torch.save({"model": trimmed(theirs, "visual_encoder.", "t5_model.")}, file)
    save_safetensors(source.vision.vit.state_dict(), tmp_path / "tower.safetensors")
    own: dict[str, Any] = {k: SIZES[k] for k in ("image_size", "vit", "qformer", "tokenizer", "max_txt_len")}
    own |= {"vit_model": "eva_clip_g", "llm": {"sizes": {}, "activation": None}}
    own["qformer"] = {**own["qformer"], "init_from": None}
    own["vit_init_from"] = str(tmp_path / "tower.safetensors")
    folder = saved_llm(tmp_path / "llm", "t5")
    back = blip.from_pretrained(file, **own, llm_model=folder)
    assert back.config.arch == "blip2_t5_instruct"
    assert_equal(trimmed(back.state_dict(), "llm."), trimmed(source.state_dict(), "llm."))
    expected = small_stage2("t5").llm.state_dict()
    assert_equal({k: v for k, v in back.llm.state_dict().items()}, expected)
    with pytest.raises(CheckpointError, match=r"leaves out vision: it was frozen, and nothing says where"):
        blip.from_pretrained(file, **{**own, "vit_init_from": None}, llm_model=folder)
    random = {**own, "llm": {"sizes": LLMS["t5"], "tokenizer": "scenes", "activation": None}}
    with pytest.raises(CheckpointError, match=r"leaves out llm\.model: it was frozen, and nothing says"):
        blip.from_pretrained(file, **random, llm_model=None)
