"""LAVIS's files of any sizes, without a configuration: tensors tell the sizes, arguments the rest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import blip
from blip.convert import convert
from blip.errors import CheckpointError
from tests.reference.small_stage2 import LLMS as SIZES
from tests.reference.small_stage2 import pictures
from tests.unit.test_convert import BLIP_KINDS, LLMS, STAGE1, small

HEADS = {"vit": {"heads": 2}}
OPEN = {"max_txt_len", "dropout", "tokenizer", "momentum", "prompt", "merge_from", "model_type", "arch"}
"""What no tensor tells and a published model has otherwise than the small one; `merge_from: null` is said."""
LOADING = {"vit_init_from", "vit_grad_ckpt", "vit_ckpt_layer", "vit_drop_path_rate", "negative_all_rank"}
"""Of the presets, for training."""


def language_model(model: Any, kind: str) -> dict[str, Any]:
    """The language model as objects of transformers: its configuration and its tokenizer."""
    tokenizer, sizes = model.llm.tokenizer, dict(SIZES[kind])
    config = CONFIG_MAPPING[sizes.pop("model_type")](
        **sizes,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.end_id,
    )
    usual = {"end": None, "bos": "tokenizer", "activation": None}  # in place of the published models'
    return {"llm_model": config, "llm": {"tokenizer": tokenizer.as_theirs(), **usual}}


def given(arch: str, model: Any) -> dict[str, Any]:
    """What the tensors of a small model cannot tell."""
    if arch in BLIP_KINDS:
        return {**HEADS, "med": {"num_heads": 2}, "tokenizer": "scenes"}
    found: dict[str, Any] = {**HEADS, "qformer": {"num_heads": 2}}
    if arch in LLMS:
        found |= language_model(model, LLMS[arch])
    if arch not in LLMS or model.config.qformer_text_input:
        found["tokenizer"] = "scenes"
    return found


@pytest.mark.parametrize("arch", [*BLIP_KINDS, *STAGE1, *LLMS])
def test_sizes_are_read_off_the_tensors(arch: str, tmp_path: Path) -> None:
    model = small(arch)
    convert(model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs.pth", "lavis", frozen="copy")
    back = blip.from_pretrained(tmp_path / "theirs.pth", arch=arch, **given(arch, model))
    assert type(back) is type(model)
    values = back.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(values[name], value), name
    said, read = asdict(model.config), asdict(back.config)
    for key in said.keys() - OPEN - LOADING - {"llm", "llm_model", "qformer", "med", "vocab_size"}:
        assert read[key] == said[key], key
    assert read.get("vocab_size") in (said.get("vocab_size"), len(model.word_pieces._tokenizer.get_vocab()))


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5", "blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_outputs_are_those_of_the_model_that_was_saved(arch: str, tmp_path: Path) -> None:
    model = small(arch)
    convert(model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs.pth", "lavis", frozen="copy")
    back = blip.from_pretrained(tmp_path / "theirs.pth", arch=arch, **given(arch, model))
    samples = {"image": pictures(2), "text_input": ["what ?", "how many ?"], "text_output": ["red", "two"]}
    assert torch.equal(back(samples).loss, model(samples).loss)
    prompts = {"image": samples["image"], "prompt": ["what ?", "a star"]}
    ids = [each.generate(prompts, num_beams=2, max_length=6, return_ids=True) for each in (model, back)]
    assert torch.equal(*ids)


def test_what_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    model = small("blip2_opt")
    convert(model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs.pth", "lavis", frozen="copy")
    with pytest.raises(
        CheckpointError, match=r"do not tell qformer\.num_heads, vit\.heads; give them too, as"
    ):
        blip.from_pretrained(tmp_path / "theirs.pth", arch="blip2_opt")


def test_rows_of_words_are_those_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small("blip2_vicuna_instruct")
    convert(model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs.pth", "lavis", frozen="copy")
    how = given("blip2_vicuna_instruct", model)
    how["llm_model"].vocab_size -= 1  # LAVIS adds a row for the padding to the folder's
    how["llm"].pop("tokenizer")
    back = blip.from_pretrained(tmp_path / "theirs.pth", arch="blip2_vicuna_instruct", **how)
    rows = model.llm.model.get_input_embeddings().weight
    assert torch.equal(back.llm.model.get_input_embeddings().weight, rows)
    assert back.config.llm.sizes["vocab_size"] == len(rows)


def test_what_ends_a_text_is_said_where_no_tokenizer_knows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small("blip2_opt")
    convert(model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs.pth", "lavis", frozen="copy")
    how = given("blip2_opt", model)
    del how["llm"]
    back = blip.from_pretrained(tmp_path / "theirs.pth", arch="blip2_opt", **how)
    samples = {"image": pictures(1), "llm_ids": torch.tensor([[5, 6]])}
    back.generate(samples, max_length=3, return_ids=True)
    end = how["llm_model"].eos_token_id
    assert f"no tokenizer says what '\\n' is: texts end with eos_token_id, {end}" in caplog.text
