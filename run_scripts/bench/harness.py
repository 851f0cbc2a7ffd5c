"""Runs two implementations of one training step, `Bench`, beside each other and compares time and memory.

Every implementation runs in a process of its own (`worker.py`), so that its peak memory is its own. On a CPU
the processes take turns step by step, so that whatever else the machine does falls on all of them. All start
from the same weights, see the same batches (captions of 8 to 20 words; in stage 1 and BLIP's pre-training
ours are padded to the longest of the batch, the other's to a fixed length) and take the same hard negatives.
Their losses and the norm of their gradient must agree, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from run_scripts.bench import roofline
from run_scripts.bench.worker import WORDS, Bench

WORKER = Path(__file__).with_name("worker.py")
TOLERANCE = 1e-5
"""Relative difference of losses in fp32 that is rounding."""
GRADIENT_TOLERANCE = 1e-4
"""The same of the norm of the gradient."""
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Lets glibc give freed memory back to the system at once."""


class Process:
    """One implementation in a process of its own."""

    def __init__(
        self, bench: Bench, role: str, precision: str, rows: int, weights: str, args: argparse.Namespace
    ) -> None:
        self.title = f"{bench.other if role == 'naive' else 'blip'} {precision}"
        self.losses = bench.losses
        command = [sys.executable, str(WORKER), bench.name, role, "--precision", precision]
        command += ["--size", args.size, "--device", args.device, "--batch", str(rows), "--weights", weights]
        environment = os.environ | (RETURN_MEMORY if args.return_memory else {})
        if args.threads:
            environment["OMP_NUM_THREADS"] = str(args.threads)
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.start = self._read()
        self.steps: list[dict[str, Any]] = []
        self.full = False

    def step(self, number: int) -> None:
        """One optimizer step; does nothing once the GPU's memory did not suffice."""
        if self.full:
            return
        assert self.child.stdin is not None
        print(number, file=self.child.stdin, flush=True)
        result = self._read()
        self.full = "out_of_memory" in result
        if not self.full:
            self.steps.append(result)

    def close(self) -> None:
        """Let the process end."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.title!r} ended early (exit code {self.child.wait()})")
        return json.loads(line)

    def summary(self, rows: int, warmup: int) -> dict[str, Any]:
        """Medians over the steps after the warm-up."""
        steps = self.steps[warmup:]
        if self.full or not steps:
            return {"title": self.title, "batch": rows, "out_of_memory": self.full}
        seconds = median(step["seconds"] for step in steps)
        return {
            "title": self.title,
            "batch": rows,
            "samples_per_s": rows / seconds,
            "seconds": seconds,
            "cpu_seconds": median(step["cpu_seconds"] for step in steps),
            "peak_gb": self.steps[-1]["gb"],
            "fixed_gb": self.steps[-1]["fixed_gb"],
            "grads_gb": self.steps[-1]["grads_gb"],
            "forward_gb": max(step["forward_gb"] for step in steps),
            "grad_norm": self.steps[0]["grad_norm"],
            "first_losses": {name: self.steps[0][name] for name in self.losses},
            "last_losses": {name: self.steps[-1][name] for name in self.losses},
        }


def paired_ratio(slow: Process, fast: Process, key: str, warmup: int) -> float:
    """Median over the steps of how much longer `slow` took than `fast` in the same turn."""
    pairs = zip(slow.steps[warmup:], fast.steps[warmup:], strict=True)
    return median(a[key] / b[key] for a, b in pairs)


def on_cpu(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All implementations, in turns or one after the other."""
    kinds = [("naive", "fp32")] + [("blip", kind) for kind in dict.fromkeys(("fp32", args.precision))]
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pth")
        starts = [partial(Process, bench, *kind, args.batch[0], weights, args) for kind in kinds]
        processes: list[Process] = []
        for group in [[start] for start in starts] if args.apart else [starts]:
            processes += in_turns([start() for start in group], args.warmup + args.steps)
    rows = [process.summary(args.batch[0], args.warmup) for process in processes]
    naive, ours = processes[:2]
    difference = {
        name: abs(ours.steps[0][name] - naive.steps[0][name]) / abs(naive.steps[0][name])
        for name in (*bench.losses, "grad_norm")
    }
    of_gradient = difference.pop("grad_norm")
    of_losses = max(difference.values())
    return {
        "rows": rows,
        "speed": paired_ratio(naive, ours, "seconds", args.warmup),
        "cpu_speed": paired_ratio(naive, ours, "cpu_seconds", args.warmup),
        "memory": rows[1]["peak_gb"] / rows[0]["peak_gb"],
        "step_memory": share(beyond(rows[1]), beyond(rows[0])),
        "forward_memory": share(rows[1]["forward_gb"], rows[0]["forward_gb"]),
        "loss_difference": of_losses,
        "gradient_difference": of_gradient,
        "equal_losses": of_losses <= TOLERANCE,
        "equal_gradients": of_gradient <= GRADIENT_TOLERANCE,
    }


def in_turns(processes: list[Process], steps: int) -> list[Process]:
    """Step by step, in an order that changes from step to step."""
    for number in range(steps):
        for process in processes if number % 2 else reversed(processes):
            process.step(number)
    for process in processes:
        process.close()
    return processes


def beyond(row: dict[str, Any]) -> float:
    """Peak memory beyond what every step needs: runtime, weights, queues, moments, gradients."""
    return row["peak_gb"] - row["fixed_gb"] - row["grads_gb"]


def share(part: float, whole: float) -> float | None:
    """How much of `whole` `part` is; nothing to be said where a small model's step took no further page."""
    return part / whole if whole > 0 else None


def times(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{ratio:.2f}x"


def on_gpu(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """One process after the other, for every batch size."""
    rows, device = [], ""
    for batch in args.batch:
        for role in ("naive", "blip") if args.twin else ("blip",):
            process = Process(bench, role, args.precision, batch, "", args)
            for number in range(args.warmup + args.steps):
                process.step(number)
            process.close()
            device = process.start["device"]
            rows.append(process.summary(batch, args.warmup))
    peak = args.peak_tflops * 1e12 if args.peak_tflops else roofline.peak_flops(device)
    return {"rows": rows, "device": device, "peak_flops": peak}


def report(bench: Bench, result: dict[str, Any], args: argparse.Namespace) -> None:
    """The table, then the ratios."""
    costs = result["flops"]
    steps = f"{args.steps} steps after {args.warmup} of warm-up"
    print(f"{bench.title}, size {args.size}, {args.device}: {steps}")
    print(
        f"FLOPs per sample: {costs['straightforward'] / 1e9:.1f} G {bench.other},"
        f" {costs['lean'] / 1e9:.1f} G needed ({costs['straightforward'] / costs['lean']:.2f}x)"
    )
    heads = ("batch", "samples/s", "s/step", "CPU s/step", "peak GB", "fixed", "gradients", "forward", "MFU")
    print(" " * 22 + "".join(f"{head:>{len(head) + 2}}" for head in heads))
    for row in result["rows"]:
        if "seconds" not in row:
            print(f"{row['title']:22}{row['batch']:7}  out of memory")
            continue
        used = ""
        if result.get("peak_flops"):
            used = f"{100 * costs['lean'] * row['samples_per_s'] / result['peak_flops']:.0f}%"
        print(
            f"{row['title']:22}{row['batch']:7}{row['samples_per_s']:11.2f}{row['seconds']:8.3f}"
            f"{row['cpu_seconds']:12.3f}{row['peak_gb']:9.2f}{row['fixed_gb']:7.2f}{row['grads_gb']:11.2f}"
            f"{row['forward_gb']:9.2f}{used:>5}"
        )
    print("fixed: runtime, weights, queues, moments; forward: what the forward pass leaves beyond them")
    if "speed" in result:
        memory = f"{times(result['memory'])} peak memory"
        memory += f", {times(result['step_memory'])} beyond fixed and gradients"
        if args.return_memory:
            memory += f", {times(result['forward_memory'])} after the forward pass"
        print(
            f"blip fp32 against {bench.other} fp32: {result['speed']:.2f}x samples/s (processor time"
            f" {result['cpu_speed']:.2f}x); {memory}; losses"
            f" {'equal' if result['equal_losses'] else 'DIFFERENT'} (largest relative difference"
            f" {result['loss_difference']:.1e}), norm of the gradient"
            f" {'equal' if result['equal_gradients'] else 'DIFFERENT'} ({result['gradient_difference']:.1e})"
        )


def arguments(bench: Bench, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=bench.sizes, help=f"default: base, or {bench.gpu_size} on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: fp32, or bf16 on a GPU")
    batches = " ".join(map(str, bench.gpu_batches))
    parser.add_argument("--batch", type=int, nargs="+", help=f"default: 8, or {batches} on a GPU")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, help="threads per process; default: torch's")
    parser.add_argument("--twin", action="store_true", help=f"run the {bench.other} step on the GPU, too")
    parser.add_argument("--apart", action="store_true", help="one after the other, to save memory")
    parser.add_argument("--return-memory", action="store_true", help="freed memory goes back at once (glibc)")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU; default: its nominal bf16 peak")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.size = args.size or (bench.gpu_size if gpu else "base")
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    args.batch = args.batch or (list(bench.gpu_batches) if gpu else [8])
    return args


def run(bench: Bench, description: str) -> int:
    """The command line; exit code 1 where losses or gradients that should be equal are not."""
    args = arguments(bench, description)
    result = (on_gpu if args.device == "cuda" else on_cpu)(bench, args)
    straightforward, lean = bench.flops(bench.sizes[args.size], sum(WORDS) / 2 + 2)
    result["flops"] = {"straightforward": straightforward, "lean": lean}
    report(bench, result, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result.get("equal_losses", True) and result.get("equal_gradients", True) else 1
