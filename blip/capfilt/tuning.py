"""Runs of training within a round, each done once, and never taken for those of another recipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip.build import train
from blip.config.files import plain
from blip.config.load import load_config
from blip.config.schema import Config
from blip.engine.run_folder import CONFIG_FILE, REPORT_FILE
from blip.errors import ConfigError
from blip.together import on_main
from blip.weights import MODEL_FOLDER

log = logging.getLogger("blip.capfilt")

_FREE = frozenset(
    {
        *("data_root", "resume", "overwrite", "device", "num_workers", "timeout_s", "published"),
        *("log_freq", "save_freq", "save_minutes", "keep_last", "tensorboard", "wandb"),
    }
)
"""Run keys that may change while a run goes on: the model that comes out is the same."""
_FREE_OF_DATASETS = frozenset({"cache_dir", "cache_gb"})
"""The same of each dataset's keys."""


def trained(place: Path, recipe: str, options: Sequence[str]) -> str:
    """Run a recipe of `blip train` to its end, go on with it, or find it done; returns its folder.

    Args:
        place: folder of the run.
        recipe: of training.
        options: `key=value` each.

    Raises:
        ConfigError: there is a run of other values.
    """
    own = [f"run.output_dir={json.dumps(str(place))}", "run.resume=auto"]
    config = load_config(recipe, [*options, *own])
    on_main(lambda: _same_recipe(place, config))
    if not ((place / REPORT_FILE).is_file() and (place / MODEL_FOLDER).is_dir()):  # the last that it writes
        log.info("%s by %s", place.name, recipe)
        train(config)
    return str(place)


def _same_recipe(place: Path, config: Config) -> None:
    began = place / CONFIG_FILE
    if not began.is_file():
        return
    before, now = _learned(load_config(str(began))), _learned(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"run.{place.name}: '{place}' was trained with another {key} ({short(before.get(key))}, now"
                f" {short(now.get(key))}); give another run.output_dir, or remove '{place}' to train it again"
            )


def _learned(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of all that the model depends on; paths start from where the run lies."""
    tree = plain(config)
    place = Path(tree["run"].pop("output_dir") or ".")
    start = Path(tree["model"].get("init_from") or "")
    if start.is_relative_to(place.parents[1]):  # the folder of all rounds may have been moved
        tree["model"]["init_from"] = str(start.relative_to(place.parents[1]))
    tree.pop("name")
    tree["run"] = {key: value for key, value in tree["run"].items() if key not in _FREE}
    for name, section in tree["datasets"].items():
        tree["datasets"][name] = {k: value for k, value in section.items() if k not in _FREE_OF_DATASETS}
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def short(value: Any) -> str:
    """A value of the configuration, for people."""
    text = json.dumps(value)
    return text if len(text) < 120 else f"{text[:117]}..."
