"""Lists of addresses, and pictures on disk, become shards as img2dataset writes them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip.config.schema import DatasetConfig
from blip.data.__main__ import main
from blip.data.catalog.table import CATALOG
from blip.data.makers import Defaults
from blip.data.official.urls import read_urls
from blip.data.samples import MALFORMED
from blip.data.sources import build_dataset
from blip.errors import DataError
from tests.servers import Site, serve

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def picture(width: int, height: int, kind: str = "jpeg", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def shards(*arguments: str) -> int:
    return main(
        ["shards", *arguments, "--allow-private", "--timeout", "0.5", "--retries", "0", "--threads", "4"]
    )


def web_list(site: Site, path: Path) -> list[dict[str, Any]]:
    """A list of what the web is like, written as JSON lines."""
    rows = [
        {"url": site.put("/small.jpg", picture(40, 30)), "caption": "small", "similarity": 0.3},
        {"url": site.put("/wide.png", picture(200, 80, "png", "RGBA")), "caption": "wide & transparent"},
        {"url": f"{site.address}/none.jpg", "caption": "gone"},
        {"url": site.put("/page.jpg", b"<html>Not found</html>"), "caption": "a page"},
        {"url": site.put("/empty.jpg", b""), "caption": "empty"},
        {"url": site.put("/huge.jpg", bytes(300_000)), "caption": "huge"},
        {"url": site.put("/slow.jpg", picture(9, 9), wait_s=1.5), "caption": "slow"},
        {"url": site.put("/cut.jpg", picture(50, 50), breaks_after=[200]), "caption": "cut"},
        {"url": "file:///etc/passwd", "caption": "a file"},
        {"url": None, "caption": "no address"},
        {"url": site.put("/untold.jpg", picture(64, 64)), "caption": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return rows


def test_a_list_of_addresses_becomes_shards_of_img2dataset(site: Site, root: Path, capsys: Captured) -> None:
    rows = web_list(site, Path("list.jsonl"))
    options = ["--fetch", "--image-size", "64", "--per-shard", "6", "--max-bytes", "200000"]
    assert shards("list.jsonl", "out", *options) == 0
    out = capsys.readouterr().out
    assert "out: 3 of 12 rows in 2 shards; failed: " in out
    stats = [json.loads(Path(f"out/0000{n}_stats.json").read_text()) for n in (0, 1)]
    assert [one["status_dict"] for one in stats] == [
        {"success": 2, "http_404": 1, "unreadable_image": 1, "empty_image": 1, "too_large": 1},
        {
            **{"timeout": 1, "truncated": 1, "bad_url": 1, "no_url": 1, "success": 1},
            "malformed_record": 1,
        },
    ]
    assert [(one["count"], one["successes"], one["failed_to_resize"]) for one in stats] == [
        (6, 2, 2),
        (6, 1, 0),
    ]
    assert json.loads(Path("out/sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 1}

    first = members(Path("out/00000.tar"))
    assert list(first) == [f"00000000{n}.{e}" for n in (0, 1) for e in ("jpg", "json", "txt")]
    small = picture(40, 30)
    assert first["000000000.jpg"] == small  # smaller than wanted and a JPEG already: as it came
    assert first["000000000.txt"] == b"small"
    assert json.loads(first["000000000.json"]) == {
        **rows[0],
        **{"key": "000000000", "status": "success", "error_message": None, "exif": "{}"},
        **{"width": 40, "height": 30, "original_width": 40, "original_height": 30},
        "sha256": hashlib.sha256(small).hexdigest(),
    }
    wide = json.loads(first["000000001.json"])
    assert [wide[key] for key in ("width", "height", "original_width", "original_height")] == [
        160,
        64,
        200,
        80,
    ]
    image = Image.open(io.BytesIO(first["000000001.jpg"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (160, 64))
    last = members(Path("out/00001.tar"))
    assert list(last) == ["000010004.jpg", "000010004.json"]  # without a caption no text
    assert json.loads(last["000010004.json"])["caption"] is None


def test_the_table_beside_a_shard_has_every_row(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web_list(site, Path("list.jsonl"))
    parquet = pytest.importorskip("pyarrow.parquet")
    assert shards("list.jsonl", "out", "--fetch", "--max-bytes", "200000") == 0
    table = parquet.read_table("out/00000.parquet").to_pylist()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    web_list(site, Path("list.jsonl"))
    assert shards("list.jsonl", "plain", "--fetch", "--max-bytes", "200000") == 0
    lines = [json.loads(line) for line in Path("plain/00000.jsonl").read_text().splitlines()]
    assert [row["error_message"] for row in lines] == [
        *(None, None, "http_404", "unreadable_image", "empty_image", "too_large", "timeout", "truncated"),
        *("bad_url", "no_url", None, "malformed_record"),
    ]
    assert [{**row, "similarity": row.get("similarity")} for row in lines] == table


def test_finished_shards_are_not_made_again(site: Site, root: Path, capsys: Captured) -> None:
    rows = [{"url": site.put(f"/{n}.jpg", picture(8 + n, 8)), "caption": str(n)} for n in range(7)]
    Path("list.json").write_text(json.dumps(rows))
    options = ["list.json", "out", "--fetch", "--per-shard", "3"]
    assert shards(*options) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix == ".tar"}
    asked = len(site.asked)
    Path("out/00001_stats.json").unlink()  # as a killed process leaves it
    Path("out/00001.tar").write_bytes(b"half")
    assert shards(*options) == 0
    assert "7 of 7 rows in 3 shards (2 of them finished before); failed: none" in capsys.readouterr().out
    assert sorted(path for path, _ in site.asked[asked:]) == ["/3.jpg", "/4.jpg", "/5.jpg"]
    assert {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix == ".tar"} == before
    assert not list(Path("out").glob(".partial*"))


def test_other_settings_or_lists_are_not_mixed_into_shards(site: Site, root: Path, capsys: Captured) -> None:
    Path("list.json").write_text(json.dumps([{"url": site.put("/a.jpg", picture(8, 8)), "caption": "a"}]))
    assert shards("list.json", "out", "--fetch") == 0
    assert shards("list.json", "out", "--fetch", "--image-size", "99") == 2
    assert "its shards were made with image_size 384, not 99; give another folder" in capsys.readouterr().err
    Path("list.json").write_text(json.dumps([{"url": site.put("/b.jpg", picture(8, 8)), "caption": "ab"}]))
    assert shards("list.json", "out", "--fetch") == 2
    assert "were made with source 'list.json of " in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/mine.tar").write_bytes(b"x")
    assert shards("list.json", "other", "--fetch") == 2
    assert "has shards that are not of this command" in capsys.readouterr().err


def test_addresses_of_this_machine_are_only_opened_when_allowed(
    site: Site, root: Path, capsys: Captured
) -> None:
    Path("list.json").write_text(json.dumps([{"url": site.put("/a.jpg", picture(8, 8)), "caption": "a"}]))
    assert main(["shards", "list.json", "out", "--fetch"]) == 2
    assert "1 private_address; --allow-private opens private addresses" in capsys.readouterr().out
    assert site.asked == []
    assert main(["shards", "list.json", "out", "--fetch", "--allow-private"]) == 0
    assert "1 of 1 rows in 1 shards; failed: none" in capsys.readouterr().out


def test_nothing_is_downloaded_unasked(site: Site, root: Path, capsys: Captured) -> None:
    Path("list.json").write_text(json.dumps([{"url": site.put("/a.jpg", picture(8, 8)), "caption": "a"}]))
    assert shards("list.json", "out") == 2
    assert "a list of addresses; add --fetch" in capsys.readouterr().err
    assert site.asked == []


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--image-size", "20"], (50, 20)),
        (["--image-size", "20", "--resize", "center_crop"], (20, 20)),
        (["--image-size", "20", "--resize", "no"], (100, 40)),
        (["--image-size", "60"], (100, 40)),
        (["--image-size", "60", "--enlarge"], (150, 60)),
        (["--image-size", "60", "--resize", "center_crop"], (40, 40)),
    ],
)
def test_pictures_get_the_size_that_is_asked_for(
    site: Site, root: Path, options: list[str], size: tuple[int, int]
) -> None:
    Path("list.csv").write_text(f"URL,TEXT\n{site.put('/a.jpg', picture(100, 40))},one\n")
    assert shards("list.csv", "out", "--fetch", *options) == 0
    assert Image.open(io.BytesIO(members(Path("out/00000.tar"))["000000000.jpg"])).size == size


def test_small_pictures_can_be_left_out(site: Site, root: Path, capsys: Captured) -> None:
    Path("list.txt").write_text(
        f"{site.put('/a.jpg', picture(100, 40))}\n\n{site.put('/b.jpg', picture(9, 9))}\n"
    )
    assert shards("list.txt", "out", "--fetch", "--min-image-size", "40") == 0
    assert "1 of 2 rows in 1 shards; failed: 1 too_small" in capsys.readouterr().out


ROWS = [{"url": f"http://x.org/{n}.jpg", "caption": f"text {n}"} for n in range(3)]
TSV = "".join(f"{row['caption']}\t{row['url']}\n" for row in ROWS)
LISTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "json": ("a.json", json.dumps(ROWS), {}),
    "jsonl": ("a.jsonl", "\n".join(map(json.dumps, ROWS)), {}),
    "jsonl called json": ("a.json", "\n".join(map(json.dumps, ROWS)), {}),
    "columns, as SBU": (
        "a.json",
        json.dumps({"image_urls": [r["url"] for r in ROWS], "captions": [r["caption"] for r in ROWS]}),
        {},
    ),
    "csv with LAION's names": (
        "a.csv",
        "URL,TEXT\n" + "".join(f"{r['url']},{r['caption']}\n" for r in ROWS),
        {},
    ),
    "tsv without a header, as CC3M": ("a.tsv", TSV, {"columns": ["caption", "url"]}),
    "own names": (
        "a.csv",
        "where,what\n" + "".join(f"{r['url']},{r['caption']}\n" for r in ROWS),
        {"url": "where", "caption": "what"},
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", LISTS)
def test_lists_are_read_in_every_format_of_img2dataset(tmp_path: Path, case: str, packed: bool) -> None:
    name, text, options = LISTS[case]
    path = tmp_path / (name + ".gz" * packed)
    if packed and case == "jsonl called json":
        path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert list(read_urls([path], **options)) == ROWS


def test_lists_may_be_parquet_text_or_folders_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "parts").mkdir()
    for n, row in enumerate(ROWS):
        table = pyarrow.table({"URL": [row["url"]], "TEXT": [row["caption"]]})
        parquet.write_table(table, tmp_path / f"parts/part-{n}.parquet")
    (tmp_path / "parts/_SUCCESS").touch()
    assert list(read_urls([tmp_path / "parts"])) == ROWS
    (tmp_path / "u.txt").write_text("".join(f"{row['url']}\n" for row in ROWS))
    (tmp_path / "c.txt").write_text("".join(f"{row['caption']}\n" for row in ROWS))
    assert list(read_urls([tmp_path / "u.txt"])) == [{"url": row["url"]} for row in ROWS]
    assert list(read_urls([tmp_path / "u.txt", tmp_path / "c.txt"])) == ROWS
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="run 'pip install pyarrow', or give the list as jsonl, csv or tsv"):
        list(read_urls([tmp_path / "parts"]))


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.json", '[{"link": "x"}]', {}, "no column of addresses, only link; name it by --url-column"),
        (
            "a.json",
            '[{"url": "x"}]',
            {"caption": "txt"},
            r"no column 'txt' \(--caption-column\); choose from url",
        ),
        ("a.bin", "x", {}, "no known kind of list"),
        ("a.parquet", "x", {}, "cannot be read as parquet"),
        ("a.json.gz", "x", {}, "cannot be read"),
        ("none", None, {}, "no list of addresses there"),
    ],
)
def test_what_is_no_list_is_told(
    tmp_path: Path, name: str, text: str | None, options: dict[str, str], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_urls([tmp_path / name], **options))


def test_a_damaged_line_of_a_list_costs_that_line(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("url\tcaption\nhttp://x/1\tone\nhttp://x/2\nhttp://x/3\tthree\n")
    found = list(read_urls([tmp_path / "a.tsv"]))
    assert [record.get("caption") for record in found] == ["one", None, "three"]
    assert MALFORMED in found[1]


def test_pictures_on_disk_become_shards(root: Path, capsys: Captured) -> None:
    (root / "own").mkdir()
    for n in range(3):
        (root / f"own/{n}.jpg").write_bytes(picture(30 + n, 20))
    (root / "own/cut.jpg").write_bytes(picture(30, 20)[:200])
    records = [{"image": f"{n}.jpg", "caption": [f"text {n}", "more"], "image_id": n} for n in range(3)]
    records += [{"image": "cut.jpg", "caption": "x"}, {"image": "none.jpg", "caption": "x"}]
    (root / "own/list.json").write_text(json.dumps([*records, 7]))
    assert main(["shards", "own/list.json", str(root / "out"), "--resize", "no"]) == 0
    failed = "failed: 1 truncated_image, 1 missing_image, 1 malformed_record"
    assert f"3 of 6 rows in 1 shards; {failed}" in capsys.readouterr().out
    found = members(root / "out/00000.tar")
    assert [found[f"00000000{n}.jpg"] for n in range(3)] == [picture(30 + n, 20) for n in range(3)]
    note = json.loads(found["000000001.json"])
    assert (note["caption"], note["image_id"], found["000000001.txt"]) == (["text 1", "more"], 1, b"text 1")
    assert main(["check", "out"]) == 0
    assert "out train: 3 records, 3 pictures, 6 captions" in capsys.readouterr().out


def test_the_embedded_scenes_and_a_folder_of_pictures_become_shards(root: Path, capsys: Captured) -> None:
    sizes = ["--size", "16", "--train", "6", "--val", "2", "--test", "2", "--web", "2", "--workers", "0"]
    assert main(["make", "scenes", *sizes]) == 0
    assert main(["shards", "scenes", str(root / "a"), "--split", "val"]) == 0
    assert "2 of 2 rows in 1 shards" in capsys.readouterr().out
    (root / "pics").mkdir()
    (root / "pics/x.png").write_bytes(picture(10, 12, "png", "L"))
    (root / "pics/x.txt").write_text("a text\n")
    assert main(["shards", "pics", str(root / "b")]) == 0
    image = Image.open(io.BytesIO(members(root / "b/00000.tar")["000000000.jpg"]))
    assert (image.mode, image.size) == ("RGB", (10, 12))
    for name, message in (
        ("scenes_vqa", "records are of kind vqa; shards hold pictures with captions"),
        ("scenes_shards", "its files are shards already"),
    ):
        assert main(["shards", name, str(root / "c")]) == 2
        assert message in capsys.readouterr().err


def test_shards_are_trained_on_and_those_of_img2dataset_too(root: Path) -> None:
    """The members and files are those that img2dataset's webdataset writer leaves."""
    (root / "web").mkdir()
    notes = [
        {"caption": "one", "url": "http://x/1.jpg", "key": "000000000", "status": "success", "exif": "{}"},
        {"caption": None, "url": "http://x/2.jpg", "key": "000000001", "status": "success", "exif": "{}"},
        {"caption": "three", "url": "http://x/3.jpg", "key": "000000002", "status": "success", "exif": "{}"},
    ]
    with tarfile.open(root / "web/00000.tar", "w") as tar:
        for n, note in enumerate(notes):
            parts = {"jpg": picture(20 + n, 20), "json": json.dumps(note).encode()}
            if note["caption"]:
                parts["txt"] = str(note["caption"]).encode()
            for ending, content in parts.items():
                info = tarfile.TarInfo(f"{note['key']}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (root / "web/00000.parquet").write_bytes(b"PAR1")
    (root / "web/00000_stats.json").write_text('{"count": 5, "successes": 3}')
    config = DatasetConfig(path="web")
    data: Any = build_dataset("web", config, data_root=root, defaults=Defaults(16))
    assert len(data) == 3
    read = [ref for ref in data.scan(0)]
    texts, causes = [], []
    with (root / "web/00000.tar").open("rb") as file:
        for ref in read:
            try:
                texts.append(data.sample(ref, file, 0, 0)["text_input"])
            except DataError as error:
                causes.append(re.sub(r".*: ", "", str(error)))
    assert texts == ["one", "three"]
    assert causes == ["no_caption"]


def test_a_web_set_of_the_catalogue_is_downloaded_and_read_by_its_name(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    rows = [(f"text {n}", site.put(f"/{n}.jpg", picture(20 + n, 20))) for n in range(3)]
    Path("in").mkdir()
    Path("in/Train_GCC-training.tsv").write_text("".join(f"{text}\t{url}\n" for text, url in rows))
    assert main(["prepare", "conceptual_caption_3m", "--from", "in"]) == 2
    assert site.asked == []
    out = capsys.readouterr().out
    assert "'prepare --fetch' downloads them into shards" in out
    assert main(["prepare", "conceptual_caption_3m", "--from", "in", "--fetch", "--allow-private"]) == 0
    assert "3 of 3 rows in 1 shards; failed: none" in capsys.readouterr().out
    assert main(["check", "conceptual_caption_3m"]) == 0
    assert "3 records, 3 pictures, 3 captions" in capsys.readouterr().out
    assert main(["list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "conceptual_caption_3m" in line)
    assert line.endswith("ready")
    data: Any = build_dataset("conceptual_caption_3m", DatasetConfig(), defaults=Defaults(16))
    assert [path.relative_to(root).as_posix() for path in data.shards.paths] == [
        "conceptual_caption/shards_3m/00000.tar"
    ]


def test_a_released_list_is_fetched_and_then_what_it_names(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    rows = [{"url": site.put("/1.jpg", picture(20, 20)), "caption": "a dog"}]
    address = site.put("/lists/ccs_filtered.json", json.dumps(rows).encode())
    row = replace(CATALOG["ccs_filtered"], remote={"ccs_filtered.json": address})
    monkeypatch.setitem(CATALOG, "ccs_filtered", row)
    assert main(["prepare", "ccs_filtered", "--fetch", "--allow-private"]) == 0
    assert main(["check", "ccs_filtered"]) == 0
    assert main(["prepare", "ccs_filtered", "--fetch", "--allow-private"]) == 0
    assert sorted(path for path, _ in site.asked) == ["/1.jpg", "/lists/ccs_filtered.json"]
