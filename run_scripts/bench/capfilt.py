"""CapFilt's pipeline beside the naive sequence, with the same weights, in one run on one machine.

    python run_scripts/bench/capfilt.py                              the size of tiny/capfilt.yaml, on the CPU
    python run_scripts/bench/capfilt.py --size base --pictures 32    ViT-B/16 at 224 px
    python run_scripts/bench/capfilt.py --size base --pictures 2000 --device cuda

The naive sequence goes over the pictures twice, as one does with the models at hand: `generate` for one
picture after the other, then the matching head for one pair after the other, each time with the picture.
Both read the same files, write one caption per picture by nucleus sampling, and judge it and the picture's
own text. In fp32 scores must agree, and captions be equal but for one in fifty, where rounding may decide
what is drawn; else the exit code is 1. They take turns, part by part, so that whatever else the machine does
falls on both. `--shared` gives captioner and filter the same tower, as after fine-tuning with a frozen one.
`--precision bf16 --naive-precision fp32` is the pipeline as a GPU runs it beside models as they are loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image

from blip.capfilt.bootstrap import Bootstrap, Expert, load_batches
from blip.capfilt.units import RecordUnit, number_of, open_pool
from blip.config.schema import DatasetConfig
from blip.data.scenes.make import make_scenes
from blip.registry import MODELS
from blip.tasks.capfilt import CaptionsConfig

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 63,
        "vit": {
            "patch_size": 21,
            "stem_width": 32,
            "stem_stride": 3,
            "width": 128,
            "depth": 4,
            "heads": 4,
            "mlp_dim": 256,
        },
        "med": {"width": 128, "depth": 3, "num_heads": 4, "mlp_dim": 256, "max_positions": 64},
    },
    "base": {"image_size": 224},
}
PARTS = 4
"""Turns that the pictures are cut into."""
TOLERANCE = 2e-5
"""Of probabilities, in fp32."""


def experts(args: argparse.Namespace, device: torch.device) -> tuple[Expert, Expert]:
    """Captioner and filter with random weights, whose spread makes texts differ."""
    torch.manual_seed(0)
    sizes = {**SIZES[args.size], "tokenizer": "scenes", "vocab_size": None, "max_txt_len": 40}
    made = []
    for arch in ("blip_caption", "blip_image_text_matching"):
        model = MODELS.get(arch).from_preset(None, **sizes)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                torch.nn.init.normal_(parameter, std=2.0 * parameter.shape[-1] ** -0.5)
        made.append(model.to(device).eval())
    if args.shared:
        made[1].vision.load_state_dict(made[0].vision.state_dict())
    return Expert(made[0], "captioner"), Expert(made[1], "filter")


def naive(
    captioner: Expert, judge: Expert, unit: RecordUnit, numbers: Iterable[int], how: dict[str, Any]
) -> list[list[tuple[str, float]]]:
    """(text, matching probability) of every picture's texts: one picture, then one pair at a time."""
    written: dict[int, str] = {}
    device = captioner.model.device
    for number in numbers:
        entry = unit.entry(number)
        with Image.open(entry.picture) as image:  # type: ignore[arg-type]
            pixels = captioner.picture(image.convert("RGB"))[None].to(device)
        own = {"index": torch.tensor([number_of(entry.name)]), "source": "bench/1"}
        [written[number]] = captioner.model.generate({"image": pixels, **own}, **how)
    found = []
    for number, caption in written.items():
        entry = unit.entry(number)
        scores = []
        for text in [*(str(one.caption) for one in entry.texts), caption.strip()]:
            with Image.open(entry.picture) as image:  # type: ignore[arg-type]
                pixels = judge.picture(image.convert("RGB"))[None].to(device)
            logits = judge.model({"image": pixels, "text_input": [judge.text(text)]}, match_head="itm")
            scores.append((text, logits.softmax(dim=1)[0, 1].item()))
        found.append(scores)
    return found


def pipeline(strap: Bootstrap, unit: RecordUnit, args: argparse.Namespace) -> list[list[tuple[str, float]]]:
    """The same from CapFilt's pipeline."""
    lines: list[dict[str, Any]] = []
    for pictures in load_batches(unit, strap.views, args.batch, 0, args.workers):
        lines += strap(pictures, "bench/1")
    return [[(text["caption"], text["itm"]) for text in line["texts"]] for line in lines]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Pictures per second of both, and what differs."""
    device = torch.device(args.device)
    how = CaptionsConfig(max_length=args.max_length)

    def autocast(precision: str = args.precision) -> AbstractContextManager[Any]:
        half = precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()

    def timed(action: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            result = action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        make_scenes(Path(folder), train=args.pictures, val=0, test=0, web=0, workers=0)
        place = Path(folder) / "scenes"
        records = json.loads((place / "annotations/train.json").read_text())
        first = {record["image"]: record for record in reversed(records)}  # one text for each picture
        (place / "one.json").write_text(json.dumps(list(first.values())))
        section = DatasetConfig(path=str(place / "one.json"), images=str(place))
        units = open_pool("bench", section, "train", -(-args.pictures // PARTS)).units()
        captioner, judge = experts(args, device)
        strap = Bootstrap(captioner, judge, how, device, autocast, 42, args.batch)
        seconds = {"naive": 0.0, "blip": 0.0}
        different, worst, texts = 0, 0.0, 0

        def one_by_one(unit: RecordUnit, numbers: range) -> Any:
            with autocast(args.naive_precision):
                return naive(captioner, judge, unit, numbers, how.generation(42))

        one_by_one(units[0], range(1))  # warms up
        for unit in units:
            assert isinstance(unit, RecordUnit)
            theirs, spent = timed(lambda unit=unit: one_by_one(unit, range(len(unit))))
            seconds["naive"] += spent
            ours, spent = timed(lambda unit=unit: pipeline(strap, unit, args))
            seconds["blip"] += spent
            for a, b in zip(theirs, ours, strict=True):
                a = list(dict.fromkeys(a))  # ours drops what stands there twice
                different += [text for text, _ in a] != [text for text, _ in b]
                worst = max([worst, *(abs(x[1] - y[1]) for x, y in zip(a, b, strict=False) if x[0] == y[0])])
                texts += len(b)
    return {
        "pictures": args.pictures,
        "texts": texts,
        "naive": args.pictures / seconds["naive"],
        "blip": args.pictures / seconds["blip"],
        "ratio": seconds["naive"] / seconds["blip"],
        "different": different,
        "worst": worst,
        "shares_tower": strap.shares_tower,
    }


def main() -> int:
    """Print a table; 1 where captions or scores differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the pipeline")
    parser.add_argument("--max-length", type=int, default=30)
    parser.add_argument("--shared", action="store_true", help="one tower for both models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--naive-precision", choices=("fp32", "bf16"), help="default: the same")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    args.naive_precision = args.naive_precision or args.precision
    found = measure(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    what = f"{found['pictures']} pictures, {found['texts']} texts"
    other = f" (naive {args.naive_precision})" if args.naive_precision != args.precision else ""
    shared = f"tower shared: {found['shares_tower']}"
    print(f"{args.size}, {what}, {args.device} {args.precision}{other}, {shared}")
    print(f"pictures/s: naive {found['naive']:.2f}, blip {found['blip']:.2f}: {found['ratio']:.2f}x")
    print(f"{found['different']} pictures have other captions, scores differ by {found['worst']:.1e} at most")
    drawn = found["different"] > 1 + found["pictures"] / 50
    exact = "bf16" not in (args.precision, args.naive_precision)
    return int(exact and (drawn or found["worst"] > TOLERANCE))


if __name__ == "__main__":
    sys.exit(main())
