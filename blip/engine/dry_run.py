"""`--dry-run`: one optimizer step per objective and one evaluation, to see that everything fits."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip import dist
from blip.batch import Output
from blip.engine.runner import Runner


def dry_run(runner: Runner) -> None:
    """Print the sizes of the model and of a batch, each objective after a step of its own, scores, memory."""
    _print_model(runner.model)
    if runner.trains:
        batches = next(runner.loader.steps())
        runner.loader.close()
        _print_batch(dict(batches[0]))
        for name, value, norm in _steps(runner, [dict(batch) for batch in batches]):
            _print(f"{name:<12} {value:.4f}, gradient norm {norm:.4f}")
    for split, datasets in runner.evaluations.items():
        for data in datasets:
            scores = runner.evaluate_on(data).metrics()
            shown = "  ".join(f"{k} {v:.2f}" for k, v in scores.items())
            _print(f"{split} of {data.name}, first {len(data)}: {shown}")
    _print(f"peak memory  {_peak_memory(runner.parallel.device) / 2**30:.2f} GiB")


def _steps(runner: Runner, batches: list[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """One optimizer step for each loss by itself, the sum first.

    Losses that are left out at first, while a part is still trained, come after those.
    """
    figures = runner.train_step(batches)
    yield "loss", float(figures["loss"]), float(figures["grad_norm"])
    moved = runner.on_device(batches)[0]
    done: set[str] = set()
    for name in _losses(runner, moved):
        done.add(name)
        yield _step(runner, moved, name)
    if runner.model.idle_parameters() and runner.model.on_step(sys.maxsize):
        for name in _losses(runner, moved):
            if name not in done:
                yield _step(runner, moved, name)


def _losses(runner: Runner, batch: dict[str, Any]) -> list[str]:
    with torch.no_grad(), runner.parallel.autocast():
        return [name for name in runner.task.train_step(runner.model, batch) if name.startswith("loss_")]


def _step(runner: Runner, batch: dict[str, Any], name: str) -> tuple[str, float, float]:
    with runner.parallel.autocast():
        output: Output = runner.task.train_step(runner.model, batch)
    output[name].backward()
    runner.parallel.average_grads(runner.model.parameters())
    norm = runner.parallel.clip_grads(runner.model.parameters(), runner.config.max_grad_norm)
    runner.optimizer.step()
    runner.optimizer.zero_grad(set_to_none=True)
    return name, float(output[name].detach()), float(norm)


def _print_model(model: Any) -> None:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _print(f"parameters   {total / 1e6:.2f} M, of which {trained / 1e6:.2f} M train")
    for name, part in model.named_children():
        _print(f"  {name:<12} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M")


def _print_batch(batch: dict[str, Any]) -> None:
    for name, value in batch.items():
        if isinstance(value, Tensor):
            _print(f"batch.{name:<12} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)
