"""Trained additions to a frozen language model; these tests need the extra `lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import ConfigError
from blip.models.llm import LanguageModel, LLMConfig, LoraConfig, build_llm

pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build(llm_model: str | None = None, **lora: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {} if llm_model else SIZES
    tokenizer = None if llm_model else "scenes"
    section = LoraConfig(**{"r": 2, "targets": ["q_proj", "v_proj"], **lora})
    return build_llm(llm_model, LLMConfig(sizes=sizes, tokenizer=tokenizer, lora=section))


def batch(llm: LanguageModel) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = llm.tokenizer.train(["how many ?"], ["two"])
    given = {key.removeprefix("llm_"): value for key, value in tokens.items()}
    return {"prefix": torch.randn(1, 3, 16), **given}


def train(llm: LanguageModel) -> None:
    """Some steps that every addition takes part in."""
    optimizer = torch.optim.SGD([p for p in llm.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        llm.loss(**batch(llm)).backward()
        optimizer.step()


def test_additions_begin_without_effect_and_learn_while_the_rest_stays() -> None:
    llm = build()
    plain = build_llm(None, LLMConfig(sizes=SIZES, tokenizer="scenes"))
    own = {n.replace("base_layer.", ""): p for n, p in llm.model.named_parameters() if not p.requires_grad}
    plain.model.load_state_dict(own, strict=False)
    before = llm.loss(**batch(llm))
    torch.testing.assert_close(before, plain.loss(**batch(plain)))
    frozen = {name: p.clone() for name, p in llm.model.named_parameters() if not p.requires_grad}
    train(llm)
    assert llm.loss(**batch(llm)) < before
    for name, value in frozen.items():
        assert torch.equal(llm.model.get_parameter(name), value)


def test_what_is_trained_has_names_of_its_own() -> None:
    llm = build()
    trained = [name for name, p in llm.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # layers, targets, two matrices each
    assert all(name.startswith("lora.") for name in trained)
    state = llm.state_dict()
    assert [name for name in state if name.startswith("lora.")] == trained
    assert not any("lora_" in name for name in state if name.startswith("model."))


def test_a_state_dict_without_the_frozen_part_brings_the_additions_back() -> None:
    llm = build()
    train(llm)
    other = build()
    kept = {name: value for name, value in llm.state_dict().items() if name.startswith("lora.")}
    other.load_state_dict(kept, strict=False)
    assert other.loss(**batch(other)) == llm.loss(**batch(llm))


def test_additions_that_were_loaded_stay_when_the_frozen_weights_come(tmp_path: Path) -> None:
    plain = build_llm(None, LLMConfig(sizes=SIZES, tokenizer="scenes"))
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer._tokenizer.save_pretrained(tmp_path)
    llm = build(str(tmp_path))
    llm.load_initial()
    train(llm)
    kept = {name: value for name, value in llm.state_dict().items() if name.startswith("lora.")}
    other = build(str(tmp_path))
    other.load_state_dict(kept, strict=False)
    other.load_initial()
    torch.testing.assert_close(other.loss(**batch(other)), llm.loss(**batch(llm)))


def test_additions_stay_in_float32_beside_half_precision() -> None:
    torch.manual_seed(0)
    config = LLMConfig(sizes=SIZES, tokenizer="scenes", precision="bf16", lora=LoraConfig(r=2))
    llm = build_llm(None, config).to("cpu")
    assert {p.dtype for p in llm.lora.values()} == {torch.float32}
    assert {p.dtype for p in llm.parameters() if not p.requires_grad} == {torch.bfloat16}
    llm.loss(**batch(llm)).backward()
    assert all(p.grad is not None for p in llm.lora.values())


def test_their_dropout_acts_in_training_though_the_models_does_not() -> None:
    llm = build(dropout=0.5)
    with torch.no_grad():
        for parameter in llm.lora.values():
            parameter.normal_()
    inputs = batch(llm)
    llm.train()
    assert not llm.model.training
    assert llm.loss(**inputs) != llm.loss(**inputs)
    llm.eval()
    assert llm.loss(**inputs) == llm.loss(**inputs)


def test_layers_that_do_not_exist_are_named() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: .*linear layers are called .*q_proj"):
        build(targets=["query"])
