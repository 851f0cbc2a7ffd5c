"""Token ids in the place of texts, for models with a language model.

With them outputs can be compared without a tokenizer. A batch or samples may have

    llm_ids, llm_mask          what the language model reads, (B, T), padded on either side: the whole text of
                               training, or the prompt of inference. Where the Q-Former reads no text,
                               `text_ids` and `text_mask` are another name for it
    prompt_ids                 what texts of training begin with and is not learned, (1, P), where nothing
                               continues them; else the tokens of `model.prompt`
    output_ids, output_mask    what continues it in training, (B, L), with its end
    llm_labels                 instead, what is learned, as `LlmTokenizer.train` makes it
    text_ids, text_mask        what the Q-Former reads, if it reads

A mask may be left out where nothing is padded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip.errors import ConfigError, UsageError
from blip.layers.decoding import flush_left
from blip.models.tokenizer import id_rows

log = logging.getLogger(__name__)


class Specials(NamedTuple):
    """Ids with a meaning of their own."""

    lead: list[int]
    """What a text begins with; may be empty."""
    end_id: int
    pad_id: int


def specials(llm: Any) -> Specials:
    """Those of the tokenizer, or, where none can be read, of the language model's configuration.

    Args:
        llm: `LanguageModel`.

    Raises:
        ConfigError: neither says what ends a text.
    """
    try:
        return Specials(llm.tokenizer.lead, llm.tokenizer.end_id, llm.tokenizer.pad_id)
    except ConfigError as error:
        config = llm.model.config
        begin, end, pad = (_first(getattr(config, f"{key}_token_id", None)) for key in ("bos", "eos", "pad"))
        if end is None:
            raise ConfigError(
                "model.llm.sizes.eos_token_id: nothing says what ends a text; give it, or a tokenizer"
            ) from error
        if llm.config.end is not None:
            log.warning("no tokenizer says what %r is: texts end with eos_token_id, %d", llm.config.end, end)
        begin = {"end": end, "none": None}.get(llm.config.bos, begin)
        lead = [] if begin is None or llm.is_encoder_decoder else [begin]
        return Specials(lead, end, end if pad is None else pad)


def _first(found: Any) -> int | None:
    return int(found[0]) if isinstance(found, list | tuple) and found else found


def prompts(samples: Mapping[str, Any], reads: bool) -> tuple[Tensor, Tensor] | None:
    """Ids int64 and mask bool (B, T) that samples give in the place of prompts; None: they give none.

    Args:
        samples: of `generate` or `predict_answers`.
        reads: whether the Q-Former reads text.

    Raises:
        UsageError: the Q-Former's ids are missing, or the language model's.
    """
    return _pair(samples, _key(samples, reads))


def learned(batch: Mapping[str, Any], llm: Any, prompt: str, reads: bool) -> dict[str, Tensor] | None:
    """`llm_ids`, `llm_mask`, `llm_labels` of a batch whose texts are ids; None: they are texts.

    Args:
        batch: of training.
        llm: `LanguageModel`.
        prompt: what texts begin with, and is not learned, where they are continued by nothing.
        reads: whether the Q-Former reads text.

    Raises:
        UsageError: as of `prompts`; or an encoder is given nothing that its decoder is to write.
    """
    found = _pair(batch, _key(batch, reads))
    if found is None:
        return None
    if "llm_labels" in batch:
        return {"llm_ids": found[0], "llm_mask": found[1], "llm_labels": batch["llm_labels"]}
    ids, mask = flush_left(*found)
    output = _pair(batch, "output")
    if llm.is_encoder_decoder:
        if output is None:
            raise UsageError("output_ids: an encoder-decoder needs the ids that it is to write, and a mask")
        return {"llm_ids": ids, "llm_mask": mask, "llm_labels": output[0].masked_fill(~output[1], -100)}
    if output is not None:
        return _joined((ids, mask), output, specials(llm))
    known = 0
    if "prompt_ids" in batch:
        known = batch["prompt_ids"].shape[-1]
    elif prompt.strip():
        known = len(llm.tokenizer.lead + llm.tokenizer.raw([prompt])[0])
    column = torch.arange(ids.shape[1], device=ids.device)[None]
    labels = ids.masked_fill(~mask | (column < known), -100)
    return {"llm_ids": ids, "llm_mask": mask, "llm_labels": labels}


def _key(batch: Mapping[str, Any], reads: bool) -> str:
    if not reads:
        return "llm" if "llm_ids" in batch else "text"
    for one, other, whose in (("llm", "text", "the Q-Former"), ("text", "llm", "the language model")):
        if f"{one}_ids" in batch and f"{other}_ids" not in batch:
            raise UsageError(f"{other}_ids: {one}_ids are given, so {whose} needs its ids, too")
    return "llm"


def _pair(batch: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor] | None:
    ids = batch.get(f"{key}_ids")
    if ids is None:
        return None
    mask = batch.get(f"{key}_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _joined(
    given: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor], known: Specials
) -> dict[str, Tensor]:
    """One text of two, with all padding behind; what the second begins with by itself is dropped (LAVIS)."""
    device, rows, unlearned = given[0].device, [], []
    for parts in zip(*given, *output, strict=True):
        first, second = (parts[i][parts[i + 1]].tolist() for i in (0, 2))
        lead = len(known.lead)
        rows.append(first + (second[lead:] if lead and second[:lead] == known.lead else second))
        unlearned.append(len(first))
    ids, mask = id_rows(rows, known.pad_id)
    column = torch.arange(ids.shape[1])[None]
    labels = ids.masked_fill(~mask | (column < torch.tensor(unlearned)[:, None]), -100)
    found = {"llm_ids": ids, "llm_mask": mask, "llm_labels": labels}
    return {key: value.to(device) for key, value in found.items()}
