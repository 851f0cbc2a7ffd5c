"""BLIP, BLIP-2 and InstructBLIP: training, evaluation and inference.

The public functions are loaded on first use, so that `import blip` stays fast and starts nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "list_models": "blip.zoo",
    "load_model": "blip.zoo",
    "load_model_and_preprocess": "blip.zoo",
    "load_preprocess": "blip.zoo",
    "from_pretrained": "blip.zoo",
    "to_hf": "blip.zoo",
    "load_dataset": "blip.zoo",
    "model_zoo": "blip.models.published",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'blip' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
