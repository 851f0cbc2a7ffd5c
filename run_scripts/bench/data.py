"""Pictures per second of one core, and memory per worker, beside what is the least there is to do.

    python run_scripts/bench/data.py                             twelve photographs of COCO, 224 px
    python run_scripts/bench/data.py --images FOLDER --size 384  one's own pictures
    python run_scripts/bench/data.py --rows 10000000             also memory with that many annotations

Speed. Every way reads the same files into batches, in one process with one thread. All take turns, so that
whatever else the machine does falls on all of them; ratios are medians over the rounds.

    bare     Pillow alone: open, decode, RGB, random crop, bicubic resize, as an array
    json     blip: annotations in a JSON file, through dataset, crop, flip, captions and collation
    shards   blip: the same pictures in webdataset shards
    LAVIS    what LAVIS does: torchvision's crop and flip, floats, normalisation, torch's collation

With RandAugment (BLIP's pictures) as well; LAVIS's is there where OpenCV is installed.

Memory. A JSON list of `--rows` records is read; then loader workers take samples all over it. What a worker
has of its own is printed at its start and at its end, and what all records take, which workers share.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms
from webdataset import TarWriter

from blip.data.datasets import PairDataset
from blip.data.loader import LoaderConfig, TrainLoader
from blip.data.records import read_records
from blip.data.samples import SampleMaker
from blip.data.streams.shards import ShardDataset
from blip.processors.image import (
    CLIP_MEAN,
    CLIP_STD,
    OPERATIONS,
    RATIO,
    Blip2ImageTrain,
    BlipImageTrain,
    crop_box,
)
from blip.processors.text import BlipCaption

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "tests/photographs/images"
BATCH = 32
COPIES = 64
"""How often the pictures stand in the annotations, so that there are several batches of them."""
SCALE = (0.5, 1.0)
CAPTION = "a photograph of two dogs that run over a beach after a yellow ball"

Chain = Callable[[int], int]
"""Reads at least so many pictures, in whole batches, and tells how many."""


def write_sources(images: list[Path], folder: Path) -> tuple[Path, Path]:
    """The pictures as records of a JSON file and as members of a shard."""
    records = [{"image": str(path.absolute()), "caption": CAPTION} for _ in range(COPIES) for path in images]
    (folder / "own.json").write_text(json.dumps(records))
    with TarWriter(str(folder / "own-000.tar"), encoder=False) as shard:
        for number, record in enumerate(records):
            content = Path(record["image"]).read_bytes()
            text = json.dumps({"caption": CAPTION}).encode()
            shard.write({"__key__": f"{number:08d}", "jpg": content, "json": text})
    return folder / "own.json", folder / "own-000.tar"


def bare(images: list[Path], size: int) -> Chain:
    """Pillow and the crop, and nothing else."""
    paths, rng = cycle(images), np.random.default_rng(0)

    def picture() -> np.ndarray:
        image = Image.open(next(paths)).convert("RGB")
        left, top, width, height = crop_box(image.width, image.height, SCALE, RATIO, rng)
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))

    def read(count: int) -> int:
        for _ in range(count):
            picture()
        return count

    return read


def opencv_augment(image: Image.Image) -> np.ndarray:
    """RandAugment(2, 5) on NumPy and OpenCV, as LAVIS has it: two operations, each with probability 0.5."""
    import cv2

    pixels = np.array(image)
    height, width = pixels.shape[:2]
    for name in np.random.choice(OPERATIONS, 2):
        if np.random.random() > 0.5:
            continue
        sign = 1 if np.random.random() > 0.5 else -1
        if name in ("AutoContrast", "Equalize"):
            pixels = cv2.merge([cv2.LUT(one, lookup(one, name)) for one in cv2.split(pixels)])
        elif name in ("Brightness", "Sharpness"):  # at level 5 nothing changes, but it is computed
            pixels = cv2.LUT(pixels, (np.arange(256, dtype=np.float32) * 1.0).clip(0, 255).astype(np.uint8))
        elif name != "Identity":
            matrix = np.float32([[1, 0, 0], [0, 1, 0]])
            if name == "Rotate":
                matrix = cv2.getRotationMatrix2D((width / 2, height / 2), sign * 15.0, 1)
            elif name.startswith("Shear"):
                matrix[(0, 1) if name == "ShearX" else (1, 0)] = sign * 0.15
            else:
                matrix[(0, 2) if name == "TranslateX" else (1, 2)] = sign * 5.0
            fill = (128, 128, 128)
            pixels = cv2.warpAffine(pixels, matrix, (width, height), borderValue=fill, flags=cv2.INTER_LINEAR)
    return pixels


def lookup(channel: np.ndarray, name: str) -> np.ndarray:
    """uint8 (256,): the table of Pillow's autocontrast or equalize for one channel."""
    counts = np.bincount(channel.reshape(-1), minlength=256)
    if name == "AutoContrast":
        low, high = (f(np.flatnonzero(counts)) for f in (np.min, np.max))
        scale = 255 / max(high - low, 1)
        return ((np.arange(256) - low) * scale).clip(0, 255).astype(np.uint8)
    step = (len(channel.reshape(-1)) - counts[np.flatnonzero(counts)[-1]]) // 255
    below = np.cumsum(counts) - counts
    return ((below + step // 2) // max(step, 1)).clip(0, 255).astype(np.uint8)


def lavis(images: list[Path], size: int, augment: bool) -> Chain:
    """torchvision's chain in float32, as LAVIS's `blip2_image_train` or `blip_image_train` has it."""
    paths = cycle(images)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            *([opencv_augment] if augment else []),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    caption = BlipCaption()

    def read(count: int) -> int:
        for _ in range(count // BATCH):
            samples = [
                {"image": transform(Image.open(path).convert("RGB")), "text_input": caption(CAPTION)}
                for path in islice(paths, BATCH)
            ]
            default_collate(samples)
        return count // BATCH * BATCH

    return read


def ours(dataset: Any) -> Chain:
    """Our loader in this process."""
    loader = TrainLoader({dataset.name: dataset}, LoaderConfig(BATCH))

    def read(count: int) -> int:
        for _ in range(count // BATCH):
            next(loader)
        return count // BATCH * BATCH

    return read


def chains(images: list[Path], size: int, folder: Path) -> dict[str, Chain]:
    """All ways, by name."""
    own, shard = write_sources(images, folder)

    def maker(augment: bool) -> SampleMaker:
        processor = BlipImageTrain if augment else Blip2ImageTrain
        return SampleMaker(processor(image_size=size), BlipCaption())

    records = read_records([own], "json", {}, [None], "own")
    return {
        "bare": bare(images, size),
        "json": ours(PairDataset("own", records, maker(False))),
        "shards": ours(ShardDataset("own", [shard], maker(False), lanes=1)),
        "json, RandAugment": ours(PairDataset("own", records, maker(True))),
        "LAVIS": lavis(images, size, False),
        **({"LAVIS, RandAugment": lavis(images, size, True)} if find_spec("cv2") else {}),
    }


def speed(images: list[Path], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Pictures per second, and the share of the bare way, as medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        ways = chains(images, args.size, Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name in ways if turn % 2 else reversed(ways):
                began = time.process_time()
                count = ways[name](args.pictures)
                if turn:  # the first round warms up
                    rates[name].append(count / (time.process_time() - began))
    shares = {name: [a / b for a, b in zip(rates[name], rates["bare"], strict=True)] for name in ways}
    return {name: {"per_s": median(rates[name]), "share": median(shares[name])} for name in ways}


def write_rows(path: Path, rows: int) -> None:
    """A JSON list of records like those of LAION."""
    words = [word.strip("().,") for word in (__doc__ or "").split()]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 20))) for _ in range(10_000)]
    with path.open("w") as file:
        for number in range(rows):
            before = ",\n" if number else "[\n"
            record = {"image": f"{number // 10_000:05d}/{number:09d}.jpg", "caption": texts[number % 10_000]}
            file.write(before + json.dumps(record))
        file.write("\n]\n")


class Texts(SampleMaker):
    """All of a sample but its picture: here memory counts, and there are no files."""

    def picture(self, image: Any, name: str, rng: Any = None) -> Any:
        return {"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "instance_id": name}


def megabytes(process: int | str | None, *keys: str) -> float:
    """MB of a process that Linux counts under these names, added up."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return sum(sizes[key] for key in keys) * 1024 / 1e6


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """MB of all records, of this process, and of each worker's own at its start and end."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "rows.json"
        write_rows(path, args.rows)
        size = path.stat().st_size
        began = time.perf_counter()
        records = read_records([path], "json", {}, [None], "rows")
        seconds = time.perf_counter() - began
    maker = Texts(Blip2ImageTrain(image_size=2), BlipCaption())
    config = LoaderConfig(256, num_workers=args.workers)
    loader = TrainLoader({"rows": PairDataset("rows", records, maker)}, config)
    next(loader)
    children = [child.pid for child in multiprocessing.active_children()]

    def own() -> list[float]:
        return [megabytes(pid, "Private_Clean", "Private_Dirty") for pid in children]

    first, seen = own(), 256
    while seen < args.samples:
        seen += len(next(loader)["instance_id"])
    last = own()
    resident = megabytes("self", "Rss")
    loader.close()
    return {
        "rows": args.rows,
        "file_mb": size / 1e6,
        "seconds": seconds,
        "records_mb": records.nbytes / 1e6,
        "process_mb": resident,
        "worker_first_mb": first,
        "worker_last_mb": last,
        "samples": seen,
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    yield f"{'':20}{'pictures/s':>12}{'of bare':>10}"
    for name, figures in result["speed"].items():
        yield f"{name:20}{figures['per_s']:12.1f}{figures['share']:10.0%}"
    if found := result.get("memory"):
        yield (
            f"{found['rows']} records, {found['file_mb']:.0f} MB of JSON: read in {found['seconds']:.0f} s,"
            f" {found['records_mb']:.0f} MB, {found['records_mb'] * 1e6 / found['rows']:.0f} bytes each; the"
            f" process has {found['process_mb']:.0f} MB"
        )
        pairs = zip(found["worker_first_mb"], found["worker_last_mb"], strict=True)
        workers = ", ".join(f"{first:.0f} -> {last:.0f} MB" for first, last in pairs)
        yield f"each worker's own, from the first batch to {found['samples']} samples: {workers}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="folder of .jpg files")
    parser.add_argument("--size", type=int, default=224, help="side in pixels")
    parser.add_argument("--pictures", type=int, default=64, help="of each way in a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, default=0, help="annotations to measure memory with; 0: none")
    parser.add_argument("--workers", type=int, default=2, help="whose memory is measured")
    parser.add_argument("--samples", type=int, default=200_000, help="that they read meanwhile")
    parser.add_argument("--folder", help="where the annotations are written; default: for temporary files")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = sorted(args.images.glob("*.jpg"))
    if not images:
        parser.error(f"--images {args.images}: no .jpg file there")
    result: dict[str, Any] = {"speed": speed(images, args)}
    if args.rows and not Path("/proc/self/smaps_rollup").exists():
        parser.error("--rows: memory is read from Linux's /proc; leave it out here")
    if args.rows:
        result["memory"] = memory(args)
    print("\n".join(lines(result)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
