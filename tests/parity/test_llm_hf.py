"""The language model's wrapper against transformers: losses, gradients, generated ids, log-probabilities."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.layers.decoding import Decoding, Draws
from blip.models.llm import LanguageModel, LLMConfig, build_llm

SIZES: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 24,
        "word_embed_proj_dim": 16,  # as OPT-350M, whose embeddings are narrower
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "gemma2": {  # a sliding window, and logits that are changed behind the head
        "model_type": "gemma2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 5.0,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "bart": {
        "model_type": "bart",
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "scale_embedding": True,
        "decoder_start_token_id": 3,
        "forced_eos_token_id": None,
    },
}
CAUSAL = [name for name in SIZES if name not in ("t5", "bart")]
PROMPTS = ["how many red circles are there ?", "a", "what is left of the blue square"]
TARGETS = ["two", "is it a green triangle", "the red circle"]
QUERIES = 3


def build(family: str, seed: int = 0, **config: Any) -> LanguageModel:
    """Random weights that are sure of something, unlike fresh ones, and end now and then."""
    llm = build_llm(None, LLMConfig(sizes=SIZES[family], tokenizer="scenes", **config))
    torch.manual_seed(seed)
    for parameter in llm.model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5
    llm.model.get_output_embeddings().weight.data[llm.tokenizer.end_id] *= 2
    return llm


def soft(llm: LanguageModel, rows: int = len(PROMPTS)) -> Tensor:
    return torch.randn(rows, QUERIES, llm.hidden_size)


def embed(llm: LanguageModel, ids: Tensor) -> Tensor:
    return llm.model.get_input_embeddings()(ids)


def unpadded(llm: LanguageModel, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Soft tokens and words of one row: (1, S, H)."""
    return torch.cat([prefix, embed(llm, ids[mask])])[None]


@pytest.mark.parametrize("family", SIZES)
def test_loss_and_gradients_are_those_of_transformers(family: str) -> None:
    llm = build(family)
    batch = llm.tokenizer.train(PROMPTS, TARGETS)
    prefix = soft(llm).requires_grad_()
    loss = llm.loss(prefix, *batch.values())
    (gradient,) = torch.autograd.grad(loss, prefix)

    ids, mask, labels = batch.values()
    unread = torch.full(prefix.shape[:2], -100)
    theirs = llm.model(
        inputs_embeds=torch.cat([prefix, embed(llm, ids)], dim=1),
        attention_mask=torch.cat([torch.ones_like(unread), mask.long()], dim=1),
        labels=torch.cat([unread, labels], dim=1) if family in CAUSAL else labels,
    )
    torch.testing.assert_close(loss, theirs.loss)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.loss, prefix)[0])


@pytest.mark.parametrize("family", CAUSAL)
def test_a_text_without_prompt_has_its_first_token_as_a_target_too(family: str) -> None:
    llm = build(family)
    ids, mask, labels = llm.tokenizer.text(TARGETS).values()
    assert (labels[:, 0] == ids[:, 0]).all()
    prefix = soft(llm)
    unread = torch.full(prefix.shape[:2], -100)
    theirs = llm.model(
        inputs_embeds=torch.cat([prefix, embed(llm, ids)], dim=1),
        attention_mask=torch.cat([torch.ones_like(unread), mask.long()], dim=1),
        labels=torch.cat([unread, labels], dim=1),
    )
    torch.testing.assert_close(llm.loss(prefix, ids, mask, labels), theirs.loss)


@pytest.mark.parametrize("family", SIZES)
def test_what_stands_in_front_is_read_before_the_soft_tokens_everywhere(family: str) -> None:
    llm, plain = build(family, before="the picture shows"), build(family)
    words = embed(plain, torch.tensor(plain.tokenizer.raw(["the picture shows"])[0]))
    prefix = soft(llm).requires_grad_()
    behind = torch.cat([words.detach().expand(len(prefix), -1, -1), prefix], dim=1)
    assert behind.shape[1] == QUERIES + 3

    batch = llm.tokenizer.train(PROMPTS, TARGETS).values()
    loss, theirs = llm.loss(prefix, *batch), plain.loss(behind, *batch)
    assert not torch.isclose(theirs, plain.loss(prefix, *batch))
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(one, prefix)[0] for one in (loss, theirs)))
    prompts, candidates = llm.tokenizer.prompt(PROMPTS), llm.tokenizer.candidates(TARGETS)
    scores = llm.log_likelihood(prefix, *prompts, *candidates)
    torch.testing.assert_close(scores, plain.log_likelihood(behind, *prompts, *candidates))
    ends = llm.tokenizer.end_id, llm.tokenizer.pad_id
    decoding = Decoding(*ends, num_beams=2, max_length=6)
    found = llm.generate(prefix, *prompts, decoding).ids
    assert torch.equal(found, plain.generate(behind, *prompts, decoding).ids)


def random_setting(seed: int, beams: int) -> dict[str, Any]:
    chance = random.Random(1000 * beams + seed)
    return {
        "num_beams": beams,
        "num_return_sequences": chance.randint(1, beams),
        "max_new_tokens": (most := chance.choice([1, 5, 9, 14])),
        "min_new_tokens": min(chance.choice([0, 0, 1, 4]), most),
        "length_penalty": chance.choice([-1.0, 0.0, 1.0, 2.0]) if beams > 1 else 1.0,
        "repetition_penalty": chance.choice([1.0, 1.5, 0.8]),
    }


def as_decoding(llm: LanguageModel, theirs: dict[str, Any]) -> Decoding:
    return Decoding(
        llm.tokenizer.end_id,
        llm.tokenizer.pad_id,
        max_length=theirs["max_new_tokens"],
        min_length=theirs["min_new_tokens"],
        num_beams=theirs["num_beams"],
        num_captions=theirs["num_return_sequences"],
        length_penalty=theirs["length_penalty"],
        repetition_penalty=theirs["repetition_penalty"],
    )


def texts(llm: LanguageModel, ids: Tensor) -> list[list[int]]:
    """Tokens up to the end."""
    end = llm.tokenizer.end_id
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


@pytest.mark.parametrize(
    ("family", "beams", "use_cache"),
    [(family, beams, True) for family in SIZES for beams in (1, 3)]
    + [(family, 3, False) for family in ("opt", "gemma2", "t5")],
)
def test_generated_ids_are_those_of_transformers(family: str, beams: int, use_cache: bool) -> None:
    lengths = set()
    for seed in range(4):
        llm = build(family, seed, use_cache=use_cache)
        tokenizer = llm.tokenizer
        ids, mask = tokenizer.prompt(PROMPTS)
        prefix, setting = soft(llm), random_setting(seed, beams)
        ours = llm.generate(prefix, ids, mask, as_decoding(llm, setting))
        ends = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
        expected = []
        # Row by row, since theirs change with the padding of `inputs_embeds`.
        for row in zip(prefix, ids, mask, strict=True):
            inputs = unpadded(llm, *row)
            new_ids = llm.model.generate(inputs_embeds=inputs, do_sample=False, **ends, **setting)
            expected += texts(llm, new_ids if family in CAUSAL else new_ids[:, 1:])
        assert texts(llm, ours.ids) == expected, (seed, setting)
        lengths |= {len(text) for text in texts(llm, ours.ids)}
    assert len(lengths) > 2  # early and late ends were both compared


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_between_soft_tokens_and_words_is_no_difference_to_lavis(family: str) -> None:
    llm = build(family)
    tokenizer = llm.tokenizer
    ids, mask = tokenizer.prompt(PROMPTS)
    prefix = soft(llm)
    mirrored = torch.cat([torch.ones(len(ids), QUERIES, dtype=torch.int64), mask.flip(1).long()], dim=1)
    rows = [i[m] for i, m in zip(ids, mask, strict=True)]
    left = torch.stack([torch.cat([row.new_zeros(ids.shape[1] - len(row)), row]) for row in rows])
    positions = (mirrored.cumsum(dim=1) - 1).clamp(min=0)
    logits = llm.model(
        inputs_embeds=torch.cat([prefix, embed(llm, left)], dim=1),
        attention_mask=mirrored,
        position_ids=positions,
    ).logits[:, -1]
    if family == "gemma2":  # whose window counts columns, padding included
        logits, prefix, ids, mask = logits[[2]], prefix[[2]], ids[[2]], mask[[2]]
    score = llm.log_likelihood(
        prefix,
        ids,
        mask,
        torch.arange(tokenizer.vocab_size)[:, None],
        torch.ones(tokenizer.vocab_size, 1, dtype=torch.bool),
    )
    torch.testing.assert_close(score, logits.log_softmax(dim=1))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", SIZES)
def test_a_candidates_score_is_the_sum_of_its_tokens_log_probabilities(family: str, use_cache: bool) -> None:
    llm = build(family, use_cache=use_cache)
    tokenizer = llm.tokenizer
    answers = ["yes", "two blue squares", "no", "a red circle left of it", "two"]
    ids, mask = tokenizer.prompt(PROMPTS)
    prefix = soft(llm)
    found = llm.log_likelihood(prefix, ids, mask, *tokenizer.candidates(answers), segment=2)
    for row, prompt in enumerate(PROMPTS):
        for column, answer in enumerate(answers):
            one = tokenizer.prompt([prompt])
            target = tokenizer.candidates([answer])[0]
            if family in CAUSAL:
                inputs = torch.cat([one[0], target], dim=1)
                logits = llm.model(
                    inputs_embeds=torch.cat([prefix[row : row + 1], embed(llm, inputs)], dim=1)
                ).logits[:, -target.shape[1] - 1 : -1]
            else:
                inputs = torch.cat([prefix[row : row + 1], embed(llm, one[0])], dim=1)
                logits = llm.model(inputs_embeds=inputs, labels=target).logits
            expected = logits.log_softmax(dim=2).gather(2, target[:, :, None]).sum()
            torch.testing.assert_close(found[row, column], expected)


@pytest.mark.parametrize("family", SIZES)
def test_texts_do_not_depend_on_the_others_of_their_batch(family: str) -> None:
    llm = build(family)
    tokenizer = llm.tokenizer
    text = "how many red circles are left of the small blue square and the big green triangle ?"
    words = text.split()
    prompts = [" ".join(words[: 1 + (5 * i) % 16]) for i in range(16)]
    prefix = soft(llm, 16)
    how = {"end_id": tokenizer.end_id, "pad_id": tokenizer.pad_id, "max_length": 8}
    beams = Decoding(**how, num_beams=3, repetition_penalty=1.5)
    nucleus = Decoding(**how, sample=True, top_p=0.9, num_captions=2)

    def run(rows: slice, decoding: Decoding) -> tuple[list[list[int]], Tensor]:
        ids, mask = tokenizer.prompt(prompts[rows])
        draws = Draws((7, "sample"), torch.arange(16)[rows])
        found = llm.generate(prefix[rows], ids, mask, decoding, draws)
        answers = tokenizer.candidates(["yes", "two red circles"])
        return texts(llm, found.ids), llm.log_likelihood(prefix[rows], ids, mask, *answers)

    for decoding in (beams, nucleus):
        together, scores = run(slice(None), decoding)
        for row in (0, 3, 7, 15):
            alone, score = run(slice(row, row + 1), decoding)
            copies = len(alone)
            assert alone == together[row * copies : (row + 1) * copies]
            torch.testing.assert_close(score, scores[row : row + 1])
