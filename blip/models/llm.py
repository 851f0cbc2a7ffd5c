"""Any language model of transformers, frozen, behind projected soft tokens (BLIP-2, section 3.3).

It knows nothing of images: what it is given are soft tokens, `prefix` (B, Q, H), and token ids. Nothing of it
is trained but additions of low rank (`lora`); gradients pass through its activations to the soft tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from blip.errors import ConfigError, DataError
from blip.layers.decoding import Decoding, Draws, Generated, candidate_scores, flush_left, generate
from blip.layers.half import HalfGradients
from blip.losses import at_least_float32, lm_loss
from blip.meta import on_meta
from blip.models.llm_build import (
    add_lora,
    grow_vocabulary,
    own_dtype,
    place,
    pretrained_model,
    random_model,
    read_config,
    read_tokenizer,
    suit_vocabulary,
)
from blip.models.llm_config import LLMConfig, LoraConfig
from blip.models.llm_ids import specials
from blip.models.llm_tokenizer import LlmTokenizer
from blip.models.llm_writer import CausalWriter, Seq2SeqWriter, Writer, logits_at
from blip.models.narrate import target_rows
from blip.models.vision import DTYPES

__all__ = ["CausalLM", "LLMConfig", "LanguageModel", "LlmTokenizer", "LoraConfig", "Seq2SeqLM", "build_llm"]

RANK_ROWS = 256
"""Candidates that are scored at once at most; each row has the keys and values of its prompt."""
LORA = ".lora_"
"""What the names of peft's additions have in common."""


class LanguageModel(nn.Module, ABC):
    """A frozen language model with its tokenizer; `build` makes one.

    One that is known by its name is a sketch without values until `load_initial`; if that is not called, it
    gets random ones when it is first used or moved. It computes in its own precision, outside autocast, and
    `to` moves it without changing that. Checkpoints may leave out all that begins with `model.`; what is
    trained has the names of `lora`.

    Args:
        hf_config: what to build, of transformers.
        config: switches.
        tokenizer: its tokenizer; None: read at first use.
        llm_model: folder or Hugging Face name of its weights; None: random ones are meant.
        data_root: where that may lie.
    """

    is_encoder_decoder: ClassVar[bool]

    def __init__(
        self,
        hf_config: Any,
        config: LLMConfig,
        tokenizer: LlmTokenizer | None = None,
        llm_model: str | None = None,
        data_root: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.config, self.llm_model = config, llm_model
        self.loaded_from: str | None = None
        """Where the weights came from; None: they are random, or not there yet."""
        self._hf_config, self._tokenizer, self._data_root = hf_config, tokenizer, data_root
        self._sketch = llm_model is not None
        self._settled = False
        self._wanted_mode = True
        self._before: Tensor | None = None
        # Before the model, so that parameters which it shares are known by these names.
        self.lora = nn.ParameterDict()
        """What is trained: parameters that the model has too, under names of their own."""
        self.register_state_dict_post_hook(_without_shared)
        self.register_load_state_dict_pre_hook(_as_saved)
        with on_meta() if self._sketch else nullcontext():
            model = self._random()
        self._take(model)

    @property
    def tokenizer(self) -> LlmTokenizer:
        """Its tokenizer.

        Raises:
            ConfigError: it cannot be read, or has more tokens than the model has rows.
        """
        if self._tokenizer is None:
            self._tokenizer = tokenizer = read_tokenizer(
                self.llm_model, self.config, self.is_encoder_decoder, self._data_root
            )
            rows = self.model.get_input_embeddings().weight.shape[0]
            if rows < tokenizer.vocab_size:
                raise ConfigError(
                    f"model.llm.sizes.vocab_size: {rows} rows are too few for the {tokenizer.vocab_size}"
                    " tokens of the tokenizer; set it to that or more, or leave it out"
                )
        return self._tokenizer

    # The model's values and where they lie

    def load_initial(self, data_root: str | Path | None = None) -> list[str]:
        """Load the weights of `llm_model`; returns one line of report, or none.

        Args:
            data_root: where a relative path that does not exist as given is looked for; None: as built.

        Raises:
            ConfigError: no such model.
            CheckpointError: no weights, or they do not fit.
        """
        return [self.load_weights(self.llm_model, data_root)] if self.llm_model else []

    def load_weights(self, source: str, data_root: str | Path | None = None) -> str:
        """Load weights from a folder, `.gguf` file or Hugging Face name; one line of report."""
        model, report = pretrained_model(source, self.config, data_root or self._data_root)
        self._sketch = self._settled = False
        self._take(model)
        self.loaded_from = source
        return report

    def _random(self) -> Any:
        return random_model(self._hf_config, DTYPES.get(self.config.precision, torch.float32))

    def _take(self, model: Any) -> None:
        """Make it the frozen model; what it will compute in is settled when it is used or moved."""
        if model.get_output_embeddings() is None:
            kind = self._hf_config.model_type
            raise ConfigError(f"model.llm_model: a {kind} has no output embeddings to write with")
        model.requires_grad_(False)
        rows = self._tokenizer.vocab_size if self._tokenizer else 0
        grow_vocabulary(model, max(rows, self._hf_config.vocab_size))
        before = {name: value.detach() for name, value in self.lora.items() if not value.is_meta}
        self.lora.clear()
        if self.config.lora.r:
            for name, parameter in add_lora(model, self.config.lora).items():
                self.lora[name.replace(".", "/")] = parameter
        with torch.no_grad():
            for name, value in before.items():
                self.lora[name].copy_(value)
        self.model = model
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]
        """H, width of the soft tokens."""
        self.train(self._wanted_mode)

    def _settle(self, device: torch.device | None = None) -> None:
        """Values that are still missing, on the device where the model is to lie, in its own type."""
        if self._sketch:
            if self.config.quantization != "none":
                raise ConfigError(
                    "model.llm.quantization: random weights are not quantised; load those of model.llm_model"
                )
            self._sketch = False
            self._take(self._random())
        if self.config.quantization == "none":
            device = torch.device(self.config.device or device or self.device)
            place(self.model, device, own_dtype(self.config, device))
        self._settled = True

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # All of `to`, `cuda`, `float` ... come here; only where to go is taken from them.
        device = fn(torch.empty(0, device=self.device if not self._sketch else "cpu")).device
        if self._sketch and device.type == "meta":  # it is there, and needs no values
            self._settled = True
        else:
            self._settle(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.get_input_embeddings().weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Dropout of the frozen model acts only if `config.dropout` says so, that of its additions always."""
        self._wanted_mode = mode
        super().train(mode and self.config.dropout)
        for name, part in self.model.named_modules():
            if f"{LORA}dropout." in f"{name}.":
                part.train(mode)
        return self

    def blocks(self) -> list[nn.Module]:
        """Its layers, for recomputation (`engine.recompute`); a sketch has none of them yet."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [part for part in self.model.modules() if isinstance(part, GradientCheckpointingLayer)]

    # Training

    def loss(
        self,
        prefix: Tensor,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        num_targets: int | None = None,
        loss_tokens: Tensor | float | None = None,
    ) -> Tensor:
        """Mean cross-entropy over target tokens, as transformers computes it; logits are made of those only.

        Args:
            prefix: (B, Q, H), soft tokens.
            ids: int64 (B, T), padded on the right, as `tokenizer.train` makes them.
            mask: bool (B, T), True = real token.
            labels: int64, -100 = no target: (B, T) of the same places; (B, L) with an encoder.
            num_targets: their number, where the host knows it; a GPU then makes no logits beside.
            loss_tokens: what the sum is divided by; None = number of targets here.

        Returns:
            scalar, float32, on the device of `prefix`.
        """
        with self._at_work():
            ids, mask, labels = (x.to(self.device) for x in (ids, mask, labels))
            wanted = labels.flatten()
            index = target_rows(wanted, num_targets)
            if index is None:
                index = torch.arange(len(wanted), device=wanted.device)
            # Additions get their gradients inside, where these are scaled.
            half = self.dtype == torch.float16 and not len(self.lora)
            keeper = HalfGradients() if half else None
            soft = keeper.enter(prefix) if keeper else prefix
            logits = self._logits(self._enter(soft), ids, mask, labels, index)
            logits = at_least_float32(logits)
            if keeper:
                logits = keeper.leave(logits)
            total = loss_tokens.to(self.device) if isinstance(loss_tokens, Tensor) else loss_tokens
            return lm_loss(logits, wanted[index], 0.0, total).to(prefix.device)

    @abstractmethod
    def _logits(self, prefix: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Logits (M, V) that predict labels `index` (M,), numbers through the batch."""

    # Inference

    @torch.no_grad()
    def generate(
        self, prefix: Tensor, ids: Tensor, mask: Tensor, decoding: Decoding, draws: Draws | None = None
    ) -> Generated:
        """Continue each prompt. No text depends on which others are in the batch, nor on padding.

        Args:
            prefix: (B, Q, H), soft tokens.
            ids: int64 (B, T), prompts padded on either side; T may be 0.
            mask: bool (B, T), True = real token.
            decoding: how tokens are chosen; lengths and penalties are of new tokens, whatever it says.
            draws: needed for sampling.

        Returns:
            new tokens and scores, on the device of `prefix`.
        """
        with self._at_work():
            ids, mask = flush_left(ids.to(self.device), mask.to(self.device))
            soft = self._enter(prefix)
            self._check_length(soft.shape[1] + ids.shape[1] + decoding.max_length - 1)
            writer, ids, mask = self._writer(soft, ids, mask)
            # As in transformers: a prompt behind soft tokens is no text, but what a decoder starts with is.
            decoding = replace(decoding, count_prompt=False, penalize_prompt=self.is_encoder_decoder)
            draws = draws and draws._replace(items=draws.items.to(self.device))
            found = generate(writer, ids, mask, decoding, draws)
        return Generated(found.ids.to(prefix.device), found.scores.to(prefix.device))

    @torch.no_grad()
    def log_likelihood(
        self,
        prefix: Tensor,
        ids: Tensor,
        mask: Tensor,
        cand_ids: Tensor,
        cand_mask: Tensor,
        segment: int | None = None,
    ) -> Tensor:
        """Summed log-probabilities of candidates behind each prompt, which is read once.

        Args:
            prefix: (B, Q, H), soft tokens.
            ids: int64 (B, T), prompts padded on either side.
            mask: bool (B, T), True = real token.
            cand_ids: int64 (N, L), or (B, N, L) where each item has its own; padded on the right.
            cand_mask: bool, of the same shape; a candidate without tokens gets minus infinity.
            segment: candidates of an item that are scored at once at most.

        Returns:
            float32 (B, N), on the device of `prefix`.
        """
        num_items, num_candidates = len(prefix), cand_ids.shape[-2]
        at_once = max(RANK_ROWS // max(num_items, 1), 1)
        at_once = min(segment or at_once, at_once)
        with self._at_work():
            ids, mask = flush_left(ids.to(self.device), mask.to(self.device))
            cand_ids, cand_mask = (
                (x if x.ndim == 3 else x[None]).to(self.device) for x in (cand_ids, cand_mask)
            )
            soft = self._enter(prefix)
            self._check_length(soft.shape[1] + ids.shape[1] + cand_ids.shape[2] - 1)
            writer, ids, mask = self._writer(soft, ids, mask)
            first = at_least_float32(writer.start(ids, mask)).log_softmax(dim=1)
            scores = first.new_full((num_items, num_candidates), -torch.inf)
            # Candidates of about the same length go together: the longest one's padding would cost the most.
            lengths, order = cand_mask.sum(dim=2).amax(dim=0).sort(stable=True)
            kept = order[lengths > 0]
            for start in range(0, len(kept), at_once):
                some = kept[start : start + at_once]
                width = int(cand_mask[:, some].sum(dim=2).max())
                shape = (num_items, len(some), width)
                part_ids, part_mask = (x[:, some, :width].expand(shape) for x in (cand_ids, cand_mask))
                found = first.gather(1, part_ids[:, :, 0])
                if width > 1:
                    found = found + _rest(writer, part_ids, part_mask)
                scores[:, some] = found.masked_fill(~part_mask[:, :, 0], -torch.inf)
        return scores.float().to(prefix.device)

    @abstractmethod
    def _writer(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> tuple[Writer, Tensor, Tensor]:
        """What reads prompts (B, T), and ids and mask of what it starts with."""

    def _enter(self, prefix: Tensor) -> Tensor:
        """Soft tokens as the model reads them: (B, Q, H) in its type, behind the words of `config.before`."""
        prefix = prefix.to(self.device, self.dtype)
        if not self.config.before:
            return prefix
        if self._before is None or self._before.device != self.device:  # else each step would wait
            ids = self.tokenizer.raw([self.config.before])[0]
            self._before = torch.tensor(ids, dtype=torch.int64, device=self.device)
        words = self.model.get_input_embeddings()(self._before)
        return torch.cat([words.expand(len(prefix), -1, -1), prefix], dim=1)

    def _check_length(self, length: int) -> None:
        """Raise DataError where a text may outgrow the model's positions."""

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """With values, in its own precision."""
        if not self._settled:
            self._settle()
        with torch.autocast(self.device.type, enabled=False):
            yield


class CausalLM(LanguageModel):
    """A decoder: reads soft tokens, prompt and text as one sequence (OPT, Llama, Vicuna, Qwen, ...)."""

    is_encoder_decoder = False

    def _logits(self, prefix: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        # The last token predicts nothing. What is padded stands behind all that looks, so no mask is needed,
        # and attention may take its fastest way.
        self._check_length(prefix.shape[1] + ids.shape[1] - 1)
        embed = self.model.get_input_embeddings()
        inputs = torch.cat([prefix, embed(ids[:, :-1])], dim=1)
        length = inputs.shape[1]
        rows = index // ids.shape[1] * length + prefix.shape[1] - 1 + index % ids.shape[1]
        with logits_at(self.model, rows):
            return self.model(inputs_embeds=inputs, use_cache=False).logits[0]

    def _writer(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> tuple[Writer, Tensor, Tensor]:
        return CausalWriter(self.model, self.config.use_cache, prefix), ids, mask

    def _check_length(self, length: int) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise DataError(
                f"model.llm: soft tokens, prompt and text may have {length} tokens together, and this"
                f" {self.model.config.model_type} has {most} positions; shorten the longest text"
            )


class Seq2SeqLM(LanguageModel):
    """An encoder that reads soft tokens and prompt, and a decoder that writes (T5, ...)."""

    is_encoder_decoder = True

    @property
    def start_id(self) -> int:
        """What the decoder starts with."""
        for config in (self.model.config, self.model.generation_config):
            found = getattr(config, "decoder_start_token_id", None)
            if found is not None:
                return int(found)
        return specials(self).pad_id

    def _logits(self, prefix: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        inputs, mask = self._inputs(prefix, ids, mask)
        start = labels.new_full((len(labels), 1), self.start_id)
        before = torch.cat([start, labels[:, :-1]], dim=1)
        with logits_at(self.model, index):
            return self.model(
                inputs_embeds=inputs,
                attention_mask=mask.long(),
                decoder_input_ids=before.masked_fill(before == -100, specials(self).pad_id),
                use_cache=False,
            ).logits[0]

    def _writer(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> tuple[Writer, Tensor, Tensor]:
        inputs, mask = self._inputs(prefix, ids, mask)
        encoder = self.model.get_encoder()
        states = encoder(inputs_embeds=inputs, attention_mask=mask.long()).last_hidden_state
        start = ids.new_full((len(ids), 1), self.start_id)
        writer = Seq2SeqWriter(self.model, self.config.use_cache, states, mask)
        return writer, start, torch.ones_like(start, dtype=torch.bool)

    def _inputs(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder reads, (B, Q + T, H), and its mask."""
        inputs = torch.cat([prefix, self.model.get_input_embeddings()(ids)], dim=1)
        return inputs, torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)


def build_llm(llm_model: str | None, config: LLMConfig, data_root: str | Path | None = None) -> LanguageModel:
    """A causal or encoder-decoder language model.

    Reads no weights: `load_initial` does. Configuration and tokenizer are read only as far as
    `config.sizes` leaves things open.

    Args:
        llm_model: folder (as given, else below the data root), `.gguf` file or Hugging Face name of weights,
            configuration and tokenizer; None: what `config` says, with random weights.
        config: switches.
        data_root: None: the environment variable BLIP_DATA, else `data`.

    Raises:
        ConfigError: there is no such model or tokenizer, or it cannot be built.
    """
    hf_config = read_config(llm_model, config, data_root)
    tokenizer = None
    if "vocab_size" not in config.sizes or (llm_model is None and config.tokenizer):
        tokenizer = read_tokenizer(llm_model, config, hf_config.is_encoder_decoder, data_root)
        if llm_model is None:
            suit_vocabulary(hf_config, tokenizer, config.sizes)
    cls = Seq2SeqLM if hf_config.is_encoder_decoder else CausalLM
    return cls(hf_config, config, tokenizer, llm_model, data_root)


def _rest(writer: Writer, ids: Tensor, mask: Tensor) -> Tensor:
    """Summed log-probabilities (B, N) of all tokens but the first of candidates (B, N, L)."""
    num_items, count, _ = ids.shape
    rows = torch.arange(num_items, device=ids.device).repeat_interleave(count)
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
    labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    wanted = (labels != -100).flatten().nonzero()[:, 0]
    logits = writer.fork(rows).extend(ids[:, :-1], wanted)
    return candidate_scores(logits, labels, 0.0).view(num_items, count)


def _without_shared(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the additions of `lora` out of the frozen model's part of a state dict."""
    for name in [n for n in state if n.startswith(f"{prefix}model.") and LORA in n]:
        del state[name]


def _as_saved(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Read a state dict that `_without_shared` has made: additions go to the frozen model's part too."""
    for name in module.lora:
        saved = f"{prefix}lora.{name}"
        if saved in state:
            state.setdefault(f"{prefix}model.{name.replace('/', '.')}", state[saved])
