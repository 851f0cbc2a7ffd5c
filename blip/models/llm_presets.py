"""The language models of the published BLIP-2 and InstructBLIP: names, sizes, and how LAVIS uses them.

With the sizes here a model is built without reading anything; its weights and tokenizer come by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "dropout": 0.1}
_T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "num_layers": 24,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
_LLAMA = {"model_type": "llama", "vocab_size": 32001, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}


def _opt(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return {**_OPT, **sizes, "num_hidden_layers": 32, "num_attention_heads": 32}


def _t5(width: int, mlp_dim: int, heads: int) -> dict[str, Any]:
    return {**_T5, "d_model": width, "d_ff": mlp_dim, "num_heads": heads}


def _llama(width: int, mlp_dim: int, depth: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp_dim, "num_hidden_layers": depth}
    return {**_LLAMA, **sizes, "num_attention_heads": depth}  # as many heads as layers


SIZES: dict[str, dict[str, Any]] = {
    "facebook/opt-2.7b": _opt(2560),
    "facebook/opt-6.7b": _opt(4096),
    "google/flan-t5-xl": _t5(2048, 5120, 32),
    "google/flan-t5-xxl": _t5(4096, 10240, 64),
    "llm/vicuna-7b": _llama(4096, 11008, 32),
    "llm/vicuna-13b": _llama(5120, 13824, 40),
}
"""Value of `model.llm_model` -> its transformers configuration."""

# A newline ends a text of OPT.
OPT: dict[str, Any] = {"half": "fp16", "end": "\n"}
# With gelu_new, which FlanT5's own configuration names, the released weights give other texts.
FLAN_T5: dict[str, Any] = {"half": "bf16", "activation": "gelu"}
VICUNA: dict[str, Any] = {"half": "fp16", "bos": "end"}

OPT_2_7B = {"llm_model": "facebook/opt-2.7b", "llm": OPT}
OPT_6_7B = {"llm_model": "facebook/opt-6.7b", "llm": OPT}
FLAN_T5_XL = {"llm_model": "google/flan-t5-xl", "llm": FLAN_T5}
FLAN_T5_XXL = {"llm_model": "google/flan-t5-xxl", "llm": FLAN_T5}
VICUNA_7B = {"llm_model": "llm/vicuna-7b", "llm": VICUNA}
VICUNA_13B = {"llm_model": "llm/vicuna-13b", "llm": VICUNA}


def sizes_of_llm(llm_model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a language model by its name, with what is given in its place or laid over it."""
    known = _known(llm_model)
    return dict(given) if "model_type" in given else {**known, **given}


def width_of_llm(llm_model: str | None) -> int | None:
    """Width of the word embeddings of a language model that is known by its name."""
    sizes = _known(llm_model)
    return sizes.get("d_model", sizes.get("hidden_size"))


def _known(llm_model: str | None) -> dict[str, Any]:
    return SIZES.get((llm_model or "").removeprefix("./"), {})
