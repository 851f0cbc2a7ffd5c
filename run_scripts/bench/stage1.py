"""Speed and memory of our stage-1 training step beside a straightforward one, in one run on one machine.

    python run_scripts/bench/stage1.py                    base size on the CPU: ViT-B/16, Q-Former 12 x 768
    python run_scripts/bench/stage1.py --size small       seconds instead of minutes
    python run_scripts/bench/stage1.py --precision bf16   our step in bfloat16 as well
    python run_scripts/bench/stage1.py --device cuda      paper size, ViT-g/14: samples/s, MFU, memory

Every implementation runs in a process of its own, so that its peak memory is its own. On a CPU the processes
take turns step by step, so that whatever else the machine does falls on all of them. Both start from the same
weights, see the same batches (captions of 8 to 20 words; ours padded to the longest of the batch, the other's
to 32) and take the same hard negatives; their losses must agree, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from run_scripts.bench import roofline
from run_scripts.bench.naive_stage1 import Sizes
from run_scripts.bench.steps import LOSSES, SIZES, WORDS

WORKER = Path(__file__).with_name("steps.py")
TOLERANCE = 1e-4
"""Relative difference of losses in fp32 that is rounding."""


class Process:
    """One implementation in a process of its own."""

    def __init__(self, role: str, precision: str, rows: int, weights: str, args: argparse.Namespace) -> None:
        self.title = f"{'straightforward' if role == 'naive' else 'blip'} {precision}"
        command = [sys.executable, str(WORKER), role, "--precision", precision, "--size", args.size]
        command += ["--device", args.device, "--batch", str(rows), "--weights", weights]
        environment = dict(os.environ)
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
            "first_losses": {name: self.steps[0][name] for name in LOSSES},
            "last_losses": {name: self.steps[-1][name] for name in LOSSES},
        }


def paired_ratio(slow: Process, fast: Process, key: str, warmup: int) -> float:
    """Median over the steps of how much longer `slow` took than `fast` in the same turn."""
    pairs = zip(slow.steps[warmup:], fast.steps[warmup:], strict=True)
    return median(a[key] / b[key] for a, b in pairs)


def on_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """All implementations take turns; the order changes from step to step."""
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pth")
        processes = [Process("naive", "fp32", args.batch[0], weights, args)]
        processes += [
            Process("blip", precision, args.batch[0], weights, args)
            for precision in dict.fromkeys(("fp32", args.precision))
        ]
        for number in range(args.warmup + args.steps):
            for process in processes if number % 2 else reversed(processes):
                process.step(number)
    for process in processes:
        process.close()
    rows = [process.summary(args.batch[0], args.warmup) for process in processes]
    naive, ours = processes[:2]
    difference = max(abs(ours.steps[0][n] - naive.steps[0][n]) / abs(naive.steps[0][n]) for n in LOSSES)
    return {
        "rows": rows,
        "speed": paired_ratio(naive, ours, "seconds", args.warmup),
        "cpu_speed": paired_ratio(naive, ours, "cpu_seconds", args.warmup),
        "memory": rows[1]["peak_gb"] / rows[0]["peak_gb"],
        "step_memory": beyond(rows[1]) / beyond(rows[0]),
        "loss_difference": difference,
        "equal_losses": difference <= TOLERANCE,
    }


def beyond(row: dict[str, Any]) -> float:
    """Peak memory without the runtime, the weights and the optimizer's moments: activations and gradients."""
    return row["peak_gb"] - row["fixed_gb"]


def on_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """One process after the other, for every batch size."""
    rows, device = [], ""
    for batch in args.batch:
        for role in ("naive", "blip") if args.twin else ("blip",):
            process = Process(role, args.precision, batch, "", args)
            for number in range(args.warmup + args.steps):
                process.step(number)
            process.close()
            device = process.start["device"]
            rows.append(process.summary(batch, args.warmup))
    peak = args.peak_tflops * 1e12 if args.peak_tflops else roofline.peak_flops(device)
    return {"rows": rows, "device": device, "peak_flops": peak}


def flops(sizes: Sizes) -> dict[str, float]:
    """FLOPs per sample: of the straightforward step, and of what is needed for texts of mean length."""
    text = sum(WORDS) / 2 + 2
    return {
        "straightforward": roofline.straightforward(sizes),
        "lean": roofline.lean(sizes, text, text - 1),
    }


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The table, then the ratios."""
    costs = result["flops"]
    print(f"stage 1, size {args.size}, {args.device}, {args.steps} steps after {args.warmup} of warm-up")
    print(
        f"FLOPs per sample: {costs['straightforward'] / 1e9:.1f} G straightforward,"
        f" {costs['lean'] / 1e9:.1f} G needed ({costs['straightforward'] / costs['lean']:.2f}x)"
    )
    heads = (
        f"{'batch':>6}{'samples/s':>11}{'s/step':>9}{'CPU s/step':>12}{'peak GB':>9}{'fixed':>7}{'MFU':>8}"
    )
    print(" " * 22 + heads)
    for row in result["rows"]:
        if "seconds" not in row:
            print(f"{row['title']:22}{row['batch']:6}  out of memory")
            continue
        used = ""
        if result.get("peak_flops"):
            used = f"{100 * costs['lean'] * row['samples_per_s'] / result['peak_flops']:.1f} %"
        print(
            f"{row['title']:22}{row['batch']:6}{row['samples_per_s']:11.2f}{row['seconds']:9.3f}"
            f"{row['cpu_seconds']:12.3f}{row['peak_gb']:9.2f}{row['fixed_gb']:7.2f}{used:>8}"
        )
    if "speed" in result:
        print(
            f"blip fp32 against straightforward fp32: {result['speed']:.2f}x samples/s (processor time"
            f" {result['cpu_speed']:.2f}x), {result['memory']:.2f}x peak memory ({result['step_memory']:.2f}x"
            " beyond runtime, weights and optimizer), losses"
            f" {'equal' if result['equal_losses'] else 'DIFFERENT'} (largest relative difference"
            f" {result['loss_difference']:.1e})"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="default: base, or paper on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: fp32, or bf16 on a GPU")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 8, or 64 128 256 on a GPU")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, help="threads per process; default: torch's")
    parser.add_argument("--twin", action="store_true", help="run the straightforward step on the GPU, too")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU; default: its nominal bf16 peak")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.size = args.size or ("paper" if gpu else "base")
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    args.batch = args.batch or ([64, 128, 256] if gpu else [8])
    return args


def main() -> int:
    """Exit code 1 where losses that should be equal are not."""
    args = arguments()
    result = on_gpu(args) if args.device == "cuda" else on_cpu(args)
    result["flops"] = flops(SIZES[args.size])
    report(result, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result.get("equal_losses", True) else 1


if __name__ == "__main__":
    sys.exit(main())
