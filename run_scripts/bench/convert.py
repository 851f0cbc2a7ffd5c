"""Memory and time of `blip convert` beside loading the whole model, in one run on one machine.

    python run_scripts/bench/convert.py                    600 MB of weights in shards of 100 MB
    python run_scripts/bench/convert.py --size 120 --shard 25
    python run_scripts/bench/convert.py --to lavis         only what is written as LAVIS's .pth

A BLIP-2 of stage 1 with random weights and few, wide layers is converted from every layout into every other.
The other way is what one would do without the command: load the model (`blip.from_pretrained`), and write it
(`save_pretrained`, `to_hf` and transformers' `save_pretrained`, `torch.save`). Each conversion has a process
of its own, which has converted a tiny model before, so that what is counted is what the weights need:
the highest resident memory (anonymous pages and mapped files) beyond that at the start. Both must write the
same tensors, or the exit code is 1, and so it is where `blip convert` takes more than 1.3 x the largest shard
of the folder it reads or writes. A file in the format before torch 1.6 (`legacy`) cannot be mapped, and is a
shard itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import blip
from blip.convert import convert
from blip.formats import lavis
from blip.weights import read_weights, save_shards

MB = 1_000_000
MOST = 1.3
"""Of the largest shard."""
ARCH = "blip2_image_text_matching"
BLOCK = 28.4 * MB
"""Of the tower below."""
SIZES: dict[str, Any] = {
    "vit_model": "eva_clip_g",
    "vit_precision": "fp32",
    "image_size": 16,
    "vit": {"patch_size": 8, "width": 768, "depth": 20, "heads": 12, "mlp_dim": 3072},
    "num_query_token": 3,
    "qformer": {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24, "max_positions": 40},
    "embed_dim": 8,
    "tokenizer": "scenes",
    "vocab_size": None,
}
WAYS = (
    ("blip", "hf"),
    ("hf", "blip"),
    ("hf", "lavis"),
    ("blip", "lavis"),
    ("lavis", "blip"),
    ("lavis", "hf"),
    ("legacy", "blip"),
)
"""(from, to)."""


def sizes(megabytes: float) -> dict[str, Any]:
    """Configuration of a model with about so many megabytes of weights."""
    return {**SIZES, "vit": {**SIZES["vit"], "depth": max(1, round(megabytes * MB / BLOCK))}}


def make(folder: Path, megabytes: float, shard_bytes: int) -> Path:
    """Our folder of a model with random weights."""
    torch.manual_seed(0)
    model = blip.load_model(ARCH, pretrained=False, **sizes(megabytes))
    folder.mkdir(parents=True)
    save_shards(model.state_dict(), folder, shard_bytes)
    model.describe(folder, {})
    return folder


def needed(action: Callable[[], Any]) -> tuple[int, float]:
    """Bytes of resident memory at the highest, beyond those at the start; and seconds."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not be counted
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before, start = _status("VmRSS"), time.perf_counter()
    action()
    return _status("VmHWM") - before, time.perf_counter() - start


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def options(source: Path, megabytes: float) -> dict[str, Any]:
    """What the tensors of a .pth do not tell."""
    return {"arch": ARCH, **sizes(megabytes)} if source.suffix == ".pth" else {}


def whole(source: Path, out: Path, to: str, shard_bytes: int, **given: Any) -> None:
    """The way of loading the model, and writing it."""
    model = blip.from_pretrained(source, **given)
    if to == "blip":
        model.save_pretrained(out)
    elif to == "hf":
        blip.to_hf(model).save_pretrained(out, max_shard_size=shard_bytes)
    else:
        torch.save({"model": lavis.table(ARCH, "eva_clip_g").to_theirs(model.state_dict()).state}, out)


def by_parts(source: Path, out: Path, to: Any, shard_bytes: int, **given: Any) -> None:
    """What the command does."""
    convert(source, out, to, shard_bytes=shard_bytes, **given)


def worker(task: dict[str, Any]) -> None:
    """One conversion, after one of a tiny model; prints what it needed."""
    way = {"whole": whole, "by parts": by_parts}[task["way"]]
    for which in ("tiny", "given"):
        source, out = (Path(task[which][key]) for key in ("source", "out"))
        given = options(source, task[which]["megabytes"])
        found = needed(lambda: way(source, out, task["to"], task["shard_bytes"], **given))  # noqa: B023
    print(json.dumps(found))


def measured(task: dict[str, Any]) -> tuple[int, float]:
    """What a process of its own needs for a task."""
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    size, seconds = json.loads(done.stdout.splitlines()[-1])
    return size, seconds


def sources(folder: Path, megabytes: float, shard_bytes: int) -> dict[str, Path]:
    """The same weights in every layout."""
    found = {"blip": make(folder / "blip", megabytes, shard_bytes)}
    found |= {"hf": folder / "hf", "lavis": folder / "lavis.pth", "legacy": folder / "legacy.pth"}
    convert(found["blip"], found["hf"], "hf", shard_bytes=shard_bytes)
    convert(found["blip"], found["lavis"], "lavis")
    state = torch.load(found["lavis"], weights_only=True)
    torch.save(state, found["legacy"], _use_new_zipfile_serialization=False)
    return found


def largest(places: Iterable[Path]) -> int:
    """Bytes of the largest shard; of files, if no place is a folder."""
    places = list(places)
    shards = [file for place in places for file in place.glob("*.safetensors")]
    return max(file.stat().st_size for file in shards or places)


def same(whole: Path, parts: Path, all_names: bool) -> bool:
    """Whether two targets hold the same tensors; some may only be in the one of the whole model."""
    a, b = read_weights(whole), read_weights(parts)
    named = a.keys() == b.keys() if all_names else a.keys() >= b.keys()
    return named and all(torch.equal(a[name], b[name]) for name in b)


def compare(args: argparse.Namespace, folder: Path) -> bool:
    """Print a line per conversion; whether all is as it should be."""
    shard = round(args.shard * MB)
    given, tiny = sources(folder / "given", args.size, shard), sources(folder / "tiny", 0, shard)
    total = sum(t.nbytes for t in read_weights(given["blip"]).values())
    count = len(list(given["blip"].glob("*.safetensors")))
    print(f"{total / MB:.0f} MB of weights; in folders, {count} shards of at most {args.shard:.0f} MB")
    print(f"{'':16}{'the whole model':>22}{'blip convert':>22}{'/ largest shard':>17}")
    good = True
    for start, to in WAYS:
        if args.to and to not in args.to:
            continue
        rows, made = {}, {}
        for way in ("whole", "by parts"):
            ending = ".pth" if to == "lavis" else ""
            tasks = {
                which: {
                    "source": str(places[start]),
                    "out": str(folder / f"{which}-{way}{ending}"),
                    "megabytes": megabytes,
                }
                for which, places, megabytes in (("tiny", tiny, 0), ("given", given, args.size))
            }
            rows[way] = measured({"way": way, "to": to, "shard_bytes": shard, **tasks})
            made[way] = {which: Path(task["out"]) for which, task in tasks.items()}
        shards = [given[start]] if start == "legacy" else [given[start], made["by parts"]["given"]]
        share = rows["by parts"][0] / largest(shards)
        # transformers has no place for `temp` and the head that writes, which a whole model begins anew.
        equal = same(made["whole"]["given"], made["by parts"]["given"], start != "hf")
        good &= equal and share <= MOST
        cells = "".join(f"{size / MB:12.0f} MB {seconds:5.1f} s" for size, seconds in rows.values())
        print(f"{start + ' -> ' + to:16}{cells}{share:16.2f}x{'' if equal else '  DIFFERENT'}", flush=True)
        for places in made.values():
            for place in places.values():
                shutil.rmtree(place) if place.is_dir() else place.unlink()
    return good


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=600, help="megabytes of weights")
    parser.add_argument("--shard", type=float, default=100, help="megabytes of a shard")
    parser.add_argument("--to", nargs="+", choices=("blip", "hf", "lavis"), help="only into these layouts")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return 0 if compare(args, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
