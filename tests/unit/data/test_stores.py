"""Remote shards: the same samples as on disk, in a bounded folder, with every failure counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from blip.config.schema import DatasetConfig
from blip.data.browse import open_splits
from blip.data.check import check_split
from blip.data.locate import locate
from blip.data.samples import BadRecord, SampleMaker
from blip.data.streams import fetch
from blip.data.streams.shards import Lane, ShardDataset
from blip.data.streams.stores import RemoteShards, find_urls
from blip.errors import ConfigError, DataError
from tests.shard_server import ShardServer, serving
from tests.unit.data.test_shards import START, Pixels, pairs, write

SIZES = [5, 3, 7, 4, 6]


MAKER = SampleMaker(Pixels(), str)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    for number, size in enumerate(SIZES):
        write(tmp_path / f"shards/{number:03d}.tar", pairs(number, size))
    return tmp_path / "shards"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(fetch, "DELAYS_S", (0.0, 0.0))
    with serving(folder) as found:
        yield found


def local(folder: Path, **options: Any) -> ShardDataset:
    return ShardDataset("web", sorted(folder.glob("*.tar")), MAKER, **options)


def remote(server: ShardServer, cache: Path, limit: int = 1 << 30, **options: Any) -> ShardDataset:
    urls = [f"{server.url}/{number:03d}.tar" for number in range(len(SIZES))]
    return ShardDataset("web", RemoteShards("web", urls, cache, limit), MAKER, **options)


Story = list[tuple[str, list[Any], list[tuple[str, str]], list[int]]]


def story(lane: Lane, count: int) -> Story:
    """Text, pixels, what was skipped, and the position behind each of the next samples."""
    found = []
    for _ in range(count):
        sample, bad = lane.next()
        skipped = [(error.cause, error.name) for error in bad]
        found.append((sample["text_input"], sample["image"].tolist(), skipped, lane.position))
    return found


def files(cache: Path) -> list[str]:
    """Names of what is kept, without what tells equal ones apart; and of leftovers."""
    return sorted(path.name.partition("-")[2] for path in cache.rglob("*") if path.is_file())


def taken(cache: Path) -> int:
    """Bytes of what is kept, while some of it comes and goes."""
    total = 0
    for path in cache.rglob("*.tar"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


# The same samples


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("limit", [1 << 30, 1], ids=["all fit", "none fits"])
def test_lanes_of_urls_are_those_of_the_files_bit_for_bit(
    folder: Path, server: ShardServer, tmp_path: Path, window: int, limit: int
) -> None:
    ours = local(folder, window=window)
    theirs = remote(server, tmp_path / "cache", limit, window=window)
    for number in range(2):
        lanes = [Lane(data, 1, number, 2, START) for data in (ours, theirs)]
        assert story(lanes[1], 40) == story(lanes[0], 40)


def test_a_lane_of_urls_resumed_anywhere_goes_on_with_another_cache(
    server: ShardServer, tmp_path: Path
) -> None:
    whole = story(Lane(remote(server, tmp_path / "cache", window=4), 1, 0, 1, START), 40)
    for used in range(1, 30, 4):
        again = remote(server, tmp_path / f"cache-{used}", window=4)
        assert story(Lane(again, 1, 0, 1, whole[used - 1][3]), 10) == whole[used : used + 10]


def test_every_shard_is_fetched_once_where_all_fit(server: ShardServer, tmp_path: Path) -> None:
    data = remote(server, tmp_path / "cache", window=4)
    for number in range(2):
        story(Lane(data, 1, number, 2, START), 60)
    assert set(server.asked.values()) == {1}
    story(Lane(remote(server, tmp_path / "cache"), 2, 0, 1, START), 25)  # another run
    assert set(server.asked.values()) == {1}
    assert files(tmp_path / "cache") == [f"{number:03d}.tar" for number in range(len(SIZES))]
    fetched, waited = data.shards.take_fetched()
    assert fetched == sum(path.stat().st_size for path in server.folder.glob("*.tar"))
    assert waited > 0
    assert data.shards.take_fetched()[0] == 0


def test_what_is_fetched_stays_below_the_limit(server: ShardServer, tmp_path: Path) -> None:
    for number in range(12):
        size = write(server.folder / f"many-{number}.tar", pairs(number, 4)).stat().st_size
    urls = [f"{server.url}/many-{number}.tar" for number in range(12)]
    data = ShardDataset("web", RemoteShards("web", urls, tmp_path / "cache", 5 * size), MAKER, window=2)
    lane = Lane(data, 1, 0, 1, START)
    for _ in range(100):
        lane.next()
        assert taken(tmp_path / "cache") <= 5 * size
    assert server.asked.total() > 12


def test_the_next_shard_is_fetched_while_one_is_read(server: ShardServer, tmp_path: Path) -> None:
    data = remote(server, tmp_path / "cache", window=1)
    lane = Lane(data, 1, 0, 1, START)
    lane.next()
    [(second, ahead)] = data.shards._ahead.items()  # type: ignore[attr-defined]
    ahead.result().close()
    assert server.asked.total() == 2
    assert server.asked[data.labels[second]] == 1


# Failures


def lost(data: ShardDataset, count: int = 30) -> set[tuple[str, str]]:
    return {bad for _, _, skipped, _ in story(Lane(data, 1, 0, 1, START), count) for bad in skipped}


def test_urls_may_have_spaces_and_letters_of_any_kind(
    folder: Path, server: ShardServer, tmp_path: Path
) -> None:
    server.folder = tmp_path / "www"
    (server.folder / "my Bilder ü").mkdir(parents=True)
    (server.folder / "my Bilder ü/a b.tar").write_bytes((folder / "000.tar").read_bytes())
    url = f"{server.url}/my Bilder ü/a b.tar"
    data = ShardDataset("web", RemoteShards("web", [url], tmp_path / "cache", 1 << 30), MAKER)
    assert (len(data), lost(data)) == (SIZES[0], set())
    assert server.asked == {"my Bilder ü/a b.tar": 1}


@pytest.mark.parametrize("codes", [[404], [503, 503, 503]])
def test_a_shard_that_cannot_be_had_is_counted_and_the_others_are_read(
    server: ShardServer, tmp_path: Path, codes: list[int]
) -> None:
    server.refuse["002.tar"] = codes
    data = remote(server, tmp_path / "cache")
    assert lost(data) == {("unreadable_shard", "002.tar")}
    [entry] = data.scan(2)
    assert isinstance(entry, BadRecord)
    assert entry.detail.startswith(f"{server.url}/002.tar: HTTP {codes[0]} ")
    assert "002.tar" not in files(tmp_path / "cache")


@pytest.mark.parametrize("sized", [True, False])
def test_what_fails_for_a_while_is_tried_again(
    folder: Path, server: ShardServer, tmp_path: Path, sized: bool
) -> None:
    server.refuse["001.tar"] = [503, 429, 200]
    server.cut = {"003.tar": 2}
    server.sized = sized
    data = remote(server, tmp_path / "cache")
    fetch_once = fetch.copy
    asked = []

    def copy(url: str, *rest: Any) -> int | None:
        asked.append(url.rpartition("/")[2])
        return fetch_once(url, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "copy", copy)
        assert story(Lane(data, 1, 0, 1, START), 25) == story(Lane(local(folder), 1, 0, 1, START), 25)
    assert {name: asked.count(name) for name in ("000.tar", "001.tar", "003.tar")} == {
        "000.tar": 1,
        "001.tar": 3,
        "003.tar": 3,
    }


def test_a_shard_that_always_breaks_off_is_no_shard_where_its_size_is_known(
    server: ShardServer, tmp_path: Path
) -> None:
    server.cut = {"002.tar": 99}
    assert lost(remote(server, tmp_path / "known")) == {("unreadable_shard", "002.tar")}
    server.sized = False
    assert lost(remote(server, tmp_path / "unknown")) == {("truncated_shard", "002.tar")}


def test_a_shard_that_is_damaged_at_its_source_is_read_as_on_disk(
    folder: Path, server: ShardServer, tmp_path: Path
) -> None:
    path = folder / "002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    (folder / "004.tar").write_bytes(b"<html>not found</html>" * 100)
    ours, theirs = local(folder), remote(server, tmp_path / "cache")
    assert story(Lane(theirs, 1, 0, 1, START), 30) == story(Lane(ours, 1, 0, 1, START), 30)
    assert lost(theirs) == {("truncated_shard", "002.tar"), ("unreadable_shard", "004.tar")}


def test_many_lost_shards_in_a_row_end_the_run(server: ShardServer, tmp_path: Path) -> None:
    urls = [f"{server.url}/none-{number}.tar" for number in range(20)]
    data = ShardDataset("web", RemoteShards("web", urls, tmp_path / "cache", 1), MAKER)
    told = r"datasets\.web\.path: 8 shards in a row cannot be read, the last is none-\d+\.tar.*404.*resume"
    with pytest.raises(DataError, match=told):
        Lane(data, 1, 0, 1, START).next()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_key(
    server: ShardServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    data = remote(server, tmp_path / "file")
    with pytest.raises(DataError, match=r"fetched shards cannot be kept there .*cache_dir"):
        list(data.scan(0))


def test_a_look_before_the_run_fetches_beginnings_only(server: ShardServer, tmp_path: Path) -> None:
    server.refuse["001.tar"] = [403]
    (server.folder / "003.tar").write_text("<html>" * 300)
    data = remote(server, tmp_path / "cache")
    assert [(error.cause, error.name) for error in data.damaged()] == [
        ("unreadable_shard", "001.tar"),
        ("unreadable_shard", "003.tar"),
    ]
    assert data.num_probed == 5
    assert (server.asked, (tmp_path / "cache").exists()) == ({}, False)


# Counting


def test_sizes_beside_the_shards_are_believed(server: ShardServer, tmp_path: Path) -> None:
    table = {f"{number:03d}.tar": size for number, size in enumerate(SIZES)}
    (server.folder / "sizes.json").write_text(json.dumps(table))
    assert len(remote(server, tmp_path / "cache")) == 25
    assert server.asked == {"sizes.json": 1}
    (server.folder / "sizes.json").write_text("[]")
    with pytest.raises(DataError, match=r"http.*sizes\.json: not a JSON object"):
        len(remote(server, tmp_path / "cache"))
    server.refuse["sizes.json"] = [500]
    with pytest.raises(DataError, match=r"datasets\.web: http.*sizes\.json: HTTP 500"):
        len(remote(server, tmp_path / "cache"))


def test_without_sizes_one_shard_stands_for_all(
    server: ShardServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        number = len(remote(server, tmp_path / "cache"))
    [counted] = [int(name[:3]) for name in server.asked]
    assert number == 5 * SIZES[counted]
    assert "estimated from 1 of 5 shards" in caplog.text


def test_a_told_number_is_believed_and_shards_that_cannot_be_counted_ask_for_it(
    server: ShardServer, tmp_path: Path
) -> None:
    server.refuse = {f"{number:03d}.tar": [403] for number in range(5)}
    urls = [f"{server.url}/{number:03d}.tar" for number in range(5)]
    assert len(ShardDataset("web", RemoteShards("web", urls, tmp_path, 1, 70), MAKER)) == 70
    with pytest.raises(DataError, match=r"cannot be counted.*HTTP 403.*give datasets\.web\.num_samples"):
        len(ShardDataset("web", RemoteShards("web", urls, tmp_path, 1), MAKER))


# Sections of a configuration


def test_urls_need_to_be_allowed_and_commands_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"set datasets\.web\.remote=true, or copy them to a disk"):
        find_urls("web", ["s3://bucket/{0..9}.tar"], remote=False)
    monkeypatch.delenv("BLIP_PIPES", raising=False)
    command = "pipe:cat x-{0..2}.tar {b,c}"
    with pytest.raises(ConfigError, match=r"is a command, and no configuration file runs one.*BLIP_PIPES=1"):
        find_urls("web", [command], remote=True)
    monkeypatch.setenv("BLIP_PIPES", "1")
    assert find_urls("web", [command], True) == [f"pipe:cat x-{n}.tar {{b,c}}" for n in range(3)]
    with pytest.raises(ConfigError, match=r"remote=true"):
        find_urls("web", [command], remote=False)


@pytest.mark.parametrize("rest", ["| sh", "; rm x", "> x", "&& y", "$(x)", "`x`", "&", "$HOME"])
def test_commands_have_no_shell(monkeypatch: pytest.MonkeyPatch, rest: str) -> None:
    monkeypatch.setenv("BLIP_PIPES", "1")
    with pytest.raises(ConfigError, match="without a shell"):
        find_urls("web", [f"pipe:cat 0.tar {rest}"], remote=True)
    assert find_urls("web", ["pipe:curl 'http://h/0.tar?a=1&b=2'"], remote=True)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "http://h/*.tar",
            r"a web server lists no files; write their numbers, as in \{00000\.\.00012",
        ),
        ("https://h/a.json", r"'https://h/a\.json' does not end in \.tar"),
        ("https://h/a.tar.gz?key=secret", r"'https://h/a\.tar\.gz' does not end in \.tar"),
        ("simplecache::s3://h/a.tar", "is no url of http, https"),
        ("file:///etc/a.tar", "is no url of http, https"),
        ("zip://a.tar", "is no url of http, https"),
        ("s3://bucket/a.tar", "fsspec cannot read it .*pip install s3fs"),
    ],
)
def test_urls_that_give_no_shards_are_refused(path: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find_urls("web", [path], remote=True)


def test_urls_and_files_of_one_dataset_are_refused(folder: Path) -> None:
    section = DatasetConfig(path=["http://h/0.tar", str(folder / "000.tar")], remote=True)
    with pytest.raises(ConfigError, match="make them two datasets, which are mixed"):
        locate("web", section, "train")


def test_labels_are_those_of_the_files_below_their_common_folder() -> None:
    def labels(*urls: str) -> list[str]:
        return RemoteShards("web", urls, Path("cache"), 1).labels

    assert labels("http://h/x/0.tar", "http://h/x/1.tar?sig=1") == ["0.tar", "1.tar"]
    assert labels("s3://b/x/y/0.tar", "s3://b/x/0.tar") == ["y/0.tar", "0.tar"]
    assert labels("http://h/get.tar?n=1", "http://h/get.tar?n=2") == [
        "http://h/get.tar?n=1",
        "http://h/get.tar?n=2",
    ]
    assert labels("pipe:cat a/0.tar -", "pipe:cat a/1.tar -") == ["0.tar", "1.tar"]
    assert labels("pipe:cat a/0.tar", "pipe:cat b/0.tar") == ["pipe:cat a/0.tar", "pipe:cat b/0.tar"]


def texts(section: dict[str, Any], root: Path) -> list[str]:
    return [sample["text_input"] for sample in open_splits("web", root, None, section)["train"]]


ALL = [f"{shard}.{i}" for shard, size in enumerate(SIZES) for i in range(size)]


def test_a_section_reads_urls_commands_and_file_systems_alike(
    folder: Path, server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP_PIPES", "1")
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe(f"/web-{tmp_path.name}/{path.name}", path.read_bytes())
    memory.pipe(f"/web-{tmp_path.name}/notes.txt", b"no shard")
    paths = [
        f"{server.url}/{{000..004}}.tar",
        f"pipe:cat {folder}/{{000..004}}.tar",
        f"memory://web-{tmp_path.name}/{{000..004}}.tar",
        f"memory://web-{tmp_path.name}/*",
        [f"{server.url}/000.tar", f"{server.url}/{{001,002,003,004}}.tar"],
    ]
    for number, path in enumerate(paths):
        assert texts({"path": path, "remote": True}, tmp_path / str(number)) == ALL
        assert files(tmp_path / str(number) / "remote") == [f"{n:03d}.tar" for n in range(5)]
    own = {"path": paths[0], "remote": True, "cache_dir": str(tmp_path / "own")}
    assert texts(own, tmp_path / "root") == ALL
    assert (len(files(tmp_path / "own")), (tmp_path / "root").exists()) == (5, False)


def test_a_command_that_fails_is_told_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DELAYS_S", ())
    data = ShardDataset("web", RemoteShards("web", ["pipe:cat /none.tar"], tmp_path, 1), MAKER)
    [entry] = data.scan(0)
    assert isinstance(entry, BadRecord)
    assert "pipe:cat /none.tar: it ends with code 1 (cat: " in entry.detail
    assert data.damaged() == []  # nothing but running it would tell


def test_a_check_with_a_limit_fetches_few_shards(server: ShardServer, tmp_path: Path) -> None:
    section = DatasetConfig(path=f"{server.url}/{{000..004}}.tar", remote=True, num_samples=25)
    source = locate("web", section, "train", tmp_path)
    report = check_split("web", "train", source, section, tmp_path, limit=4)
    assert (report.checked, report.bad) == (4, [])
    assert server.asked == {"000.tar": 1, "002.tar": 1, "004.tar": 1}
    report = check_split("web", "train", source, section, tmp_path)
    assert (report.checked, report.records) == (25, 25)
