"""Hugging Face's configurations of the BLIP family as ours and back, and whole models of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from blip.config.schema import ModelConfig
from blip.errors import CheckpointError, UsageError, hint
from blip.formats import hf

_VIT = {
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
_QFORMER = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
}


class HfModel(NamedTuple):
    """How one class of transformers and a model of ours describe the same thing."""

    arch: str
    """Our registry name."""
    values: Callable[[Any], dict[str, Any]]
    """Their configuration -> values of ours."""
    build: Callable[[Any, Any], Any]
    """Our configuration and model -> their model, with random weights."""


def _retrieval_values(config: Any) -> dict[str, Any]:
    vision, qformer = config.vision_config, config.qformer_config
    fixed = [
        ("vision_config.hidden_act", vision.hidden_act, "gelu"),
        ("vision_config.qkv_bias", vision.qkv_bias, True),
        ("qformer_config.hidden_act", qformer.hidden_act, "gelu"),
    ]
    for key, value, only in fixed:
        if value != only:
            raise CheckpointError(f"config.json: {key} is {value!r}; BLIP-2 has {only!r}, and nothing else")
    return {
        "vit_model": "eva_clip_g",
        "image_size": vision.image_size,
        "vit": {ours: getattr(vision, theirs) for ours, theirs in _VIT.items()},
        "num_query_token": config.num_query_tokens,
        "cross_attention_freq": qformer.cross_attention_frequency,
        "qformer": {ours: getattr(qformer, theirs) for ours, theirs in _QFORMER.items()},
        "embed_dim": config.image_text_hidden_size,
        "vocab_size": qformer.vocab_size,
        "max_txt_len": min(32, qformer.max_position_embeddings),
        "dropout": qformer.hidden_dropout_prob,
    }


def _build_retrieval(config: Any, model: Any) -> Any:
    from transformers import (
        Blip2Config,
        Blip2ForImageTextRetrieval,
        Blip2QFormerConfig,
        Blip2VisionConfig,
    )

    if config.vit_model != "eva_clip_g":
        raise UsageError(
            f"to_hf: Blip2ForImageTextRetrieval has an EVA tower (eva_clip_g), not {config.vit_model}"
        )
    # transformers has one epsilon for the blocks and for `ln_vision`, whose own is 1e-5 here and in LAVIS.
    vit, qformer = model.vision.vit.config, config.qformer
    return Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config=Blip2VisionConfig(
                image_size=vit.image_size, **{theirs: getattr(vit, ours) for ours, theirs in _VIT.items()}
            ),
            qformer_config=Blip2QFormerConfig(
                vocab_size=model.qformer.embedding.word.num_embeddings,
                cross_attention_frequency=config.cross_attention_freq,
                encoder_hidden_size=vit.width,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                use_qformer_text_input=True,
                **{theirs: getattr(qformer, ours) for ours, theirs in _QFORMER.items()},
            ),
            num_query_tokens=config.num_query_token,
            image_text_hidden_size=config.embed_dim,
        )
    )


CLASSES = {
    "Blip2ForImageTextRetrieval": HfModel("blip2_image_text_matching", _retrieval_values, _build_retrieval),
}
"""Class of transformers -> what it is here."""


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
        given = ", ".join(architectures)
        raise CheckpointError(
            f"'{folder}' holds a {given}, which has no counterpart here{hint(given, CLASSES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        values = CLASSES[name].values(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"'{folder}': config.json is none of a {name} ({reason})") from error
    if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        values["tokenizer"] = str(folder)
    return CLASSES[name].arch, values


def to_model(arch: str, model: Any) -> Any:
    """The transformers model with the weights of ours, in eval mode.

    Args:
        arch: registry name of `model`.
        model: `BlipModel`.

    Raises:
        UsageError: transformers has no such model.
        CheckpointError: weights that its layout has no place for.
    """
    tables = {found.arch: found for found in CLASSES.values()}
    fitting = [found for name, found in tables.items() if hf.TABLES.get(name) is hf.TABLES.get(arch, ())]
    if not fitting:
        raise UsageError(f"to_hf: transformers has no counterpart of {arch!r}{hint(arch, hf.TABLES)}")
    config: ModelConfig = model.config
    theirs = fitting[0].build(config, model)
    state: Mapping[str, Tensor] = hf.table(arch).to_theirs(model.state_dict()).state
    theirs.load_state_dict(dict(state))
    return theirs.eval()
