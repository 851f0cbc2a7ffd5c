"""The embedded dataset `scenes`: procedural, deterministic, written in the formats of the real sets.

`make_scenes` writes `<root>/scenes`; image paths in the files are relative to that folder:

    scenes.json                            seed, sizes, version, items per file, held-out pairs, facts
    images/{train,val,test,web}/000012.png
    annotations/{train,val,test}.json      captions, COCO-Karpathy layout (train: one item per caption)
    annotations/{val,test}_gt.json         the same in COCO format, for the caption metrics
    annotations/vqa_<split>.json           one answer per question, eleven types
    annotations/instruct_<split>.json      text_input, text_output, nine types
    annotations/nlvr_<split>.json          two images, a sentence, "True" or "False"
    annotations/web.json, web_truth.json   noisy captions; what was done to each, and the clean one
    annotations/records_<split>.json       what is in each picture, for scoring and oracles
    shards/{train,web}-00000.tar           the same pictures (the first caption of each) for webdataset
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from blip import keyed
from blip.data.scenes import instruct, pairs, questions, text, web
from blip.data.scenes.claims import expected_r1, matches, normal, parse, score_caption
from blip.data.scenes.instruct import TYPES as TASK_TYPES
from blip.data.scenes.instruct import tasks
from blip.data.scenes.questions import TYPES as QUESTION_TYPES
from blip.data.scenes.render import render
from blip.data.scenes.text import caption, captions
from blip.data.scenes.web import web_text
from blip.data.scenes.world import HELD_OUT, Scene, scene, scenes
from blip.data.streams.tars import add_sample
from blip.errors import DataError, UsageError

__all__ = [
    "Scene",
    "caption",
    "captions",
    "make_scenes",
    "matches",
    "parse",
    "render",
    "scene",
    "scenes",
    "score_caption",
    "vocabulary",
]

VERSION = 1
CAPTIONS_PER_IMAGE = 2
"""Of a training image; validation and test images have one each."""
PAIRS_PER_IMAGE = 2

# Fixed, so that nothing depends on the workers; one where captions must differ in the whole split.
_PARTS = {"train": 32, "val": 1, "test": 1, "web": 16}
_FILES = {
    **{
        split: {
            "captions": split,
            "vqa": f"vqa_{split}",
            "instruct": f"instruct_{split}",
            "nlvr": f"nlvr_{split}",
            "records": f"records_{split}",
        }
        for split in ("train", "val", "test")
    },
    "web": {"captions": "web", "truth": "web_truth", "records": "records_web"},
}


def make_scenes(
    root: str | Path,
    size: int = 64,
    train: int = 10000,
    val: int = 500,
    test: int = 500,
    web: int = 5000,
    seed: int = 0,
    workers: int = 2,
    overwrite: bool = False,
) -> Path:
    """Write the dataset to `<root>/scenes`; the same bytes for any number of `workers`.

    Args:
        root: data root; created where missing.
        size: side of the images, in pixels.
        train, val, test, web: images per split.
        workers: processes; 0 and 1 work in this one.
        overwrite: replace a dataset that was made with other arguments.

    Returns:
        The folder. One that already holds this very dataset is kept.

    Raises:
        DataError: the folder holds another dataset and `overwrite` is false, or something else altogether,
            or cannot be written.
        UsageError: a size or count that no dataset can have.
    """
    if size < 16 or min(train, val, test, web) < 0:
        raise UsageError(
            f"scenes: size {size} must be at least 16 pixels, and train {train}, val {val}, test {test} and "
            f"web {web} images at least 0"
        )
    wanted = {"train": train, "val": val, "test": test, "web": web}
    meta = {"name": "scenes", "version": VERSION, "seed": seed, "image_size": size, "images": wanted}
    place = Path(root) / "scenes"
    if _kept(place, meta, overwrite):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".scenes-", dir=place.parent))
    except OSError as error:
        raise DataError(
            f"{root}: cannot write scenes here ({error.strerror}); choose another data root"
        ) from None
    try:
        draft.chmod(0o755)
        _write_all(draft, meta, workers)
        _move(draft, place, meta, overwrite)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def _kept(place: Path, meta: dict[str, Any], overwrite: bool) -> bool:
    """Whether `place` already holds what `meta` describes; an error where something else is in the way."""
    if not place.exists() or not any(place.iterdir()):
        return False
    try:
        found = json.loads((place / "scenes.json").read_text())
    except (OSError, ValueError):
        raise DataError(
            f"{place}: exists but holds no dataset made here (no readable scenes.json); "
            "move it away or choose another data root"
        ) from None
    differing = [
        f"{key} {found.get(key)!r} instead of {meta[key]!r}" for key in meta if found.get(key) != meta[key]
    ]
    if differing and not overwrite:
        raise DataError(
            f"{place}: holds scenes made with {', '.join(differing)}; "
            "pass overwrite=True to replace it, or choose another data root"
        )
    return not differing


def _move(draft: Path, place: Path, meta: dict[str, Any], overwrite: bool) -> None:
    """Put the finished `draft` in its place; another process may have been faster with the same dataset."""
    try:
        os.rename(draft, place)
    except OSError:
        if _kept(place, meta, overwrite):
            return
        old = Path(tempfile.mkdtemp(prefix=".scenes-", dir=place.parent))
        os.rename(place, old / "old")
        os.rename(draft, place)
        shutil.rmtree(old, ignore_errors=True)


@dataclass
class _Job:
    """A range of one split, for one worker."""

    folder: Path
    split: str
    start: int
    stop: int
    meta: dict[str, Any]
    shard: str | None
    """Tar file that holds the range, too."""


@dataclass
class _Made:
    """What a job returns: its scenes, and per annotation file the items without running numbers."""

    scenes: list[Scene]
    items: dict[str, list[dict[str, Any]]]


def _write_all(folder: Path, meta: dict[str, Any], workers: int) -> None:
    for name in ("annotations", "shards", *(f"images/{split}" for split in meta["images"])):
        (folder / name).mkdir(parents=True)
    jobs = [job for split, count in meta["images"].items() for job in _jobs(folder, split, count, meta)]
    made: dict[str, list[_Made]] = {split: [] for split in meta["images"]}
    for job, result in zip(jobs, _run(jobs, workers), strict=True):
        made[job.split].append(result)
    counts = {}
    for split, parts in made.items():
        items: dict[str, list[dict[str, Any]]] = {name: [] for name in _FILES[split]}
        for part in parts:
            for name, some in part.items.items():
                items[name] += some
        for number, item in enumerate(items.get("vqa", [])):
            item["question_id"] = number
        for name, some in items.items():
            file = f"{_FILES[split][name]}.json"
            _write_list(folder / "annotations" / file, some)
            counts[file] = len(some)
        if split in ("val", "test"):
            _write_json(folder / "annotations" / f"{split}_gt.json", _coco(split, items["captions"]))
    facts = {
        split: _statistics([s for part in made[split] for s in part.scenes]) for split in ("val", "test")
    }
    facts["web"] = dict(Counter(item["kind"] for part in made["web"] for item in part.items["truth"]))
    held_out = sorted(HELD_OUT)
    _write_json(folder / "scenes.json", {**meta, "items": counts, "held_out": held_out, "facts": facts})


def _jobs(folder: Path, split: str, count: int, meta: dict[str, Any]) -> list[_Job]:
    parts = min(_PARTS[split], count)
    edges = [count * i // parts for i in range(parts + 1)] if parts else []
    shards = [f"shards/{split}-{i:05d}.tar" if split in ("train", "web") else None for i in range(parts)]
    return [
        _Job(folder, split, start, stop, meta, shard)
        for (start, stop), shard in zip(pairwise(edges), shards, strict=True)
    ]


def _run(jobs: list[_Job], workers: int) -> Iterator[_Made]:
    if workers <= 1:
        yield from map(_make, jobs)
        return
    # Forking is quick, and a script without a main guard may call this; elsewhere than on Linux it is unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_make, jobs)


def _make(job: _Job) -> _Made:
    """Draw and describe one range: writes its pictures and shard, returns what goes into annotation files."""
    some = scenes(job.split, job.start, job.stop, job.meta["seed"])
    items: dict[str, list[dict[str, Any]]] = {"records": [one.record() for one in some]}
    if job.split == "web":
        texts = [web_text(one, job.meta["seed"], job.meta["images"]["web"]) for one in some]
        items["captions"] = [_caption_item(one, web.text) for one, web in zip(some, texts, strict=True)]
        items["truth"] = [
            {"image": image_path(one), "kind": web.kind, "clean": web.clean}
            for one, web in zip(some, texts, strict=True)
        ]
        shard_items = items["captions"]
    else:
        several = _captions(some, job)
        items |= _tasks(some, job)
        shard_items = [_caption_item(one, texts[0]) for one, texts in zip(some, several, strict=True)]
        items["captions"] = [
            item for one, texts in zip(some, several, strict=True) for item in _caption_items(one, texts)
        ]
    pictures = [_png(one, job.meta["image_size"]) for one in some]
    for one, picture in zip(some, pictures, strict=True):
        (job.folder / image_path(one)).write_bytes(picture)
    if job.shard:
        _write_shard(job.folder / job.shard, shard_items, pictures)
    return _Made(some, items)


def _captions(some: list[Scene], job: _Job) -> list[list[str]]:
    """Captions of each scene: one in val and test, `CAPTIONS_PER_IMAGE` of different wording in train."""
    seed = job.meta["seed"]
    if job.split != "train":
        return [[text] for text in captions(some, seed)]
    several = []
    for one in some:
        rng = keyed.generator(seed, "caption", one.split, one.index)
        texts: dict[str, str] = {}
        while len(texts) < CAPTIONS_PER_IMAGE:
            text = caption(one, rng)
            texts.setdefault(normal(text), text)
        several.append(list(texts.values()))
    return several


def _tasks(some: list[Scene], job: _Job) -> dict[str, list[dict[str, Any]]]:
    """Questions, instructions and pairs; val and test have every type once where the scene allows it."""
    seed, few = job.meta["seed"], job.split == "train"
    asked, told = [], []
    for one in some:
        rng = keyed.generator(seed, "questions", one.split, one.index)
        for kind, question, answer in questions.questions(one, rng, 4 if few else len(QUESTION_TYPES)):
            item = {"question_id": 0, "question": question, "answer": answer, "image": image_path(one)}
            asked.append({**item, "dataset": "scenes", "type": kind})
        for kind, text_input, text_output in tasks(one, rng, 3 if few else len(TASK_TYPES)):
            item = {"image": image_path(one), "text_input": text_input, "text_output": text_output}
            told.append({**item, "type": kind})
    rng = keyed.generator(seed, "pairs", job.split, job.start)
    both = [
        {
            "images": [image_path(pair.left), image_path(pair.right)],
            "sentence": pair.sentence,
            "label": str(pair.label),
            "type": pair.form,
        }
        for pair in pairs.pairs(some, rng, PAIRS_PER_IMAGE)
    ]
    return {"vqa": asked, "instruct": told, "nlvr": both}


def image_path(one: Scene) -> str:
    """Where the picture of a scene is, relative to the dataset's folder."""
    return f"images/{one.split}/{one.index:06d}.png"


def vocabulary() -> list[str]:
    """Every word (lower case, no punctuation) that any text of the dataset can hold, sorted."""
    rooms = (text, questions, instruct, pairs, web)
    return sorted(set().union(*(room.vocabulary() for room in rooms)))


def _caption_items(one: Scene, texts: list[str]) -> list[dict[str, Any]]:
    if one.split == "train":
        return [_caption_item(one, text) for text in texts]
    return [{"image": image_path(one), "caption": texts}]


def _caption_item(one: Scene, text: str) -> dict[str, Any]:
    name = f"scenes_{one.index}" if one.split == "train" else f"scenes_{one.split}_{one.index}"
    return {"image": image_path(one), "caption": text, "image_id": name}


def _coco(split: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's annotation format, as caption metrics read it; image ids are the numbers in the file names."""
    ids = [int(Path(item["image"]).stem) for item in items]
    return {
        "info": {"description": f"scenes {split}"},
        "licenses": [],
        "type": "captions",
        "images": [{"id": i, "file_name": item["image"]} for i, item in zip(ids, items, strict=True)],
        "annotations": [
            {"id": i, "image_id": i, "caption": item["caption"][0]}
            for i, item in zip(ids, items, strict=True)
        ],
    }


def _statistics(some: list[Scene]) -> dict[str, float]:
    """Expected R@1 of models that see part of a scene, and the share of held-out scenes, in percent."""

    def unbound(*names: str) -> list[tuple[tuple[str, ...], ...]]:
        return [tuple(tuple(sorted(getattr(t, n) for t in one.things)) for n in names) for one in some]

    def bound(*names: str) -> list[tuple[tuple[str, ...], ...]]:
        return [tuple(sorted(tuple(getattr(t, n) for n in names) for t in one.things)) for one in some]

    fresh = sum(any((t.shape, t.color) in HELD_OUT for t in one.things) for one in some)
    figures = {
        "r1_colors_and_shapes": expected_r1(unbound("color", "shape")),
        "r1_also_sizes_and_textures_unbound": expected_r1(unbound("color", "shape", "size", "texture")),
        "r1_colors_bound_to_shapes": expected_r1(bound("color", "shape")),
        "r1_all_but_places": expected_r1(bound("color", "shape", "size", "texture")),
        "with_held_out_pair": 100 * fresh / max(len(some), 1),
    }
    return {name: round(value, 2) for name, value in figures.items()}


def _png(one: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    render(one, size).save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def _write_shard(path: Path, items: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """A webdataset shard."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item, picture in zip(items, pictures, strict=True):
            key = Path(item["image"]).stem
            note = json.dumps({"caption": item["caption"], "image_id": item["image_id"]}).encode()
            add_sample(tar, key, {"png": picture, "json": note})


def _write_list(path: Path, items: list[dict[str, Any]]) -> None:
    """A JSON list with one item per line."""
    lines = ",\n".join(json.dumps(item) for item in items)
    path.write_text(f"[\n{lines}\n]\n" if items else "[]\n")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")
