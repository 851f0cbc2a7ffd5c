"""Tar shards: what is read of them, in which order, from which position, and what damage costs."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip.data.samples import BadRecord, SampleMaker
from blip.data.streams.shards import Lane, ShardDataset, num_lanes
from blip.data.streams.stores import LocalShards
from blip.data.streams.tars import Ref, expand, find_shards, scan
from blip.errors import ConfigError, DataError

START = [0, 0, 0, 0, 0]
Members = list[tuple[str, bytes]]


class Pixels:
    """A picture processor without augmentation, but for one random pixel."""

    def pixels(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        assert rng is not None
        pixels = torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1).copy())
        pixels[0, 0, 0] = int(rng.integers(256))
        return pixels

    def norm(self) -> Tensor:
        return torch.ones(2, 3)


def png(blue: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), (0, 0, blue)).save(data, "PNG")
    return data.getvalue()


def write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(shard: int, count: int) -> Members:
    """`count` samples whose caption tells where they stand."""
    members = []
    for i in range(count):
        record = {"caption": f"{shard}.{i}", "url": f"u{i}"}
        members += [(f"{i:03d}.png", png(i)), (f"{i:03d}.json", json.dumps(record).encode())]
    return members


def dataset(folder: Path, shards: list[Members], **options: Any) -> ShardDataset:
    paths = [write(folder / f"{n:03d}.tar", members) for n, members in enumerate(shards)]
    return ShardDataset("web", paths, SampleMaker(Pixels(), str), **options)


def first(shards: ShardDataset, seed: int = 0) -> dict[str, Any]:
    return Lane(shards, seed, 0, 1, START).next()[0]


def captions(lane: Lane, count: int) -> list[str]:
    return [lane.next()[0]["text_input"] for _ in range(count)]


def numbered(sizes: list[int]) -> list[Members]:
    return [pairs(shard, size) for shard, size in enumerate(sizes)]


def names(sizes: list[int]) -> list[str]:
    return [f"{shard}.{i}" for shard, size in enumerate(sizes) for i in range(size)]


# Order


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_the_lanes_of_an_epoch_have_every_sample_once(tmp_path: Path, lanes: int) -> None:
    sizes = [5, 3, 7, 4, 6]
    shards = dataset(tmp_path, numbered(sizes), window=4)
    found = []
    for number in range(lanes):
        lane = Lane(shards, 1, number, lanes, START)
        while True:
            sample = lane.next()[0]["text_input"]
            if lane.position[0]:
                break
            found.append(sample)
    assert sorted(found) == sorted(names(sizes))


def test_each_epoch_has_an_order_of_its_own_and_windows_span_shards(tmp_path: Path) -> None:
    sizes = [2, 3, 2, 3, 2]
    shards = dataset(tmp_path, numbered(sizes), window=5)
    lane = Lane(shards, 1, 0, 1, START)
    epochs = [captions(lane, 12) for _ in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(names(sizes))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    windows = [epoch[at : at + 5] for epoch in epochs for at in (0, 5)]
    assert any(len({name[0] for name in window}) > 2 for window in windows)
    # A window has what stands next in the shards, in another order.
    assert any(
        [int(name[2:]) for name in window] != sorted(int(name[2:]) for name in window) for window in windows
    )


def test_a_window_of_one_keeps_the_stored_order(tmp_path: Path) -> None:
    shards = dataset(tmp_path, numbered([6]), window=1)
    assert captions(Lane(shards, 1, 0, 1, START), 12) == names([6]) * 2


def test_a_larger_window_mixes_more_samples(tmp_path: Path) -> None:
    sizes = [40]
    shards = dataset(tmp_path, numbered(sizes), window=8)
    found = captions(Lane(shards, 1, 0, 1, START), 40)
    assert [sorted(found[at : at + 8]) for at in range(0, 40, 8)] == [
        sorted(names(sizes)[at : at + 8]) for at in range(0, 40, 8)
    ]
    assert found != names(sizes)


def test_samples_of_one_window_come_in_another_order_in_each_epoch(tmp_path: Path) -> None:
    lane = Lane(dataset(tmp_path, numbered([9]), window=9), 1, 0, 1, START)
    assert len({tuple(captions(lane, 9)) for _ in range(4)}) == 4


def test_orders_depend_on_the_seed_and_augmentations_on_the_epoch(tmp_path: Path) -> None:
    shards = dataset(tmp_path, numbered([30]), window=30)
    lane, same, other = (Lane(shards, seed, 0, 1, START) for seed in (1, 1, 2))
    assert captions(lane, 30) == captions(same, 30) != captions(other, 30)
    one = dataset(tmp_path, numbered([1]))
    lane = Lane(one, 1, 0, 1, START)
    corners = [int(lane.next()[0]["image"][0, 0, 0]) for _ in range(8)]
    assert len(set(corners)) > 4


# Position


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_a_lane_resumed_at_any_position_goes_on_to_the_sample(tmp_path: Path, window: int) -> None:
    broken = pairs(3, 5)
    broken[4] = (broken[4][0], b"no picture")
    members = [pairs(0, 3), pairs(1, 4), pairs(2, 1), broken, [], pairs(5, 4)]
    shards = dataset(tmp_path, members, window=window)
    truncate(tmp_path / "001.tar", 2600)
    lane = Lane(shards, 1, 0, 1, START)
    story, positions = [], []
    for _ in range(45):
        sample, bad = lane.next()
        story.append((sample["text_input"], sample["image"].tolist(), [(e.cause, e.name) for e in bad]))
        positions.append(lane.position)
    assert {cause for _, _, bad in story for cause, _ in bad} == {"truncated_shard", "unreadable_image"}
    for used, position in enumerate(positions[:30], start=1):
        resumed = Lane(shards, 1, 0, 1, position)
        for told in story[used : used + 15]:
            sample, bad = resumed.next()
            assert (sample["text_input"], sample["image"].tolist(), [(e.cause, e.name) for e in bad]) == told


# Damage


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def entries(path: Path) -> list[Any]:
    return [e.key if isinstance(e, Ref) else (e.cause, e.name) for e in scan(path, 0, path.name)]


def test_a_truncated_shard_loses_its_tail_only_and_says_so(tmp_path: Path) -> None:
    members = pairs(0, 4)
    path = write(tmp_path / "a.tar", members)
    full = path.read_bytes()
    # Per member a block of header and one of content; two members make a sample; then zeros.
    ends = [1024 * i + 512 + len(members[i][1]) for i in (1, 3, 5, 7)]
    zeros = 8 * 1024
    for keep in range(0, len(full), 64):
        path.write_bytes(full[:keep])
        complete = [f"{i:03d}" for i, end in enumerate(ends) if end <= keep]
        if keep >= zeros + 512:
            assert entries(path) == complete
        elif keep < 512:
            assert entries(path) == [("unreadable_shard", "a.tar")]
        else:
            assert entries(path) == [*complete, ("truncated_shard", "a.tar")], keep


def test_a_shard_that_is_no_tar_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    shards = dataset(tmp_path, numbered([2, 2, 2]))
    (tmp_path / "001.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "002.tar").unlink()
    lane = Lane(shards, 1, 0, 1, START)
    bad: list[BadRecord] = []
    seen = []
    for _ in range(4):
        sample, skipped = lane.next()
        seen.append(sample["text_input"])
        bad += skipped
    assert Counter(seen) == {"0.0": 2, "0.1": 2}
    assert {(error.cause, error.name) for error in bad} == {
        ("unreadable_shard", "001.tar"),
        ("unreadable_shard", "002.tar"),
    }


def test_bad_records_are_skipped_with_their_cause(tmp_path: Path) -> None:
    members = [
        ("0.png", png()),
        ("1.json", b'{"caption": "no picture"}'),
        ("2.png", png()),
        ("2.json", b"{broken"),
        ("3.png", b""),
        ("3.json", b'{"caption": "empty picture"}'),
        ("4.png", png()[:44]),
        ("4.json", b'{"caption": "half a picture"}'),
        ("5.png", png()),
        ("5.json", b'{"text": "another column"}'),
        ("6.png", png()),
        ("6.json", b"17"),
        ("7.png", png()),
        ("7.json", b"[" * 100_000),
        ("8.png", png()),
        ("8.json", b'{"caption": "good"}'),
    ]
    lane = Lane(dataset(tmp_path, [members], window=1), 1, 0, 1, START)
    sample, bad = lane.next()
    assert sample["text_input"] == "good"
    assert [(error.name, error.cause) for error in bad] == [
        ("000.tar/0", "no_caption"),
        ("000.tar/1", "missing_image"),
        ("000.tar/2", "malformed_record"),
        ("000.tar/3", "empty_image"),
        ("000.tar/4", "truncated_image"),
        ("000.tar/5", "no_caption"),
        ("000.tar/6", "malformed_record"),
        ("000.tar/7", "malformed_record"),
    ]


def test_names_with_another_dot_are_counted_where_a_key_has_nothing_else(tmp_path: Path) -> None:
    caption = b'{"caption": "a dog"}'
    dotted = [("IMG.1.png", png()), ("IMG.1.json", caption), ("IMG.2.png", png()), ("IMG.2.txt", b"a cat")]
    masked = [("a.seg.png", png()), ("a.png", png(5)), ("a.json", caption), ("a.seg.cls", b"1")]
    hidden = [("._b.png", b"macOS"), (".b.png", png()), ("c.v1.cls", b"1")]
    shards = dataset(tmp_path, [masked + dotted + hidden], window=1)
    lane = Lane(shards, 1, 0, 1, START)
    sample, bad = lane.next()
    assert (sample["text_input"], int(sample["image"][2, 0, 0]), bad) == ("a dog", 5, [])
    _, bad = lane.next()
    assert [(error.name, error.cause) for error in bad] == [
        ("000.tar/IMG.1", "missing_image"),
        ("000.tar/IMG.2", "missing_image"),
    ]
    assert "first dot" in str(bad[0])


def test_pictures_of_all_kinds_and_texts_with_a_mark_are_read(tmp_path: Path) -> None:
    members = []
    for kind in ("gif", "bmp", "tiff", "jfif", "ppm"):
        data = io.BytesIO()
        Image.new("RGB", (2, 2)).save(data, "JPEG" if kind == "jfif" else kind)
        members += [
            (f"{kind}.{kind.upper()}", data.getvalue()),
            (f"{kind}.txt", b"\xef\xbb\xbfA " + kind.encode()),
        ]
    read = captions(Lane(dataset(tmp_path, [members]), 1, 0, 1, START), 5)
    assert sorted(read) == ["A bmp", "A gif", "A jfif", "A ppm", "A tiff"]


@pytest.mark.parametrize("members", [[], [("0.png", b"broken"), ("0.json", b'{"caption": "a"}')]])
def test_a_lane_without_any_good_sample_is_an_error(tmp_path: Path, members: Members) -> None:
    shards = dataset(tmp_path, [members, members], window=1)
    for position in (START, [0, 1, 1, 0, len(members) // 2]):
        with pytest.raises(DataError, match=r"datasets\.web: no readable sample in 2 shard\(s\)"):
            Lane(shards, 1, 0, 1, position).next()


def test_a_position_in_shards_that_have_shrunk_is_an_error(tmp_path: Path) -> None:
    shards = dataset(tmp_path, numbered([6]), window=4)
    lane = Lane(shards, 1, 0, 1, START)
    captions(lane, 3)
    write(tmp_path / "000.tar", pairs(0, 2))
    with pytest.raises(DataError, match=r"datasets\.web: its shards hold other samples"):
        Lane(shards, 1, 0, 1, lane.position).next()


def test_a_header_that_points_backwards_ends_the_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", pairs(0, 3))
    data = bytearray(path.read_bytes())
    info = tarfile.TarInfo("001.json")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # A negative size in base 256, as an attacker may write it, with the right checksum: reading so many
    # bytes would read all, and the next header would be this one again.
    header[124:136] = (-2048).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[3072:3584] = header
    path.write_bytes(data)
    assert entries(path) == ["000", ("truncated_shard", "a.tar")]


# Contents


def test_members_of_unknown_kind_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            link = tarfile.TarInfo("x.json")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        for name in ("a.pyd", "a.pkl", "a.pth", "a.seg.png", ".json", "a.cls", "a.JPG", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    refs = list(scan(path, 0, "a.tar"))
    assert len(refs) == 1
    assert isinstance(refs[0], Ref)
    assert (refs[0].key, set(refs[0].files)) == ("a", {"jpg", "txt"})


def test_long_names_and_folders_in_a_shard_are_read(tmp_path: Path) -> None:
    long = "folder.d/" + "x" * 150
    members = [(f"{long}.png", png()), (f"{long}.txt", b" a caption \n")]
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        sample = first(ShardDataset("web", [path], SampleMaker(Pixels(), str)))
        assert (sample["text_input"], sample["instance_id"]) == ("a caption", f"{number}.tar/{long}")


def test_ranked_captions_are_drawn_from_the_best_two(tmp_path: Path) -> None:
    lists = (["best", "second", "third"], [{"caption": "best"}, {"caption": "second"}, {"caption": "third"}])
    for records in lists:
        members = [("0.png", png()), ("0.json", json.dumps(records).encode())]
        lane = Lane(dataset(tmp_path, [members]), 1, 0, 1, START)
        assert set(captions(lane, 20)) == {"best", "second"}


def test_columns_and_prompt_apply_to_shards(tmp_path: Path) -> None:
    record = {"TEXT": "hello", "pic": 7}
    members = [("0.png", png()), ("0.json", json.dumps(record).encode())]
    path = write(tmp_path / "0.tar", members)
    columns = {"caption": "TEXT", "image_id": "pic"}
    sample = first(ShardDataset("web", [path], SampleMaker(Pixels(), str, "say ", columns)))
    assert (sample["text_input"], sample["image_id"]) == ("say hello", 7)


def test_picture_numbers_are_of_the_record_its_url_or_its_name(tmp_path: Path) -> None:
    def numbers(folder: str, records: list[dict[str, Any]]) -> list[int]:
        (tmp_path / folder).mkdir()
        members = []
        for i, record in enumerate(records):
            members += [(f"{i}.png", png()), (f"{i}.json", json.dumps({"caption": "a", **record}).encode())]
        lane = Lane(dataset(tmp_path / folder, [members], window=1), 1, 0, 1, START)
        return [lane.next()[0]["image_id"] for _ in records]

    assert numbers("a", [{"image_id": 5, "url": "u"}, {"image_id": 5}]) == [5, 5]
    url, same, other = numbers("b", [{"url": "u"}, {"url": "u"}, {"url": "v"}])
    assert url == same != other
    names = numbers("c", [{}, {}, {"image_id": "x"}])
    assert len(set(names)) == 3
    assert all(0 <= number < 1 << 48 for number in names)


def test_picture_numbers_are_left_out_where_asked(tmp_path: Path) -> None:
    assert "image_id" not in first(dataset(tmp_path, numbered([2]), image_ids=False))


def test_equal_names_in_two_folders_are_two_samples(tmp_path: Path) -> None:
    paths = []
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        paths.append(write(tmp_path / part / "0.tar", [("0.png", png()), ("0.txt", part.encode())]))
    lane = Lane(ShardDataset("web", paths, SampleMaker(Pixels(), str)), 1, 0, 1, START)
    found = {sample["instance_id"]: sample["image_id"] for sample, _ in (lane.next() for _ in range(2))}
    assert set(found) == {"x/0.tar/0", "y/0.tar/0"}
    assert len(set(found.values())) == 2


# Counting


def test_samples_are_counted_from_headers(tmp_path: Path) -> None:
    assert dataset(tmp_path, numbered([3, 0, 5])).num_samples == 8


def test_a_table_of_sizes_is_believed_and_what_it_lacks_is_counted(tmp_path: Path) -> None:
    shards = dataset(tmp_path, numbered([3, 1, 5]))
    (tmp_path / "sizes.json").write_text('{"000.tar": 1000, "002.tar": 70, "other.tar": 9}')
    assert shards.num_samples == 1071
    (tmp_path / "sizes.json").write_text('["000.tar"]')
    with pytest.raises(DataError, match=r"sizes\.json: not a JSON object"):
        _ = dataset(tmp_path, numbered([3])).num_samples


def test_many_samples_are_estimated_by_file_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LocalShards, "most_counted", 25)
    shards = dataset(tmp_path, numbered([10] * 8))
    with caplog.at_level(logging.WARNING):
        assert shards.num_samples == 80
    assert "estimated from 3 of 8 shards" in caplog.text


# Names


def test_braces_stand_for_all_their_names() -> None:
    assert expand("part{0..1}_s{08..10}.tar") == [
        f"part{part}_s{shard}.tar" for part in (0, 1) for shard in ("08", "09", "10")
    ]
    assert expand("{a,b}/{9..11}") == ["a/9", "a/10", "a/11", "b/9", "b/10", "b/11"]
    assert expand("plain.tar") == ["plain.tar"]


def test_shards_are_found_by_folder_pattern_and_braces(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n:02d}.tar", []) for n in range(3)]
    (tmp_path / "notes.txt").write_text("not a shard")
    for pattern in (".", "*.tar", "0*", "{00..02}.tar", "0{0,1,2}.tar"):
        assert find_shards(pattern, tmp_path) == paths
    assert find_shards(paths[1]) == [paths[1]]
    with pytest.raises(DataError, match=r"1 of 4 files are missing, the first is '.*03\.tar'"):
        find_shards("{00..03}.tar", tmp_path)
    with pytest.raises(DataError, match=r"no \.tar file"):
        find_shards("*.nothing", tmp_path)


@pytest.mark.parametrize("name", ["pipe:rm -rf x", "https://host/{0..3}.tar", "s3://b/a.tar", "a.tar.gz"])
def test_commands_urls_and_compressed_archives_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="shards"):
        find_shards(name)


# Lanes


def test_the_number_of_lanes_depends_on_batch_and_shards_only(tmp_path: Path) -> None:
    shards = dataset(tmp_path, [[]] * 9, lanes=16)
    for world in (1, 2, 4, 8):
        assert num_lanes(shards, 64, world) == 8
    assert num_lanes(shards, 12, 2) == 4
    assert num_lanes(shards, 7, 1) == 1
    shards.lanes = 12
    assert num_lanes(shards, 24, 3) == 6


def test_lanes_that_ranks_cannot_share_are_refused_with_what_would_do(tmp_path: Path) -> None:
    shards = dataset(tmp_path, [[]] * 9, lanes=16)
    with pytest.raises(ConfigError, match=r"datasets\.web\.lanes: 16 gives 8 lanes .* 3 ranks; use 3 or 6$"):
        num_lanes(shards, 24, 3)
    for lanes in (3, 6):
        shards.lanes = lanes
        assert num_lanes(shards, 24, 3) == lanes
    with pytest.raises(ConfigError, match=r"9 shard\(s\) cannot feed 10 ranks"):
        num_lanes(shards, 40, 10)
