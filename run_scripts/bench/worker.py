"""One implementation of a training step in a process of its own; `harness.py` starts it and says when."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from run_scripts.bench.parts import Sizes

WORDS = (8, 20)
"""Fewest and most tokens of a text, without [CLS] and [SEP]."""
PAGE_BYTES = resource.getpagesize()
CLEAR_REFS = Path("/proc/self/clear_refs")


def batch_of(sizes: Sizes, rows: int, step: int) -> dict[str, Tensor]:
    """One step's image, text_ids and text_mask, padded to `text_length`; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(rows, 3, sizes.image_size, sizes.image_size, generator=generator)
    length = torch.randint(WORDS[0], WORDS[1] + 1, (rows, 1), generator=generator) + 2  # [CLS], [SEP]
    mask = torch.arange(sizes.text_length) < length
    ids = torch.randint(1, sizes.vocab - sizes.specials, mask.shape, generator=generator)
    return {"image": image, "text_ids": ids.masked_fill(~mask, 0), "text_mask": mask}


def to_longest(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What our loader makes of `batch_of`: texts padded to the longest, and the number of targets."""
    mask = batch["text_mask"]
    longest = int(mask.sum(dim=1).max())
    text = {key: batch[key][:, :longest] for key in ("text_ids", "text_mask")}
    return {"image": batch["image"], **text, "num_targets": int(mask.sum()) - len(mask)}


@dataclass(frozen=True)
class Bench:
    """What is measured: two ways of computing the same step."""

    name: str
    """Of the module in this folder that holds it as `BENCH`."""
    title: str
    sizes: Mapping[str, Any]
    """Name -> `Sizes`; `base` is the default on a CPU."""
    gpu_size: str
    """The default on a GPU."""
    gpu_batches: tuple[int, ...]
    naive: Callable[[Any, torch.dtype | None], nn.Module]
    """Sizes and a GPU's half precision -> the other model, called with the values of a batch."""
    library: Callable[[Any, torch.dtype | None], nn.Module]
    """The same -> the library's model."""
    to_ours: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]]
    """Sizes and weights of the other model -> the library's names."""
    flops: Callable[[Any, float], tuple[float, float]]
    """Sizes and tokens per text -> FLOPs per sample: of the other step, and what is needed."""
    other: str = "straightforward"
    """What the other one is called."""
    losses: tuple[str, ...] = ("loss_itc", "loss_itm", "loss_lm", "loss")
    """Of both models' output, to be compared."""
    batch: Callable[[Any, int, int], dict[str, Tensor]] = batch_of
    """Sizes, rows and number of a step -> what the other model is given; the same in every process."""
    for_ours: Callable[[dict[str, Tensor]], dict[str, Any]] = to_longest
    """The same batch -> what the library's model is given."""


class NaiveStep:
    """The other step; AdamW as torch makes it by default."""

    def __init__(self, bench: Bench, sizes: Any, device: torch.device, half: torch.dtype | None) -> None:
        torch.manual_seed(0)
        with device:
            model = bench.naive(sizes, half if device.type == "cuda" else None)
        self.model = model.to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]
        rest = [p for p in trained if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    def losses(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The losses of one batch."""
        return self.model(*(value.to(device) for value in batch.values()))

    def finish(self, output: dict[str, Tensor]) -> None:
        """Nothing is left to do."""


class LibraryStep:
    """The library's step, with the optimizer of its trainer."""

    def __init__(
        self, bench: Bench, sizes: Any, device: torch.device, half: torch.dtype | None, weights: str
    ) -> None:
        from blip.config.schema import RunConfig
        from blip.engine.optim import build_optimizer
        from blip.losses import argmax_sampler
        from blip.weights import load_into, read_weights

        self.for_ours = bench.for_ours
        with device:
            self.model: Any = bench.library(sizes, half if device.type == "cuda" else None)
        if weights:
            state = bench.to_ours(sizes, read_weights(weights))
            load_into(self.model, state, source=weights, allow_missing=["queue.ids"])
        self.model = self.model.to(device).train()
        self.model.negative_sampler = argmax_sampler
        self.optimizer = build_optimizer(self.model, RunConfig(init_lr=1e-4, weight_decay=0.05, max_iters=1))

    def losses(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The losses of one batch."""
        given = self.for_ours(batch)
        return self.model({k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()})

    def finish(self, output: dict[str, Tensor]) -> None:
        """What the trainer lets the model do after a step: momentum twin and queue."""
        self.model.after_step([output])


def work(args: argparse.Namespace) -> None:
    """Build, then read step numbers from standard input and answer each with time, losses and memory."""
    bench: Bench = importlib.import_module(f"run_scripts.bench.{args.bench}").BENCH
    sizes, device = bench.sizes[args.size], torch.device(args.device)
    runtime = peak_gb(device)
    half = torch.bfloat16 if args.precision == "bf16" else None
    step: Any
    if args.role == "naive":
        step = NaiveStep(bench, sizes, device, half)
        if args.weights:
            torch.save(step.model.state_dict(), args.weights)
    else:
        step = LibraryStep(bench, sizes, device, half, args.weights)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    answer({"gb": peak_gb(device), "device": name})
    forget_peak(device)
    for line in sys.stdin:
        try:
            result = timed_step(step, bench, bench.batch(sizes, args.batch, int(line)), device, half)
        except torch.OutOfMemoryError:
            answer({"out_of_memory": True})
            return
        answer(result | {"gb": peak_gb(device), "fixed_gb": runtime + states_gb(step)})


def timed_step(
    step: Any, bench: Bench, batch: dict[str, Tensor], device: torch.device, half: torch.dtype | None
) -> dict[str, Any]:
    """One optimizer step: wall and processor seconds, losses, norm of gradients, memory of what it adds."""
    synchronize(device)
    before = resident_gb(device)
    start, cpu = time.perf_counter(), time.process_time()
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        losses = step.losses(batch, device)
    forward = resident_gb(device) - before
    losses["loss"].backward()
    grads = [p.grad for p in step.model.parameters() if p.grad is not None]
    grads_gb = size_gb(grads)
    step.optimizer.step()
    synchronize(device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    norm = float(torch.stack([grad.float().norm() for grad in grads]).norm())  # not timed
    del grads
    start, start_cpu = time.perf_counter(), time.process_time()
    step.optimizer.zero_grad()
    step.finish(losses)
    synchronize(device)
    figures = {
        "seconds": seconds + time.perf_counter() - start,
        "cpu_seconds": cpu + time.process_time() - start_cpu,
        "forward_gb": forward,
        "grads_gb": grads_gb,
        "grad_norm": norm,
    }
    return figures | {name: float(losses[name].detach()) for name in bench.losses}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> float:
    """Peak of the allocator on a GPU, of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forget_peak(device: torch.device) -> None:
    """Let the peak be that of what follows, where the system can: to build and load is no part of a step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")


def resident_gb(device: torch.device) -> float:
    """What is held now; on a CPU where the system does not tell, the peak so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_gb(device)
    return int(statm.read_text().split()[1]) * PAGE_BYTES / 1e9


def states_gb(step: Any) -> float:
    """Weights, queues and the optimizer's moments, which stay from step to step."""
    moments = [value for state in step.optimizer.state.values() for value in state.values()]
    return size_gb([*step.model.parameters(), *step.model.buffers(), *moments])


def size_gb(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", help="module of this folder")
    parser.add_argument("role", choices=["naive", "blip"])
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument(
        "--weights", default="", help="file that `naive` writes its weights to and `blip` reads"
    )
    work(parser.parse_args())


if __name__ == "__main__":
    main()
