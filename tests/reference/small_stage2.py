"""Small models with a language model, the same weights every time, and what they are fed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.config.typed import typed_section
from blip.registry import MODELS

IMAGE = 16
LLMS: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "dropout": 0.0,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
    },
}
SIZES: dict[str, Any] = {
    "vit_model": "vit_base",
    "vit_precision": "fp32",
    "image_size": IMAGE,
    "vit": {"patch_size": 8, "width": 12, "depth": 2, "heads": 2, "mlp_dim": 20},
    "num_query_token": 3,
    "qformer": {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24, "max_positions": 48},
    "tokenizer": "scenes",
    "max_txt_len": 20,
    "dropout": 0.0,
}
CAPTIONS = [
    "a red circle above a blue square",
    "a green triangle",
    "two stars",
    "a blue cross left of a star",
]
QUESTIONS = ["what color is the circle ?", "how many stars are there ?", "what ?", "is it a star ?"]
ANSWERS = ["red", "two", "a blue square", "yes"]


def small_stage2(kind: str = "opt", arch: str = "blip2_llm", /, **values: Any) -> Any:
    """A model in training mode; `values` are configuration keys, sections as dictionaries."""
    cls = MODELS.get(arch)
    section = {"sizes": LLMS[kind], "tokenizer": "scenes", **values.pop("llm", {})}
    sizes = {**SIZES, "llm": section, "arch": arch}
    config = typed_section(cls.config_class, {"small": sizes, "test": values})
    torch.manual_seed(0)
    model: Any = cls(config)
    vary(model)
    return model.train()


def vary(model: torch.nn.Module) -> None:
    """Weights at which nothing is negligible, and a language model that is sure of something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.startswith("llm.model.") and parameter.ndim == 2:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def pictures(rows: int = len(CAPTIONS)) -> Tensor:
    """(B, 3, H, W)."""
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))


def captions(count: int = len(CAPTIONS), /, **more: Any) -> dict[str, Any]:
    """A batch of pictures and captions."""
    return {"image": pictures(count), "text_input": CAPTIONS[:count], "seed": 5, "step": 7, **more}


def instructions(count: int = len(CAPTIONS), /, **more: Any) -> dict[str, Any]:
    """A batch of pictures, instructions and outputs."""
    return captions(count, **{"text_input": QUESTIONS[:count], "text_output": ANSWERS[:count], **more})
