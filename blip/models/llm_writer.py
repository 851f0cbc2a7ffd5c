"""Language models of transformers behind the step function of `layers/decoding.py`.

Rows are laid out [padding | soft tokens | text]: all padding stands on the left and is masked, so that the
last column is every row's newest token and no text depends on which others are in the batch.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from blip.errors import ConfigError


@contextmanager
def logits_at(model: Any, rows: Tensor) -> Iterator[None]:
    """Within, the model computes logits at some positions only, whatever it does with them afterwards.

    Args:
        model: of transformers, with output embeddings.
        rows: int64 (M,), numbers of the positions, counted through the batch (B, S); `logits` is (1, M, V).
    """

    def select(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (hidden.flatten(0, -2).index_select(0, rows)[None], *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class Writer(ABC):
    """Reads a prompt behind soft tokens, and what is written, token by token; keeps the past.

    Args:
        model: of transformers.
        use_cache: keep keys and values; without them everything is read again with each token.
    """

    def __init__(self, model: Any, use_cache: bool) -> None:
        self.model = model
        self.use_cache = use_cache
        self.embed = model.get_input_embeddings()
        self.cache: Any = None
        self.past: Tensor | None = None
        """(R, S) or (R, S, H), all that was read; without a cache only."""
        self.rows = 0
        """R, texts that are written."""

    @abstractmethod
    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read the prompts (B, T), padded on the right. -> logits (B, V) of what follows."""

    @abstractmethod
    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Add tokens int64 (R, W) to the rows. -> logits (M, V) at `rows` (M,), numbers of the R * W."""

    @abstractmethod
    def _continue(self, rows: Tensor, items: Tensor | None) -> None:
        """Put the past of `rows` (R',) in the places of the present ones."""

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token int64 (R,) to every row. -> logits (R, V) of what follows."""
        return self.extend(tokens[:, None], torch.arange(len(tokens), device=tokens.device))

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        """Continue other rows (`StepDecoder.reorder`)."""
        # Greedy beams mostly stay where they are; on a CPU it costs nothing to look.
        if rows.device.type == "cpu" and rows.tolist() == list(range(self.rows)):
            return
        self._continue(rows, items)
        self.rows = len(rows)

    def fork(self, rows: Tensor) -> Self:
        """Another writer that continues `rows` (R',), while this one stays as it is."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        other._continue(rows, rows)
        other.rows = len(rows)
        return other

    def _with_past(self, new: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given for `new` (R, W) or (R, W, H), and where `rows` of it are there."""
        if self.use_cache:
            return new, rows
        self.past = new if self.past is None else torch.cat([self.past, new], dim=1)
        length, width = self.past.shape[1], new.shape[1]
        return self.past, rows // width * length + length - width + rows % width

    def _select(self, rows: Tensor) -> None:
        """Put the past of `rows` in the places of the present ones."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        elif self.past is not None:
            self.past = self.past[rows]

    def _run(self, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The model's logits (M, V) at `rows` (M,) of the positions that it is given."""
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        with logits_at(self.model, rows):
            output = self.model(**arguments, use_cache=self.use_cache)
        if self.use_cache:
            self.cache = getattr(output, "past_key_values", None)
            if not hasattr(self.cache, "reorder_cache"):
                kind = self.model.config.model_type
                raise ConfigError(
                    f"model.llm.use_cache: {kind} keeps no keys and values that could follow other beams; set"
                    " it to false"
                )
        return output.logits[0]


class CausalWriter(Writer):
    """A decoder that reads soft tokens, prompt and text as one sequence.

    Args:
        model, use_cache: as of `Writer`.
        prefix: (B, Q, H), soft tokens in the model's type.
    """

    def __init__(self, model: Any, use_cache: bool, prefix: Tensor) -> None:
        super().__init__(model, use_cache)
        self.prefix = prefix
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read soft tokens and prompts. -> logits (B, V)."""
        inputs = torch.cat([self.prefix, self.embed(prompt_ids)], dim=1)
        mask = torch.cat([prompt_mask.new_ones(self.prefix.shape[:2]), prompt_mask], dim=1)
        self.rows, length = mask.shape
        inputs, self.mask = flush_right(inputs, mask)
        self.padded = not bool(self.mask.all())
        last = torch.arange(self.rows, device=mask.device) * length + length - 1
        return self._read(inputs, last)

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Add tokens; padding among them must stand on the right, where nothing looks at it."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        return self._read(self.embed(tokens), rows)

    def _read(self, inputs: Tensor, rows: Tensor) -> Tensor:
        inputs, rows = self._with_past(inputs, rows)
        arguments: dict[str, Any] = {"inputs_embeds": inputs}
        if self.padded:
            # Where nothing is padded, no mask lets attention take its fastest way, and positions are counted.
            arguments["attention_mask"] = self.mask.long()
            if self.takes_positions:
                positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
                arguments["position_ids"] = positions[:, -inputs.shape[1] :]
        return self._run(rows, arguments)

    def _continue(self, rows: Tensor, items: Tensor | None) -> None:
        self.mask = self.mask[rows]
        self._select(rows)


class Seq2SeqWriter(Writer):
    """A decoder that looks at what an encoder has made of soft tokens and prompt.

    Args:
        model, use_cache: as of `Writer`.
        states: (B, S, H), of the encoder.
        mask: bool (B, S), True = real.
    """

    def __init__(self, model: Any, use_cache: bool, states: Tensor, mask: Tensor) -> None:
        super().__init__(model, use_cache)
        self.states = states
        self.mask = None if bool(mask.all()) else mask.long()

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read what the decoder starts with, (B, 1). -> logits (B, V)."""
        self.rows = len(prompt_ids)
        return self.extend(prompt_ids, torch.arange(self.rows, device=prompt_ids.device))

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Add tokens; padding among them must stand on the right, where nothing looks at it."""
        from transformers.modeling_outputs import BaseModelOutput

        tokens, rows = self._with_past(tokens, rows)
        arguments = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=self.states),
            "attention_mask": self.mask,
            "decoder_input_ids": tokens,
        }
        return self._run(rows, arguments)

    def _continue(self, rows: Tensor, items: Tensor | None) -> None:
        # Row r is of item r % B before and after, and all rows of an item look at the same states.
        moved = items is not None or len(rows) != self.rows
        if moved:
            self.states = self.states[rows]
            self.mask = None if self.mask is None else self.mask[rows]
        if moved or not hasattr(self.cache, "self_attention_cache"):
            self._select(rows)
        else:
            self.cache.self_attention_cache.reorder_cache(rows)


def flush_right(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of values (B, S, H), padded on the right by `mask` bool (B, S), with the padding on the left."""
    length = mask.shape[1]
    column = torch.arange(length, device=mask.device)[None]
    shift = length - mask.sum(dim=1, keepdim=True)  # (B, 1)
    index = (column - shift) % max(length, 1)
    return values.take_along_dim(index[:, :, None], dim=1), column >= shift
