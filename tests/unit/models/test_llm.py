from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from blip.config.typed import typed_section
from blip.engine.recompute import apply_recompute
from blip.errors import CheckpointError, ConfigError, DataError
from blip.layers.decoding import Decoding
from blip.models.llm import LanguageModel, LLMConfig, LoraConfig, build_llm
from blip.models.llm_build import own_dtype
from blip.models.llm_tokenizer import LlmTokenizer

OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
KINDS = {"opt": OPT, "llama": LLAMA, "t5": T5}
PROMPTS, TARGETS = ["how many circles ?", "what is left of it ?"], ["two", "a blue square"]


def build(sizes: dict[str, Any], **config: Any) -> LanguageModel:
    torch.manual_seed(0)
    return build_llm(None, LLMConfig(sizes=sizes, tokenizer="scenes", **config))


def batch(llm: LanguageModel) -> dict[str, Tensor]:
    """Arguments of `loss`."""
    torch.manual_seed(1)
    tokens = llm.tokenizer.train(PROMPTS, TARGETS)
    return {
        "prefix": torch.randn(2, 3, llm.hidden_size),
        **{key.removeprefix("llm_"): value for key, value in tokens.items()},
    }


def saved(folder: Path, sizes: dict[str, Any], dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model written as transformers does; with its tokenizer, if the folder has none."""
    llm = build(sizes)
    llm.model.to(dtype).save_pretrained(folder)
    llm.tokenizer._tokenizer.save_pretrained(folder)
    return llm


def values(llm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in llm.model.state_dict().items()}


# Frozen


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_changes_nothing_of_it(kind: str) -> None:
    llm = build(KINDS[kind]).train()
    before = values(llm)
    inputs = batch(llm)
    inputs["prefix"].requires_grad_()
    llm.loss(**inputs).backward()
    assert inputs["prefix"].grad is not None
    assert inputs["prefix"].grad.abs().sum() > 0
    assert [p for p in llm.parameters() if p.requires_grad or p.grad is not None] == []
    torch.testing.assert_close(values(llm), before, rtol=0, atol=0)


def test_training_mode_is_not_for_it_unless_dropout_is_wanted() -> None:
    assert not any(part.training for part in build(OPT).train().modules())
    llm = build(OPT, dropout=True).train()
    assert llm.model.training
    assert not llm.eval().model.training


def test_dropout_acts_in_training_where_it_is_wanted() -> None:
    llm = build(OPT | {"dropout": 0.5}, dropout=True).train()
    inputs = batch(llm)
    assert llm.loss(**inputs) != llm.loss(**inputs)
    llm.eval()
    assert llm.loss(**inputs) == llm.loss(**inputs)


# Loss


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_made_of_targets_only(kind: str) -> None:
    llm = build(KINDS[kind])
    inputs = batch(llm)
    shapes = []
    llm.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    llm.loss(**inputs)
    targets = int((inputs["labels"] != -100).sum())
    assert shapes == [(1, targets, llm.tokenizer.vocab_size)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_sum_over_what_it_is_told(kind: str) -> None:
    llm = build(KINDS[kind])
    inputs = batch(llm)
    targets = int((inputs["labels"] != -100).sum())
    mean = llm.loss(**inputs)
    torch.testing.assert_close(llm.loss(**inputs, loss_tokens=2.5), mean * targets / 2.5)
    torch.testing.assert_close(llm.loss(**inputs, loss_tokens=torch.tensor(4.0)), mean * targets / 4)
    torch.testing.assert_close(llm.loss(**inputs, num_targets=targets), mean)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert llm.loss(**inputs) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_ids_make_no_difference(kind: str) -> None:
    llm = build(KINDS[kind])
    inputs = batch(llm)
    other = {**inputs, "ids": inputs["ids"].masked_fill(~inputs["mask"], 7)}
    torch.testing.assert_close(llm.loss(**other), llm.loss(**inputs), rtol=0, atol=0)


def test_layers_may_be_recomputed() -> None:
    for sizes in KINDS.values():
        llm = build(sizes)
        inputs = batch(llm)
        inputs["prefix"].requires_grad_()
        (plain,) = torch.autograd.grad(llm.loss(**inputs), inputs["prefix"])
        assert len(llm.blocks()) == (4 if llm.is_encoder_decoder else 2)
        apply_recompute(llm.blocks(), "torch")
        (again,) = torch.autograd.grad(llm.loss(**inputs), inputs["prefix"])
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


# Precision and place


def test_it_computes_in_its_own_precision_whatever_surrounds_it() -> None:
    llm = build(LLAMA)
    inputs = batch(llm)
    plain = llm.loss(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert llm.loss(**inputs) == plain
    llm.to(torch.bfloat16).double().half()
    assert (llm.dtype, llm.loss(**inputs)) == (torch.float32, plain)
    half = build(LLAMA, precision="bf16")
    assert half.dtype == torch.bfloat16
    assert half.loss(**inputs).dtype == torch.float32
    torch.testing.assert_close(half.loss(**inputs), plain, rtol=0.02, atol=0)
    # What positions are turned by is too coarse in half precision, as transformers has it too.
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_that_overflow_in_fp16_stay_in_float32() -> None:
    types = {
        name.split(".")[-2]: p.dtype
        for name, p in build(T5, precision="fp16").to("cpu").model.named_parameters()
    }
    assert types["wo"] == torch.float32
    assert (
        types["wi_0"] == types["q"] == types["lm_head" if "lm_head" in types else "shared"] == torch.float16
    )


def test_small_gradients_survive_half_precision() -> None:
    exact, half = build(OPT), build(OPT, precision="fp16")
    half.model.load_state_dict(exact.model.state_dict())
    inputs = batch(exact)
    inputs["prefix"].requires_grad_()
    for scale in (1.0, 1e-7, 65536.0):
        want, have = (
            torch.autograd.grad(llm.loss(**inputs) * scale, inputs["prefix"])[0] / scale
            for llm in (exact, half)
        )
        torch.testing.assert_close(have, want, rtol=0.05, atol=0.02 * want.abs().max().item())


def test_it_stays_where_its_own_device_is() -> None:
    llm = build(LLAMA, device="cpu")
    llm.to("meta")
    assert llm.device.type == "cpu"
    assert llm.loss(**batch(llm)).isfinite()


def test_additions_are_not_trained_inside_a_model_in_fp16() -> None:
    """Their gradients lie inside, where fp16 would lose them and nothing scales them."""
    gpu, half = torch.device("cuda"), {"half": "fp16"}
    assert own_dtype(LLMConfig(**half), gpu) == torch.float16
    assert own_dtype(LLMConfig(**half, lora=LoraConfig(r=2)), gpu) == torch.bfloat16
    assert own_dtype(LLMConfig(**half, precision="fp16", lora=LoraConfig(r=2)), gpu) == torch.float16
    assert own_dtype(LLMConfig(**half, lora=LoraConfig(r=2)), torch.device("cpu")) == torch.float32


@pytest.mark.gpu
def test_auto_precision_is_half_on_a_gpu_and_back_on_a_cpu() -> None:
    llm = build(LLAMA, half="fp16")
    inputs = batch(llm)
    plain = llm.loss(**inputs)
    llm.cuda()
    assert (llm.dtype, llm.device.type) == (torch.float16, "cuda")
    torch.testing.assert_close(llm.loss(**inputs), plain, rtol=0.02, atol=0)  # prefix and loss on the CPU
    on_gpu = {key: value.cuda() for key, value in inputs.items()}
    targets = int((inputs["labels"] != -100).sum())
    torch.testing.assert_close(llm.loss(**on_gpu, num_targets=targets), llm.loss(**on_gpu))
    assert llm.cpu().dtype == torch.float32


# Weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_from_a_folder_when_they_are_asked_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = saved(tmp_path / "models" / "mine", KINDS[kind])
    llm = build_llm("models/mine", LLMConfig(), data_root=tmp_path)
    assert llm.device.type == "meta"
    assert llm.loaded_from is None
    (line,) = llm.load_initial()
    assert line.startswith("llm: ")
    assert line.endswith("tensors from models/mine; frozen")
    assert llm.loaded_from == "models/mine"
    assert not any(p.requires_grad for p in llm.parameters())
    torch.testing.assert_close(values(llm), values(original))
    torch.testing.assert_close(llm.loss(**batch(llm)), original.loss(**batch(original)))
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))
    assert build_llm("models/mine", LLMConfig()).load_initial()


def test_a_model_whose_weights_are_not_loaded_gets_random_ones(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA)
    llm = build_llm(str(tmp_path), LLMConfig())
    assert llm.loss(**batch(llm)).isfinite()
    moved = build_llm(str(tmp_path), LLMConfig(precision="bf16")).to("cpu")
    assert (moved.device.type, moved.dtype) == ("cpu", torch.bfloat16)
    assert build(LLAMA).load_initial() == []


def test_stored_half_precision_is_float32_on_a_cpu(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA, torch.bfloat16)
    llm = build_llm(str(tmp_path), LLMConfig())
    llm.load_initial()
    assert llm.loss(**batch(llm)).isfinite()
    assert llm.dtype == torch.float32


def test_sizes_with_a_vocabulary_are_built_without_reading_anything() -> None:
    llm = build_llm("no/such", LLMConfig(sizes=OPT | {"vocab_size": 40}))
    assert (llm.hidden_size, llm.is_encoder_decoder) == (16, False)
    with pytest.raises(ConfigError, match="no tokenizer 'no/such'"):
        _ = llm.tokenizer
    with pytest.raises(ConfigError, match=r"model\.llm_model: no language model 'no/such' on disk"):
        llm.load_initial()
    small = build_llm(None, LLMConfig(sizes=OPT | {"vocab_size": 4}, tokenizer="scenes"))
    assert small.model.config.vocab_size == small.tokenizer.vocab_size


def test_sizes_are_laid_over_the_models_own(tmp_path: Path) -> None:
    saved(tmp_path, T5)
    llm = build_llm(str(tmp_path), LLMConfig(sizes={"dense_act_fn": "relu", "dropout_rate": 0.3}))
    llm.load_initial()
    assert (llm.model.config.dense_act_fn, llm.model.config.dropout_rate) == ("relu", 0.3)
    assert llm.model.config.d_kv == 8
    gelu = build_llm(str(tmp_path), LLMConfig(activation="gelu"))
    gelu.load_initial()
    assert gelu.model.encoder.block[0].layer[1].DenseReluDense.act(
        torch.tensor(1.0)
    ) == torch.nn.functional.gelu(torch.tensor(1.0))


def test_a_model_without_padding_gets_a_row_that_is_the_mean_of_the_others(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path
    )
    torch.manual_seed(0)
    own = build(LLAMA).model.config
    own.vocab_size = 5
    original = LlamaForCausalLM(own)
    original.save_pretrained(tmp_path)
    for sizes in ({}, {**LLAMA, "vocab_size": 6}):
        llm = build_llm(str(tmp_path), LLMConfig(sizes=sizes))
        llm.load_initial()
        assert llm.tokenizer.pad_id == 5
        embeddings = llm.model.get_input_embeddings().weight
        assert embeddings.shape == (6, 16)
        torch.testing.assert_close(embeddings[:5], original.get_input_embeddings().weight.data)
        torch.testing.assert_close(embeddings[5], embeddings[:5].mean(dim=0))
        assert llm.load_initial()  # once more


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA)
    cases = (
        ({**OPT, "vocab_size": 301}, r"sizes\.model_type: opt, but .* is a llama"),
        ({**LLAMA, "vocab_size": 301, "intermediate_size": 48}, "no weights could be read|mismatch|another"),
        ({**LLAMA, "vocab_size": 301, "num_hidden_layers": 3}, "lacks 9 tensors"),
    )
    for sizes, message in cases:
        llm = build_llm(str(tmp_path), LLMConfig(sizes=sizes))
        with pytest.raises(CheckpointError, match=message):
            llm.load_initial()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.llm_model: no weights could be read from"):
        build_llm(str(tmp_path), LLMConfig()).load_initial()


def test_a_copy_is_a_model_of_its_own() -> None:
    llm = build(OPT)
    other = copy.deepcopy(llm)
    torch.testing.assert_close(other.loss(**batch(other)), llm.loss(**batch(llm)))
    assert list(other.state_dict()) == list(llm.state_dict())
    assert all(name.startswith("model.") for name in llm.state_dict())


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, r"model\.llm\.device.*'gpu' is no device"),
        ({"quantization": "int8", "precision": "fp32"}, r"quantization.*half precision"),
        ({"end": ""}, r"model\.llm\.end.*ends nothing"),
        ({"lora": {"targets": ["q_proj"]}}, r"model\.llm\.lora\.r.*0 means no additions"),
        ({"lora": {"r": 4, "alpha": 0}}, r"lora\.alpha.*not above 0"),
        ({"lora": {"rank": 4}}, r"lora\.rank"),
        ({"bos": "start"}, r"model\.llm\.bos"),
        ({"precision": "fp8"}, r"model\.llm\.precision"),
    ],
)
def test_values_that_cannot_be_used_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed_section(LLMConfig, {"test": changes}, ("model", "llm"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"model\.llm_model: nothing says which language model"),
        ({"sizes": OPT}, r"model\.llm\.tokenizer: .*'scenes'"),
        (
            {"sizes": {"model_type": "ott"}},
            r"sizes\.model_type: transformers has no 'ott'; did you mean 'opt'",
        ),
        (
            {"sizes": {**OPT, "hiden_size": 8}},
            r"sizes\.hiden_size: no such key of opt; did you mean 'hidden_size'",
        ),
        ({"sizes": {**OPT, "num_attention_heads": 3}, "tokenizer": "scenes"}, r"model\.llm: .*opt"),
        (
            {"sizes": T5, "activation": "gelo"},
            r"llm\.activation: transformers has no 'gelo'; did you mean 'gelu'",
        ),
    ],
)
def test_a_model_that_cannot_be_built_is_explained(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_llm(None, LLMConfig(**config))


def test_lora_and_quantisation_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'blip\[lora\]'"):
        build(OPT, lora=LoraConfig(r=4))
    saved(tmp_path, OPT)
    with pytest.raises(ConfigError, match=r"pip install 'blip\[quantize\]'"):
        build_llm(str(tmp_path), LLMConfig(quantization="int8")).load_initial()
    llm = build_llm("no/such", LLMConfig(sizes={**OPT, "vocab_size": 9}, quantization="int8"))
    with pytest.raises(ConfigError, match="random weights are not quantised"):
        llm.to("cpu")


# Inference


def test_a_text_that_outgrows_the_positions_is_refused() -> None:
    llm = build(OPT)
    inputs = batch(llm)
    labels = inputs.pop("labels")
    how = {"end_id": llm.tokenizer.end_id, "pad_id": llm.tokenizer.pad_id, "min_length": 1}
    room = 24 - 3 - inputs["ids"].shape[1] + 1  # the last token is not read
    assert llm.generate(**inputs, decoding=Decoding(**how, max_length=room)).ids.shape[1] <= room
    with pytest.raises(DataError, match="have 25 tokens together, and this opt has 24 positions"):
        llm.generate(**inputs, decoding=Decoding(**how, max_length=room + 1))
    long = {key: value.repeat(1, 4) for key, value in {**inputs, "labels": labels}.items() if key != "prefix"}
    with pytest.raises(DataError, match="24 positions"):
        llm.loss(inputs["prefix"], **long)


def test_a_prompt_may_be_empty() -> None:
    for sizes in KINDS.values():
        llm = build(sizes, bos="none")
        prefix = torch.randn(2, 3, 16)
        rules = Decoding(llm.tokenizer.end_id, llm.tokenizer.pad_id, max_length=4, num_beams=2)
        empty = torch.zeros(2, 0, dtype=torch.int64)
        one = llm.generate(prefix, empty, empty.bool(), rules)
        padding = torch.full((2, 3), llm.tokenizer.pad_id)
        two = llm.generate(prefix, padding, torch.zeros(2, 3, dtype=torch.bool), rules)
        assert torch.equal(one.ids, two.ids)
        found = llm.log_likelihood(
            prefix, empty, empty.bool(), *llm.tokenizer.candidates(["two", "a circle"])
        )
        assert found.isfinite().all()


def test_prompts_may_be_padded_on_either_side() -> None:
    for sizes in KINDS.values():
        llm = build(sizes)
        ids, mask = llm.tokenizer.prompt(["a", "what is left of it ?"])
        prefix = torch.randn(2, 3, 16)
        rules = Decoding(llm.tokenizer.end_id, llm.tokenizer.pad_id, max_length=6, num_beams=3)
        left = torch.stack([i[m.int().argsort(stable=True)] for i, m in zip(ids, mask, strict=True)])
        one = llm.generate(prefix, ids, mask, rules)
        two = llm.generate(prefix, left, mask.sort(dim=1).values, rules)
        assert torch.equal(one.ids, two.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_each_item_may_have_candidates_of_its_own(kind: str) -> None:
    llm = build(KINDS[kind])
    ids, mask = llm.tokenizer.prompt(PROMPTS)
    prefix = torch.randn(2, 3, 16)
    answers = [["two", "a red circle", "no"], ["left of the blue square", "yes", ""]]
    cand_ids, cand_mask = llm.tokenizer.candidates([text for some in answers for text in some])
    cand_ids, cand_mask = cand_ids.view(2, 3, -1), cand_mask.view(2, 3, -1)
    found = llm.log_likelihood(prefix, ids, mask, cand_ids, cand_mask)
    for row in range(2):
        shared = llm.log_likelihood(
            prefix[[row]], ids[[row]], mask[[row]], cand_ids[row], cand_mask[row], segment=1
        )
        torch.testing.assert_close(found[[row]], shared)
    if not llm.is_encoder_decoder:
        assert found[1, 2] == -torch.inf  # no token at all
    assert llm.log_likelihood(prefix, ids, mask, cand_ids[:, :0], cand_mask[:, :0]).shape == (2, 0)


def test_a_model_whose_past_cannot_be_reordered_does_without_a_cache() -> None:
    sizes = {"model_type": "mamba", "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    rules = {"max_length": 4, "num_beams": 2}
    for use_cache in (True, False):
        llm = build(sizes, use_cache=use_cache)
        ids, mask = llm.tokenizer.prompt(["a circle", "a blue circle"])
        given = (torch.randn(2, 3, 16), ids, mask)
        decoding = Decoding(llm.tokenizer.end_id, llm.tokenizer.pad_id, **rules)
        if use_cache:
            with pytest.raises(ConfigError, match=r"model\.llm\.use_cache: mamba .* set it to false"):
                llm.generate(*given, decoding)
        else:
            assert len(llm.generate(*given, decoding).ids) == 2


def test_tokenizer_of_either_kind_fits_its_model() -> None:
    assert isinstance(build(T5).tokenizer, LlmTokenizer)
    assert build(T5).tokenizer.kind == "seq2seq"
    assert isinstance(build(T5).model, T5ForConditionalGeneration)
    assert build(LLAMA).tokenizer.kind == "causal"
