"""The embedded dataset `scenes`: procedural, deterministic, written in the formats of the real sets.

`make_scenes` writes `<root>/scenes`:

    scenes.json                        seed, sizes, counts, version, held-out pairs, statistics
    images/<split>/000012.png          train, val, test, web
    annotations/{train,val,test}.json  captions, COCO-Karpathy layout (train: one item per caption)
    annotations/{val,test}_gt.json     the same in COCO format, for the caption metrics
    annotations/records_<split>.json   what is in each picture, for scoring and oracles
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip import keyed
from blip.data.scenes_render import render
from blip.data.scenes_text import caption, captions, matches, normal, parse, score_caption
from blip.data.scenes_world import HELD_OUT, Scene, scene, scenes
from blip.errors import DataError

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
]

VERSION = 1
CAPTIONS_PER_IMAGE = 2
"""Of a training image; validation and test images have one each."""
_CHUNK = 250
_SHARDS = {"train": 32, "web": 16}


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
        DataError: the folder holds another dataset and `overwrite` is false, or something else altogether.
    """
    wanted = {"train": train, "val": val, "test": test, "web": web}
    meta = {"name": "scenes", "version": VERSION, "seed": seed, "image_size": size, "images": wanted}
    place = Path(root) / "scenes"
    if _kept(place, meta, overwrite):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".scenes-", dir=place.parent))
    try:
        draft.chmod(0o755)
        _write_all(draft, meta, workers)
        _move(draft, place, meta, overwrite)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def _kept(place: Path, meta: dict[str, Any], overwrite: bool) -> bool:
    """Whether `place` already holds what `meta` describes; an error where something else is in the way."""
    if not place.exists():
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
    """A range of one split, for one worker; where `shard` is given the range is a tar shard, too."""

    folder: Path
    split: str
    start: int
    stop: int
    size: int
    seed: int
    shard: Path | None


@dataclass
class _Made:
    scenes: list[Scene]
    captions: list[list[str]]


def _write_all(folder: Path, meta: dict[str, Any], workers: int) -> None:
    jobs = [job for split, count in meta["images"].items() for job in _jobs(folder, split, count, meta)]
    for split in meta["images"]:
        (folder / "images" / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    made: dict[str, list[_Made]] = {split: [] for split in meta["images"]}
    for job, result in zip(jobs, _run(jobs, workers), strict=True):
        made[job.split].append(result)
    for split, parts in made.items():
        some = [one for part in parts for one in part.scenes]
        texts = [text for part in parts for text in part.captions]
        _write_list(folder / "annotations" / f"records_{split}.json", [one.record() for one in some])
        _write_captions(folder / "annotations", split, some, texts)
    _write_json(folder / "scenes.json", {**meta, "held_out": sorted(HELD_OUT)})


def _jobs(folder: Path, split: str, count: int, meta: dict[str, Any]) -> list[_Job]:
    if split in ("val", "test"):  # captions are distinct within the whole split
        return [_Job(folder, split, 0, count, meta["image_size"], meta["seed"], None)]
    parts = -(-count // _CHUNK)
    edges = [count * i // parts for i in range(parts + 1)] if parts else []
    return [
        _Job(folder, split, start, stop, meta["image_size"], meta["seed"], None)
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


def _run(jobs: list[_Job], workers: int) -> Iterable[_Made]:
    if workers <= 1:
        yield from map(_make, jobs)
        return
    # Forking costs nothing, and a script without a main guard may call this; elsewhere than on Linux it is unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_make, jobs)


def _make(job: _Job) -> _Made:
    """Draw and describe one range; what is returned goes into the annotation files."""
    some = scenes(job.split, job.start, job.stop, job.seed)
    if job.split in ("val", "test"):
        texts = [[text] for text in captions(some, job.seed)]
    else:
        texts = [_training_captions(one, job.seed) for one in some]
    for one in some:
        (job.folder / image_path(one)).write_bytes(_png(one, job.size))
    return _Made(some, texts)


def _training_captions(one: Scene, seed: int) -> list[str]:
    """`CAPTIONS_PER_IMAGE` captions of different wording."""
    rng = keyed.generator(seed, "caption", one.split, one.index)
    texts: list[str] = []
    while len(texts) < CAPTIONS_PER_IMAGE:
        text = caption(one, rng)
        if normal(text) not in map(normal, texts):
            texts.append(text)
    return texts


def image_path(one: Scene) -> str:
    """Where the picture of a scene is, relative to the dataset's folder."""
    return f"images/{one.split}/{one.index:06d}.png"


def _png(one: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    render(one, size).save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def _write_captions(folder: Path, split: str, some: list[Scene], texts: list[list[str]]) -> None:
    if split == "train":
        items = [
            {"image": image_path(one), "caption": text, "image_id": f"scenes_{one.index}"}
            for one, several in zip(some, texts, strict=True)
            for text in several
        ]
        _write_list(folder / "train.json", items)
    elif split in ("val", "test"):
        items = [
            {"image": image_path(one), "caption": several} for one, several in zip(some, texts, strict=True)
        ]
        _write_list(folder / f"{split}.json", items)
        annotations = [
            {"id": one.index, "image_id": one.index, "caption": several[0]}
            for one, several in zip(some, texts, strict=True)
        ]
        images = [{"id": one.index, "file_name": image_path(one)} for one in some]
        truth = {"info": {"description": f"scenes {split}"}, "licenses": [], "type": "captions"}
        _write_json(folder / f"{split}_gt.json", {**truth, "images": images, "annotations": annotations})


def _write_list(path: Path, items: list[Any]) -> None:
    """A JSON list with one item per line."""
    lines = ",\n".join(json.dumps(item) for item in items)
    path.write_text(f"[\n{lines}\n]\n" if items else "[]\n")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")
