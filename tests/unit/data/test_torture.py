"""The torture set: every good sample is read, every bad one counted by its cause, nothing is left over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blip.data.datasets import PairDataset
from blip.data.loader import LoaderConfig, TrainLoader
from blip.data.records import read_records
from blip.data.samples import BadRecord, SampleMaker, read_image
from blip.data.skips import SkipLog
from blip.data.streams.shards import Lane, ShardDataset
from blip.processors.image import Blip2ImageTrain
from blip.processors.text import BlipCaption
from tests.torture import PHOTOGRAPHS, bad_pictures, photographs, write_files, write_shard

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture
def maker() -> SampleMaker:
    return SampleMaker(Blip2ImageTrain(image_size=16), BlipCaption())


def test_ten_kinds_of_corrupt_jpegs_have_their_cause() -> None:
    found = {}
    for name, (content, _) in bad_pictures().items():
        with pytest.raises(BadRecord) as error:
            read_image(content, name)
        found[name] = error.value.cause
    assert found == {name: cause for name, (_, cause) in bad_pictures().items()}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_photograph_that_ends_in_zeros_is_truncated(tmp_path: Path, share: float) -> None:
    found = Counter()
    for record in photographs():
        content = (PHOTOGRAPHS / "images" / record["image"]).read_bytes()
        kept = int(len(content) * share)
        hole = content[:kept] + bytes(len(content) - kept)
        (tmp_path / "x.jpg").write_bytes(hole)
        for place in (hole, tmp_path / "x.jpg"):
            with pytest.raises(BadRecord) as error:
                read_image(place, "x")
            found[error.value.cause] += 1
        whole = read_image(content, "x")
        padded = read_image(content + bytes(512), "x")  # as cameras do
        assert np.array_equal(np.asarray(whole), np.asarray(padded))
    assert found == {"truncated_image": 24}


def test_every_record_of_a_file_is_a_sample_or_counted(maker: SampleMaker, tmp_path: Path) -> None:
    path, causes = write_files(tmp_path)
    records = read_records([path], roots=[tmp_path / "images"], name="torture")
    dataset = PairDataset("torture", records, maker)
    bad = {}
    for index in range(len(dataset)):
        try:
            dataset.sample(index)
        except BadRecord as error:
            bad[error.name] = error.cause
    assert bad == causes
    assert len(dataset) - len(bad) == 12 * 5 + 15


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_good_record_and_lists_every_bad_one(
    maker: SampleMaker, tmp_path: Path, workers: int
) -> None:
    path, causes = write_files(tmp_path)
    records = read_records([path], roots=[tmp_path / "images"], name="torture")
    dataset = PairDataset("torture", records, maker)
    skips = SkipLog(tmp_path / "run", max_bad_ratio=1.0)
    config = LoaderConfig(8, num_workers=workers, drop_last=False)
    loader = TrainLoader({"torture": dataset}, config, skips=skips)
    seen = {name for batch in loader.rest_of_epoch() for name in batch["instance_id"]}
    loader.close()
    assert seen == {f"torture/{number}" for number in range(len(dataset))} - set(causes)
    assert set(skips.counts["torture"]) == set(causes.values())
    assert (tmp_path / "run/skipped.jsonl").read_text().count("\n") == len(causes)


def test_every_sample_of_shards_is_read_or_counted_and_nothing_is_written(
    maker: SampleMaker, tmp_path: Path
) -> None:
    home = tmp_path / "some/where/inside"
    home.mkdir(parents=True)
    paths, good, causes = write_shard(home)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lane = Lane(ShardDataset("torture", paths, maker, lanes=1, window=8), 0, 0, 1, [0] * 5)
    seen: Counter[str] = Counter()
    bad = {}
    while not lane.position[0]:
        sample, skipped = lane.next()
        bad |= {error.name: error.cause for error in skipped}
        seen[sample["instance_id"]] += not lane.position[0]
    assert bad == causes
    assert +seen == Counter(good)
    assert seen["torture-0.tar/twice"] == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
