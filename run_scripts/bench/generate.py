"""Caption generation beside transformers' `generate`, with the same weights, in one run on one machine.

    python run_scripts/bench/generate.py                   base size on the CPU, 384 px, beam 3, batch 8, 32
    python run_scripts/bench/generate.py --size small      seconds instead of minutes
    python run_scripts/bench/generate.py --device cuda     the same on a GPU

Both see the same pictures and the prompt "a picture of", and their ids must be identical, or the exit code
is 1. Where a text differs, both write it again in float64, which tells whether rounding has decided. They
take turns, so that whatever else the machine does falls on both. Weights are random, which makes captions
of the full length; with trained weights texts end earlier, and what is finished leaves our batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from blip.formats import hf
from blip.layers.decoding import Decoding
from blip.models.blip_caption import BlipCaption, BlipCaptionConfig
from blip.models.generate import MedWriter, write
from blip.models.med import MedConfig
from blip.models.vision import VisionConfig
from blip.weights import load_into

PROMPT = (101, 1037, 3861, 1997, 102)
"""[CLS] a picture of [SEP] in bert-base-uncased."""
SEP, VOCAB = 102, 30524
SIZES: dict[str, dict[str, Any]] = {
    "base": {"image": 384, "width": 768, "depth": 12, "heads": 12, "vit_depth": 12},
    "small": {"image": 96, "width": 128, "depth": 3, "heads": 4, "vit_depth": 3},
}


def models(size: dict[str, Any]) -> tuple[Any, BlipCaption]:
    """transformers' model with random weights, and ours with the same ones."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    width, heads = size["width"], size["heads"]
    torch.manual_seed(0)
    # The usual spread at base size, and more where it is narrower, or texts would not differ.
    spread = 0.02 * (768 / width) ** 0.5
    text = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "encoder_hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": size["depth"],
        "num_attention_heads": heads,
        "bos_token_id": VOCAB - 2,
        "sep_token_id": SEP,
        "eos_token_id": SEP,
        "initializer_range": spread,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": size["vit_depth"],
        "num_attention_heads": heads,
        "image_size": size["image"],
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "initializer_range": spread,
    }
    theirs = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    config = BlipCaptionConfig(
        image_size=size["image"],
        vit=VisionConfig(
            vit_model="vit_base", width=width, depth=size["vit_depth"], heads=heads, mlp_dim=4 * width
        ),
        med=MedConfig(width=width, depth=size["depth"], num_heads=heads, mlp_dim=4 * width),
        vocab_size=VOCAB,
        dropout=0.0,
    )
    ours = BlipCaption(config).eval()
    weights = hf.table("blip_caption").to_ours(dict(theirs.state_dict())).state
    load_into(ours, weights, source="transformers' model")
    return theirs, ours


def compare(theirs: Any, ours: BlipCaption, images: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of seconds, the rows whose ids differ, and those that differ in float64, too."""

    def ask_theirs(images: Tensor) -> Tensor:
        prompt = torch.tensor([PROMPT], device=images.device).expand(len(images), -1)
        limits = {"num_beams": args.beams, "max_length": args.max_length, "min_length": 5, "do_sample": False}
        return theirs.generate(pixel_values=images, input_ids=prompt, **limits)[:, len(PROMPT) - 1 :]

    def ask_ours(images: Tensor) -> Tensor:
        rules = Decoding(SEP, 0, max_length=args.max_length, min_length=5, num_beams=args.beams)
        keys = ours.text.image_keys(ours.image_states({"image": images}))
        ids = torch.tensor([PROMPT[:-1]], device=images.device).expand(len(images), -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return write(MedWriter(ours.text, ours.lm_head, keys), ids, mask, rules, None).ids

    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    found: dict[str, Tensor] = {}
    for number in range(args.repeats + 1):  # the first round warms up
        turns: list[tuple[str, Callable[[Tensor], Tensor]]] = [("theirs", ask_theirs), ("ours", ask_ours)]
        for name, ask in turns if number % 2 else turns[::-1]:
            started = time.perf_counter()
            with torch.no_grad():
                found[name] = ask(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    ratio = median(a / b for a, b in zip(seconds["theirs"][1:], seconds["ours"][1:], strict=True))
    own = found["ours"]
    differing = [i for i, (a, b) in enumerate(zip(texts(found["theirs"]), texts(own), strict=True)) if a != b]
    wrong = 0
    if differing:
        theirs.double(), ours.double()
        with torch.no_grad():
            again = [texts(ask(images[differing].double())) for ask in (ask_theirs, ask_ours)]
        wrong = sum(a != b for a, b in zip(*again, strict=True))
        theirs.float(), ours.float()
    return {
        "batch": len(images),
        "theirs": median(seconds["theirs"][1:]),
        "ours": median(seconds["ours"][1:]),
        "ratio": ratio,
        "rounding": len(differing) - wrong,
        "wrong": wrong,
        "tokens": own.shape[1],
        "different": len(own.unique(dim=0)),
    }


def pictures(count: int, side: int) -> Tensor:
    """Large patches of colour, (count, 3, side, side): of noise every text would be nearly the same."""
    generator = torch.Generator().manual_seed(count)
    hues = torch.randn(count, 3, 1, 1, generator=generator)
    patches = 1.5 * torch.randn(count, 3, 4, 4, generator=generator)
    return hues + interpolate(patches, size=(side, side), mode="bicubic")


def texts(ids: Tensor) -> list[list[int]]:
    """Tokens of each text up to its end; what comes behind is filled differently."""
    rows = ids.tolist()
    return [row[: row.index(SEP) + 1] if SEP in row else row for row in rows]


def main() -> int:
    """Print a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    theirs, ours = (model.to(args.device) for model in models(SIZES[args.size]))
    identical = True
    for batch in args.batch:
        row = compare(theirs, ours, pictures(batch, SIZES[args.size]["image"]).to(args.device), args)
        identical &= not (row["rounding"] or row["wrong"])
        ids = "identical"
        if row["rounding"] or row["wrong"]:
            ids = (
                f"DIFFERENT in {row['rounding'] + row['wrong']} texts, of them {row['wrong']} in float64, too"
            )
        print(
            f"batch {row['batch']:3d}, beam {args.beams}: transformers {row['theirs']:.2f} s, blip"
            f" {row['ours']:.2f} s, {row['ratio']:.2f}x; {row['tokens']} new tokens, {row['different']}"
            f" different texts, ids {ids}",
            flush=True,
        )
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
