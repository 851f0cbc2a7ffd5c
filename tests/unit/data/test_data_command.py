from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip.data.__main__ import main
from blip.data.catalog.table import CATALOG
from blip.data.official.paths import PathMapper

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root, which BLIP_DATA names."""
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def picture(path: Path, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def make(root: Path, *more: str) -> int:
    sizes = ["--size", "16", "--train", "12", "--val", "4", "--test", "4", "--web", "8", "--workers", "0"]
    return main(["make", "scenes", "--data-root", str(root), *sizes, *more])


def fails(capsys: Captured, *arguments: str) -> str:
    """The one paragraph that a command fails with."""
    assert main(list(arguments)) == 2
    paragraph = capsys.readouterr().err.strip()
    assert paragraph.startswith("error: ")
    assert "\n" not in paragraph
    assert "Traceback" not in paragraph
    return paragraph


def test_scenes_are_made_listed_and_checked(root: Path, capsys: Captured) -> None:
    assert make(root) == 0
    assert f"{root}/scenes: 12 train, 4 val, 4 test, 8 web images of 16 px" in capsys.readouterr().out
    assert main(["list"]) == 0
    ready = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("ready")]
    kinds = ["scenes_vqa", "scenes_instruct", "scenes_nlvr", "scenes_answers"]
    assert ready == ["scenes", *kinds, "scenes_web", "scenes_shards", "scenes_web_shards"]
    for name, text in (
        ("scenes", "scenes train: 24 records, 12 pictures, 24 captions"),
        ("scenes", "scenes test: 4 records, 4 pictures, 4 captions"),
        ("scenes_vqa", "scenes_vqa train: 48 records, 12 pictures, 48 questions"),
        ("scenes_web", "scenes_web train: 8 records, 8 pictures, 8 captions"),
        ("scenes_shards", "scenes_shards train: 12 records, 12 pictures, 12 captions"),
    ):
        assert main(["check", name]) == 0
        out = capsys.readouterr().out
        assert text in out
        assert "unusable:       none" in out
        assert out.count("sample ") == 3 * out.count("pictures read:")
        assert "16 x 16 RGB" in out


def test_the_catalogue_shows_what_of_a_dataset_is_missing(root: Path, capsys: Captured) -> None:
    put(root / "coco/annotations/coco_karpathy_val.json", [])
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CATALOG)
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines["coco_caption"].endswith("missing 3 of 4 places, has val")
    assert lines["capfilt14m"].endswith("missing 2 of 2 places")
    assert main(["list", "coco_caption"]) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  missing: ")]
    named = [f"annotations/coco_karpathy_{split}.json" for split in ("train", "test")]
    assert missing == [f"  missing:      {root}/coco/{place}" for place in (*named, "images")]


def own(root: Path, good: int = 6) -> Path:
    """A list with one record of each kind of damage behind `good` good ones."""
    for number in range(good):
        picture(root / f"own/{number}.png")
    (root / "own/cut.png").write_bytes((root / "own/0.png").read_bytes()[:80])
    records = [{"image": f"{n}.png", "caption": ["One two", "three four five."]} for n in range(good)]
    records += [
        {"image": "cut.png", "caption": "x"},
        {"image": "none.png", "caption": "y"},
        {"image": "0.png", "caption": ["!!", 5]},
        {"caption": "no picture"},
    ]
    return put(root / "own/list.json", [*records, 7])


def test_damage_is_counted_by_cause_and_listed(root: Path, capsys: Captured) -> None:
    own(root)
    assert main(["check", "own/list.json", "--max-bad-ratio", "0.5", "--report", "out/bad.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "list train: 11 records, 10 pictures, 15 captions" in out
    assert "pictures read:  8 of 10" in out  # one record names none, one could not be parsed
    assert "caption tokens: min 1, median 2, 95% 3, max 3" in out
    assert "list/0: 12 x 10 RGB, 'one two'" in out
    found = [json.loads(line) for line in Path("out/bad.jsonl").read_text().splitlines()]
    assert sorted((line["record"], line["cause"]) for line in found) == [
        ("list/10", "malformed_record"),
        ("list/6", "truncated_image"),
        ("list/7", "missing_image"),
        ("list/8", "no_caption"),
        ("list/8#1", "bad_text"),
        ("list/9", "missing_image"),
    ]
    assert all(
        f"1 {cause}" in out for cause in ("truncated_image", "no_caption", "bad_text", "malformed_record")
    )
    assert "2 missing_image" in out


def test_too_much_damage_is_an_exit_code(root: Path, capsys: Captured) -> None:
    own(root)
    assert "more than 5.0% of the records are unusable (list train: 33.3%)" in fails(
        capsys, "check", "own/list.json"
    )


def test_a_limit_reads_pictures_spread_over_the_set(root: Path, capsys: Captured) -> None:
    own(root)
    assert main(["check", "own/list.json", "--limit", "2", "--max-bad-ratio", "1"]) == 0
    assert "pictures read:  1 of 10" in capsys.readouterr().out  # the first; the last is the unparsed record
    make(root)
    assert main(["check", "scenes_shards", "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "12 records, 12 pictures, 3 captions" in out
    assert "pictures read:  3 of 12" in out


def test_the_share_is_of_texts_that_a_run_would_lose(root: Path, capsys: Captured) -> None:
    picture(root / "own/a.png")
    rows = [{"image": name, "caption": ["one", "two", "three"]} for name in ("a.png", "none.png")]
    put(root / "own/some.json", rows)
    assert "(some train: 50.0%)" in fails(capsys, "check", "own/some.json")
    put(root / "own/none.json", [{"image": f"{n}.jpg", "caption": ["one", "two"]} for n in range(50)])
    assert "(none train: 100.0%)" in fails(capsys, "check", "own/none.json")
    assert "(none train: 100.0%)" in fails(capsys, "check", "own/none.json", "--limit", "5")


def test_a_bad_picture_is_counted_for_each_record_that_shows_it(root: Path, capsys: Captured) -> None:
    picture(root / "own/a.png")
    shown = ["a.png", "none.png", "a.png", "none.png", "none.png"]
    put(root / "own/x.json", [{"image": name, "caption": "a dog"} for name in shown])
    assert "(x train: 60.0%)" in fails(capsys, "check", "own/x.json", "--report", "bad.jsonl")
    found = [json.loads(line) for line in Path("bad.jsonl").read_text().splitlines()]
    assert [(e["record"], e["cause"]) for e in found] == [(f"x/{n}", "missing_image") for n in (1, 3, 4)]
    assert all("none.png" in entry["detail"] for entry in found)
    assert main(["check", "own/x.json", "--max-bad-ratio", "0.6"]) == 0
    out = capsys.readouterr().out
    assert "pictures read:  2 of 2" in out
    assert "unusable:       3 missing_image" in out


def test_pictures_that_share_an_id_are_each_looked_at(root: Path, capsys: Captured) -> None:
    picture(root / "own/a.png")
    rows = [{"image": name, "image_id": 7, "caption": "a dog"} for name in ("a.png", "none.png", "a.png")]
    put(root / "own/x.json", rows)
    assert "(x train: 33.3%)" in fails(capsys, "check", "own/x.json")


def test_own_columns_folders_and_tokenizers_are_understood(
    root: Path, tmp_path: Path, capsys: Captured
) -> None:
    picture(root / "pics/a.png")
    put(tmp_path / "list.csv", "pic,said\na.png,Hello world\n")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "he", "##l", "##o", "world"]
    put(tmp_path / "vocab.txt", "\n".join(vocabulary) + "\n")
    columns = ["--column", "image=pic", "--column", "caption=said", "--images", "pics"]
    assert main(["check", "list.csv", *columns, "--tokenizer", str(tmp_path / "vocab.txt")]) == 0
    out = capsys.readouterr().out
    assert "list train: 1 records, 1 pictures, 1 captions" in out
    assert "median 7" in out  # [CLS] he ##l ##l ##o world [SEP]


def test_only_the_split_that_is_asked_for_is_read(root: Path, capsys: Captured) -> None:
    make(root)
    capsys.readouterr()
    assert main(["check", "scenes", "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("scenes ")] == [
        "scenes val: 4 records, 4 pictures, 4 captions"
    ]


WRONG = {
    "nothing there": (["check", "coco_caption"], "no file 'coco/annotations/coco_karpathy_train.json' under"),
    "typo": (
        ["check", "coco_captoin"],
        "neither a named dataset nor a file or folder.*did you mean 'coco_caption'",
    ),
    "no file": (
        ["check", "pairs.json"],
        "pairs.json: neither a named dataset nor a file or folder, .*; 'blip data list' shows the names$",
    ),
    "no split": (
        ["check", "scenes", "--split", "tset"],
        "--split tset: scenes has no such split; did you mean 'test'",
    ),
    "split absent": (
        ["check", "coco_caption", "--split", "val"],
        "no file 'coco/annotations/coco_karpathy_val.json'",
    ),
    "column": (
        ["check", "x.csv", "--column", "captoin=text"],
        "--column captoin=text: write OURS=THEIRS; did you mean",
    ),
    "no equals": (["check", "x.csv", "--column", "caption"], "--column caption: write OURS=THEIRS"),
    "empty": (["check", "empty.json"], "holds no records"),
    "no column": (["check", "x.csv"], "no column 'caption', only image, captoin; .*did you mean 'captoin'"),
    "unknown to prepare": (["prepare", "cocos"], "no dataset 'cocos' in the catalogue"),
    "embedded": (["prepare", "scenes_web"], "run 'blip data make scenes'"),
    "no downloads": (["prepare", "coco_caption", "--from", "nowhere"], "--from nowhere: no such folder"),
    "tokenizer": (["check", "y.csv", "--tokenizer", "words.txt"], r"'words\.txt' has no \[PAD\] token"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_paragraph(root: Path, capsys: Captured, case: str) -> None:
    put(root / "empty.json", [])
    put(root / "x.csv", "image,captoin\na,b\n")
    put(root / "y.csv", "image,caption\na,b\n")
    put(Path("words.txt"), "[UNK]\n[CLS]\n[SEP]\na\n")
    arguments, message = WRONG[case]
    assert re.search(message, fails(capsys, *arguments))


@pytest.mark.parametrize(
    "arguments", [[], ["mke"], ["make", "coco"], ["check"], ["check", "x", "--limit", "0"]], ids=str
)
def test_what_is_no_command_gets_the_usage(capsys: Captured, arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert "usage: blip data" in capsys.readouterr().err


def test_help_is_no_error(capsys: Captured) -> None:
    assert main(["check", "--help"]) == 0
    assert "--max-bad-ratio" in capsys.readouterr().out


def test_debug_shows_the_traceback(root: Path, capsys: Captured) -> None:
    assert main(["check", "coco_caption", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_scenes_made_otherwise_are_not_replaced_unasked(root: Path, capsys: Captured) -> None:
    make(root)
    assert "overwrite" in fails(
        capsys, "make", "scenes", "--out", str(root), "--train", "9", "--workers", "0"
    )
    assert make(root, "--overwrite") == 0


def test_prepare_names_every_file_and_its_place(root: Path, capsys: Captured) -> None:
    text = fails(capsys, "prepare", "coco_caption", "vg_caption", "laion400M")
    assert "coco_caption vg_caption laion400M: not complete, 5 entries" in text
    assert main(["prepare", "coco_caption", "vg_caption", "laion400M"]) == 2
    out = capsys.readouterr().out
    for name in ("coco_caption", "vg_caption"):
        row = CATALOG[name]
        assert all(str(root / place) in out for place in [*row.splits.values(), row.images])
        assert row.pictures in out
    assert f"{root}/laion400M/*.tar" in out
    assert "still wanted (nothing is downloaded without --fetch):" in out


def test_prepare_makes_foreign_paths_relative(root: Path, tmp_path: Path, capsys: Captured) -> None:
    for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K_2/3.jpg"):
        picture(root / "vg/images" / name)
    foreign = "/export/share/datasets/vision/visual-genome"
    records = [
        {"image": f"{foreign}/{p}", "caption": p} for p in ("VG_100K/1.jpg", "image/2.jpg", "image/3.jpg")
    ]
    put(tmp_path / "downloads/vg_caption.json", records)
    assert main(["prepare", "vg_caption", "--from", "downloads"]) == 0
    out = capsys.readouterr().out
    assert "train: 3 records, 3 captions" in out
    assert "3 image paths adapted" in out
    assert "3 of 3 pictures looked for are there" in out
    written = json.loads((root / "vg/annotations/vg_caption.json").read_text())
    assert [(r["image"], r["caption"]) for r in written] == [
        ("VG_100K/1.jpg", "VG_100K/1.jpg"),
        ("VG_100K_2/2.jpg", "image/2.jpg"),
        ("VG_100K_2/3.jpg", "image/3.jpg"),
    ]
    assert main(["check", "vg_caption"]) == 0
    assert main(["prepare", "vg_caption"]) == 0
    assert "adapted" not in capsys.readouterr().out


def test_prepare_in_place_keeps_the_original(root: Path, capsys: Captured) -> None:
    picture(root / "vg/images/VG_100K/1.jpg")
    records = [{"image": "/elsewhere/VG_100K/1.jpg", "caption": "x", "more": [1]}]
    place = put(root / "vg/annotations/vg_caption.json", records)
    assert main(["prepare", "vg_caption"]) == 0
    assert json.loads(place.read_text()) == [{"image": "VG_100K/1.jpg", "caption": "x", "more": [1]}]
    assert json.loads(place.with_name("vg_caption.json.orig").read_text()) == records


def test_prepare_says_which_pictures_are_absent(root: Path, tmp_path: Path, capsys: Captured) -> None:
    picture(root / "flickr30k/images/flickr30k-images/1.jpg")
    for split in ("train", "val", "test"):
        records = [{"image": f"flickr30k-images/{n}.jpg", "caption": ["a"]} for n in (1, 2)]
        put(tmp_path / f"in/flickr30k_{split}.json", records)
    assert "3 entries" in fails(capsys, "prepare", "flickr30k", "--from", "in")
    assert main(["prepare", "flickr30k"]) == 2
    out = capsys.readouterr().out
    assert (
        f"{root}/flickr30k/images/flickr30k-images/2.jpg: this and about 50% of the pictures of train.json"
        in out
    )
    assert (root / "flickr30k/annotations/test.json").is_file()


def test_prepare_wants_absolute_paths_resolved_when_pictures_come(root: Path, capsys: Captured) -> None:
    put(root / "sbu_captions/annotations/sbu.json", [{"image": "/export/sbu/1.jpg", "caption": "x"}])
    assert "2 entries" in fails(capsys, "prepare", "sbu_caption")
    picture(root / "sbu_captions/images/1.jpg")
    assert main(["prepare", "sbu_caption"]) == 0
    assert json.loads((root / "sbu_captions/annotations/sbu.json").read_text())[0]["image"] == "1.jpg"


def test_prepare_counts_shards_and_tells_broken_ones(root: Path, capsys: Captured) -> None:
    make(root)
    (root / "laion400M").mkdir()
    for number, path in enumerate(sorted((root / "scenes/shards").glob("train-*.tar"))[:2]):
        (root / f"laion400M/{number}.tar").write_bytes(path.read_bytes())
    assert main(["prepare", "laion400M"]) == 0
    sizes = json.loads((root / "laion400M/sizes.json").read_text())
    assert sorted(sizes) == ["0.tar", "1.tar"]
    assert f"{sum(sizes.values())} samples in 2 shards" in capsys.readouterr().out
    whole = (root / "laion400M/1.tar").read_bytes()
    (root / "laion400M/1.tar").write_bytes(whole[:700])
    fails(capsys, "prepare", "laion400M")
    assert main(["prepare", "laion400M"]) == 2
    assert "1.tar: truncated_shard: fetch this shard again" in capsys.readouterr().out


def test_a_damaged_annotation_file_is_not_taken(root: Path, tmp_path: Path, capsys: Captured) -> None:
    (root / "vg/images").mkdir(parents=True)
    put(tmp_path / "in/vg_caption.json", '[{"image": "a.jpg", "caption": "b"}, {"ima')
    assert "not valid JSON" in fails(capsys, "prepare", "vg_caption", "--from", "in")
    assert not (root / "vg/annotations").exists()


def test_a_path_that_leads_out_of_the_folder_stays_what_it_is(tmp_path: Path) -> None:
    picture(tmp_path / "secret.jpg")
    picture(tmp_path / "images/a/1.jpg")
    picture(tmp_path / "images/b/1.jpg")
    mapper = PathMapper(tmp_path / "images")
    table = {
        "../secret.jpg": "../secret.jpg",
        "x/../a/1.jpg": "a/1.jpg",
        "/q/b/1.jpg": "b/1.jpg",
        "/q/1.jpg": "/q/1.jpg",
    }
    assert {path: mapper(path) for path in table} == table


def test_the_module_runs_as_a_command(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip.data", "list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "vg_caption" in done.stdout


def test_a_reader_that_has_enough_of_it_is_no_error(root: Path) -> None:
    arguments = [sys.executable, "-m", "blip.data", "list", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()  # as in `blip data list --json | head`
        assert running.stderr.read() == b""
    assert running.returncode == 0


def test_questions_and_sentences_are_checked(root: Path, capsys: Captured) -> None:
    for name in "ab":
        picture(root / f"own/{name}.png")
    put(root / "own/train.json", [{"image": "a.png", "question": "What is it?"}] * 2)
    assert "100.0%" in fails(capsys, "check", "own")  # answers are wanted in training only
    put(root / "own/val.json", [{"image": "a.png", "question": "What is it?"}] * 2)
    assert main(["check", "own", "--split", "val"]) == 0
    assert "own val: 2 records, 1 pictures, 2 questions" in capsys.readouterr().out
    pairs = [{"images": ["a.png", f"{n}.png"], "sentence": "a left one", "label": "True"} for n in "bx"]
    put(root / "own/pairs.jsonl", "\n".join(map(json.dumps, pairs)))
    assert main(["check", "own/pairs.jsonl", "--max-bad-ratio", "1"]) == 0
    out = capsys.readouterr().out
    assert "pairs train: 2 records, 2 pictures, 2 sentences" in out
    assert "sentence tokens: min 3, median 3, 95% 3, max 3" in out
    assert "1 missing_image" in out
    assert "pairs/0: 12 x 10 RGB and 12 x 10 RGB, 'a left one'" in out
    put(
        root / "own/one.json", [{"image": "a.png", "caption": "a dog", "label": n} for n in ("yes", "no", "")]
    )
    assert main(["check", "own/one.json", "--kind", "classification", "--max-bad-ratio", "1"]) == 0
    assert "1 no_label" in capsys.readouterr().out
    assert main(["check", "own/one.json"]) == 0
    assert "3 captions" in capsys.readouterr().out


def test_prepare_brings_lists_pairs_and_official_files(root: Path, tmp_path: Path, capsys: Captured) -> None:
    for name in ("dev/1-img0.png", "dev/1-img1.png"):
        picture(root / "nlvr/images" / name)
    record = {"images": ["/export/nlvr/dev/1-img0.png", "/export/nlvr/dev/1-img1.png"], "sentence": "x"}
    for split in ("train", "dev", "test"):
        put(tmp_path / f"in/nlvr_{split}.json", [{**record, "label": "True"}])
    assert main(["prepare", "nlvr", "--from", "in"]) == 0
    out = capsys.readouterr().out
    assert "train: 1 records, 1 sentences in" in out
    assert "2 image paths adapted" in out
    assert "2 of 2 pictures looked for are there" in out
    written = json.loads((root / "nlvr/annotations/dev.json").read_text())
    assert written == [{**record, "images": ["dev/1-img0.png", "dev/1-img1.png"], "label": "True"}]
    assert main(["check", "nlvr", "--split", "val"]) == 0

    capsys.readouterr()
    picture(root / "coco/images/val2014/a.jpg")
    row = CATALOG["ok_vqa"]
    for file in (*row.files, row.answer_list):
        name = Path(file).name
        content = ["yes"] if file == row.answer_list else [{"image": "val2014/a.jpg", "question": "q"}]
        put(tmp_path / "in" / name, content)
    assert "1 entries" in fails(capsys, "prepare", "ok_vqa", "--from", "in")
    put(tmp_path / "in/mscoco_val2014_annotations.json", {"annotations": []})
    assert main(["prepare", "ok_vqa", "--from", "in"]) == 0
    assert "1 questions in" in capsys.readouterr().out
    assert all((root / file).is_file() for file in (*row.files, *row.others))
    assert main(["list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  ok_vqa "))
    assert line.endswith("ready")


def test_names_of_pictures_without_suffix_are_completed(root: Path, tmp_path: Path) -> None:
    picture(root / "flickr30k/images/flickr30k-images/12.jpg")
    for split in ("train", "dev", "test"):
        put(tmp_path / f"in/ve_{split}.json", [{"image": "12", "sentence": "x", "label": "neutral"}])
    assert main(["prepare", "snli_ve", "--from", "in"]) == 0
    assert json.loads((root / "snli/annotations/ve_dev.json").read_text())[0]["image"] == "12.jpg"
    assert main(["check", "snli_ve"]) == 0
