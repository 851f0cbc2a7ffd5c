"""Configurations and tokenizers of transformers, as objects or folders, as values of a configuration."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from blip.errors import UsageError, brief
from blip.stored.files import read_json
from blip.stored.values import check_values
from blip.weights import GIVEN

_NOT_SIZES = ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype")
_TOKENIZERS = ("tokenizer", "llm.tokenizer")


def as_values(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as plain values of the section `model`.

    Sections may be dataclasses. `llm_model` and `llm.sizes` may be a transformers configuration, and
    `llm.sizes` a folder with one; `tokenizer` and `llm.tokenizer` may be a tokenizer of transformers or of
    the package tokenizers, which is written to a folder that lasts as long as this process.

    Raises:
        UsageError: a folder without a configuration, or an object that is no tokenizer.
    """
    values = {key: asdict(v) if _is_section(v) else _copied(v) for key, v in overrides.items()}
    if _is_config(values.get("llm_model")):
        llm = values.setdefault("llm", {})
        llm.setdefault("sizes", values["llm_model"])
        values["llm_model"] = None
    llm = values.get("llm")
    if isinstance(llm, dict) and "sizes" in llm:
        llm["sizes"] = _sizes(llm["sizes"])
    for key in _TOKENIZERS:
        section, _, name = key.rpartition(".")
        tree = values.get(section) if section else values
        if isinstance(tree, dict) and tree.get(name) is not None:
            tree[name] = _tokenizer(key, tree[name])
    return values


def _is_section(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict") and hasattr(value, "model_type")


def _sizes(given: Any) -> Any:
    if isinstance(given, str | Path):
        from transformers import AutoConfig

        try:
            if os.path.isfile(file := Path(given) / "config.json"):
                check_values(read_json(file, "model configuration"), f"'{file}'")
            given = AutoConfig.from_pretrained(given, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each class checks in its own way
            raise UsageError(
                f"llm.sizes: '{given}' is no folder with a config.json ({brief(error)})"
            ) from error
    if not _is_config(given):
        return given
    sizes = {key: value for key, value in given.to_diff_dict().items() if key not in _NOT_SIZES}
    return {**sizes, "model_type": given.model_type}


def _tokenizer(key: str, given: Any) -> str:
    if isinstance(given, str | Path):
        return str(given)
    folder = Path(tempfile.mkdtemp(prefix=GIVEN))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if hasattr(given, "save_pretrained"):
        given.save_pretrained(folder)
    elif hasattr(given, "encode_batch") and hasattr(given, "save"):
        given.save(str(folder / "tokenizer.json"))
    else:
        raise UsageError(
            f"{key}: a {type(given).__name__} is no tokenizer; give a name, a folder, or a tokenizer of"
            " transformers or tokenizers"
        )
    return str(folder)
