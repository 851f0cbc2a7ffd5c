"""Hugging Face's configurations of the BLIP family as ours and back, and whole models of theirs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from blip.errors import BlipError, CheckpointError, UsageError, brief, hint
from blip.formats import hf, hf_blip, hf_llm
from blip.formats.hf_blip import EXPLICIT, check_fixed
from blip.weights import some, untie

log = logging.getLogger(__name__)


def _word_pieces(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    found = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt"))
    return {**values, "tokenizer": str(folder)} if found else values


class HfModel(NamedTuple):
    """How one class of transformers and a model of ours describe the same thing."""

    arch: str
    """Our registry name."""
    values: Callable[[Any], dict[str, Any]]
    """Their configuration -> values of ours."""
    build: Callable[[Any, Any], Any]
    """Our configuration and model -> their model, with random weights."""
    tokenizers: Callable[[Path, dict[str, Any]], dict[str, Any]] = _word_pieces
    """Folder and values of ours -> values with the tokenizers that the folder holds."""
    also: tuple[str, ...] = ()
    """Further models of ours whose weights it can hold."""
    explicit: tuple[str, ...] = ()
    """Dotted keys of `config.json` whose defaults are not to be trusted."""


def _retrieval_values(config: Any) -> dict[str, Any]:
    qformer = config.qformer_config
    check_fixed(config, hf_llm.FIXED, "BLIP-2")
    return {
        **hf_llm.values_of_parts(config),
        "embed_dim": config.image_text_hidden_size,
        "vocab_size": qformer.vocab_size,
        "max_txt_len": min(32, qformer.max_position_embeddings),
    }


def _build_retrieval(config: Any, model: Any) -> Any:
    from transformers import (
        Blip2Config,
        Blip2ForImageTextRetrieval,
        Blip2QFormerConfig,
        Blip2VisionConfig,
    )

    name = "Blip2ForImageTextRetrieval"
    parts = hf_llm.parts_of(config, model, name, Blip2VisionConfig, Blip2QFormerConfig)
    parts["qformer_config"].vocab_size = model.qformer.embedding.word.num_embeddings
    parts["qformer_config"].use_qformer_text_input = True
    return Blip2ForImageTextRetrieval(Blip2Config(**parts, image_text_hidden_size=config.embed_dim))


CLASSES = {
    "Blip2ForImageTextRetrieval": HfModel(
        "blip2_image_text_matching",
        _retrieval_values,
        _build_retrieval,
        also=("blip2", "blip2_feature_extractor"),
    ),
    "Blip2ForConditionalGeneration": HfModel(
        "blip2_llm",
        hf_llm.generation_values,
        hf_llm.build_generation,
        hf_llm.tokenizers,
        also=("blip2_opt", "blip2_t5"),
    ),
    "InstructBlipForConditionalGeneration": HfModel(
        "blip2_llm_instruct",
        hf_llm.instruct_values,
        hf_llm.build_instruct,
        hf_llm.tokenizers,
        also=("blip2_t5_instruct", "blip2_vicuna_instruct"),
    ),
    "BlipForImageTextRetrieval": HfModel(
        "blip_image_text_matching",
        hf_blip.retrieval_values,
        hf_blip.build_retrieval,
        also=("blip_retrieval",),
        explicit=EXPLICIT,
    ),
    "BlipForConditionalGeneration": HfModel(
        "blip_caption", hf_blip.caption_values, hf_blip.build_caption, explicit=EXPLICIT
    ),
    "BlipModel": HfModel("blip_dual_encoder", hf_blip.dual_values, hf_blip.build_dual, explicit=EXPLICIT),
    "BlipForQuestionAnswering": HfModel("blip_vqa", hf_blip.vqa_values, hf_blip.build_vqa, explicit=EXPLICIT),
}
"""Class of transformers -> what it is here."""


_SAID = {
    *("arch", "image_size", "vit_type", "vit_model", "vit_init_from", "vit", "med", "qformer", "vocab_size"),
    *("embed_dim", "num_query_token", "cross_attention_freq", "qformer_text_input", "tokenizer", "llm"),
    *("llm_model", hf_llm.IMAGE_TOKEN),
}
_UNSEEN = ("norm_eps", "heads", "num_heads")


def as_lavis(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder of published weights says of sizes and tokenizers.

    How transformers writes and judges texts (prompts, lengths, special tokens) is left out, so that LAVIS's
    ways stay, and so are numbers which leave no trace in tensors and have been wrong in such folders.

    Args:
        values: of our configuration, as `read_folder` gives them.
    """
    said = {key: value for key, value in values.items() if key in _SAID}
    for section in ("vit", "med", "qformer"):
        if section in said:
            said[section] = {key: value for key, value in said[section].items() if key not in _UNSEEN}
    return said


def read_folder(folder: Path, architectures: list[str]) -> tuple[str, dict[str, Any]]:
    """Our registry name and configuration values of a Hugging Face folder.

    Args:
        folder: with their `config.json`.
        architectures: that file's entry of the same name.

    Raises:
        CheckpointError: a class without a counterpart here, or sizes that ours cannot have.
    """
    from transformers import AutoConfig

    name = next((name for name in architectures if name in CLASSES), None)
    if name is None:
        given = some(architectures)
        raise CheckpointError(
            f"'{folder}' holds a {given}, which has no counterpart here{hint(given, CLASSES)}"
        )
    try:
        _check_explicit(folder, CLASSES[name].explicit)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        values = CLASSES[name].values(config)
    except BlipError:
        raise
    except Exception as error:  # each class of transformers checks in its own way
        raise CheckpointError(f"'{folder}': config.json is none of a {name} ({brief(error)})") from error
    values = CLASSES[name].tokenizers(folder, values)
    return values.pop("arch", CLASSES[name].arch), values


def _check_explicit(folder: Path, keys: tuple[str, ...]) -> None:
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in keys:
        section, _, field = key.partition(".")
        if field not in said.get(section, {}):
            raise CheckpointError(
                f"'{folder}': config.json does not say {key}, and the default of transformers is not that of"
                " BLIP's weights; write it there"
            )


def theirs_of(arch: str, model: Any) -> Any:
    """The transformers model of the same sizes, with random weights, on the default device.

    Args:
        arch: registry name of `model`.
        model: `BlipModel`.

    Raises:
        UsageError: transformers has no such model.
    """
    fitting = next((found for found in CLASSES.values() if arch in (found.arch, *found.also)), None)
    if fitting is None:
        raise UsageError(f"to_hf: transformers has no counterpart of {arch!r}{hint(arch, hf.TABLES)}")
    return fitting.build(model.config, model)


def to_model(arch: str, model: Any) -> Any:
    """The transformers model with the weights of ours, in eval mode; arguments and errors as `theirs_of`.

    Raises:
        CheckpointError: weights that its layout has no place for.
    """
    theirs = theirs_of(arch, model)
    if (note := hf_llm.one_epsilon(model)) is not None:
        log.info("to_hf: %s", note)
    state: Mapping[str, Tensor] = hf.table(arch).to_theirs(model.state_dict()).state
    untie(theirs, state)
    theirs.load_state_dict(hf_llm.with_image_row(theirs, state))
    return theirs.eval()
