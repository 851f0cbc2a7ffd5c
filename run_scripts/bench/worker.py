"""One implementation of a training step in a process of its own; `harness.py` starts it and says when."""

from __future__ import annotations

import argparse
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
LOSSES = ("loss_itc", "loss_itm", "loss_lm", "loss")
PAGE_BYTES = resource.getpagesize()


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
    """Sizes and a GPU's half precision -> the straightforward model, which takes image, ids and mask."""
    library: Callable[[Any, torch.dtype | None], nn.Module]
    """The same -> the library's model."""
    to_ours: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]]
    """Sizes and weights of the straightforward model -> the library's names."""
    flops: Callable[[Any, float], tuple[float, float]]
    """Sizes and tokens per text -> FLOPs per sample: of the straightforward step, and what is needed."""


def batch_of(sizes: Sizes, rows: int, step: int) -> dict[str, Tensor]:
    """One step's image, text_ids and text_mask, padded to `text_length`; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(rows, 3, sizes.image_size, sizes.image_size, generator=generator)
    length = torch.randint(WORDS[0], WORDS[1] + 1, (rows, 1), generator=generator) + 2  # [CLS], [SEP]
    mask = torch.arange(sizes.text_length) < length
    ids = torch.randint(1, sizes.vocab - sizes.specials, mask.shape, generator=generator)
    return {"image": image, "text_ids": ids.masked_fill(~mask, 0), "text_mask": mask}


class NaiveStep:
    """The straightforward step; AdamW as torch makes it by default."""

    def __init__(self, bench: Bench, sizes: Any, device: torch.device, half: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.model = bench.naive(sizes, half if device.type == "cuda" else None).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]
        rest = [p for p in trained if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    def losses(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The losses of one batch."""
        return self.model(*(batch[key].to(device) for key in ("image", "text_ids", "text_mask")))

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

        self.model: Any = bench.library(sizes, half if device.type == "cuda" else None)
        if weights:
            state = bench.to_ours(sizes, read_weights(weights))
            load_into(self.model, state, source=weights, allow_missing=["queue.ids"])
        self.model = self.model.to(device).train()
        self.model.negative_sampler = argmax_sampler
        self.optimizer = build_optimizer(self.model, RunConfig(init_lr=1e-4, weight_decay=0.05, max_iters=1))

    def losses(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The losses of one batch, with texts padded to the longest, as the loader does it."""
        mask = batch["text_mask"]
        longest, num_targets = int(mask.sum(dim=1).max()), int(mask.sum()) - len(mask)
        text = {key: batch[key][:, :longest].to(device) for key in ("text_ids", "text_mask")}
        return self.model({"image": batch["image"].to(device), **text, "num_targets": num_targets})

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
    for line in sys.stdin:
        try:
            result = timed_step(step, batch_of(sizes, args.batch, int(line)), device, half)
        except torch.OutOfMemoryError:
            answer({"out_of_memory": True})
            return
        answer(result | {"gb": peak_gb(device), "fixed_gb": runtime + states_gb(step)})


def timed_step(
    step: Any, batch: dict[str, Tensor], device: torch.device, half: torch.dtype | None
) -> dict[str, Any]:
    """One optimizer step: wall and processor seconds, losses, memory of what it adds."""
    synchronize(device)
    before = resident_gb(device)
    start, cpu = time.perf_counter(), time.process_time()
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        losses = step.losses(batch, device)
    forward = resident_gb(device) - before
    losses["loss"].backward()
    grads = size_gb(p.grad for p in step.model.parameters() if p.grad is not None)
    step.optimizer.step()
    step.optimizer.zero_grad()
    step.finish(losses)
    synchronize(device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    figures = {"seconds": seconds, "cpu_seconds": cpu, "forward_gb": forward, "grads_gb": grads}
    return figures | {name: float(losses[name].detach()) for name in LOSSES}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> float:
    """Peak of the allocator on a GPU, of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
