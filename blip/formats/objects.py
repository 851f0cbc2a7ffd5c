"""Configurations and tokenizers of transformers, as objects or folders, as values of a configuration."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from blip.errors import UsageError, brief
from blip.formats.hf_llm import sizes_of_config
from blip.stored.files import read_json
from blip.stored.values import check_values
from blip.weights import GIVEN

_TOKENIZERS = ("tokenizer", "llm.tokenizer")


def as_values(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as plain values of the section `model`.

    Sections may be dataclasses. `llm_model` and `llm.sizes` may be a transformers configuration, and
    `llm.sizes` a folder with one; `tokenizer` and `llm.tokenizer` may be a tokenizer of transformers or of
    the package tokenizers, which is written to a folder that lasts as long as this process.

    Raises:
        UsageError: a folder without a configuration, or an object of another kind.
    """
    values = {key: _plain(value) for key, value in overrides.items()}
    model = values.get("llm_model")
    if _is_config(model):
        llm = values.get("llm") or {}
        if isinstance(llm, dict):  # anything else is refused as a section
            values["llm"] = {**llm, "sizes": llm.get("sizes") or model}
        values["llm_model"] = None
    elif not isinstance(model, str | Path | None):
        raise UsageError(
            f"llm_model: a {type(model).__name__} is no language model here; give a name, a folder, or a"
            " configuration of transformers"
        )
    llm = values.get("llm")
    if isinstance(llm, dict) and "sizes" in llm:
        llm["sizes"] = _sizes(llm["sizes"])
    for key in _TOKENIZERS:
        section, _, name = key.rpartition(".")
        tree = values.get(section) if section else values
        if isinstance(tree, dict) and tree.get(name) is not None:
            tree[name] = _tokenizer(key, tree[name])
    return values


def _plain(value: Any) -> Any:
    """Sections as dictionaries; a configuration of transformers, which is a dataclass too, stays."""
    if is_dataclass(value) and not isinstance(value, type) and not _is_config(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


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
    if isinstance(given, dict):
        return given
    if not _is_config(given):
        raise UsageError(
            f"llm.sizes: a {type(given).__name__} says no sizes; give a dictionary, a folder, or a"
            " configuration of transformers"
        )
    return sizes_of_config(given)


def _tokenizer(key: str, given: Any) -> str:
    if isinstance(given, str | Path):
        return str(given)
    theirs = hasattr(given, "save_pretrained") and hasattr(given, "convert_tokens_to_ids")
    if not theirs and not (hasattr(given, "encode_batch") and hasattr(given, "save")):
        raise UsageError(
            f"{key}: a {type(given).__name__} is no tokenizer; give a name, a folder, or a tokenizer of"
            " transformers or tokenizers"
        )
    folder = Path(tempfile.mkdtemp(prefix=GIVEN))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if theirs:
        given.save_pretrained(folder)
    else:
        given.save(str(folder / "tokenizer.json"))
    return str(folder)
