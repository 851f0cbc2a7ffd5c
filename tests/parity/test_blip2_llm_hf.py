"""BLIP-2 and InstructBLIP with language models against transformers' own classes, with the same weights."""

from __future__ import annotations

import copy
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)

import blip
from blip.convert import convert
from blip.errors import CheckpointError, UsageError
from blip.formats import hf
from blip.models.llm_tokenizer import LlmTokenizer
from blip.models.tokenizer import DEC, WordPieces
from tests.reference.small_stage2 import ANSWERS, CAPTIONS, LLMS, QUESTIONS, small_stage2

CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
"""In float64, but for norms that language models always compute in float32."""
IMAGE, WIDTH, QUERIES, ROWS = 24, 48, 4, 3
# transformers has one epsilon for the blocks and for the norm that LAVIS calls `ln_vision` and gives 1e-5.
EPS = 1e-5
BLIP2, INSTRUCT = Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration
PARTS = {
    BLIP2: (Blip2Config, Blip2VisionConfig, Blip2QFormerConfig),
    INSTRUCT: (InstructBlipConfig, InstructBlipVisionConfig, InstructBlipQFormerConfig),
}
CASES = {
    "blip2_opt": (BLIP2, "opt"),
    "blip2_t5": (BLIP2, "t5"),
    "blip2_vicuna_instruct": (INSTRUCT, "llama"),
    "blip2_t5_instruct": (INSTRUCT, "t5"),
}
PROMPTS = ["how many red circles are there ?", "a", "what is left of the blue square"]
MORE_ROWS = 3
"""Rows of the vocabulary without a word; the first of them stands for soft tokens in transformers' ids."""


def tokenizer_of(llm: str) -> LlmTokenizer:
    return LlmTokenizer.load("scenes", "seq2seq" if llm == "t5" else "causal")


def make(their_class: Any, llm: str) -> Any:
    """Their model with weights at which nothing is negligible."""
    config, vision, qformer = PARTS[their_class]
    tokenizer = tokenizer_of(llm)
    sizes = dict(LLMS[llm])
    text = AutoConfig.for_model(
        sizes.pop("model_type"),
        **sizes,
        vocab_size=tokenizer.vocab_size + MORE_ROWS,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.lead[0],
        eos_token_id=tokenizer.end_id,
        **({"decoder_start_token_id": tokenizer.pad_id} if llm == "t5" else {}),
    )
    model = their_class(
        config(
            vision_config=vision(
                hidden_size=WIDTH,
                intermediate_size=100,
                num_hidden_layers=2,
                num_attention_heads=3,
                image_size=IMAGE,
                patch_size=8,
                layer_norm_eps=EPS,
            ),
            qformer_config=qformer(
                vocab_size=WordPieces("scenes", (DEC,)).vocab_size,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=72,
                max_position_embeddings=40,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            text_config=text,
            num_query_tokens=QUERIES,
            image_token_index=tokenizer.vocab_size,
        )
    ).eval()
    if llm == "t5":  # FlanT5's output embeddings are no copy of the word embeddings
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.startswith("language_model.") and parameter.ndim == 2:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.2 if parameter.ndim > 1 else 0.1))
            if name.endswith("self_attn.qkv.bias"):
                parameter[WIDTH : 2 * WIDTH] = 0  # as in every released checkpoint
        model.get_output_embeddings().weight[tokenizer.end_id] *= 2  # texts end now and then
    return model


def written(theirs: Any, llm: str, folder: Path) -> Path:
    """Their folder: weights, configuration and tokenizers, as their processors keep them."""
    theirs.save_pretrained(folder)
    tokenizer_of(llm)._tokenizer.save_pretrained(folder)
    if isinstance(theirs, INSTRUCT):
        (folder / "qformer_tokenizer").mkdir()
        words = resources.files("blip") / "models" / "scenes_vocab.txt"
        (folder / "qformer_tokenizer" / "vocab.txt").write_text(words.read_text())
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """Registry name, their model, and ours by way of the folder that theirs is saved in."""
    their_class, llm = CASES[request.param]
    theirs = make(their_class, llm)
    folder = written(theirs, llm, tmp_path_factory.mktemp(request.param))
    return request.param, theirs, blip.from_pretrained(folder, freeze_vit=False)


@pytest.fixture(scope="module")
def exact(case: tuple[str, Any, Any]) -> tuple[str, Any, Any]:
    """Both in float64, where rounding hides nothing."""
    arch, theirs, ours = copy.deepcopy(case)
    ours.double()
    ours.llm.model.double()
    return arch, theirs.double(), ours


def images() -> Tensor:
    return torch.randn(ROWS, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))


def their_inputs(theirs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """A batch of ours as they want it: placeholders for the soft tokens in front of the text."""
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    places = ids.new_full((len(ids), QUERIES), theirs.config.image_token_index)
    inputs = {
        "pixel_values": batch["image"],
        "input_ids": torch.cat([places, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), mask.long()], dim=1),
    }
    if "llm_labels" in batch:
        labels, seq2seq = batch["llm_labels"], theirs.config.text_config.is_encoder_decoder
        inputs["labels"] = labels if seq2seq else torch.cat([torch.full_like(places, -100), labels], dim=1)
    if isinstance(theirs, INSTRUCT):
        inputs["qformer_input_ids"] = batch["text_ids"]
        inputs["qformer_attention_mask"] = batch["text_mask"].long()
    return inputs


def texts(kind: str) -> dict[str, Any]:
    if kind == "captions":
        return {"text_input": CAPTIONS[:ROWS], "seed": 1, "step": 2}
    return {"text_input": QUESTIONS[:ROWS], "text_output": ANSWERS[:ROWS]}


def test_their_folder_becomes_our_model_of_the_same_name(case: tuple[str, Any, Any]) -> None:
    arch, theirs, ours = case
    assert ours.config.arch == arch
    state = hf.table(arch).to_ours(theirs.state_dict()).state
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=name)
    config = ours.config
    assert (config.image_size, config.num_query_token, config.dropout) == (IMAGE, QUERIES, 0.0)
    assert (config.vit.heads, config.vit.norm_eps, config.qformer.num_heads) == (3, EPS, 4)
    assert config.qformer_text_input == isinstance(theirs, INSTRUCT)
    assert ours.frozen_parts() == {}


@pytest.mark.parametrize("kind", ["captions", "instructions"])
def test_loss_and_gradients_are_those_of_transformers(kind: str, exact: tuple[str, Any, Any]) -> None:
    arch, theirs, ours = exact
    batch = ours.prepare({"image": images().double(), **texts(kind)})
    theirs.zero_grad()
    expected = theirs(**their_inputs(theirs, batch))
    expected.loss.backward()
    ours.train().zero_grad()
    found = ours(batch)
    found.loss.backward()
    # That of decoders is always float32 there.
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE, check_dtype=False)

    wanted = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.grad is not None}
    for name, value in wanted.items():
        if name.endswith("self_attn.qkv.bias"):  # that of the keys has no gradient but rounding
            assert value[WIDTH : 2 * WIDTH].abs().max() < 1e-5
            value[WIDTH : 2 * WIDTH] = 0
    renamed = hf.table(arch).to_ours(wanted).state
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    unread = {name for name in renamed if name.startswith("qformer.layers.2.text_ffn.")}
    assert not any(renamed[name].any() for name in unread)  # what the last layer makes of the text
    assert gradients.keys() == {name for name in renamed if not name.startswith("llm.")} - unread
    for name, value in gradients.items():
        torch.testing.assert_close(value, renamed[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    ours.eval()


@torch.no_grad()
def test_soft_tokens_and_logits_are_those_of_transformers(exact: tuple[str, Any, Any]) -> None:
    _, theirs, ours = exact
    batch = ours.prepare({"image": images().double(), **texts("instructions")})
    inputs = their_inputs(theirs, batch)
    expected = theirs(**inputs)
    given = {k: v for k, v in inputs.items() if k.startswith(("pixel", "qformer"))}
    prefix = ours.soft_tokens(batch)
    torch.testing.assert_close(prefix, theirs.get_image_features(**given).pooler_output, **CLOSE)
    labels = batch["llm_labels"]
    index = (labels != -100).flatten().nonzero()[:, 0]
    logits = ours.llm._logits(prefix, batch["llm_ids"], batch["llm_mask"], labels, index)
    if ours.llm.is_encoder_decoder:
        wanted = expected.logits[labels != -100]
    else:  # a token's logits stand at the one before it
        wanted = expected.logits[:, QUERIES - 1 : -1][labels != -100]
    torch.testing.assert_close(logits, wanted, **CLOSE)


def generated(ours: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[list[int]]:
    """New tokens of each picture up to the end, by way of `generate`."""
    seen: list[Tensor] = []
    monkeypatch.setattr(LlmTokenizer, "decode", lambda self, ids: seen.append(ids) or [""] * len(ids))
    ours.generate({"image": images()}, prompt=PROMPTS, **how)
    return cut(ours, seen[0])


def cut(ours: Any, ids: Tensor) -> list[list[int]]:
    end = ours.llm.tokenizer.end_id
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


def prompt_inputs(theirs: Any, ours: Any) -> dict[str, Tensor]:
    """Prompts of different length as their processors lay them out: padding, placeholders, words."""
    ids, mask = ours.llm.tokenizer.prompt(PROMPTS)
    text = ours.word_pieces(PROMPTS) if isinstance(theirs, INSTRUCT) else {}
    inputs = their_inputs(theirs, {"image": images(), "llm_ids": ids, "llm_mask": mask, **text})
    shift = (~mask).sum(dim=1)
    order = (torch.arange(QUERIES + mask.shape[1])[None] - shift[:, None]) % (QUERIES + mask.shape[1])
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key].gather(1, order)
    return inputs


SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 1, "max_length": 12},
    {"num_beams": 5, "max_length": 12},
    {"num_beams": 5, "max_length": 9, "min_length": 5, "length_penalty": -1.0},
    {"num_beams": 5, "max_length": 7, "length_penalty": 2.0, "num_captions": 3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_generated_ids_are_those_of_transformers(
    setting: dict[str, Any], case: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs, ours = case
    seq2seq = ours.llm.is_encoder_decoder
    # Of a decoder theirs counts the placeholders' id as text, ours, like LAVIS, new tokens only.
    penalty = 1.5 if seq2seq else 1.0
    tokenizer = ours.llm.tokenizer
    found = generated(ours, monkeypatch, repetition_penalty=penalty, **setting)
    inputs = prompt_inputs(theirs, ours)
    expected = theirs.generate(
        **inputs,
        do_sample=False,
        num_beams=setting["num_beams"],
        num_return_sequences=setting.get("num_captions", 1),
        max_new_tokens=setting["max_length"],
        # As LAVIS calls it: of an encoder-decoder the decoder's start counts.
        **{"min_length" if seq2seq else "min_new_tokens": setting.get("min_length", 1)},
        length_penalty=setting.get("length_penalty", 1.0),
        repetition_penalty=penalty,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )
    start = 1 if seq2seq else inputs["input_ids"].shape[1]
    assert found == cut(ours, expected[:, start:])
    assert len({tuple(row) for row in found}) > 1


def test_what_transformers_gets_of_a_model_is_that_model(case: tuple[str, Any, Any], tmp_path: Path) -> None:
    _, theirs, ours = case
    exported = blip.to_hf(ours)
    assert type(exported) is type(theirs)
    expected = theirs.state_dict()
    assert exported.state_dict().keys() == expected.keys()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    for section in ("vision_config", "qformer_config", "text_config"):
        given, back = (getattr(m.config, section).to_dict() for m in (theirs, exported))
        free = {"initializer_range", "vocab_size"} if section == "qformer_config" else {"dtype"}
        if section == "vision_config":
            free |= {"initializer_range"}
        assert {k for k in given if given[k] != back.get(k)} <= free
    assert exported.config.image_token_index == theirs.config.image_token_index
    assert exported.config.num_query_tokens == QUERIES
    if isinstance(theirs, INSTRUCT):
        assert exported.config.qformer_config.vocab_size == theirs.config.qformer_config.vocab_size
    batch = ours.prepare({"image": images(), **texts("instructions")})
    inputs = their_inputs(theirs, batch)
    exported.save_pretrained(tmp_path)
    back = type(theirs).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(exported(**inputs).loss, theirs(**inputs).loss)
        assert torch.equal(back(**inputs).loss, theirs(**inputs).loss)


def test_the_image_token_gets_a_row_where_every_row_has_a_word(
    case: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs, ours = case
    rows = theirs.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(ours.llm.tokenizer, "vocab_size", rows)  # as Vicuna's, whose last word is the padding
    exported = blip.to_hf(ours)
    token = exported.config.image_token_index
    weight = exported.get_input_embeddings().weight
    assert (token, len(weight) % 64, len(weight) > token) == (rows, 0, True)
    assert exported.config.text_config.vocab_size == len(weight)
    torch.testing.assert_close(weight[:rows], theirs.get_input_embeddings().weight, rtol=0, atol=0)
    batch = ours.prepare({"image": images(), **texts("instructions")})
    # Padded rows of different length: an image token equal to the padding would be miscounted.
    with torch.no_grad():
        expected = theirs(**their_inputs(theirs, batch)).logits
        found = exported(**their_inputs(exported, batch)).logits
    torch.testing.assert_close(found[..., :rows], expected, rtol=0, atol=1e-6)
    padding = found[..., ours.llm.tokenizer.pad_id, None]
    torch.testing.assert_close(found[..., rows:], padding.expand_as(found[..., rows:]), rtol=0, atol=1e-6)


def test_our_model_of_their_weights_is_saved_and_comes_back(
    case: tuple[str, Any, Any], tmp_path: Path
) -> None:
    _, _, ours = case
    back = blip.from_pretrained(ours.save_pretrained(tmp_path / "ours"))
    assert asdict(back.config) == asdict(ours.config)
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, ours.state_dict()[name], rtol=0, atol=0, msg=name)


def test_opt_as_it_was_converted_ends_texts_by_a_newline(tmp_path: Path) -> None:
    from blip.formats.hf_config import read_folder

    theirs = make(BLIP2, "opt")
    theirs.config.text_config.eos_token_id = 50118
    theirs.config.save_pretrained(tmp_path)
    arch, values = read_folder(tmp_path, ["Blip2ForConditionalGeneration"])
    assert (arch, values["llm"]["end"], values["llm_model"]) == ("blip2_opt", "\n", None)
    assert "tokenizer" not in values["llm"]


@pytest.mark.parametrize("arch", CASES)
def test_a_folder_without_tokenizers_goes_both_ways(arch: str, tmp_path: Path) -> None:
    their_class, llm = CASES[arch]
    theirs = make(their_class, llm)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = blip.from_pretrained(tmp_path / "theirs")
    tokenizer, pieces = tokenizer_of(llm), WordPieces("scenes", (DEC,))
    reads = pieces(QUESTIONS[:ROWS]) if their_class is INSTRUCT else {}
    learned = tokenizer.train(QUESTIONS[:ROWS], ANSWERS[:ROWS])
    batch = {"image": images(), **learned, **reads}
    torch.testing.assert_close(ours(batch).loss, theirs(**their_inputs(theirs, batch)).loss)
    ids, mask = tokenizer.prompt(["what color is the circle ?"] * ROWS)  # of one length: nothing is padded
    samples = {"image": images(), "llm_ids": ids, "llm_mask": mask, **reads}
    how = {"num_beams": 3, "min_length": 1, "repetition_penalty": 1.0}
    found = ours.generate(samples, max_length=6, return_ids=True, **how)
    how = {"do_sample": False, "max_new_tokens": 6, "num_beams": 3}
    expected = theirs.generate(**their_inputs(theirs, samples), **how)
    expected = expected[:, expected.shape[1] - found.shape[1] :]
    ended = (found == tokenizer.end_id).cumsum(
        dim=1
    ) > 0  # behind it, InstructBLIP's is padded with more ends
    assert torch.equal(found.masked_fill(ended, -1), expected.masked_fill(ended, -1))
    back = blip.to_hf(ours)
    assert back.config.image_token_index == theirs.config.image_token_index
    assert back.config.text_config.eos_token_id == theirs.config.text_config.eos_token_id
    after = back.state_dict()
    assert after.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(after[name], value), name


def test_what_stands_before_soft_tokens_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_stage2("opt", "blip2_opt", vit_model="eva_clip_g", llm={"before": "a star"}).eval()
    convert(model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs", "hf")
    assert "put the tokens of 'a star' in front" in caplog.text
    back = blip.from_pretrained(tmp_path / "theirs")
    assert back.config.llm.before == "a star"


def test_a_qformer_that_reads_is_none_of_blip_2_there(case: tuple[str, Any, Any], tmp_path: Path) -> None:
    from blip.formats.hf_config import read_folder

    arch, theirs, ours = case
    other = "blip2_llm" if isinstance(theirs, INSTRUCT) else "blip2_llm_instruct"
    ours.config.arch = other
    with pytest.raises(UsageError, match="to_hf: the Q-Former of"):
        blip.to_hf(ours)
    ours.config.arch = arch
    if isinstance(theirs, BLIP2):
        config = Blip2Config(qformer_config=Blip2QFormerConfig(use_qformer_text_input=True))
        config.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"use_qformer_text_input is True; BLIP-2 has False"):
            read_folder(tmp_path, ["Blip2ForConditionalGeneration"])
