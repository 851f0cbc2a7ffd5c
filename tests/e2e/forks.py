"""A process that has imported everything once and forks a command at each request; importing takes seconds.

`python -m tests.e2e.forks` reads requests as lines of JSON and answers in kind:

    {"start": {"module", "argv", "env", "cwd", "log", "traps"}}   -> process id of the started command
    {"next": null}                                         -> [process id, exit code] of the next that ends

A trap is something done to the command from within, so that it happens at a moment that no outsider can hit.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

# Imported late by the commands; here once for all of them.
PRELOADED = (
    "blip.train",
    "blip.evaluate",
    "blip.capfilt.rounds",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch.utils.serialization.config",
    "torch._dynamo",
    "numpy.ctypeslib",
    "safetensors.torch",
    "tokenizers",
    "importlib.resources.readers",
    "encodings.utf_8_sig",
    "blip.models.blip2_qformer",
    "blip.processors.image",
    "blip.processors.text",
    "blip.tasks.pretrain",
)


def serve() -> None:
    """Answer requests until there are no more."""
    for name in PRELOADED:
        importlib.import_module(name)
    Image.init()
    gc.freeze()  # collections in children then leave alone, and so share, what is loaded
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                _become(**request["start"])
            answer: Any = pid
        else:
            pid, status = os.waitpid(-1, 0)
            answer = [pid, os.waitstatus_to_exitcode(status)]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become(
    module: str, argv: list[str], env: dict[str, str], cwd: str, log: str, traps: list[list[Any]]
) -> NoReturn:
    """Run a command, in a process group of its own, as `python -m module *argv` would."""
    os.setpgid(0, 0)  # so that what it leaves behind can be found
    with open(os.devnull) as nothing, open(log, "a") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *argv]
    for name, *arguments in traps:
        globals()[name](*arguments)
    code = importlib.import_module(module).main(argv)
    # What the end of an interpreter does, without taking apart all modules, which takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Traps


def die_at(target: str, call: int, moment: str) -> None:
    """SIGKILL in the `call`-th call of `target`, a dotted name: `before` it, `after`, or `half` way.

    Half way means that the file it has written, its last Path argument, has lost its end.
    """
    signal_at(target, call, moment, signal.SIGKILL)


def signal_at(target: str, call: int, moment: str, number: int) -> None:
    """The same with another signal."""
    calls = 0

    def hit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and moment == "before":
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if calls == call and moment == "half":
            _cut([arg for arg in args if isinstance(arg, Path)][-1])
        if calls == call and moment in ("half", "after"):
            os.kill(os.getpid(), number)
        return result

    wrap(target, hit)


def die_within_line(call: int) -> None:
    """SIGKILL when half of the `call`-th line of metrics or events is on the disk."""
    calls = 0

    def hit(function: Callable[..., Any], lines: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        function(lines, *args)
        if calls == call:
            _cut(lines.path, 20)
            os.kill(os.getpid(), signal.SIGKILL)

    wrap("blip.engine.run_folder.Lines.put", hit)


def dump_gradients(folder: str) -> None:
    """Save the gradients of every optimizer step, before clipping, as `step-N-rank-R.pt`."""
    import torch

    from blip import dist

    step = 0

    def hit(function: Callable[..., Any], parallel: Any, parameters: Any, *args: Any) -> Any:
        nonlocal step
        step += 1
        parameters = list(parameters)
        grads = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
        torch.save(grads, Path(folder) / f"step-{step}-rank-{dist.rank()}.pt")
        return function(parallel, parameters, *args)

    wrap("blip.engine.parallel.Parallel.clip_grads", hit)


def poison(first: int, last: int) -> None:
    """Make the pictures of optimizer steps `first` to `last`, from 0, not a number."""

    def hit(function: Callable[..., Any], loader: Any) -> Any:
        batch = function(loader)
        if first <= batch["step"] <= last:
            batch["image_norm"] = batch["image_norm"] * float("nan")
        return batch

    wrap("blip.data.loader.TrainLoader.__next__", hit)


def slow_clock(factor: float) -> None:
    """Let `time.monotonic` run so many times faster, so that minutes pass in a short run."""
    import time

    original = time.monotonic
    time.monotonic = lambda: factor * original()


def dump_weights(folder: str) -> None:
    """Save the model's weights after every optimizer step, as `step-N.pt`."""
    import torch

    def hit(function: Callable[..., Any], runner: Any, batches: Any) -> Any:
        result = function(runner, batches)
        torch.save(runner.model.state_dict(), Path(folder) / f"step-{runner.progress.step}.pt")
        return result

    wrap("blip.engine.runner.Runner.train_step", hit)


def wrap(target: str, hit: Callable[..., Any]) -> None:
    """Replace `target`, a dotted name, by `hit(original, ...)` in this process."""
    place, name = target.rsplit(".", 1)
    owner = _find(place)
    original = getattr(owner, name)
    command = os.getpid()

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != command:  # a loader process, which has inherited the trap
            return original(*args, **kwargs)
        return hit(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _find(dotted: str) -> Any:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        place, name = dotted.rsplit(".", 1)
        return getattr(_find(place), name)


def _cut(path: Path, count: int | None = None) -> None:
    size = path.stat().st_size
    os.truncate(path, size - count if count is not None else size // 2)


if __name__ == "__main__":
    serve()
    os._exit(0)
