"""Configurations of transformers' BLIP models as ours and back."""

from __future__ import annotations

import logging
from typing import Any

from blip.errors import CheckpointError, ConfigError, UsageError

log = logging.getLogger(__name__)

VIT = {
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
"""Our keys of a tower -> theirs."""
BERT = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
}
"""Our keys of a text transformer -> theirs."""
EXPLICIT = ("text_config.num_attention_heads", "vision_config.layer_norm_eps")
"""What `config.json` must say, since transformers' defaults (8 and 1e-5) are not BLIP's (12 and 1e-6)."""

_BERT_VOCAB, _BERT_SEP, _BERT_PAD = 30524, 102, 0
_LARGE = 1024
"""Width of BLIP's larger tower."""


def check_fixed(config: Any, fixed: dict[str, Any], name: str) -> None:
    """Raise CheckpointError where a configuration says something of which models here have no choice.

    Args:
        config: theirs.
        fixed: dotted key -> the only value there is.
        name: of the models.
    """
    for key, only in fixed.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value != only:
            raise CheckpointError(f"config.json: {key} is {value!r}; {name} has {only!r}, and nothing else")


def check_stem(vit: Any) -> None:
    """Raise UsageError if a tower (VitConfig) has a convolution before its patches."""
    if vit.stem_width:
        raise UsageError(
            "to_hf: model.vit.stem_width: transformers' towers have no convolution before their patches"
        )


def _values(config: Any, max_txt_len: int) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    check_fixed(config, {"vision_config.hidden_act": "gelu", "text_config.hidden_act": "gelu"}, "BLIP")
    if (text.hidden_size, text.num_attention_heads) == (768, 8):
        log.warning(
            "config.json: text_config.num_attention_heads is 8, as was once written by mistake; BLIP's own"
            " weights have 12 heads: give med={'num_heads': 12} for them"
        )
    return {
        "vit_type": "large" if vision.hidden_size == _LARGE else "base",
        "image_size": vision.image_size,
        "vit": {ours: getattr(vision, theirs) for ours, theirs in VIT.items()},
        "med": {ours: getattr(text, theirs) for ours, theirs in BERT.items()},
        "vocab_size": text.vocab_size,
        "special_ids": _special_ids(text),
        "max_txt_len": min(max_txt_len, text.max_position_embeddings),
        "dropout": text.hidden_dropout_prob,
    }


def _special_ids(text: Any) -> dict[str, int]:
    """Ids that are neither the last row of the vocabulary but one nor BERT's."""
    theirs = {"dec": text.bos_token_id, "sep": text.sep_token_id, "pad": text.pad_token_id}
    usual = {"dec": text.vocab_size - 2, "sep": _BERT_SEP, "pad": _BERT_PAD}
    rows = range(text.vocab_size)  # what is never looked up, such as the first id of a judge, may be anything
    return {key: number for key, number in theirs.items() if number in rows and number != usual[key]}


def _decoder_values(config: Any, max_txt_len: int) -> dict[str, Any]:
    values, smoothing = _values(config, max_txt_len), config.text_config.label_smoothing
    return {**values, "label_smoothing": smoothing, "beam_lengths": "new"}


def retrieval_values(config: Any) -> dict[str, Any]:
    """Values of `blip_image_text_matching`; transformers judges texts by [CLS]."""
    return {**_values(config, 35), "embed_dim": config.image_text_hidden_size, "itm_token": "cls"}


def dual_values(config: Any) -> dict[str, Any]:
    """Values of `blip_dual_encoder`."""
    return {**_values(config, 35), "embed_dim": config.projection_dim}


def caption_values(config: Any) -> dict[str, Any]:
    """Values of `blip_caption`; transformers adds no prompt."""
    return {**_decoder_values(config, 40), "prompt": ""}


def vqa_values(config: Any) -> dict[str, Any]:
    """Values of `blip_vqa`; transformers leaves [CLS], and lets answers look at the padding of questions."""
    return {**_decoder_values(config, 35), "generate_attends_padding": True, "question_token": "cls"}


def _config(config: Any, model: Any, name: str) -> Any:
    """Their configuration of our model; every field that has a counterpart is written."""
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

    vit, med = model.vision.vit.config, config.med
    if vit.name not in ("vit_base", "vit_large"):
        raise UsageError(f"to_hf: {name} has BLIP's tower (base or large), not {config.vit_type}")
    check_stem(vit)
    words = model.text.embedding.word.num_embeddings
    sep, pad = _ends(model, words)
    return BlipConfig(
        vision_config=BlipVisionConfig(
            image_size=vit.image_size,
            hidden_act="gelu",
            attention_dropout=0.0,
            **{theirs: getattr(vit, ours) for ours, theirs in VIT.items()},
        ),
        text_config=BlipTextConfig(
            vocab_size=words,
            encoder_hidden_size=vit.width,
            hidden_act="gelu",
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            initializer_range=med.init_std,
            bos_token_id=model.text.dec_id,
            sep_token_id=sep,
            pad_token_id=pad,
            is_decoder=True,
            label_smoothing=getattr(config, "label_smoothing", 0.0),
            **{theirs: getattr(med, ours) for ours, theirs in BERT.items()},
        ),
        image_text_hidden_size=getattr(config, "embed_dim", 256),
    )


def _ends(model: Any, words: int) -> tuple[int, int]:
    """Ids of [SEP] and [PAD]; BERT's, where nothing says them."""
    if words == _BERT_VOCAB and not model.config.special_ids:
        return _BERT_SEP, _BERT_PAD
    try:
        return model.text_ends.end_id, model.text_ends.pad_id
    except ConfigError as error:
        log.warning("to_hf: [SEP] and [PAD] are taken to be those of BERT; %s", error)
        return _BERT_SEP, _BERT_PAD


def build_retrieval(config: Any, model: Any) -> Any:
    """BlipForImageTextRetrieval."""
    from transformers import BlipForImageTextRetrieval

    return BlipForImageTextRetrieval(_config(config, model, "BlipForImageTextRetrieval"))


def build_caption(config: Any, model: Any) -> Any:
    """BlipForConditionalGeneration."""
    from transformers import BlipForConditionalGeneration

    return BlipForConditionalGeneration(_config(config, model, "BlipForConditionalGeneration"))


def build_dual(config: Any, model: Any) -> Any:
    """BlipModel."""
    from transformers import BlipModel

    theirs = _config(config, model, "BlipModel")
    theirs.projection_dim = config.embed_dim
    return BlipModel(theirs)


def build_vqa(config: Any, model: Any) -> Any:
    """BlipForQuestionAnswering."""
    from transformers import BlipForQuestionAnswering

    name, vit = "BlipForQuestionAnswering", model.vision.vit.config
    if vit.width != config.med.width:
        raise UsageError(
            f"to_hf: {name} needs a tower as wide as its text transformer; here they are {vit.width} and"
            f" {config.med.width}"
        )
    return BlipForQuestionAnswering(_config(config, model, name))
