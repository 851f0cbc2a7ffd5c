"""Complete training state, written so that it is whole or absent; `checkpoint_files` has the layout.

Rank 0 writes all of it, after gathering what the ranks have of their own, so saving needs no shared disk;
resuming needs the folder on every node. Files are readable without running code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blip import atomic, dist
from blip.engine import checkpoint_files as files
from blip.engine.checkpoint_files import latest, read_state
from blip.engine.rng import capture_rng, restore_rng
from blip.errors import CheckpointError
from blip.together import on_all, on_main
from blip.weights import (
    CHECKPOINT_FOLDER,
    WEIGHTS_FILE,
    LoadReport,
    load_into,
    read_weights,
    save_safetensors,
)

__all__ = ["Checkpoints", "Stateful", "fingerprint", "latest", "load_model", "read_part", "read_state"]

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a checkpoint can hold: plain containers, numbers, texts and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to survive."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Go back to a state."""
        ...


class Checkpoints:
    """The checkpoints of one run folder. Methods are called on every rank and fail on all ranks alike.

    Args:
        run_dir: the run folder.
        keep_last: newest checkpoints to keep; the best, and the one this process resumed from, stay as well.
    """

    def __init__(self, run_dir: str | Path, keep_last: int = 2) -> None:
        self.folder = Path(run_dir) / CHECKPOINT_FOLDER
        self.keep_last = keep_last
        self._resumed: Path | None = None
        self._clean = False
        self._hashes: dict[str, str] = {}

    @property
    def best(self) -> Path | None:
        """The checkpoint that `mark_best` named last."""
        return files.pointer_target(self.folder / "best")

    @property
    def last(self) -> Path | None:
        """The checkpoint that was saved last."""
        return files.pointer_target(self.folder / "last")

    def find(self, resume: str | None) -> Path | None:
        """The checkpoint that `run.resume` means: None, `auto`, a checkpoint, a pointer or a run folder.

        Raises:
            CheckpointError: there is none at that path.
        """
        if resume is None:
            return None
        if resume == "auto":
            return on_main(lambda: latest(self.folder.parent))
        return on_main(lambda: files.checkpoint_at(Path(resume).expanduser()))

    def save(
        self,
        step: int,
        model: Any,
        stateful: Mapping[str, Stateful],
        per_rank: Mapping[str, Stateful] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, point `last` at it, and remove old ones.

        Args:
            step: optimizer steps done.
            model: unwrapped `BlipModel`; its `frozen_parts` are left out and recorded by hash.
            stateful: what is the same on every rank, by name.
            per_rank: what each rank has of its own; the random generators are added.

        Raises:
            CheckpointError: the folder cannot be written to, or the disk is full.
        """
        place = files.step_folder(self.folder, step)
        own = {"rng": capture_rng(), **{name: part.state_dict() for name, part in (per_rank or {}).items()}}
        files.check_storable(own, "per_rank")
        states = {name: part.state_dict() for name, part in stateful.items()}
        weights = model.state_to_save()
        ranks = dist.gather_objects(own)

        def write() -> None:
            self._clean_up()
            try:
                self._write(place, weights, states, ranks, self._describe(step, model, len(ranks)))
            except OSError as error:
                shutil.rmtree(files.partial_folder(place), ignore_errors=True)
                raise CheckpointError(
                    f"cannot save step {step} in '{self.folder}': {error.strerror or error}; make room or"
                    " rights, and continue with run.resume=auto"
                ) from error
            self._rotate()

        on_main(write)
        return place

    def restore(
        self,
        folder: Path,
        model: Any,
        stateful: Mapping[str, Stateful],
        per_rank: Mapping[str, Stateful] | None = None,
    ) -> int:
        """Put a checkpoint's state into all that is handed over, as `save` got it; returns its step.

        Newer checkpoints of this run are removed: they belong to a past that is about to be replaced.

        Raises:
            CheckpointError: incomplete or damaged, of an unknown format, of another model or number of
                processes, or without one of the states.
        """
        step = on_all(lambda: _read(folder, model, stateful, per_rank or {}))
        self._resumed = folder.resolve()
        on_main(lambda: self._rewind(folder, step))
        return step

    def mark_best(self, step: int) -> None:
        """Point `best` at the checkpoint of `step`, where there is one."""
        place = files.step_folder(self.folder, step)
        on_main(lambda: files.point(self.folder / "best", place) if place.is_dir() else None)

    def _describe(self, step: int, model: Any, world_size: int) -> dict[str, Any]:
        parts = model.frozen_parts()
        for prefix in parts.keys() - self._hashes.keys():
            self._hashes[prefix] = fingerprint(model, prefix)  # once: frozen parts do not change
        return {
            "format": files.FORMAT,
            "step": step,
            "class": type(model).__name__,
            "arch": model.config.arch,
            "model_type": model.config.model_type,
            "world_size": world_size,
            "frozen": {p: {"source": source, "sha256": self._hashes[p]} for p, source in parts.items()},
        }

    def _write(
        self,
        place: Path,
        weights: dict[str, Tensor],
        states: dict[str, dict[str, Any]],
        ranks: list[dict[str, Any]],
        state: dict[str, Any],
    ) -> None:
        partial = files.partial_folder(place)
        partial.mkdir(parents=True)
        plain = {name: value for name, value in states.items() if files.is_plain(value)}
        tensors = {name: value for name, value in states.items() if name not in plain}
        files.check_storable(tensors, "stateful")
        save_safetensors(weights, partial / WEIGHTS_FILE)
        files.write_tensors(tensors, partial / files.TENSORS_FILE)
        for rank, own in enumerate(ranks):
            files.write_tensors(own, partial / files.rank_file(rank))
        state["stateful"] = plain
        state["files"] = {
            path.name: {"size": path.stat().st_size, "crc32": files.checksum(path)}
            for path in sorted(partial.iterdir())
        }
        atomic.write_text(partial / files.STATE_FILE, json.dumps(state, indent=1) + "\n")
        if place.exists():
            files.remove(place)
        os.rename(partial, place)
        atomic.sync(self.folder)
        files.point(self.folder / "last", place)

    def _clean_up(self) -> None:
        """Once, when training saves or resumes; an evaluation beside a running training must not."""
        if not self._clean:
            files.clean_up(self.folder)
        self._clean = True

    def _rotate(self) -> None:
        found = files.step_folders(self.folder)
        keep = {
            folder.resolve() for folder in (*found[-self.keep_last :], self.best, self._resumed) if folder
        }
        for folder in found:
            if folder.resolve() not in keep:
                try:
                    files.remove(folder)
                except OSError as error:  # the next save tries again
                    log.warning("cannot remove the old checkpoint '%s': %s", folder, error)

    def _rewind(self, folder: Path, step: int) -> None:
        if folder.resolve().parent != self.folder.resolve():
            return
        self._clean_up()
        newer = [f for f in files.step_folders(self.folder) if files.step_number(f) > step]
        for stale in newer:
            files.remove(stale)
        if newer:
            names = ", ".join(f.name for f in newer)
            log.warning("resuming after step %d: removed the newer checkpoints %s", step, names)
        if self.best is None:
            (self.folder / "best").unlink(missing_ok=True)
        files.point(self.folder / "last", folder)


def load_model(folder: Path, model: Any, exact: bool = False) -> LoadReport:
    """Put a checkpoint's weights into `model`, whose frozen parts must be loaded already.

    Args:
        exact: refuse, instead of warn, where the frozen parts are not those that were trained beside.

    Raises:
        CheckpointError: incomplete, damaged, of an unknown format, or of another model.
    """
    state = read_state(folder)
    files.check_content(folder, state, WEIGHTS_FILE)
    tensors = read_weights(folder / WEIGHTS_FILE)
    source = f"'{folder}' (model.arch {state['arch']})"
    absent: dict[str, dict[str, str]] = state["frozen"]
    report = load_into(model, tensors, source=source, allow_missing=[prefix + "*" for prefix in absent])
    for prefix, part in absent.items():
        if fingerprint(model, prefix) != part["sha256"]:
            text = (
                f"'{folder}' was trained beside another frozen '{prefix.rstrip('.')}' (from {part['source']})"
                " than this model has; load the same weights, in the same precision"
            )
            if exact:
                raise CheckpointError(text)
            log.warning("%s", text)
    return report


def read_part(folder: Path, name: str) -> Any:
    """The state that one of `stateful` had in a checkpoint.

    Raises:
        CheckpointError: incomplete or damaged, or without such a part.
    """
    state = read_state(folder)
    files.check_content(folder, state, files.TENSORS_FILE)
    parts = {**state["stateful"], **files.read_tensors(folder / files.TENSORS_FILE)}
    if name not in parts:
        raise CheckpointError(f"'{folder}' holds no state of {name!r}, only of {', '.join(sorted(parts))}")
    return parts[name]


def fingerprint(model: nn.Module, prefix: str = "") -> str:
    """SHA-256 over names, types, shapes and values of the state whose names start with `prefix`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefix):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(
    folder: Path, model: Any, stateful: Mapping[str, Stateful], per_rank: Mapping[str, Stateful]
) -> int:
    state = read_state(folder)
    _check_origin(folder, state, model)
    rank_file = files.rank_file(dist.rank())
    for name in (files.TENSORS_FILE, rank_file):
        files.check_content(folder, state, name)
    shared = {**state["stateful"], **files.read_tensors(folder / files.TENSORS_FILE)}
    ranked = files.read_tensors(folder / rank_file)
    files.check_names(folder, shared, stateful)
    files.check_names(folder, ranked, {"rng", *per_rank})
    load_model(folder, model, exact=True)
    for states, parts in ((shared, stateful), (ranked, per_rank)):
        for name, part in parts.items():
            part.load_state_dict(states[name])
    restore_rng(ranked["rng"])
    return int(state["step"])


def _check_origin(folder: Path, state: Mapping[str, Any], model: Any) -> None:
    if state["class"] != type(model).__name__:
        raise CheckpointError(
            f"'{folder}' is of model.arch {state['arch']!r} ({state['class']}), this run has"
            f" {model.config.arch!r} ({type(model).__name__}); set model.arch, or resume another checkpoint"
        )
    saved, present = state["world_size"], dist.world_size()
    if saved != present:
        raise CheckpointError(
            f"'{folder}' was saved by {saved} processes and this run has {present}; resume"
            f" with {saved} (torchrun), or start a new run from its weights with model.init_from={folder}"
        )
