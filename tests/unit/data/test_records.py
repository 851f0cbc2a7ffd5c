from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip.data.readers import detect, read_file, read_json
from blip.data.records import PackedRecords, number_pictures, read_records
from blip.data.samples import MALFORMED
from blip.errors import DataError

RECORDS = [
    {"image": "a.jpg", "caption": "a dog", "image_id": "coco_1"},
    {"image": "b.jpg", "caption": "a cät, 日本", "image_id": "coco_2"},
    {"image": "a.jpg", "caption": 'two "dogs", one\nline', "image_id": "coco_1"},
]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return list(read_records([path], **options))


def as_csv(rows: list[list[str]]) -> str:
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows)


ROWS = [[str(record[key]) for key in ("image", "caption", "image_id")] for record in RECORDS]
SPELLINGS = {
    "list.json": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=4, ensure_ascii=False),
    "bom.json": "\ufeff" + json.dumps(RECORDS),
    "data.json": json.dumps({"dataset_type": "train", "data": RECORDS}),
    "lines.jsonl": "\n".join(json.dumps(record) for record in RECORDS) + "\n\n",
    "lines.json": "\n".join(json.dumps(record) for record in RECORDS),
    "crlf.jsonl": "\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
    "table.csv": as_csv([["image", "caption", "image_id"], *ROWS]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, SPELLINGS[name])) == RECORDS


def test_a_tsv_keeps_quotation_marks_that_never_close(tmp_path: Path) -> None:
    text = 'image\tcaption\na.jpg\t"a dog\nb.jpg\t5" wheels, he said "no"\n'
    expected = [
        {"image": "a.jpg", "caption": '"a dog'},
        {"image": "b.jpg", "caption": '5" wheels, he said "no"'},
    ]
    assert read(write(tmp_path / "t.tsv", text)) == expected


def test_an_object_of_records_is_read_by_its_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "o.json", json.dumps({"x1": RECORDS[0], "x2": RECORDS[1]}))
    assert read(path) == [{"sample_id": "x1", **RECORDS[0]}, {"sample_id": "x2", **RECORDS[1]}]


def test_coco_captions_are_grouped_by_picture(tmp_path: Path) -> None:
    images = [
        {"id": 7, "file_name": "7.jpg"},
        {"id": 9, "file_name": "9.jpg"},
        {"id": 8, "file_name": "8.jpg"},
    ]
    captions = [(9, "x"), (7, "y"), (9, "z"), (5, "no picture")]
    annotations = [{"image_id": i, "caption": text, "id": n} for n, (i, text) in enumerate(captions)]
    path = write(tmp_path / "captions.json", json.dumps({"images": images, "annotations": annotations}))
    records = read_records([path])
    assert list(records)[:3] == [
        {"image": "7.jpg", "image_id": 7, "caption": ["y"]},
        {"image": "9.jpg", "image_id": 9, "caption": ["x", "z"]},
        {"image": "8.jpg", "image_id": 8, "caption": []},
    ]
    assert "image 5" in records[3][MALFORMED]
    assert records.num_captions.tolist() == [1, 2, 0, 0]


def test_a_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"image": f"{i}.jpg", "caption": 'x, ] } \\ " é' * (i % 7), "n": i} for i in range(50)]
    for indent, chunk in ((None, 1), (2, 7), (None, 64)):
        monkeypatch.setattr("blip.data.readers._CHUNK", chunk)
        path = write(tmp_path / "list.json", json.dumps(records, indent=indent))
        assert list(read_json(path)) == records


def test_numbers_at_the_edge_of_a_piece_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip.data.readers._CHUNK", 1)
    path = write(tmp_path / "n.json", "[123456, 7]")
    assert [item[MALFORMED] for item in read_json(path)] == ["a number, not an object"] * 2


def test_a_folder_gives_pictures_with_the_texts_beside_them(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.jpg", "b/1.webp", "c.gif"):
        write(tmp_path / name, b"x")
    write(tmp_path / "a.txt", "a dog\n\n")
    write(tmp_path / "b/1.txt", "one\ntwo\n")
    write(tmp_path / "notes.md", "no picture")
    assert read(tmp_path) == [
        {"image": "a.jpg", "caption": "a dog"},
        {"image": "c.gif"},
        {"image": "b/1.webp", "caption": ["one", "two"]},
        {"image": "b/2.PNG"},
    ]


def test_records_of_the_same_id_are_all_read(tmp_path: Path) -> None:
    rows = ", ".join(f'"{key}": {{"image": "{n}.jpg", "caption": "x"}}' for n, key in enumerate("abaa"))
    path = write(
        tmp_path / "ids.json", f'{{{rows}, "b": {{"image": "4.jpg", "caption": "x", "caption": "y"}}}}'
    )
    assert [(r["image"], r["caption"]) for r in read(path)] == [
        *((f"{n}.jpg", "x") for n in range(4)),
        ("4.jpg", "y"),
    ]


def test_a_folder_passes_over_no_picture_and_follows_links(tmp_path: Path) -> None:
    for name in ("in/a.jfif", "in/b.HEIC", "elsewhere/c.jpg"):
        write(tmp_path / name, b"x")
    (tmp_path / "in/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    write(tmp_path / "elsewhere/c.txt", "a dog")
    assert [record["image"] for record in read(tmp_path / "in")] == ["a.jfif", "b.HEIC", "sub/c.jpg"]


def test_a_folder_without_captions_or_pictures_says_what_to_give(tmp_path: Path) -> None:
    write(tmp_path / "pictures/a.jpg", b"x")
    write(tmp_path / "hub/data/train-00000-of-00001.parquet", b"PAR1")
    write(tmp_path / "notes/a.md", b"x")
    for name, message in (
        ("pictures", r"pictures without captions; put a NAME\.txt beside each"),
        ("hub", r"holds no records; it has Parquet files: .*save_to_disk"),
        ("notes", r"holds no records; give a folder of pictures"),
    ):
        with pytest.raises(DataError, match=rf"^datasets\.mine\.path: .*{name}.*{message}"):
            read_records([tmp_path / name], name="mine")


def test_empty_image_ids_of_a_table_name_no_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "image,caption,image_id\na.jpg,x,\nb.jpg,y,\na.jpg,z,\n")
    assert read_records([path]).pictures.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_metadata_is_that_table(tmp_path: Path, name: str) -> None:
    csv = "file_name,text\nx/1.jpg,a dog\n"
    write(
        tmp_path / name,
        csv if name.endswith("csv") else json.dumps({"file_name": "x/1.jpg", "text": "a dog"}),
    )
    records = read_records([tmp_path])
    assert list(records) == [{"image": "x/1.jpg", "caption": "a dog"}]
    assert records.picture(0, records[0]["image"]) == str(tmp_path / "x/1.jpg")


def test_columns_are_renamed_and_others_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl", json.dumps({"pic": "a.jpg", "de": "ein Hund", "caption": "old", "x": 1})
    )
    records = read(path, columns={"image": "pic", "caption": "de"})
    assert records == [{"image": "a.jpg", "caption": "ein Hund", "x": 1}]


def test_several_files_are_one_list_and_know_their_places(tmp_path: Path) -> None:
    one = write(tmp_path / "one/r.json", json.dumps(RECORDS[:2]))
    two = write(tmp_path / "two/r.csv", "image,caption\nz.jpg,zebra\n/abs/y.jpg,yak\n")
    records = read_records([one, two], roots=[None, tmp_path / "pictures"])
    assert [records.picture(i, record["image"]) for i, record in enumerate(records)] == [
        str(tmp_path / "one/a.jpg"),
        str(tmp_path / "one/b.jpg"),
        str(tmp_path / "pictures/z.jpg"),
        "/abs/y.jpg",
    ]
    assert records.pictures.tolist() == [0, 1, 2, 3]
    assert records.where(1) == f"{one}[1]"
    assert records.where(2) == f"{two}[0]"


def test_equal_paths_below_different_folders_are_different_pictures(tmp_path: Path) -> None:
    files = [
        write(tmp_path / name / "r.json", json.dumps([{"image": "a.jpg", "caption": "x"}])) for name in "pq"
    ]
    assert read_records(files).pictures.tolist() == [0, 1]
    assert read_records(files, roots=[tmp_path, tmp_path]).pictures.tolist() == [0, 0]


def test_a_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", "".join(json.dumps(RECORDS[0]) + "\n" for _ in range(500)))
    assert len(read_records([path], limit=2)) == 2
    assert len(read_records([path], limit=150)) == 150


def test_pictures_are_numbered_by_id_else_by_path_in_order_of_appearance() -> None:
    records = [
        {"image": "a", "image_id": 5},
        {"image": "b"},
        {"image": "c", "image_id": "5"},
        {"image": "b", "caption": "x"},
        {"caption": "no picture"},
        {"caption": "no picture"},
    ]
    packed = PackedRecords(records)
    assert packed.pictures.tolist() == [0, 1, 0, 1, 2, 3]
    assert packed.num_pictures == 4
    numbers, count = number_pictures(np.array([9, 3, 9, 1, 3], np.uint64))
    assert (numbers.tolist(), count) == ([0, 1, 0, 2, 1], 3)


def test_records_survive_pickling_and_are_numbers_only() -> None:
    records = [
        {"image": f"{i}.jpg", "caption": [f"text {i}", "é\ud800"], "x": {"y": [1, None, 2.5]}}
        for i in range(100)
    ]
    packed = pickle.loads(pickle.dumps(PackedRecords(records)))
    assert list(packed) == records
    assert packed[-1] == records[-1]
    assert packed.nbytes < 150 * len(records)
    with pytest.raises(IndexError, match="no record 100 of 100"):
        packed[100]


SHARING = """
import gc, os
from pathlib import Path
from blip.data.records import PackedRecords

packed = PackedRecords({"image": f"{i:06d}.jpg", "caption": f"number {i} " * 12} for i in range(60000))

def private():
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty"))

reading, writing = os.pipe()
gc.disable()  # a collection would touch every object of the imports
if os.fork() == 0:
    packed[0]
    before = private()
    total = sum(len(record["image"]) for record in packed)
    os.write(writing, f"{total} {private() - before}".encode())
    os._exit(0)
os.wait()
print(packed.nbytes, os.read(reading, 100).decode())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's memory accounts")
def test_workers_share_the_records_they_read() -> None:
    # A process of its own: the pages a worker of this one would touch depend on the tests run before.
    ended = subprocess.run([sys.executable, "-c", SHARING], capture_output=True, text=True, check=True)
    size, total, growth = map(int, ended.stdout.split())
    assert size > 8e6
    assert total == 60000 * 10
    assert growth < 3000  # kB; of some 10,000 that were read


BROKEN = {
    "nonsense.json": ("hello", "neither a JSON list nor an object; it starts with 'h'"),
    "empty.json": ("", "neither a JSON list"),
    "cut.json": (
        json.dumps(RECORDS, indent=1)[:-30],
        r"line \d+: not valid JSON .* in record 2.*is the file complete",
    ),
    "comma.json": (
        '[{"image": "a", "caption": "b"}\n{}]',
        r"line 2: not valid JSON \('{' where a comma or \]",
    ),
    "end.json": ('[{"image": "a", "caption": "b"}', "the file ends after record 0"),
    "config.json": (
        '{"model": "x", "epochs": 3}',
        "an object with model, epochs; expected a list of records",
    ),
    "boxes.json": ('{"images": [{"id": 1}], "annotations": [{"bbox": 1}]}', "no COCO captions .*image_id"),
    "none.json": ("[]", "holds no records; give a file that has some"),
    "none.csv": ("image,caption\n", "holds no records"),
    "semicolons.csv": (
        "image;caption\na.jpg;x\n",
        "first line is one field, 'image;caption', which ';' seems",
    ),
    "tabs.csv": ("image\tcaption\na.jpg\tx\n", "set the dataset's format to tsv"),
    "commas.tsv": ("image,caption\na.jpg,x\n", "set the dataset's format to csv"),
    "wide.csv": ("image,caption\n".encode("utf-16"), "its text is UTF-16; save it as UTF-8"),
    "odd_wide.json": (b"\xfe\xff" + "[]".encode("utf-16-be"), "its text is UTF-16"),
    "lists.json": ("[[1], [2]]", "no usable record among the first 2; the first: a list, not an object"),
    "bad.jsonl": ("{image: a}\n", "no usable record among the first 1; the first: line 1: not valid JSON"),
    "typo.csv": (
        "image,captoin\na,b\n",
        "no column 'caption', only image, captoin; .*did you mean 'captoin'",
    ),
    "noimage.json": (
        '[{"caption": "b", "url": "c"}]',
        "no column 'image', only caption, url; .*columns: {image: ...}",
    ),
    "odd.xml": ("<a/>", "no known kind of annotation file; .*json, jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_useless_file_is_an_error_that_says_why(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    path = write(tmp_path / name, text)
    with pytest.raises(
        DataError, match=rf"^datasets\.mine\.path: .*{name}.*{message}" if "odd" not in name else message
    ) as e:
        read_records([path], name="mine")
    assert "\n" not in str(e.value)


def test_a_column_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", json.dumps({"image": "a", "captoin": "b"}))
    with pytest.raises(
        DataError, match=r"no column 'captions', which datasets\.mine\.columns\.caption names.*'captoin'"
    ):
        read_records([path], columns={"caption": "captions"}, name="mine")
    with pytest.raises(DataError, match=r"datasets\.mine\.columns\.captoin: .*did you mean 'caption'"):
        read_records([path], columns={"captoin": "caption"}, name="mine")


def test_a_damaged_record_costs_that_record_only(tmp_path: Path) -> None:
    good = json.dumps(RECORDS[0])
    cases = {
        "r.jsonl": f"{good}\n{{oops\n[1]\n{good}",
        "r.json": f"[{good}, 5, null, {good}]",
        "r.csv": "image,caption\na,b\na,b,c\na\nc,d\n",
    }
    for name, text in cases.items():
        records = read(write(tmp_path / name, text))
        assert [MALFORMED in record for record in records] == [False, True, True, False], name
    reasons = [record.get(MALFORMED) for record in read(tmp_path / "r.csv")]
    assert reasons[1:3] == [
        "line 3: 3 fields where the header has 2",
        "line 4: 1 fields where the header has 2",
    ]


def test_bytes_that_are_not_utf8_stay_in_their_caption(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.json", b'[{"image": "a", "caption": "caf\xe9"}, {"image": "b", "caption": "ok"}]'
    )
    records = read(path)
    assert records[1]["caption"] == "ok"
    with pytest.raises(UnicodeEncodeError):
        records[0]["caption"].encode()


def test_hostile_json_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not valid JSON"):
        read_records([write(tmp_path / "deep.json", "[" + "[" * 200000)])


def test_kinds_are_told_by_name_and_content(tmp_path: Path) -> None:
    files = {
        "a.json": "json",
        "a.jsonl": "jsonl",
        "a.ndjson": "jsonl",
        "a.csv": "csv",
        "a.tsv": "tsv",
        "a.tar": "shards",
    }
    assert {name: detect(write(tmp_path / name, "[]")) for name in files} == files
    write(tmp_path / "hf/dataset_info.json", "{}")
    write(tmp_path / "tars/0.tar", "")
    write(tmp_path / "pictures/0.jpg", "")
    found = {name: detect(tmp_path / name) for name in ("hf", "tars", "pictures")}
    assert found == {"hf": "hf", "tars": "shards", "pictures": "folder"}


def test_a_missing_datasets_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "hf/dataset_info.json", "{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets'; run 'pip install datasets'"):
        read_records([tmp_path / "hf"], name="mine")


def test_a_hugging_face_folder_is_read_row_by_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "x.png")
    rows = {"picture": [str(tmp_path / "x.png")] * 2, "captions": [["a", "b"], ["c"]]}
    made = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    made.save_to_disk(tmp_path / "embedded")
    records = read_records([tmp_path / "embedded"], columns={"image": "picture"})
    assert records[0]["caption"] == ["a", "b"]
    content = records.picture(0, records[0]["image"])
    assert isinstance(content, bytes) or Path(content).is_file()
    assert (records.num_captions.tolist(), records.pictures.tolist()) == ([2, 1], [0, 1])

    paths = {"image": ["a.jpg", "b.jpg", "a.jpg"], "text": ["x", "y", "z"]}
    datasets.Dataset.from_dict(paths).save_to_disk(tmp_path / "paths")
    records = read_records([tmp_path / "paths"], limit=3)
    assert records.pictures.tolist() == [0, 1, 0]
    assert records.picture(1, records[1]["image"]) == str(tmp_path / "paths/b.jpg")
    datasets.Dataset.from_dict({"image": ["a.jpg"]}).save_to_disk(tmp_path / "bare")
    with pytest.raises(DataError, match="no column 'caption', only image"):
        read_records([tmp_path / "bare"])


def test_read_file_reads_what_it_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "no_ending", json.dumps(RECORDS))
    assert list(read_file(path, "json")) == RECORDS
