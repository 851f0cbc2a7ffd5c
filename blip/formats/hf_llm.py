"""Configurations of transformers' BLIP-2 and InstructBLIP with a language model, as ours and back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.errors import ConfigError, UsageError
from blip.formats.hf_blip import BERT, VIT, check_fixed, check_stem

log = logging.getLogger(__name__)

FIXED = {
    "vision_config.hidden_act": "gelu",
    "vision_config.qkv_bias": True,
    "qformer_config.hidden_act": "gelu",
}
"""What BLIP-2's tower and Q-Former have no key for."""
_OPT_NEWLINE = 50118
"""What ends a text of OPT in BLIP-2, in transformers by its number."""
_ROWS_AT_A_TIME = 64
"""transformers' own conversion of InstructBLIP adds rows of words by that many."""
_NOT_SIZES = (
    *("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"),
    *("id2label", "label2id", "quantization_config"),
)
_SIZES = ("tie_word_embeddings", "decoder_start_token_id", "dense_act_fn")
"""Keys that configurations take without listing them."""
_ALWAYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
"""Sizes that are said even where they are the default, so that no tokenizer is asked for them."""
_WORDS = ("embed_tokens.weight", "shared.weight", "wte.weight", "word_embeddings.weight")
"""What word embeddings are called."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
QFORMER_TOKENIZER = "qformer_tokenizer"
"""Folder in which InstructBLIP's processor keeps the Q-Former's tokenizer."""

BEFORE = "text_before_soft_tokens"
"""Key of their configuration that keeps our `llm.before`, of which their model knows nothing."""

_LN_VISION = "ln_vision_eps"
"""Key of their vision configuration that only we read: they have no epsilon of its own for `ln_vision`."""
IMAGE_TOKEN = "image_token"
"""Beside the values of a configuration: id that stands for a soft token in their texts."""


def generation_values(config: Any) -> dict[str, Any]:
    """Values of BLIP-2's stage 2."""
    check_fixed(config, {**FIXED, "qformer_config.use_qformer_text_input": False}, "BLIP-2")
    arch = {"opt": "blip2_opt", "t5": "blip2_t5"}.get(config.text_config.model_type, "blip2_llm")
    return {"arch": arch, **_values(config), "qformer_text_input": False, "max_txt_len": 32}


def instruct_values(config: Any) -> dict[str, Any]:
    """Values of InstructBLIP."""
    check_fixed(config, FIXED, "InstructBLIP")
    qformer = config.qformer_config
    archs = {"llama": "blip2_vicuna_instruct", "t5": "blip2_t5_instruct"}
    return {
        "arch": archs.get(config.text_config.model_type, "blip2_llm_instruct"),
        **_values(config),
        "qformer_text_input": True,
        "vocab_size": qformer.vocab_size,
        "max_txt_len": min(128, qformer.max_position_embeddings),
    }


def values_of_parts(config: Any) -> dict[str, Any]:
    """Values of BLIP-2's tower and Q-Former."""
    vision, qformer = config.vision_config, config.qformer_config
    return {
        "vit_model": "eva_clip_g",
        "image_size": vision.image_size,
        "vit": {ours: getattr(vision, theirs) for ours, theirs in VIT.items()},
        "ln_vision_eps": getattr(vision, _LN_VISION, vision.layer_norm_eps),
        "num_query_token": config.num_query_tokens,
        "cross_attention_freq": qformer.cross_attention_frequency,
        "qformer": {ours: getattr(qformer, theirs) for ours, theirs in BERT.items()},
        "dropout": qformer.hidden_dropout_prob,
    }


def _values(config: Any) -> dict[str, Any]:
    text = config.text_config
    newline = text.model_type == "opt" and text.eos_token_id == _OPT_NEWLINE
    return {
        **values_of_parts(config),
        "vit_init_from": None,  # the tower and the language model are among the weights
        "prompt": "",
        "beam_lengths": "new",
        "llm_model": None,
        IMAGE_TOKEN: getattr(config, "image_token_index", None),
        "llm": {
            "sizes": sizes_of_config(text),
            "half": "bf16" if text.model_type == "t5" else "fp16",
            "end": "\n" if newline else None,
            "before": getattr(config, BEFORE, ""),
        },
    }


def sizes_of_config(text: Any) -> dict[str, Any]:
    """A transformers configuration as `model.llm.sizes`: all that its kind of language model is built by."""
    plain, changed = type(text)(), text.to_diff_dict()
    sizes = {k: v for k, v in changed.items() if k not in _NOT_SIZES and (hasattr(plain, k) or k in _SIZES)}
    said = {key: getattr(text, key, None) for key in _ALWAYS if hasattr(plain, key)}
    return {**{k: v for k, v in said.items() if v is not None}, **sizes, "model_type": text.model_type}


def tokenizers(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values with the tokenizers that a folder holds beside the weights."""
    own = folder / QFORMER_TOKENIZER
    found = dict(values)
    if _has_tokenizer(folder):
        found["llm"] = {**values["llm"], "tokenizer": str(folder)}
    if values["qformer_text_input"] and _has_tokenizer(own):
        found["tokenizer"] = str(own)
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def build_generation(config: Any, model: Any) -> Any:
    """Blip2ForConditionalGeneration."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
    )

    name = "Blip2ForConditionalGeneration"
    if config.qformer_text_input:
        raise UsageError(f"to_hf: the Q-Former of {name} reads no text, and this one does")
    parts = _parts(config, model, name, Blip2VisionConfig, Blip2QFormerConfig)
    return Blip2ForConditionalGeneration(Blip2Config(**parts))


def build_instruct(config: Any, model: Any) -> Any:
    """InstructBlipForConditionalGeneration."""
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
    )

    name = "InstructBlipForConditionalGeneration"
    if not config.qformer_text_input:
        raise UsageError(f"to_hf: the Q-Former of {name} reads text, and this one does not")
    parts = _parts(config, model, name, InstructBlipVisionConfig, InstructBlipQFormerConfig)
    parts["qformer_config"].vocab_size = model.qformer.embedding.word.num_embeddings
    return InstructBlipForConditionalGeneration(InstructBlipConfig(**parts))


def parts_of(config: Any, model: Any, name: str, vision_class: Any, qformer_class: Any) -> dict[str, Any]:
    """Arguments of their configuration for tower and Q-Former; `name` is that of their model."""
    if config.vit_model != "eva_clip_g":
        raise UsageError(f"to_hf: {name} has an EVA tower (eva_clip_g), not {config.vit_model}")
    vit = model.vision.vit.config
    check_stem(vit)
    own = {} if one_epsilon(model) is None else {_LN_VISION: config.ln_vision_eps}
    return {
        "vision_config": vision_class(
            image_size=vit.image_size, **{theirs: getattr(vit, ours) for ours, theirs in VIT.items()}, **own
        ),
        "qformer_config": qformer_class(
            cross_attention_frequency=config.cross_attention_freq,
            encoder_hidden_size=vit.width,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            **{theirs: getattr(config.qformer, ours) for ours, theirs in BERT.items()},
        ),
        "num_query_tokens": config.num_query_token,
    }


def one_epsilon(model: Any) -> str | None:
    """What becomes of an epsilon of `ln_vision` that is not the tower's; None: it is."""
    own = getattr(model.config, "ln_vision_eps", None)
    tower = getattr(model.vision.vit, "config", None)
    if own is None or tower is None or own == tower.norm_eps:
        return None
    return (
        f"transformers computes the norm behind the tower with the tower's epsilon, {tower.norm_eps:g}; our"
        f" ln_vision_eps, {own:g}, stands in config.json for the way back"
    )


def _parts(config: Any, model: Any, name: str, vision_class: Any, qformer_class: Any) -> dict[str, Any]:
    """Arguments of their configuration."""
    if len(model.llm.lora):
        raise UsageError(f"to_hf: {name} has no place for model.llm.lora's additions to the language model")
    if config.llm.quantization != "none":
        raise UsageError(
            f"to_hf: the language model is quantised ({config.llm.quantization}); load it with"
            " model.llm.quantization none"
        )
    before = {}
    if config.llm.before:
        before[BEFORE] = config.llm.before
        log.warning(
            "to_hf: %s has no place for model.llm.before: put the tokens of %r in front of those that stand"
            " for soft tokens, in each text",
            name,
            config.llm.before,
        )
    return {
        **parts_of(config, model, name, vision_class, qformer_class),
        **before,
        "text_config": _text_config(config, model.llm),
        "image_token_index": _image_token(config, model.llm),
    }


def _text_config(config: Any, llm: Any) -> Any:
    """The language model's own, with what ends and begins its texts."""
    text = copy.deepcopy(llm.model.config)
    text.dtype = torch.float32
    tokenizer = _tokenizer(llm)
    if tokenizer is not None:
        if config.llm.end is not None:
            text.eos_token_id = tokenizer.end_id
        if tokenizer.lead:
            text.bos_token_id = tokenizer.lead[0]
        text.pad_token_id = tokenizer.pad_id
    if _image_token(config, llm) >= _rows(llm):  # Vicuna: every row has a word; one more, by 64 at a time
        text.vocab_size = (_rows(llm) // _ROWS_AT_A_TIME + 1) * _ROWS_AT_A_TIME
    if llm.is_encoder_decoder:
        text.decoder_start_token_id = llm.start_id
    return text


def _tokenizer(llm: Any) -> Any:
    """The language model's tokenizer; None where it cannot be read: its configuration then says all."""
    try:
        return llm.tokenizer
    except ConfigError as error:
        log.warning("to_hf: special tokens are those of the configuration; %s", error)
        return None


def _image_token(config: Any, llm: Any) -> int:
    """What stands for a soft token in transformers' ids: the first row without a word, or else a new one.

    Never the padding: padded texts would then have more soft tokens than there are.
    """
    tokenizer, said = _tokenizer(llm), config.llm.image_token
    if said is not None and (tokenizer is None or said >= tokenizer.vocab_size):  # no word of it
        return int(said)
    return _rows(llm) if tokenizer is None else min(tokenizer.vocab_size, _rows(llm))


def _rows(llm: Any) -> int:
    return int(llm.model.get_input_embeddings().weight.shape[0])


def with_rows(overrides: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Overrides with as many rows of words as the weights have: LAVIS adds one for Vicuna's padding.

    Args:
        overrides: plain values of the section `model`.
        tensors: by our names, with or without the language model's.
    """
    llm = overrides.get("llm")
    sizes = llm.get("sizes") if isinstance(llm, dict) else None
    name = next((n for n in tensors if n.startswith("llm.model.") and n.endswith(_WORDS)), None)
    if name is None or not llm or not sizes or "vocab_size" not in sizes:
        return overrides
    rows = len(tensors[name])
    if rows != sizes["vocab_size"]:
        log.info("llm.sizes.vocab_size: %d rows of words, as the weights have", rows)
    return {**overrides, "llm": {**llm, "sizes": {**sizes, "vocab_size": rows}}}


def without_image_rows(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], image_token: int | None
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Undo `with_image_row`: a language model that has no row for soft tokens gets its own rows back.

    Args:
        values: of our configuration.
        tensors: by our names.
        image_token: what `IMAGE_TOKEN` says; if all rows from there on are copies of the padding's, they go.
    """
    sizes = dict(values.get("llm", {}).get("sizes", {}))
    rows, pad = sizes.get("vocab_size"), sizes.get("pad_token_id")
    if not (isinstance(image_token, int) and isinstance(rows, int) and 0 <= image_token < rows):
        return dict(values), tensors
    kept = {**values, "llm": {**values["llm"], "image_token": image_token}}
    if not isinstance(pad, int) or not 0 <= pad < image_token:
        return kept, tensors
    long = [n for n in tensors if n.startswith("llm.model.") and tensors[n].shape[:1] == (rows,)]
    if any(tensors[name].is_meta for name in long[:1]):  # no values, so nothing tells
        return dict(values), tensors
    added = [bool((tensors[n][image_token:] == tensors[n][pad]).all()) for n in long]
    if not long or not all(added):
        return kept, tensors
    sizes["vocab_size"] = image_token
    return {**values, "llm": {**values["llm"], "sizes": sizes}}, _Cut(tensors, set(long), image_token)


class _Cut(Mapping[str, Tensor]):
    """Weights, some of them with fewer rows."""

    def __init__(self, state: Mapping[str, Tensor], names: set[str], rows: int) -> None:
        self._state, self._names, self._rows = state, names, rows

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        return tensor[: self._rows] if name in self._names else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def with_image_row(theirs: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the rows that `theirs` has more than words, for its image token.

    Each is a copy of the padding's, so it is never the likeliest word.

    Args:
        theirs: the model that the weights are for.
        state: weights in its layout.
    """
    wanted = theirs.state_dict()
    return {name: image_row(theirs, wanted.get(name), tensor) for name, tensor in state.items()}


def image_row(theirs: Any, wanted: Tensor | None, tensor: Tensor) -> Tensor:
    """One tensor of `with_image_row`, with more rows where `wanted`, that of `theirs`, has them."""
    text = getattr(theirs.config, "text_config", None)
    if text is None or wanted is None or not tensor.shape[:1] < wanted.shape[:1] == (text.vocab_size,):
        return tensor
    row = tensor[text.pad_token_id]
    return torch.cat([tensor, row.expand(len(wanted) - len(tensor), *row.shape)])
