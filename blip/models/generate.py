"""How the BERT-like models write texts: MED and the Q-Former behind the steps of `layers/decoding.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip.errors import UsageError
from blip.layers.attention import ImageKeys, KeyValue
from blip.layers.cache import TokenCache, keep_image_keys
from blip.layers.decoding import Decoding, Draws, Generated, generate
from blip.layers.masks import causal_mask
from blip.layers.text import LMHead
from blip.models.med import Med
from blip.models.qformer import QFormer
from blip.models.tokenizer import Ends


class TextWriter(ABC):
    """A text transformer and its head, token by token.

    Args:
        lm_head: states -> logits.
        words: (V, D), the word embeddings.
        dec_id: id of [DEC], with which texts begin.
        num_positions: tokens that a text may have.
    """

    cache: TokenCache
    position: Tensor
    """int64 (B,), place of each item's next token in its text."""
    copies: int

    def __init__(self, lm_head: LMHead, words: Tensor, dec_id: int, num_positions: int) -> None:
        self.lm_head, self.words, self.dec_id = lm_head, words, dec_id
        self.num_positions = num_positions

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read the prompts (B, T), padded on the right. -> logits (B, V)."""
        states, self.cache = self.read(prompt_ids, prompt_mask)
        self.position = prompt_mask.sum(dim=1)
        self.copies = 1
        rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        return self.lm_head(states[rows, self.position - 1], self.words)

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        """Continue other rows; `items` as of `StepDecoder.reorder`."""
        self.cache.reorder(rows, items)
        if items is not None:
            self.position = self.position[items]
        self.copies = len(rows) // len(self.position)

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token int64 (R,) to every row. -> logits (R, V)."""
        states = self.add(tokens, self.position.repeat(self.copies))
        self.position = self.position + 1
        return self.lm_head(states, self.words)

    @abstractmethod
    def read(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, TokenCache]:
        """States (B, T, D) of the prompts, and what later tokens look at."""

    @abstractmethod
    def add(self, tokens: Tensor, position: Tensor) -> Tensor:
        """States (R, D) of one more token per row, (R,), at those places (R,)."""


class MedWriter(TextWriter):
    """MED's decoder. What is looked at exists once per item, whatever the number of beams.

    Args:
        text: decoder.
        lm_head: states -> logits.
        keys: of what the items look at; used up.
    """

    def __init__(self, text: Med, lm_head: LMHead, keys: ImageKeys) -> None:
        own = text.embedding_of("decode")
        super().__init__(lm_head, own.word.weight, text.dec_id, own.position.num_embeddings)
        self.text, self.keys = text, keys

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, TokenCache]:
        """Prompts that look at what is to be described."""
        output = self.text(prompt_ids, causal_mask(prompt_mask), [(self.keys, 1)], "decode")
        return output.states, TokenCache(output.cache, prompt_mask)

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        """Continue other rows; `items` as of `StepDecoder.reorder`."""
        super().reorder(rows, items)
        if items is not None:
            self.keys = keep_image_keys(self.keys, items)

    def add(self, tokens: Tensor, position: Tensor) -> Tensor:
        """States of one more token per row."""
        return self.text.step(tokens, position, self.cache, [(self.keys, self.copies)])


class QFormerWriter(TextWriter):
    """The Q-Former as a captioner: text behind the queries, which have looked at the picture (BLIP-2, ITG).

    Args:
        qformer: with text.
        lm_head: states -> logits.
        dec_id: id of [DEC].
        queries: self-attention keys and values of the queries, per layer.
    """

    def __init__(self, qformer: QFormer, lm_head: LMHead, dec_id: int, queries: list[KeyValue]) -> None:
        own = qformer.embedding
        super().__init__(lm_head, own.word.weight, dec_id, own.position.num_embeddings)
        self.qformer, self.queries = qformer, queries

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, TokenCache]:
        """Prompts behind the queries."""
        num_query = self.qformer.num_query
        attention = causal_mask(prompt_mask, num_query)
        output = self.qformer(self.qformer.embedding(prompt_ids), attention, past=self.queries)
        both = [own.behind(past) for own, past in zip(output.cache, self.queries, strict=True)]
        seen = torch.cat([prompt_mask.new_ones(len(prompt_mask), num_query), prompt_mask], dim=1)
        return output.text, TokenCache(both, seen)

    def add(self, tokens: Tensor, position: Tensor) -> Tensor:
        """States of one more token per row."""
        return self.qformer.step(tokens, position, self.cache)


def decoding(ends: Ends, use_nucleus_sampling: bool, **how: Any) -> Decoding:
    """LAVIS's arguments of `generate` as rules of decoding.

    Args:
        ends: ids behind a text.
        use_nucleus_sampling: draw with `top_p`, `top_k` and `temperature`, instead of following beams.
        **how: fields of `Decoding`.
    """
    if use_nucleus_sampling:
        how["num_beams"] = 1
    else:
        how = {key: value for key, value in how.items() if key not in ("top_p", "top_k", "temperature")}
    return Decoding(*ends, sample=use_nucleus_sampling, **how)


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
    writer: TextWriter,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rules: Decoding,
    draws: Draws | None,
) -> Generated:
    """Continue prompts (B, T), whose first ids are replaced by [DEC].

    Raises:
        UsageError: a text could become longer than the positions that there are.
    """
    if rules.max_length > writer.num_positions:
        raise UsageError(
            f"max_length: {rules.max_length}, where texts have at most {writer.num_positions} positions"
        )
    first = torch.full_like(prompt_ids[:, :1], writer.dec_id)
    prompt_ids = torch.cat([first, prompt_ids[:, 1:]], dim=1)
    return generate(writer, prompt_ids, prompt_mask, rules, draws)


class Captioning(ABC):
    """A model that writes captions from [DEC] and a prompt on."""

    config: Any
    device: torch.device
    word_pieces: Any
    text_ends: Ends
    sampling_penalty: ClassVar[float] = 1.0
    """Repetition penalty of nucleus sampling."""

    @abstractmethod
    def caption_writer(self, samples: dict[str, Any]) -> tuple[TextWriter, int]:
        """What writes about the pictures, and their number B."""

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        num_captions: int = 1,
        length_penalty: float = 1.0,
        top_k: int = 50,
        temperature: float = 1.0,
        seed: int | None = None,
        return_ids: bool = False,
    ) -> list[str] | Tensor:
        """Captions, without their prompts.

        Args:
            samples: `image` (B, 3, H, W) or `image_embeds`; optional `prompt`, a text or one per picture, in
                place of the model's own, if it has one, or `prompt_ids` int64 (B, T), its ids, of which [DEC]
                replaces the first, and `prompt_mask`, padded on the right; optional `index` (B,), which keys
                the random numbers.
            use_nucleus_sampling: draw tokens, with `top_p`, `top_k` and `temperature`; else follow beams.
            num_beams: captions that are followed at once.
            max_length, min_length: in tokens, those of the prompt and [DEC] included.
            top_p: draw among the fewest tokens that have this probability together.
            repetition_penalty: above 1, tokens that are there become less likely; None: 1, and
                `sampling_penalty` with nucleus sampling.
            num_captions: per picture.
            length_penalty: scores of beams are divided by their length (`Decoding.beam_lengths`) to this
                power.
            top_k: draw among so many tokens.
            temperature: logits are divided by it before drawing.
            seed: of the random numbers; None takes one of torch's global generator.
            return_ids: give new ids int64 (B * num_captions, L), padded behind the end, in place of texts.

        Returns:
            B * num_captions texts, a picture's together, the best first.
        """
        if repetition_penalty is None:
            repetition_penalty = self.sampling_penalty if use_nucleus_sampling else 1.0
        rules = decoding(
            self.text_ends,
            use_nucleus_sampling,
            num_beams=num_beams,
            num_captions=num_captions,
            max_length=max_length,
            min_length=min_length,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            beam_lengths=getattr(self.config, "beam_lengths", "whole"),
        )
        writer, rows = self.caption_writer(samples)
        draws = draws_of(samples, rows, seed, self.device) if use_nucleus_sampling else None
        prompt_ids, prompt_mask = self._prompts(samples, rows)
        written = write(writer, prompt_ids, prompt_mask, rules, draws)
        return written.ids if return_ids else self.word_pieces.decode(written.ids)

    def _prompts(self, samples: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of prompts without their [SEP]."""
        if "prompt_ids" in samples:
            ids = samples["prompt_ids"].expand(rows, -1)
            mask = samples.get("prompt_mask", torch.ones_like(ids, dtype=torch.bool))
            return ids, mask.bool().expand(rows, -1)
        prompt = samples.get("prompt", getattr(self.config, "prompt", ""))
        if not prompt.strip() if isinstance(prompt, str) else False:  # [DEC] alone
            start = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
            return start, torch.ones_like(start, dtype=torch.bool)
        prompts = [prompt] * rows if isinstance(prompt, str) else list(prompt)
        if len(prompts) != rows:
            raise UsageError(f"prompt: {len(prompts)} prompts for {rows} pictures; give one, or one each")
        tokens = self.word_pieces(prompts)
        ids, mask = tokens["text_ids"].to(self.device), tokens["text_mask"].to(self.device)
        # The last real token of each row is [SEP]; without it rows are one token shorter.
        return ids[:, :-1], mask[:, 1:]
