"""What a run leaves behind: configuration, environment, metrics, predictions; and what the terminal shows.

Rank 0 decides and writes; the other ranks call the same methods, which then do nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from blip import atomic, dist, keyed
from blip.config.files import dump, plain
from blip.config.schema import Config
from blip.engine.comparison import as_text
from blip.engine.display import ChanceWatch, Display
from blip.engine.environment import describe
from blip.engine.mirrors import Mirror, TensorBoard, WeightsAndBiases
from blip.engine.run_folder import (
    CONFIG_FILE,
    ENV_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    PREDICTIONS_FOLDER,
    PUBLISHED_FILE,
    SUBMISSIONS_FOLDER,
    TENSORBOARD_FOLDER,
    Lines,
    file_name,
    holds_run,
    number,
    open_folder,
    plain_value,
    remove_run,
)
from blip.together import on_main
from blip.weights import MODEL_FOLDER

log = logging.getLogger(__name__)


class Tracker:
    """Keeps the run folder; built on every rank, best used as a context.

    Args:
        config: its name, and `run.output_dir`, `resume`, `overwrite`, `evaluate`, `tensorboard`, `wandb`.

    Raises:
        ConfigError: the folder holds a run and neither `resume` nor `overwrite` is given; it cannot be
            written to; TensorBoard or W&B is asked for and cannot be used.
        CheckpointError: `run.resume` is a path without a complete checkpoint.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder: Path = on_main(lambda: open_folder(config))
        self._display: Display | None = None
        self._watch: ChanceWatch | None = None
        self._metrics: Lines | None = None
        self._events: Lines | None = None
        self._mirrors: list[Mirror] = []
        on_main(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def model_folder(self) -> Path:
        """Where the final weights are exported to."""
        return self.folder / MODEL_FOLDER

    def begin(self, total_steps: int, step: int = 0, num_candidates: int | None = None) -> None:
        """Told before training starts or goes on.

        Lines of steps after `step` are dropped, because those steps are about to be done again.

        Args:
            total_steps: optimizer steps of the whole run.
            step: steps done.
            num_candidates: what ITC chooses from, for the warning that it is at chance level.
        """
        if self._metrics is None or self._events is None:
            return
        own = [self.folder / name for name in (PREDICTIONS_FOLDER, SUBMISSIONS_FOLDER)]
        for folder in (self.folder, *own, self.model_folder):
            for leftover in folder.glob(atomic.PARTIAL + "*"):  # of a run that was killed
                leftover.unlink()
        self._metrics.rewind(step)
        self._events.rewind(step)
        self._display = Display(total_steps, step)
        self._watch = ChanceWatch(max(100, min(2000, total_steps // 3)), num_candidates)

    def step(self, step: int) -> None:
        """Told after every optimizer step; moves the bar."""
        if self._display is not None:
            self._display.step(step)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Write one line of `metrics.jsonl`, and show it where it is of training.

        Args:
            line: `split`, `step`, then figures: numbers or one-element tensors; what is not finite becomes
                null. A line of the same split and step is replaced.
        """
        if self._metrics is None:
            return
        line = {key: number(value) for key, value in line.items()}
        self._metrics.put(line, (str(line["split"]), int(line["step"])))
        if line["split"] == "train" and self._display is not None and self._watch is not None:
            self._display.figures(line)
            self._watch.look(line)
        for mirror in self._mirrors:
            mirror.put(line)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Write one line of `events.jsonl`: what happened at a step beside its figures."""
        if self._events is not None:
            self._events.put({"event": kind, "step": step, **fields})

    def predictions(self, name: str, predictions: Sequence[Mapping[str, Any]]) -> Path:
        """Write what the model said to `predictions/<name>.json`, one prediction a line; returns the path."""
        path = self.folder / PREDICTIONS_FOLDER / f"{file_name(name)}.json"
        if dist.is_main():
            path.parent.mkdir(exist_ok=True)
            rows = ",\n".join(json.dumps(p, ensure_ascii=False, default=plain_value) for p in predictions)
            atomic.write_text(path, f"[\n{rows}\n]\n" if rows else "[]\n")
        return path

    def submission(self, name: str, content: Any) -> Path:
        """Write what an evaluation server takes to `submissions/<name>.json`; returns the path."""
        path = self.folder / SUBMISSIONS_FOLDER / f"{file_name(name)}.json"
        if dist.is_main():
            path.parent.mkdir(exist_ok=True)
            atomic.write_text(path, json.dumps(content, ensure_ascii=False, default=plain_value) + "\n")
            log.info("for the evaluation server: %s", path)
        return path

    def published(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show scores beside published ones, and write them to `published.json`, where there are some.

        Args:
            rows: as `blip.engine.comparison.as_values` gives them.
        """
        path = self.folder / PUBLISHED_FILE
        if not dist.is_main():
            return
        if rows:
            atomic.write_text(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
            log.info("beside what is published:\n%s", as_text(rows))
        else:  # of an evaluation before this one
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Finish the display, the files and the mirrors."""
        if self._display is not None:
            self._display.close()
        for lines in (self._metrics, self._events):
            if lines is not None:
                lines.close()
        for mirror in self._mirrors:
            mirror.close()

    def abandon(self) -> None:
        """Close; a run that failed before its first figure or checkpoint is in nobody's way."""
        self.close()
        if dist.is_main() and not holds_run(self.folder):
            remove_run(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _open(self) -> None:
        run = self.config.run
        # An evaluation of a run that is there leaves what that run was made of.
        if not (run.evaluate and (self.folder / CONFIG_FILE).exists()):
            atomic.write_text(self.folder / CONFIG_FILE, dump(self.config))
        started = _write_environment(self.folder / ENV_FILE)
        self._metrics = Lines(self.folder / METRICS_FILE)
        self._events = Lines(self.folder / EVENTS_FILE)
        if run.tensorboard:
            self._mirrors.append(TensorBoard(self.folder / TENSORBOARD_FOLDER))
        if run.wandb:
            identity = f"{keyed.key(str(self.folder.resolve()), started):016x}"
            self._mirrors.append(WeightsAndBiases(self.folder, run.wandb, identity, plain(self.config)))


def _write_environment(path: Path) -> str:
    """Put the first start on top and later ones under `resumed`; returns the time of the first."""
    present = describe()
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
        first.setdefault("resumed", []).append(present)
    except (OSError, ValueError, AttributeError):
        first = present
    atomic.write_text(path, json.dumps(first, indent=2, ensure_ascii=False) + "\n")
    return str(first.get("started"))
