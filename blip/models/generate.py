"""How BLIP's decoder writes texts: MED behind the step function of `layers/decoding.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.layers.attention import ImageKeys
from blip.layers.cache import TokenCache, keep_image_keys
from blip.layers.decoding import Decoding, Draws, Generated, generate
from blip.layers.masks import causal_mask
from blip.layers.text import LMHead
from blip.models.med import Med

NUCLEUS_REPETITION_PENALTY = 1.1
"""What BLIP uses with nucleus sampling."""


class MedWriter:
    """MED's decoder, token by token. What is looked at exists once per item, whatever the number of beams.

    Args:
        text: decoder.
        lm_head: states -> logits.
        keys: of what the items look at; used up.
    """

    def __init__(self, text: Med, lm_head: LMHead, keys: ImageKeys) -> None:
        self.text, self.lm_head, self.keys = text, lm_head, keys

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read the prompts (B, T), padded on the right. -> logits (B, V)."""
        output = self.text(prompt_ids, causal_mask(prompt_mask), [(self.keys, 1)], "decode")
        self.cache = TokenCache(output.cache, prompt_mask)
        self.position = prompt_mask.sum(dim=1)  # (B,), of the next token
        self.copies = 1
        rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        return self._logits(output.states[rows, self.position - 1])

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        """Continue other rows; `items` as of `StepDecoder.reorder`."""
        self.cache.reorder(rows, items)
        if items is not None:
            self.keys = keep_image_keys(self.keys, items)
            self.position = self.position[items]
        self.copies = len(rows) // len(self.position)

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token int64 (R,) to every row. -> logits (R, V)."""
        position = self.position.repeat(self.copies)
        states = self.text.step(tokens, position, self.cache, [(self.keys, self.copies)])
        self.position = self.position + 1
        return self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        return self.lm_head(states, self.text.embedding_of("decode").word.weight)


def decoding(word_pieces: Any, use_nucleus_sampling: bool, **how: Any) -> Decoding:
    """LAVIS's arguments of `generate` as rules of decoding.

    Args:
        word_pieces: tokenizer; [SEP] ends a text.
        use_nucleus_sampling: draw with `top_p`, `top_k` and `temperature`, instead of following beams.
        **how: fields of `Decoding`; a `repetition_penalty` of None is 1 with beams, and 1.1 with nucleus
            sampling, as BLIP has it.
    """
    if how.get("repetition_penalty") is None:
        how["repetition_penalty"] = NUCLEUS_REPETITION_PENALTY if use_nucleus_sampling else 1.0
    if use_nucleus_sampling:
        how["num_beams"] = 1
    else:
        how = {key: value for key, value in how.items() if key not in ("top_p", "top_k", "temperature")}
    ends = {"end_id": word_pieces.sep_id, "pad_id": word_pieces.pad_id}
    return Decoding(**ends, sample=use_nucleus_sampling, **how)


def draws_of(samples: dict[str, Any], num_items: int, seed: int | None, device: torch.device) -> Draws:
    """The random numbers of sampling.

    Args:
        samples: optional `index` int64 (B,), numbers of the items; else their places in the batch.
        num_items: B.
        seed: the same seed gives the same texts; None takes one of torch's global generator.
        device: of the ids.
    """
    index = samples.get("index")
    items = torch.arange(num_items) if index is None else torch.as_tensor(index)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    return Draws((seed, "sample", str(samples.get("source", ""))), items.to(device))


def write(
    text: Med,
    lm_head: LMHead,
    keys: ImageKeys,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rules: Decoding,
    draws: Draws | None,
) -> Generated:
    """Continue prompts (B, T), whose first ids are replaced by [DEC]."""
    first = torch.full_like(prompt_ids[:, :1], text.dec_id)
    prompt_ids = torch.cat([first, prompt_ids[:, 1:]], dim=1)
    return generate(MedWriter(text, lm_head, keys), prompt_ids, prompt_mask, rules, draws)
