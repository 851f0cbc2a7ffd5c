"""Re-ranked retrieval beside brute force over pairs, and how time and memory grow, in one run on one machine.

    python run_scripts/bench/retrieval.py                  1,000 pictures x 5,000 captions, a few minutes
    python run_scripts/bench/retrieval.py --images 200     seconds

Pictures of 64 px, five captions each, are made on the spot; the model is a small BLIP with random weights.
Brute force takes every picture and caption by itself, sorts plain lists, and judges each candidate pair from
the picture's states on, with keys and padding of its own. Scores of all candidates must agree to rounding, so
must the candidates but for similarities that are equal to rounding, and all recalls, or the exit code is 1.
Every size has a process of its own; its peak memory is counted beyond what it has held before the evaluation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from blip.batch import EvalContext, to_device
from blip.config.schema import DatasetConfig
from blip.data.loader import EvalLoader
from blip.data.scenes.make import Scene, make_scenes
from blip.data.scenes.text import captions
from blip.data.sources import build_dataset
from blip.metrics.retrieval import recalls_from_ranks
from blip.models.blip_retrieval import BlipRetrieval, BlipRetrievalConfig
from blip.models.med import MedConfig
from blip.models.vision import VisionConfig
from blip.tasks import retrieval
from blip.tasks.retrieval import Retrieval, RetrievalRun

SIDE, LONGEST = 64, 35
ROUNDING = 2e-5
"""Difference of scores in float32; they are of the order of 1."""
MB = 1 << 20


def small_model() -> Any:
    """A BLIP with random weights, spread so far that pairs differ."""
    torch.manual_seed(0)
    vit = VisionConfig(
        vit_model="vit_base", patch_size=16, width=48, depth=2, heads=4, mlp_dim=96, init_std=0.2
    )
    med = MedConfig(width=32, depth=2, num_heads=4, mlp_dim=64, max_positions=64, init_std=0.2)
    sizes: dict[str, Any] = {
        "image_size": SIDE,
        "vit": vit,
        "med": med,
        "tokenizer": "scenes",
        "dropout": 0.0,
    }
    return BlipRetrieval(BlipRetrievalConfig(embed_dim=16, queue_size=8, **sizes)).eval()


def make(root: Path, images: int) -> None:
    """Pictures with five captions each, as a list."""
    folder = make_scenes(root, size=SIDE, train=0, val=0, test=images, web=0, workers=1)
    records = json.loads((folder / "annotations/test.json").read_text())
    drawn = [
        Scene.from_record(row) for row in json.loads((folder / "annotations/records_test.json").read_text())
    ]
    several = zip(*(captions(drawn, seed) for seed in range(5)), strict=True)
    rows = [record | {"caption": list(texts)} for record, texts in zip(records, several, strict=True)]
    (folder / "five.json").write_text(json.dumps(rows))


def load(root: Path, images: int) -> Any:
    """The first so many pictures."""
    processors = {"eval": {"name": "blip_image_eval", "image_size": SIDE}}
    places = {"path": {"test": "scenes/five.json"}, "images": "scenes"}
    section = DatasetConfig(vis_processor=processors, max_samples=images, **places)
    return EvalLoader(build_dataset("five", section, "test", root, train=False, wanted="retrieval"), 100)


def ours(model: Any, data: Any, k: int) -> dict[str, Any]:
    """Scores and candidates of the task, its recalls, seconds and bytes."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    counted = retrieval._recalls

    def keep(scores: Tensor, to_texts: Tensor, to_images: Tensor, *rest: Any) -> dict[str, float]:
        seen.append((scores, to_texts, to_images))
        return counted(scores, to_texts, to_images, *rest)

    retrieval._recalls = keep
    task = Retrieval(RetrievalRun(task="retrieval", evaluate=True, k_test=k, eval_max_txt_len=LONGEST))
    before, started = peak(), time.perf_counter()
    with torch.no_grad():
        found = task.evaluate(model, data, EvalContext(torch.device("cpu"), 100, nullcontext)).metrics()
    seconds, after = time.perf_counter() - started, peak()
    retrieval._recalls = counted
    scores, to_texts, to_images = seen[0]  # then come those of similarities alone
    pairs = int((to_texts | to_images).sum())
    figures = {"seconds": seconds, "mb": (after - before) / MB, "pairs": pairs, "texts": len(data.text)}
    return {**figures, "recalls": found, "scores": scores, "to_texts": to_texts, "to_images": to_images}


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def brute_force(model: Any, data: Any, k: int) -> dict[str, Any]:
    """The same by plain loops: candidates by sorting, a forward pass from states to logits for each pair."""
    started = time.perf_counter()
    with torch.no_grad():
        batches = EvalLoader(data.dataset, 1).batches()
        alone = [model.retrieval_images(to_device(dict(batch), torch.device("cpu"))) for batch in batches]
        tokens = [model.tokenize([text], LONGEST) for text in data.text]
        texts = torch.cat([model.retrieval_texts(t["text_ids"], t["text_mask"]) for t in tokens])
        images = torch.cat([feats for feats, _ in alone])  # (I, 1, E)
        sim = (images @ texts.T).amax(dim=1)  # (I, T)
        rows = [sorted(range(len(texts)), key=row.__getitem__)[-k:] for row in sim.tolist()]
        columns = [sorted(range(len(images)), key=column.__getitem__)[-k:] for column in sim.T.tolist()]
        wanted = {(i, t) for i, row in enumerate(rows) for t in row}
        wanted |= {(i, t) for t, column in enumerate(columns) for i in column}
        logits = judged(model, sorted(wanted), [states for _, states in alone], tokens)
    scores = {pair: logit + float(sim[pair]) for pair, logit in logits.items()}
    found = {"scores": scores, "sim": sim, "rows": rows, "columns": columns}
    return {**found, "recalls": plain_recalls(found, data), "seconds": time.perf_counter() - started}


def judged(
    model: Any, pairs: list[tuple[int, int]], states: list[Tensor], tokens: list[dict[str, Tensor]]
) -> dict[tuple[int, int], float]:
    """The matching logit of each pair; captions are padded to the longest that is allowed."""
    found = {}
    for at in range(0, len(pairs), 512):
        some = pairs[at : at + 512]
        keys = model.text.image_keys(torch.cat([states[i] for i, _ in some]))
        ids, mask = (
            torch.zeros(len(some), LONGEST, dtype=torch.long),
            torch.zeros(len(some), LONGEST, dtype=torch.bool),
        )
        for row, (_, t) in enumerate(some):
            length = tokens[t]["text_ids"].shape[1]
            ids[row, :length], mask[row, :length] = tokens[t]["text_ids"][0], tokens[t]["text_mask"][0]
        logits = model.itm_logits([(keys, 1)], ids, mask)[:, 1].tolist()
        found |= dict(zip(some, logits, strict=True))
    return found


def plain_recalls(found: dict[str, Any], data: Any) -> dict[str, float]:
    """Recalls by counting for every query the wrong candidates that score at least as high as the right."""

    def rank(scores: dict[int, float], right: set[int]) -> int:
        best = max((score for key, score in scores.items() if key in right), default=None)
        if best is None:
            return retrieval.NOT_FOUND
        return sum(score >= best for key, score in scores.items() if key not in right)

    scores = found["scores"]
    for_images = [{t: scores[i, t] for t in row} for i, row in enumerate(found["rows"])]
    for_texts = [{i: scores[i, t] for i in column} for t, column in enumerate(found["columns"])]
    image_ranks = [rank(own, set(data.img2txt[i])) for i, own in enumerate(for_images)]
    text_ranks = [rank(own, {data.txt2img[t]}) for t, own in enumerate(for_texts)]
    return recalls_from_ranks(torch.tensor(image_ranks).numpy(), torch.tensor(text_ranks).numpy())


def compare(root: Path, images: int, k: int) -> dict[str, Any]:
    """Both ways on the same data, and what is different."""
    model, data = small_model(), load(root, images)
    fast, plain = ours(model, data, k), brute_force(model, data, k)
    scores, sim = fast["scores"], plain["sim"]
    gaps = [abs(float(scores[pair]) - score) for pair, score in plain["scores"].items()]
    largest = max(gap for gap in gaps if gap != float("inf"))
    lost = 0
    for i, row in enumerate(plain["rows"]):  # candidates that only one way has, and that are no ties
        other = set(fast["to_texts"][i].nonzero()[:, 0].tolist())
        bound = float(sim[i, row[0]])
        lost += sum(abs(float(sim[i, t]) - bound) > ROUNDING for t in other.symmetric_difference(row))
    for t, column in enumerate(plain["columns"]):
        other = set(fast["to_images"][:, t].nonzero()[:, 0].tolist())
        bound = float(sim[column[0], t])
        lost += sum(abs(float(sim[i, t]) - bound) > ROUNDING for i in other.symmetric_difference(column))
    names = list(plain["recalls"])
    return {
        **{name: fast[name] for name in ("seconds", "pairs", "texts")},
        "brute_seconds": plain["seconds"],
        "difference": largest,
        "different_candidates": lost,
        "recalls": {name: fast["recalls"][name] for name in names},
        "brute_recalls": plain["recalls"],
        "equal": largest < ROUNDING
        and not lost
        and {n: fast["recalls"][n] for n in names} == plain["recalls"],
    }


def grow(root: Path, images: int, k: int) -> dict[str, Any]:
    """Time and memory of our way alone."""
    model = small_model()
    ours(model, load(root, 8), min(k, 10))  # what is loaded on first use
    found = ours(model, load(root, images), k)
    return {name: found[name] for name in ("seconds", "mb", "pairs", "texts")}


def apart(name: str, root: Path, images: int, k: int) -> dict[str, Any]:
    """`compare` or `grow` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(root), str(images), str(k)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> int:
    """Print a line per size, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="pictures, with five captions each")
    parser.add_argument("--k", type=int, default=128, help="candidates that are re-ranked")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, root, images, k = args.one
        function = {"compare": compare, "grow": grow}[name]
        print(json.dumps(function(Path(root), int(images), int(k))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, args.images)
        sizes = [(args.images // part, args.k) for part in (4, 2, 1)]
        sizes += [(args.images, max(args.k // part, 10)) for part in (4, 2)]
        for images, k in sizes:
            found = apart("grow", root, images, k)
            print(
                f"{images:5d} pictures x {found['texts']:6d} captions, k {k:4d}: {found['pairs']:8d} pairs,"
                f" {found['seconds']:7.1f} s ({1e6 * found['seconds'] / found['pairs']:.0f} us a pair),"
                f" {found['mb']:6.0f} MB",
                flush=True,
            )
        found = apart("compare", root, args.images, args.k)
    print(
        f"brute force: {found['brute_seconds']:.1f} s against {found['seconds']:.1f} s; largest difference"
        f" of {found['pairs']} scores {found['difference']:.1e}; {found['different_candidates']} other"
        f" candidates; recalls {'equal' if found['equal'] else 'DIFFERENT'}"
    )
    print(" ".join(f"{name} {value:.2f}" for name, value in found["recalls"].items()))
    if not found["equal"]:
        print(" ".join(f"{name} {value:.2f}" for name, value in found["brute_recalls"].items()))
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
