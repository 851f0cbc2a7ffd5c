"""The run folder and its files: where it lies, whose it is, and lines that stand once for each step."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from torch import Tensor

from blip import atomic
from blip.config.schema import Config
from blip.engine.checkpoint_files import checkpoint_at
from blip.errors import ConfigError
from blip.weights import CHECKPOINT_FOLDER, MODEL_FOLDER

log = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG_FILE = "config.yaml"
ENV_FILE = "env.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
REPORT_FILE = "report.html"
PUBLISHED_FILE = "published.json"
"""The last scores beside those that `run.published` names."""
PREDICTIONS_FOLDER = "predictions"
SUBMISSIONS_FOLDER = "submissions"
TENSORBOARD_FOLDER = "tensorboard"
SKIPPED_FILES = "skipped*.jsonl"
"""Bad records, listed by `blip.data.skips.SkipLog`."""

_FILES = (CONFIG_FILE, ENV_FILE, METRICS_FILE, EVENTS_FILE, REPORT_FILE, PUBLISHED_FILE, SKIPPED_FILES)
_FOLDERS = (CHECKPOINT_FOLDER, MODEL_FOLDER, PREDICTIONS_FOLDER, SUBMISSIONS_FOLDER, TENSORBOARD_FOLDER)
_SIGNS = (CONFIG_FILE, METRICS_FILE, CHECKPOINT_FOLDER)
"""What a folder that holds a run has."""


def open_folder(config: Config) -> Path:
    """Choose the run folder, make it, and see that it is ours to write.

    `run.output_dir`, else the run that `run.resume` lies in, else a new one named by recipe and time.

    Raises:
        ConfigError: it holds a run and neither `run.resume` nor `run.overwrite` is given, or it cannot be
            written to.
        CheckpointError: `run.resume` is a path without a complete checkpoint.
    """
    run = config.run
    resumed = _run_of(run.resume)
    if run.output_dir is None and resumed is None:
        if run.resume == "auto":
            log.warning("run.resume=auto looks into run.output_dir, which is not given: a new run starts")
        return _guarded(lambda: _new_folder(Path("output") / _recipe_path(config.name)))
    folder = Path(run.output_dir).expanduser() if run.output_dir is not None else resumed
    assert folder is not None
    signs = [name for name in _SIGNS if (folder / name).exists()]
    goes_on = run.resume == "auto" or (resumed is not None and resumed.resolve() == folder.resolve())
    if signs and not goes_on:
        if not run.overwrite:
            raise ConfigError(
                f"run.output_dir: '{folder}' already holds a run ({', '.join(signs)}); continue it with"
                " run.resume=auto, replace it with run.overwrite=true, or choose another folder"
            )
        _guarded(lambda: remove_run(folder))
    return _guarded(lambda: _writable(folder))


def _run_of(resume: str | None) -> Path | None:
    """The run folder of the checkpoint that a path means; raises CheckpointError where there is none."""
    if resume is None or resume == "auto":
        return None
    checkpoint = checkpoint_at(Path(resume).expanduser())
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINT_FOLDER else None


def _new_folder(parent: Path) -> Path:
    """A folder named by the present time that did not exist before."""
    parent.mkdir(parents=True, exist_ok=True)
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"all names like '{parent / name}' are taken")


def _writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(f"{atomic.PARTIAL}*"):  # of a process that was killed: a run has one at a time
        if draft.is_file():
            draft.unlink(missing_ok=True)
    probe = folder / f"{atomic.PARTIAL}probe"
    probe.touch()
    probe.unlink()
    return folder


def holds_run(folder: Path) -> bool:
    """Whether a run has left figures or checkpoints there, more than the configuration it began with."""
    return any((folder / name).exists() for name in _SIGNS if name != CONFIG_FILE)


def remove_run(folder: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    for pattern in (*_FILES, *_FOLDERS):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _guarded(action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        place = error.filename or "output"
        raise ConfigError(
            f"run.output_dir: cannot write to '{place}': {error.strerror or error}; choose a folder"
            " that you may write to"
        ) from error


def _recipe_path(name: str) -> Path:
    parts = [file_name(part) for part in name.split("/")]
    return Path(*[part for part in parts if part]) if any(parts) else Path("run")


def file_name(name: str) -> str:
    """A name without anything that a file system or a path could read otherwise."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")


class Lines:
    """A file of JSON objects, one a line, that is appended to; a killed run may leave half a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._keys: set[tuple[str, int]] = set()
        text = path.read_bytes() if path.exists() else b""
        if text and not text.endswith(b"\n"):
            self._rewrite(self._read())
        self._keys = {_key(line) for line in self._read()}

    def put(self, line: dict[str, Any], key: tuple[str, int] | None = None) -> None:
        """Append a line; one with the same key goes."""
        if key is not None and key in self._keys:
            self._rewrite([old for old in self._read() if _key(old) != key])
        if key is not None:
            self._keys.add(key)
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line, ensure_ascii=False, default=plain_value) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps."""
        lines = self._read()
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) < len(lines):
            self._rewrite(kept)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # half a line
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines

    def _rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        self.close()
        kept = list(lines)
        atomic.write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self._keys = {_key(line) for line in kept}


def _key(line: Mapping[str, Any]) -> tuple[str, int]:
    return str(line.get("split", line.get("event"))), line["step"]


def number(value: Any) -> Any:
    """Tensors and NumPy scalars as plain numbers; what JSON has no number for as None."""
    value = plain_value(value) if isinstance(value, Tensor | np.ndarray | np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_value(value: Any) -> Any:
    """What JSON cannot hold, as something it can: tensors and arrays as lists, paths as text."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
