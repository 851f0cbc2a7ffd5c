"""How processes share the work: who takes which unit, and how far all of them have come."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import TracebackType

from blip import dist
from blip.atomic import PARTIAL
from blip.engine.display import Display
from blip.together import on_main

SHOWN_EVERY_S = 10.0


class Claims:
    """Who does what, as files in a folder that all ranks see; entered and left by all ranks together.

    What a killed run has claimed and not finished is free again.

    Args:
        folder: where to put them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / f"{PARTIAL}claims"

    def __enter__(self) -> Claims:
        on_main(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            dist.barrier()
            on_main(lambda: shutil.rmtree(self._folder, ignore_errors=True))

    def take(self, name: str) -> bool:
        """Whether this process is the one to do it."""
        try:
            os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _begin(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)


class Progress:
    """How far this process has come, as a part of all pictures; the others are taken to be as fast.

    Args:
        total: pictures of all processes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.before = self.done = 0
        self._shown = self._began = time.monotonic()
        self._display: Display | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._display is not None:
            self._display.close()

    def skip(self, count: int) -> None:
        """Told of pictures that were done before."""
        self.before += count

    def add(self, count: int) -> None:
        """Told of pictures that have been done now."""
        self.done += count
        if not dist.is_main():
            return
        if self._display is None:
            self._display = Display(self.total, self.before, unit="picture")
        now, at = time.monotonic(), min(self.before + self.done * dist.world_size(), self.total)
        self._display.step(at)
        if now - self._shown > SHOWN_EVERY_S:
            self._shown = now
            rate = self.done * dist.world_size() / (now - self._began)
            self._display.figures({"step": at, "samples_per_s": rate})
