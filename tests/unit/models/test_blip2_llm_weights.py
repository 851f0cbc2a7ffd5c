"""Weights of BLIP-2 with a language model: what it starts from, saves and loads, and what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.config.lavis import translate
from blip.config.schema import SectionError
from blip.errors import CheckpointError, ConfigError
from blip.formats.load import load_any
from blip.models.blip2_config import Blip2LlmConfig
from blip.models.blip2_opt import Blip2Opt, Blip2T5
from blip.weights import save_safetensors
from tests.reference.small_stage1 import small_model
from tests.reference.small_stage2 import (
    LLMS,
    QUESTIONS,
    SIZES,
    captions,
    pictures,
    small_stage2,
)

LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


def values(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("reads", [False, True])
def test_stage_2_starts_from_stage_1(reads: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = small_stage2("opt", qformer_text_input=True).qformer.embedding.word.num_embeddings
    stage1 = small_model(vocab_size=vocabulary, qformer=small_stage2("opt").config.qformer).float()
    save_safetensors(stage1.state_dict(), tmp_path / "stage1.safetensors")
    model = small_stage2("opt", qformer_text_input=reads)
    before = values(model)
    lines = load_any(model, tmp_path / "stage1.safetensors")
    given, after = stage1.state_dict(), model.state_dict()
    for name, value in after.items():
        expected = before[name] if name.startswith(("llm.", "llm_proj.")) else given[name]
        assert torch.equal(value, expected), name
    report = "\n".join(lines)
    objective = "itm_head.* (2), temp, vision_proj.* (2), text_proj.* (2)"
    assert "(stage 1's own; a language model stands in its place)" in report
    assert all(part in report for part in objective.split(", "))
    no_text = "(this Q-Former reads no text; with model.qformer_text_input it does)"
    assert (no_text in report) != reads
    assert "llm_proj.* (2), which keep the values they start with" in caplog.text


def test_a_projection_to_another_language_model_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = small_stage2("opt", llm={"sizes": LLMS["opt"] | {"hidden_size": 24, "word_embed_proj_dim": 24}})
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("llm.")}
    save_safetensors(state, tmp_path / "other.safetensors")
    llm = saved_llm("opt", tmp_path / "llm")
    model = small_stage2("opt", llm_model=str(llm), llm={"sizes": {}, "tokenizer": None})
    lines = load_any(model, tmp_path / "other.safetensors")
    assert any("it speaks to a language model of another width" in line for line in lines)
    assert "llm_proj.* (2), which keep" in caplog.text
    assert torch.equal(model.qformer.query_tokens, source.qformer.query_tokens)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    state = small_stage2("opt").state_dict()
    for lost in (
        "llm_proj.weight",
        "llm.model.model.decoder.final_layer_norm.weight",
        "qformer.query_tokens",
    ):
        save_safetensors({n: v for n, v in state.items() if n != lost}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=rf"1 missing \({lost}\)"):
            load_any(small_stage2("opt"), tmp_path / "x.safetensors")


def saved_llm(kind: str, folder: Path, seed: int = 3) -> Path:
    """A language model as transformers writes it."""
    torch.manual_seed(seed)
    llm = small_stage2(kind).llm
    llm.model.save_pretrained(folder)
    llm.tokenizer._tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("llm", LLMS)
def test_a_language_model_that_was_loaded_is_no_part_of_what_is_saved(
    llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    saved_llm(llm, root / "models" / "small")
    monkeypatch.setenv("BLIP_DATA", str(root))
    own = {"llm_model": "models/small", "llm": {"sizes": {}, "tokenizer": None}}
    model = small_stage2(llm, **own).eval()
    lines = model.load_parts()
    assert any("tensors from models/small" in line for line in lines)
    assert model.frozen_parts() == {"llm.model.": "models/small"}
    folder = model.save_pretrained(tmp_path / "model")
    back = blip.from_pretrained(folder)
    assert back.config == model.config
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, msg=name)
    samples, prompts = {"image": pictures(2)}, QUESTIONS[:2]
    assert back.generate(samples, prompt=prompts) == model.generate(samples, prompt=prompts)

    (root / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no language model 'models/small'"):
        blip.from_pretrained(folder)


def test_a_random_language_model_is_saved(tmp_path: Path) -> None:
    model = small_stage2("t5").eval()
    back = blip.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, msg=name)


def test_random_weights_read_no_language_model() -> None:
    model = small_stage2("opt")
    sizes = {k: v for k, v in SIZES.items() if k not in ("tokenizer", "max_txt_len")}
    made = blip.load_model(
        "blip2_opt",
        "pretrain_opt2.7b",
        pretrained=False,
        **sizes,
        llm={"sizes": LLMS["opt"] | {"vocab_size": 99}},
    )
    assert made.config.load_llm is False
    assert made.llm.hidden_size == model.llm.hidden_size
    assert not made.llm.model.get_input_embeddings().weight.is_meta


def test_additions_of_low_rank_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}}
    model = small_stage2("opt", llm=lora)
    before = values(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(captions()).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("llm.lora.") for name in changed)
    assert not any(name.startswith("llm.model.") for name in changed)
    back = blip.from_pretrained(model.save_pretrained(tmp_path / "model"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=0, msg=name)
    torch.testing.assert_close(back(captions()).loss, model.eval()(captions()).loss)
    plain = small_stage2("opt", llm=lora)
    lines = load_any(plain, tmp_path / "model")
    assert f"{len(before)} tensors loaded" in lines[0]


# Published models


@pytest.mark.parametrize(
    ("cls", "preset", "width", "depth"),
    [
        (Blip2Opt, "pretrain_opt2.7b", 2560, 32),
        (Blip2Opt, "caption_coco_opt6.7b", 4096, 32),
        (Blip2T5, "pretrain_flant5xl", 2048, 24),
        (Blip2T5, "pretrain_flant5xl_vitL", 2048, 24),
        (Blip2T5, "pretrain_flant5xxl", 4096, 24),
    ],
)
def test_published_sizes_need_no_file(cls: Any, preset: str, width: int, depth: int) -> None:
    with torch.device("meta"):
        model = cls.from_preset(preset)
    assert (model.llm.hidden_size, model.llm.model.config.num_hidden_layers) == (width, depth)
    millions = sum(p.numel() for n, p in model.qformer.named_parameters() if n != "query_tokens") / 1e6
    narrower = 6 * 2 * 768 * (1408 - 1024) / 1e6 if preset.endswith("vitL") else 0
    assert round(millions + narrower, 2) == 105.14  # as counted in the released model
    assert model.llm_proj.weight.shape == (width, 768)
    assert model.config.llm.precision == "auto"
    if cls is Blip2T5:
        assert model.llm.model.config.dense_act_fn == "gelu"


@pytest.mark.parametrize(
    ("cls", "preset", "tuned", "start"),
    [
        (Blip2Opt, "pretrain_opt2.7b", "blip2_pretrained_opt2.7b", "blip2_pretrained_opt2.7b"),
        (Blip2Opt, "caption_coco_opt6.7b", "blip2_caption_opt6.7b", "blip2_pretrained_opt6.7b"),
        (
            Blip2T5,
            "pretrain_flant5xl_vitL",
            "blip2_pretrained_flant5xl_vitL",
            "blip2_pretrained_flant5xl_vitL",
        ),
        (Blip2T5, "caption_coco_flant5xl", "blip2_caption_flant5xl", "blip2_pretrained_flant5xl"),
    ],
)
def test_published_weights_have_lavis_s_names(cls: Any, preset: str, tuned: str, start: str) -> None:
    assert cls.published[preset] == f"{LAVIS}{tuned}.pth"
    assert cls.starts[preset] == f"{LAVIS}{start}.pth"
    assert cls.published.keys() == cls.starts.keys() == cls.presets.keys()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_output_txt_len": 0}, "max_output_txt_len: 0 is below 1"),
        ({"qformer_text_input": True, "max_txt_len": 600}, "max_txt_len: 600 exceeds qformer.max_positions"),
    ],
)
def test_values_that_cannot_be_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(SectionError) as caught:
        Blip2LlmConfig(**given)
    assert any(problem.startswith(expected) for problem in caught.value.problems)
    assert Blip2LlmConfig(max_txt_len=600).max_txt_len == 600  # without text it has no positions


def test_lavis_s_names_of_the_language_model_become_ours() -> None:
    for key in ("opt_model", "t5_model"):
        tree = {"model": {"arch": "blip2_opt", key: "facebook/opt-350m", "few_shot_prob": 0.0}}
        found = translate(tree, (), ())
        assert found.tree["model"] == {"arch": "blip2_opt", "llm_model": "facebook/opt-350m"}
        [note] = found.notes
        assert note.startswith("model.few_shot_prob: 0.0 ignored: no dataset has samples of a few shots")
    both = translate({"model": {"opt_model": "a", "llm_model": "b"}}, (), ())
    assert both.tree["model"] == {"llm_model": "b"}
    assert both.notes == ["model.opt_model: ignored: model.llm_model=b is given too"]


def test_a_model_without_language_model_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match=r"model\.llm_model: nothing says which language model"):
        small_stage2("opt", llm={"sizes": {}})
