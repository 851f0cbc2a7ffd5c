"""Generation against transformers' `generate`: the same weights, ids and scores; the same distributions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from blip.layers.decoding import Decoding, Draws, generate, likely

VOCAB, END, PAD, START = 13, 3, 0, 1
IMAGE_WIDTH = 12


class Whole:
    """A decoder without any cache: the model reads every text from its start."""

    def __init__(self, model: Any, **looks_at: Tensor) -> None:
        self.model = model
        self.looks_at = looks_at

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        self.ids, self.mask = prompt_ids, prompt_mask
        return self.logits()

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        if items is not None:
            self.looks_at = {name: value[items] for name, value in self.looks_at.items()}
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self.logits()

    def logits(self) -> Tensor:
        if not self.mask.all():
            return torch.cat(
                [self.read(ids[mask][None]) for ids, mask in zip(self.ids, self.mask, strict=True)]
            )
        return self.read(self.ids)

    def read(self, ids: Tensor) -> Tensor:
        seen = {name: value.repeat(len(ids) // len(value), 1, 1) for name, value in self.looks_at.items()}
        return self.model(ids, use_cache=False, **seen).logits[:, -1]


def sharpen(model: Any, seed: int) -> Any:
    """Random weights that are sure of something, unlike fresh ones, and end now and then."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5
    model.get_output_embeddings().weight.data[END] *= 3
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model.eval()


def gpt2(seed: int) -> tuple[Any, dict[str, Tensor]]:
    config = GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=16, n_layer=2, n_head=2)
    return sharpen(GPT2LMHeadModel(config), seed), {}


def bert(seed: int) -> tuple[Any, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        is_decoder=True,
    )
    return sharpen(BertLMHeadModel(config), seed), {}


def blip_text(seed: int) -> tuple[Any, dict[str, Tensor]]:
    config = BlipTextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        encoder_hidden_size=IMAGE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        is_decoder=True,
        bos_token_id=START,
        sep_token_id=END,
    )
    model = sharpen(BlipTextLMHeadModel(config), seed)
    return model, {"encoder_hidden_states": torch.randn(3, 5, IMAGE_WIDTH) * 3}


def random_setting(seed: int, beams: int) -> dict[str, Any]:
    chance = random.Random(1000 * beams + seed)
    return {
        "num_beams": beams,
        "num_return_sequences": chance.randint(1, beams),
        "max_new_tokens": (most := chance.choice([1, 4, 9, 16])),
        "min_new_tokens": min(chance.choice([0, 0, 1, 3, 4]), most),
        "length_penalty": chance.choice([-1.0, 0.0, 0.6, 1.0, 2.0]) if beams > 1 else 1.0,
        "repetition_penalty": chance.choice([1.0, 1.0, 1.1, 1.7, 0.8]),
    }


def as_decoding(theirs: dict[str, Any]) -> Decoding:
    """transformers' setting as ours."""
    return Decoding(
        end_id=END,
        pad_id=PAD,
        max_length=theirs["max_new_tokens"],
        min_length=theirs["min_new_tokens"],
        count_prompt=False,
        num_beams=theirs["num_beams"],
        num_captions=theirs["num_return_sequences"],
        length_penalty=theirs["length_penalty"],
        repetition_penalty=theirs["repetition_penalty"],
    )


def texts(ids: Tensor) -> list[list[int]]:
    """Tokens up to the end; transformers fills what follows with the end where the pad id is 0."""
    rows = ids.tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("family", [gpt2, bert, blip_text])
def test_ids_and_scores_are_those_of_transformers(family: Any, beams: int) -> None:
    lengths = set()
    for seed in range(8):
        model, looks_at = family(seed)
        setting = random_setting(seed, beams)
        prompts = torch.randint(4, VOCAB, (3, 1 + seed % 4))
        theirs = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **setting,
            **looks_at,
        )
        ours = generate(Whole(model, **looks_at), prompts, prompts > 0, as_decoding(setting))
        new_ids = theirs.sequences[:, prompts.shape[1] :]
        assert texts(ours.ids) == texts(new_ids), (seed, setting)
        assert ours.ids.shape == new_ids.shape
        if beams > 1:
            torch.testing.assert_close(ours.scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)
        else:
            log_probs = model.compute_transition_scores(
                theirs.sequences, theirs.scores, normalize_logits=True
            )
            written = [len(text) for text in texts(new_ids)]
            sums = torch.stack([row[:n].sum() for row, n in zip(log_probs, written, strict=True)])
            torch.testing.assert_close(ours.scores, sums, atol=1e-4, rtol=1e-4)
        lengths |= {len(text) for text in texts(ours.ids)}
    assert len(lengths) > 3  # early and late ends were both compared


@pytest.mark.parametrize("beams", [1, 3])
def test_lengths_that_count_the_prompt_are_those_of_transformers(beams: int) -> None:
    for seed in range(8):
        model, looks_at = blip_text(seed)
        prompts = torch.randint(4, VOCAB, (3, 4))
        theirs = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_beams=beams,
            do_sample=False,
            max_length=12,
            min_length=8,
            **looks_at,
        )
        decoding = Decoding(END, PAD, max_length=12, min_length=8, num_beams=beams)
        ours = generate(Whole(model, **looks_at), prompts, prompts > 0, decoding)
        assert texts(ours.ids) == texts(theirs[:, 4:])


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_different_length_are_those_of_transformers_padded_left(
    beams: int, penalty: float
) -> None:
    for seed in range(6):
        model, _ = gpt2(seed)  # heeds the mask in its positions
        prompts = torch.randint(4, VOCAB, (3, 5))
        mask = torch.arange(5) >= torch.tensor([[0], [2], [4]])
        prompts = prompts.masked_fill(~mask, PAD)
        setting = {"num_beams": beams, "max_new_tokens": 8, "repetition_penalty": penalty}
        theirs = model.generate(prompts, attention_mask=mask.long(), do_sample=False, **setting)
        decoding = Decoding(
            END, PAD, max_length=8, count_prompt=False, num_beams=beams, repetition_penalty=penalty
        )
        ours = generate(Whole(model), prompts, mask, decoding)
        assert texts(ours.ids) == texts(theirs[:, 5:]), seed


@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
def test_what_may_be_drawn_is_what_transformers_warpers_leave(top_k: int, top_p: float) -> None:
    torch.manual_seed(top_k)
    for temperature in (1.0, 0.5, 3.0):
        scores = torch.randn(6, 40) * 2
        scores[:, 7] = -torch.inf  # an end that may not come yet
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(torch.zeros(6, 1, dtype=torch.long), scores).softmax(dim=1)
        decoding = Decoding(END, PAD, sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        tokens, probs = likely(scores, decoding)
        torch.testing.assert_close(torch.zeros_like(scores).scatter(1, tokens, probs), expected)


def test_tokens_as_likely_as_the_last_kept_one_stay_as_in_transformers() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0]])
    expected = TopKLogitsWarper(2)(torch.zeros(1, 1, dtype=torch.long), scores).softmax(dim=1)
    tokens, probs = likely(scores, Decoding(END, PAD, sample=True, top_k=2))
    torch.testing.assert_close(torch.zeros_like(scores).scatter(1, tokens, probs), expected)


def test_samples_are_as_frequent_as_transformers_probabilities() -> None:
    model, looks_at = blip_text(0)
    looks_at = {name: value[:1] for name, value in looks_at.items()}
    prompt, count = torch.tensor([[5, 6]]), 4000
    decoding = Decoding(
        END,
        PAD,
        max_length=2,
        min_length=1,
        count_prompt=False,
        num_captions=count,
        repetition_penalty=1.3,
        sample=True,
        temperature=2.0,
        top_k=8,
        top_p=0.95,
    )
    rules = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            MinNewTokensLengthLogitsProcessor(2, 1, END),
            TemperatureLogitsWarper(2.0),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.95),
        ]
    )
    expected = torch.zeros(VOCAB, VOCAB)
    known: dict[tuple[int, ...], Tensor] = {}

    def next_logits(ids: Tensor) -> Tensor:
        text = tuple(ids.tolist())
        if text not in known:
            with torch.no_grad():
                known[text] = model(ids[None], use_cache=False, **looks_at).logits[0, -1]
        return known[text]

    def next_probs(ids: Tensor) -> Tensor:
        return rules(ids[None], next_logits(ids)[None].clone()).softmax(dim=1)[0]

    for token, prob in enumerate(next_probs(prompt[0])):
        if prob > 0:
            expected[token] = prob * next_probs(torch.tensor([5, 6, token]))

    class Remembering(Whole):
        def logits(self) -> Tensor:
            return torch.stack([next_logits(ids) for ids in self.ids])

    draws = Draws((0, "sample", "frequencies"), torch.tensor([11]))
    ids = generate(Remembering(model), prompt, prompt > 0, decoding, draws).ids
    assert END not in ids[:, 0]
    seen = torch.bincount(ids[:, 0] * VOCAB + ids[:, 1], minlength=VOCAB * VOCAB).view(VOCAB, VOCAB)
    assert (seen[expected == 0] == 0).all()
    expected = expected * count
    # Chi-squared over the pairs that occur often enough; mean = degrees of freedom, variance twice that.
    often = expected >= 5
    freedom = int(often.sum()) - 1
    distance = ((seen - expected) ** 2 / expected)[often].sum()
    assert distance < freedom + 4 * (2 * freedom) ** 0.5
    assert freedom > 8
