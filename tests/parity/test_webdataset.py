"""Shards against the `webdataset` library: it reads what we write, and we read what it writes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from torch import Tensor

from blip.config.schema import DatasetConfig
from blip.data.browse import open_splits
from blip.data.samples import SampleMaker
from blip.data.scenes.make import make_scenes
from blip.data.sources import build_dataset
from blip.data.streams.shards import Lane, ShardDataset
from blip.data.streams.tars import IMAGES, Ref, find_shards, payload
from tests.shard_server import serving

MEMBERS = {
    "jpg": ("jpg", "json"),
    "png": ("png", "json"),
    "webp": ("webp", "txt"),
    "both texts": ("png", "json", "txt"),
    "class and index beside them": ("cls", "png", "json", "index"),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the embedded dataset, in two or more shards."""
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, size=24, train=20, val=0, test=0, web=0, workers=0)
    return root


def theirs(shards: list[Path], decode: str = "pil") -> Iterator[dict[str, Any]]:
    """The library's samples in stored order."""
    urls = [str(path) for path in shards]
    yield from wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode(decode)


def pixels(image: Image.Image | Tensor) -> bytes:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image).tobytes()


def picture(number: int) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


def member(extension: str, number: int) -> bytes:
    if extension in IMAGES:
        data = io.BytesIO()
        options: dict[str, Any] = {"lossless": True} if extension == "webp" else {}
        picture(number).save(data, "JPEG" if extension == "jpg" else extension.upper(), **options)
        return data.getvalue()
    caption = f"Caption number {number}, café"
    if extension == "json":
        return json.dumps({"caption": caption, "url": f"http://example.org/{number}"}).encode()
    return caption.encode() if extension == "txt" else b"7"


def written(folder: Path, extensions: tuple[str, ...], count: int = 7, per_shard: int = 3) -> list[Path]:
    """Shards as `webdataset.ShardWriter` writes them; members are bytes, so nothing is encoded twice."""
    pattern = str(folder / "shard-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=per_shard, encoder=False, verbose=0) as sink:
        for number in range(count):
            members = {extension: member(extension, number) for extension in extensions}
            sink.write({"__key__": f"part/{number:05d}", **members})
    return sorted(folder.glob("*.tar"))


def raw(shards: list[Path]) -> list[tuple[str, dict[str, bytes]]]:
    """Names and members of our reader, in stored order."""
    data = ShardDataset("web", shards, SampleMaker(Pixels(), str))
    found = []
    for number, path in enumerate(shards):
        with path.open("rb") as file:
            for entry in data.scan(number):
                assert isinstance(entry, Ref)
                members = {e: payload(file, place, entry.key) for e, place in entry.files.items()}
                found.append((entry.key, members))
    return found


class Pixels:
    """Pictures as they are."""

    def pixels(self, image: Image.Image, rng: Any = None) -> Any:
        return image

    def norm(self) -> Any:
        return None


def test_the_library_reads_our_shards(scenes: Path) -> None:
    shards = find_shards("scenes/shards/train-*.tar", scenes)
    assert len(shards) > 1
    ours = list(open_splits("scenes_shards", scenes, None, {})["train"])
    library = list(theirs(shards))
    assert len(ours) == len(library) == 20
    for mine, other in zip(ours, library, strict=True):
        assert mine["instance_id"].endswith(f"/{other['__key__']}")
        assert mine["text_input"] == other["json"]["caption"]
        assert pixels(mine["image"]) == pixels(other["png"])


def test_our_shards_hold_the_bytes_that_the_library_sees(scenes: Path) -> None:
    shards = find_shards("scenes/shards/train-*.tar", scenes)
    seen = [
        (sample["__key__"], {key: value for key, value in sample.items() if not key.startswith("__")})
        for sample in wds.WebDataset([str(path) for path in shards], shardshuffle=False)
    ]
    assert raw(shards) == seen


@pytest.mark.parametrize("extensions", MEMBERS.values(), ids=MEMBERS.keys())
def test_we_read_the_library_s_shards(tmp_path: Path, extensions: tuple[str, ...]) -> None:
    shards = written(tmp_path, extensions)
    assert len(shards) == 3
    known = [extension for extension in extensions if extension in (*IMAGES, "json", "txt")]
    expected = [(f"part/{n:05d}", {e: member(e, n) for e in known}) for n in range(7)]
    found = raw(shards)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [dict(sorted(members.items())) for _, members in found] == [
        dict(sorted(members.items())) for _, members in expected
    ]
    samples = list(open_splits("web", None, None, {"path": str(tmp_path / "shard-*.tar")})["train"])
    assert [sample["text_input"] for sample in samples] == [f"Caption number {n}, café" for n in range(7)]
    image = next(extension for extension in extensions if extension in IMAGES)
    for number, (sample, other) in enumerate(zip(samples, theirs(shards), strict=True)):
        assert pixels(sample["image"]) == pixels(other[image])
        if image != "jpg":
            assert pixels(sample["image"]) == pixels(picture(number))


def test_what_the_library_s_encoders_write_is_read(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "e-%d.tar"), verbose=0) as sink:
        sink.write({"__key__": "a", "png": picture(1), "json": {"caption": "encoded"}})
    [sample] = open_splits("web", None, None, {"path": str(tmp_path / "e-0.tar")})["train"]
    assert sample["text_input"] == "encoded"
    assert pixels(sample["image"]) == pixels(picture(1))


@pytest.mark.skipif(shutil.which("curl") is None, reason="the library reads urls by curl")
def test_the_library_and_we_read_the_same_from_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both by their own way with urls, and by a command."""
    (tmp_path / "served").mkdir()
    shards = written(tmp_path / "served", ("png", "json"), count=11, per_shard=2)
    monkeypatch.setenv("BLIP_PIPES", "1")
    with serving(tmp_path / "served") as server:
        url = f"{server.url}/shard-{{000000..000005}}.tar"
        expected = [(sample["json"], pixels(sample["png"])) for sample in theirs(shards)]
        fetch = f"{sys.executable} -c 'import sys, urllib.request as r; "
        fetch += f"sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())' {url}"
        for number, place in enumerate((url, f"pipe:{fetch}")):
            library = wds.WebDataset(place, shardshuffle=False, empty_check=False).decode("pil")
            assert [(sample["json"], pixels(sample["png"])) for sample in library] == expected
            options = {"path": place, "remote": True, "cache_dir": str(tmp_path / str(number))}
            ours = list(open_splits("web", tmp_path, None, options)["train"])
            assert [(sample["text_input"], pixels(sample["image"])) for sample in ours] == [
                (record["caption"], content) for record, content in expected
            ]


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_epoch_of_training_has_the_library_s_samples_once(tmp_path: Path, lanes: int) -> None:
    shards = written(tmp_path, ("png", "json"), count=11, per_shard=2)
    section = DatasetConfig(
        path=str(tmp_path / "shard-{000000..000005}.tar"),
        vis_processor={"train": {"name": "blip_image_eval", "image_size": 8}},
        text_processor={"train": {"name": "blip_caption"}},
        window=4,
    )
    data = build_dataset("web", section)
    assert isinstance(data, ShardDataset)
    found = []
    for number in range(lanes):
        lane = Lane(data, 3, number, lanes, [0] * 5)
        while True:
            sample = lane.next()[0]
            if lane.position[0]:
                break
            found.append(sample["text_input"])
    expected = [sample["json"]["caption"].lower() for sample in theirs(shards)]
    assert sorted(found) == sorted(expected)
    assert len(data) == 11
