"""Commands that stand on each other's results, as many at once as the machine has cores.

What is finished leaves `NAME.done` beside its folder and is not done again; what was stopped goes on where it
was, as `run.resume=auto` does. `NAME.log` has what the commands print.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other and fill one folder."""

    folder: Path
    commands: tuple[tuple[str, ...], ...]
    """What each is, behind `python`."""
    needs: tuple[Job, ...] = ()

    @property
    def name(self) -> str:
        """Whom it is about: kind and seed."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def mark(self) -> Path:
        """File that says what was done, once it is."""
        return self.folder.with_name(f"{self.folder.name}.done")

    @property
    def unfinished(self) -> Path:
        """File with the seconds that were spent so far, if it was stopped."""
        return self.folder.with_name(f"{self.folder.name}.seconds")

    @property
    def log(self) -> Path:
        """File with what the commands print."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def finished(self) -> bool:
        """Whether it has been done.

        Raises:
            ValueError: by other commands.
        """
        done = self._done()
        if done is not None and done["commands"] != [list(one) for one in self.commands]:
            raise ValueError(f"{self.mark}: this run was made by other commands; choose another --output")
        return done is not None

    def minutes(self) -> float:
        """How long it took; 0 as long as it is not finished."""
        done = self._done()
        return 0.0 if done is None else done["seconds"] / 60

    def spent(self) -> float:
        """Seconds that went into it before it was stopped."""
        return float(self.unfinished.read_text()) if self.unfinished.is_file() else 0.0

    def _done(self) -> dict[str, Any] | None:
        return json.loads(self.mark.read_text(encoding="utf-8")) if self.mark.is_file() else None


def with_needs(jobs: Iterable[Job]) -> list[Job]:
    """These jobs and all that they stand on, each once, what is needed first."""
    found: dict[Job, None] = {}

    def visit(job: Job) -> None:
        if job not in found:
            for one in job.needs:
                visit(one)
            found[job] = None

    for job in jobs:
        visit(job)
    return list(found)


class Runner:
    """Runs jobs, the ones that most others wait for first.

    Args:
        workers: how many at once; each has the threads that are its share of the cores.
        say: takes lines about the progress.
        lock: file descriptor that the commands keep open, so that a lock on it lasts as long as any of them.
    """

    def __init__(self, workers: int, say: Callable[[str], None] = print, lock: int | None = None) -> None:
        self.workers, self.say, self._lasting = workers, say, () if lock is None else (lock,)
        threads = max(len(os.sched_getaffinity(0)) // workers, 1)
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        python = os.environ.get("BLIP_PYTHON") or sys.executable
        self.python = str(Path(python).absolute()) if os.sep in python else python
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Condition()
        self._began: dict[Job, float] = {}
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Run what is not finished; returns what failed, or stands on what did."""
        waiting = dict.fromkeys(job for job in jobs if not job.finished()).keys()
        order = sorted(waiting, key=_weights(jobs).__getitem__, reverse=True)
        total, running, failed = len(waiting), set[Job](), set[Job]()
        done = {job for job in jobs if job not in waiting}
        if done:
            self.say(f"{len(done)} of {len(jobs)} runs are finished")

        def work(job: Job) -> None:
            began = time.monotonic()
            try:
                good, why = self._carry_out(job), f"see {job.log}"
            except OSError as error:
                good, why = False, str(error)
            with self._lock:
                running.discard(job)
                (done if good else failed).add(job)
                took = f"{(time.monotonic() - began) / 60:.1f} min"
                told = took if good else f"FAILED; {why}"
                if good or not self._stopped:
                    self.say(f"[{len(done & waiting) + len(failed)}/{total}] {job.name}: {told}")
                self._lock.notify_all()

        with self._lock:
            try:
                while waiting_now := [job for job in order if job not in running | done | failed]:
                    lost = [job for job in waiting_now if failed.intersection(job.needs)]
                    failed.update(lost)
                    ready = [job for job in waiting_now if job not in lost and done.issuperset(job.needs)]
                    for job in ready[: self.workers - len(running)]:
                        running.add(job)
                        threading.Thread(target=work, args=(job,), daemon=True).start()
                    if not lost:
                        self._lock.wait(1.0)
                while running:
                    self._lock.wait(1.0)
            except BaseException:
                self._stopped = True  # the lock is held: no other starts
                for child in self._children:
                    child.send_signal(signal.SIGTERM)
                for child in self._children:
                    child.wait()
                for job in running:
                    if job in self._began:
                        self._note(job)
                raise
        return [job for job in jobs if job in failed]

    def _carry_out(self, job: Job) -> bool:
        """Run its commands; whether all went well.

        Raises:
            OSError: a file cannot be written, or there is no such Python.
        """
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        self._began[job] = time.monotonic() - job.spent()
        if not self._commands(job):
            with self._lock:
                if not self._stopped:  # a stop has noted it, or is about to
                    self._note(job)
            return False
        done = {"commands": job.commands, "seconds": round(time.monotonic() - self._began[job], 1)}
        write_text(job.mark, json.dumps(done, indent=1))
        return True

    def _note(self, job: Job) -> None:
        """Keep how long it has taken so far."""
        write_text(job.unfinished, f"{time.monotonic() - self._began[job]:.3f}\n")

    def _commands(self, job: Job) -> bool:
        with job.log.open("ab") as log:
            for command in job.commands:
                log.write(f"$ python {shlex.join(command)}\n".encode())
                log.flush()
                with self._lock:
                    if self._stopped:
                        return False
                    child = subprocess.Popen(
                        [self.python, *command],
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=self.environment,
                        pass_fds=self._lasting,
                    )
                    self._children.add(child)
                code = child.wait()
                with self._lock:
                    self._children.discard(child)
                if code:
                    return False
        return True


def _weights(jobs: Sequence[Job]) -> dict[Job, int]:
    """How many jobs stand on each, and on those that stand on it."""
    behind: dict[Job, set[Job]] = {job: set() for job in jobs}
    for job in reversed(jobs):
        for one in job.needs:
            behind[one] |= {job} | behind[job]
    return {job: len(some) for job, some in behind.items()}
