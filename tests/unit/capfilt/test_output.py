"""What is kept is written in the format that it came in, and read back by our own readers."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip.capfilt.dataset import Dataset
from blip.capfilt.journal import Journal
from blip.capfilt.output import Made, Provenance
from blip.capfilt.units import Entry, ShardUnit, open_pool
from blip.capfilt.work import Pool, Work, work_of
from blip.config.schema import DatasetConfig
from blip.data.streams.tars import add_sample
from blip.errors import DataError
from blip.tasks.capfilt import KeepConfig
from blip.zoo import load_dataset

TOLD = Provenance("blip_caption:1", "blip_image_text_matching:2", 1)
KEEP = KeepConfig(itm=0.5)
RECORDS = [
    {"image": "a.png", "caption": "a red star", "image_id": 3, "url": "http://x/ä"},
    {"image": "b.png", "caption": ["bad: two", 'a star, "quoted"\nand more'], "image_id": 4},
    {"image": "sub/c.png", "caption": "bad", "image_id": 5},
    {"image": "a.png", "caption": "another\tone", "image_id": 3},
]


def picture(path: Path, color: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), color).save(path)
    return path.read_bytes()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, color in (("a", "red"), ("b", "blue"), ("sub/c", "green")):
        picture(tmp_path / "pictures" / f"{name}.png", color)
    return tmp_path / "pictures"


def judge(work: list[Work]) -> None:
    """Journals in which texts that begin with "bad" are bad, and each picture has a synthetic text."""
    for one in work:
        for number in range(len(one.unit)):
            entry: Entry = one.unit.entry(number)
            texts: list[dict[str, Any]] = [
                {
                    "caption": text.caption,
                    "origin": "web",
                    "record": text.record,
                    "itm": 0.1 if text.caption.startswith("bad") else 0.9,
                    "itc": 0.0,
                }
                for text in entry.texts
            ]
            bad = entry.name.endswith(("/2", "c"))  # nothing is kept of that picture
            texts.append(
                {"caption": "written", "origin": "synthetic", "itm": 0.2 if bad else 0.7, "itc": 0.3}
            )
            one.journal.begin(1, len(one.unit))
            one.journal.add([{"picture": entry.name, "texts": texts}])
        one.journal.end([], len(one.unit))


def write(folder: Path, *pools: Pool) -> dict[str, Made]:
    work = work_of(pools, folder / "scored")
    judge(work)
    least = {origin: {"itm": 0.5} for origin in ("web", "synthetic")}
    dataset = Dataset(folder, KEEP, TOLD, least, lambda: False)
    made = dataset.write(work, pools, lambda: None)
    again = Dataset(folder, KEEP, TOLD, least, lambda: False).write(work, pools, lambda: None)
    assert again == made
    return made


def dump(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        texts = [r["caption"] if isinstance(r["caption"], str) else r["caption"][1] for r in records]
        table = [["image", "caption", "image_id", "url"]]
        for r, text in zip(records, texts, strict=True):
            table.append([r["image"], text, r["image_id"], r.get("url", "")])
        with path.open("w", newline="") as file:
            if path.suffix == ".csv":
                csv.writer(file).writerows(table)
            else:
                file.writelines("\t".join(map(plain, row)) + "\n" for row in table)
    return path


def plain(value: Any) -> str:
    """As a table without quotes has it."""
    return " ".join(str(value).split())


KEPT = [
    ("a.png", "a red star", "web"),
    ("a.png", "another\tone", "web"),
    ("a.png", "written", "synthetic"),
    ("b.png", 'a star, "quoted"\nand more', "web"),
    ("b.png", "written", "synthetic"),
]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_annotation_files_keep_their_format(pictures: Path, tmp_path: Path, ending: str) -> None:
    path = dump(tmp_path / f"web.{ending}", RECORDS)
    section = DatasetConfig(path=str(path), images=str(pictures))
    made = write(tmp_path / "round-1", open_pool("mine", section, "train", 2))["mine"]
    assert made == Made([f"mine/web.{ending}"], [str(pictures)], len(KEPT))
    file = tmp_path / "round-1" / "dataset" / made.paths[0]
    data = load_dataset("again", path=str(file), images=made.images[0], split="train")["train"]
    kept = [(image, plain(text) if ending == "tsv" else text, origin) for image, text, origin in KEPT]
    assert [pair["text_input"] for pair in data] == [text for _, text, _ in kept]
    content = file.read_text()
    if ending in ("csv", "tsv"):
        if ending == "csv":
            rows = list(csv.DictReader(io.StringIO(content, newline="")))
        else:
            header, *others = [line.split("\t") for line in content.splitlines()]
            rows = [dict(zip(header, row, strict=True)) for row in others]
        assert [(r["image"], r["caption"], r["provenance_origin"]) for r in rows] == kept
        assert rows[2]["provenance_captioner"] == TOLD.captioner
        assert rows[0]["provenance_captioner"] == ""
        assert rows[0]["url"] == "http://x/ä"
        return
    found = json.loads(content) if ending == "json" else [json.loads(text) for text in content.splitlines()]
    assert [(r["image"], r["caption"], r["provenance"]["origin"]) for r in found] == kept
    assert (found[0]["url"], found[0]["image_id"]) == ("http://x/ä", 3)
    told = {"origin": "web", "itm": 0.9, "itc": 0.0, "filter": TOLD.filter, "round": 1}
    assert found[0]["provenance"] == told


def test_a_table_that_was_written_tells_nothing_of_former_models(pictures: Path, tmp_path: Path) -> None:
    path = dump(tmp_path / "web.csv", RECORDS)
    made = write(
        tmp_path / "1", open_pool("mine", DatasetConfig(path=str(path), images=str(pictures)), "train", 2)
    )
    again = tmp_path / "1" / "dataset" / made["mine"].paths[0]
    write(tmp_path / "2", open_pool("mine", DatasetConfig(path=str(again), images=str(pictures)), "train", 2))
    rows = list(csv.DictReader((tmp_path / "2/dataset/mine/web.csv").open(newline="")))
    told = {(row["provenance_origin"], row["provenance_captioner"]) for row in rows}
    assert told == {("web", ""), ("synthetic", TOLD.captioner)}


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_fields_that_are_no_utf8_come_back_as_they_were(pictures: Path, tmp_path: Path, ending: str) -> None:
    path = dump(tmp_path / f"web.{ending}", [{**RECORDS[0], "url": "CUT"}])
    whole = path.read_bytes()
    for cut in (b"\xff", b"\\ud83d") if ending.startswith("json") else (b"\xff",):
        path.write_bytes(whole.replace(b"CUT", cut))
        pool = open_pool("mine", DatasetConfig(path=str(path), images=str(pictures)), "train", 2)
        made = write(tmp_path / f"{len(cut)}", pool)["mine"]
        file = tmp_path / f"{len(cut)}" / "dataset" / made.paths[0]
        again = open_pool("mine", DatasetConfig(path=str(file), images=str(pictures)), "train", 2)
        assert [r["url"] for r in again.records] == [r["url"] for r in pool.records] * 2


def test_several_files_stay_several_files(pictures: Path, tmp_path: Path) -> None:
    first = dump(tmp_path / "web.json", RECORDS[:2])
    (tmp_path / "more").mkdir()
    second = dump(tmp_path / "more" / "web.json", [{"image": "d.png", "caption": "a moon"}])
    picture(tmp_path / "more" / "d.png")
    section = DatasetConfig(path=[str(first), str(second)], images=[str(pictures), str(tmp_path / "more")])
    made = write(tmp_path / "round-1", open_pool("mine", section, "train", 2))["mine"]
    assert made.paths == ["mine/web.json", "mine/web-2.json"]
    assert made.images == [str(pictures), str(tmp_path / "more")]
    paths = [str(tmp_path / "round-1" / "dataset" / path) for path in made.paths]
    data = load_dataset("again", path=paths, images=made.images, split="train")["train"]
    assert len(list(data)) == made.texts == 5
    own = {record["image"] for record in json.loads(Path(paths[1]).read_text())}
    assert own == {"d.png"}


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_a_file_may_have_any_name_where_its_format_is_told(
    pictures: Path, tmp_path: Path, ending: str
) -> None:
    path = dump(tmp_path / f"web.{ending}", RECORDS).rename(tmp_path / "web.txt")
    section = DatasetConfig(path=str(path), images=str(pictures), format=ending)
    made = write(tmp_path / "round-1", open_pool("mine", section, "train", 2))["mine"]
    assert made.paths == [f"mine/web.{ending}"]


def test_files_that_count_their_pictures_anew_stay_apart(pictures: Path, tmp_path: Path) -> None:
    files = [
        dump(tmp_path / f"{name}.json", [{"image": f"{name}.png", "caption": name, "image_id": 0}])
        for name in ("a", "b")
    ]
    section = DatasetConfig(path=[str(path) for path in files], images=str(pictures))
    pool = open_pool("mine", section, "train", 2)
    [unit] = pool.units()
    entries = [unit.entry(number) for number in range(len(unit))]
    assert [Path(str(one.picture)).stem for one in entries] == ["a", "b"]
    assert [[text.caption for text in one.texts] for one in entries] == [["a"], ["b"]]
    assert write(tmp_path / "round-1", pool)["mine"].texts == 4


def test_a_folder_of_pictures_becomes_jsonl(pictures: Path, tmp_path: Path) -> None:
    section = DatasetConfig(path=str(pictures))
    made = write(tmp_path / "round-1", open_pool("mine", section, "train", 2))["mine"]
    assert made.paths == ["mine/pictures.jsonl"]
    lines = (tmp_path / "round-1/dataset" / made.paths[0]).read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == ["written"] * made.texts


def test_embedded_pictures_of_a_hugging_face_folder_become_shards(pictures: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["a", "b", "sub/c"]
    rows = {
        "image": [str(pictures / f"{name}.png") for name in names],
        "text": ["a red star", "bad", "a green one"],
    }
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    whole = whole.map(lambda row: row, features=whole.features)
    whole.save_to_disk(tmp_path / "hf")
    made = write(
        tmp_path / "round-1", open_pool("mine", DatasetConfig(path=str(tmp_path / "hf")), "train", 2)
    )
    place = tmp_path / "round-1" / "dataset" / "mine"
    assert made["mine"] == Made(["mine"], [], 3)
    assert json.loads((place / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 1}
    data = load_dataset("again", path=str(place), split="train")["train"]
    found = [(pair["image"].getpixel((0, 0)), pair["text_input"]) for pair in data]
    assert [color for color, _ in found] == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert found[1][1] == "written"


def shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            add_sample(tar, key, members)


def test_shards_keep_names_keys_and_pictures(pictures: Path, tmp_path: Path) -> None:
    red, blue = (pictures / "a.png").read_bytes(), (pictures / "b.png").read_bytes()
    buffer = io.BytesIO()
    Image.open(io.BytesIO(blue)).save(buffer, "JPEG")
    record = {"caption": "a red star", "url": "u", "caption_id": 9}
    samples = [
        ("0", {"png": red, "json": json.dumps(record).encode()}),
        ("1", {"jpg": buffer.getvalue(), "txt": b"bad"}),
        ("c", {"png": red, "txt": b"bad, and so is what is written"}),
    ]
    shard(tmp_path / "web" / "x-00.tar", samples)
    ranked = json.dumps(["bad", "fine", "also fine"]).encode()
    shard(tmp_path / "web" / "x-01.tar", [("d", {"png": red, "json": ranked})])
    shard(tmp_path / "web" / "x-02.tar", [("c", {"png": red, "txt": b"bad"})])
    section = DatasetConfig(path=str(tmp_path / "web" / "x-*.tar"))
    made = write(tmp_path / "round-1", open_pool("mine", section, "train", 2))
    place = tmp_path / "round-1" / "dataset" / "mine"
    assert made["mine"].texts == 3
    assert sorted(path.name for path in place.iterdir()) == ["sizes.json", "x-00.tar", "x-01.tar"]
    with tarfile.open(place / "x-00.tar") as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert list(members) == ["0.png", "0.json", "0.txt", "1.jpg", "1.json", "1.txt"]
    assert members["0.png"] == red
    assert members["1.jpg"] == buffer.getvalue()
    note = json.loads(members["0.json"])
    assert note["caption"] == ["a red star", "written"]
    assert (note["url"], note["caption_id"]) == ("u", 9)
    assert [told["origin"] for told in note["provenance"]] == ["web", "synthetic"]
    assert note["provenance"][1]["captioner"] == TOLD.captioner
    assert json.loads(members["1.json"])["caption"] == "written"
    assert members["1.txt"] == b"written"
    with tarfile.open(place / "x-01.tar") as tar:
        notes = [json.loads(tar.extractfile(i).read()) for i in tar if i.name.endswith("json")]  # type: ignore[union-attr]
    assert notes[0]["caption"] == ["fine", "also fine", "written"]


@pytest.mark.parametrize("now", ["gone", "another", "shorter"])
def test_a_shard_that_is_not_as_it_was_judged_stops_it(pictures: Path, tmp_path: Path, now: str) -> None:
    """Nothing is left out in silence, nor given to another picture."""
    red, path = (pictures / "a.png").read_bytes(), tmp_path / "web" / "x.tar"
    samples = [(key, {"png": red, "txt": key.encode()}) for key in "pqr"]
    shard(path, samples)
    section = DatasetConfig(path=str(path))
    work = work_of([open_pool("mine", section, "train", 2)], tmp_path / "scored")
    judge(work)
    if now == "gone":
        path.unlink()
    else:
        shard(path, samples[1:] if now == "another" else samples[:2])
    work = [one._replace(unit=ShardUnit(one.unit.data, 0)) for one in work]  # as another process has it
    least = {origin: {"itm": 0.5} for origin in ("web", "synthetic")}
    with pytest.raises(DataError, match="was there when its texts were judged"):
        Dataset(tmp_path, KEEP, TOLD, least, lambda: False).write(work, [work[0].pool], lambda: None)


def test_members_of_unknown_kind_stay_with_their_sample(pictures: Path, tmp_path: Path) -> None:
    red = (pictures / "a.png").read_bytes()
    samples = [
        ("d/0", {"png": red, "txt": b"a star", "cls": b"0", "emb.npy": b"00"}),
        (
            "d/1",
            {"cls": b"1", "png": red, "mask.png": b"11", "jpg": b"second", "json": b'{"caption": "bad"}'},
        ),
        ("d/3", {"cls": b"2", "png": red}),
        ("d/3", {"png": red, "cls": b"3", "txt": b"the same key"}),
        ("README", {"md": b"of no sample"}),
    ]
    shard(tmp_path / "x.tar", samples)
    write(tmp_path / "round-1", open_pool("mine", DatasetConfig(path=str(tmp_path / "x.tar")), "train", 2))
    with tarfile.open(tmp_path / "round-1/dataset/mine/x.tar") as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    found = [(name, content) for name, content in members if not name.endswith((".json", ".txt"))]
    assert found == [
        *[("d/0.png", red), ("d/0.cls", b"0"), ("d/0.emb.npy", b"00")],
        *[("d/1.jpg", b"second"), ("d/1.cls", b"1"), ("d/1.mask.png", b"11"), ("d/1.png", red)],
        *[("d/3.png", red), ("d/3.cls", b"2")],
        *[("d/3.png", red), ("d/3.cls", b"3")],
    ]


def test_a_shard_is_held_no_longer_than_it_is_read(pictures: Path, tmp_path: Path) -> None:
    red = (pictures / "a.png").read_bytes()
    shard(tmp_path / "x.tar", [(key, {"png": red, "txt": b"a star"}) for key in "pqr"])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: len(whole) // 2])
    [unit] = open_pool("mine", DatasetConfig(path=str(tmp_path / "x.tar")), "train", 2).units()
    assert isinstance(unit, ShardUnit)
    before = set(vars(unit))
    for _ in range(2):
        assert len(unit) == 2
        assert unit.entry(0).name == "x.tar/p"
        assert [error.cause for error in unit.close()] == ["truncated_shard"]
        assert set(vars(unit)) == before
    assert unit.close() == []


def test_a_draft_of_other_rules_is_begun_anew(pictures: Path, tmp_path: Path) -> None:
    path = dump(tmp_path / "web.json", RECORDS)
    pool = open_pool("mine", DatasetConfig(path=str(path), images=str(pictures)), "train", 2)
    folder = tmp_path / "round-1"
    write(folder, pool)
    work = work_of([pool], folder / "scored")
    some = partial(Dataset, folder, KEEP, TOLD, stopping=lambda: False)
    strict = some(least={origin: {"itm": 0.8} for origin in ("web", "synthetic")})
    assert strict.write(work, [pool], lambda: None)["mine"].texts == 3

    with pytest.raises(DataError, match="nothing is kept of any text"):
        some(least={origin: {"itm": 0.99} for origin in ("web", "synthetic")}).write(
            work, [pool], lambda: None
        )
    assert len(json.loads((folder / "dataset/mine/web.json").read_text())) == 3


# Journals


def lines(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"picture": f"{i}", "texts": []} for i in range(start, start + count)]


def test_a_journal_goes_on_behind_the_last_whole_batch(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "0.jsonl")
    assert journal.begin(4, 10) == 0
    journal.add(lines(4))
    journal.add(lines(4, 4))
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole)):
        journal.path.write_bytes(whole[:-cut])
        kept = journal.begin(4, 10)
        assert kept == (4 if cut < len(whole) // 2 + 1 else 0)
        assert journal.path.read_bytes() == whole[: kept * len(whole) // 8]
    journal.path.write_bytes(whole)
    journal.add(lines(2, 8))
    assert not journal.done
    assert journal.pictures is None
    journal.end([{"picture": "shard", "cause": "truncated_shard", "detail": "", "whole": True}] * 7, 10)
    assert journal.done
    assert journal.pictures == 10
    assert len(list(journal.lines())) == 17
    text = journal.path.read_bytes()
    journal.path.write_bytes(text[:-3])  # killed within the last line
    assert not journal.done
    assert journal.begin(4, 10) == 10
    with pytest.raises(Exception, match="ends before its unit does"):
        list(journal.lines())


WRONG = {"picture": "a.tar", "cause": "unreadable_shard", "detail": "it is away"}


def test_a_shard_that_was_away_is_lost_and_begun_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "0.jsonl")
    assert journal.begin(1, 0) == 0
    journal.end([WRONG], 0)
    assert (journal.done, journal.lost, journal.pictures) == (True, True, 0)
    assert [line["whole"] for line in journal.lines()] == [True]
    whole = journal.path.read_bytes()
    for cut in (0, 1, len(b'{"done": 0, "lost": true}\n'), len(b'{"done": 0, "lost": true}\n') + 1):
        journal.path.write_bytes(whole[: len(whole) - cut])  # killed meanwhile: its line is no picture's
        assert journal.begin(1, 3) == 0
        assert not journal.path.read_bytes()
    journal.add(lines(3))
    journal.end([], 3)
    assert (journal.done, journal.lost, journal.pictures) == (True, False, 3)


@pytest.mark.parametrize(
    ("beside", "bad", "lost"),
    [
        ([], {}, False),
        ([{**WRONG, "cause": "truncated_shard"}], {}, False),  # the rest of it is there
        ([], {"cause": "corrupt_image", "detail": ""}, False),
        ([], {"cause": "unreadable_shard", "detail": ""}, True),  # it went away in between
    ],
)
def test_a_shard_that_was_read_is_lost_where_its_file_went_away(
    tmp_path: Path, beside: list[dict[str, Any]], bad: dict[str, Any], lost: bool
) -> None:
    journal = Journal(tmp_path / "a" / "0.jsonl")
    journal.begin(1, 3)
    journal.add([*lines(2), {"picture": "2", **bad} if bad else lines(1, 2)[0]])
    journal.end(beside, 3)
    assert (journal.done, journal.lost) == (True, lost)
    assert journal.begin(1, 3) == (0 if lost else 3)
    journal.add([{"picture": "0", "texts": [{"caption": '"whole": true'}]}] * (3 if lost else 0))
    assert journal.begin(1, 3) == 3
