"""Archives are unpacked inside their folder: whatever they hold, nothing is written elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from blip.data.__main__ import main
from blip.data.catalog.table import CATALOG
from blip.data.official import archives
from blip.data.official.archives import holds, unpack
from blip.errors import DataError

PICTURE = b"\xff\xd8 a picture"
GOOD = {"train2014/a.jpg": PICTURE, "train2014/deep/b.png": b"b", "notes.json": b"[]"}
OUTSIDE = (
    "../up.jpg",
    "train2014/../../up2.jpg",
    "/abs.jpg",
    "..\\win.jpg",
    "C:\\win.jpg",
    "\\\\host\\x.jpg",
)


def make_zip(path: Path, members: dict[str, bytes], **more: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name, mode in more.items():
            info = zipfile.ZipInfo(f"{name}.jpg")
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
    return path


def make_tar(path: Path, members: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in special:
            archive.addfile(info)
    return path


def make(path: Path, members: dict[str, bytes]) -> Path:
    return make_zip(path, members) if path.suffix == ".zip" else make_tar(path, members)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_plain_files_of_known_kinds_are_written_once(tmp_path: Path, name: str) -> None:
    junk = {"run.sh": b"rm", "a.pkl": b"x", "__MACOSX/._a.jpg": b"x", ".hidden": b"x"}
    path = make(tmp_path / name, {**GOOD, **junk})
    done = unpack(path, tmp_path / "out")
    assert tree(tmp_path / "out") == GOOD
    assert (done.written, done.there, done.ignored, dict(done.refused)) == (3, 0, 4, {})
    (tmp_path / "out/train2014/a.jpg").write_bytes(b"cut")  # a copy that broke off elsewhere
    done = unpack(path, tmp_path / "out")
    assert (done.written, done.there) == (1, 2)
    assert tree(tmp_path / "out") == GOOD


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_members_with_foreign_places_are_refused_and_counted(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / name, {**dict.fromkeys(OUTSIDE, b"bad"), **GOOD})
    done = unpack(path, tmp_path / "x/y/out")
    assert dict(done.refused) == {"outside": len(OUTSIDE)}
    assert done.first == "../up.jpg"
    assert "3 files unpacked" in done.line()
    assert "6 outside, the first is '../up.jpg'" in done.line()
    assert tree(tmp_path / "x") == {f"y/out/{place}": content for place, content in GOOD.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "x"]


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    kinds = {
        "sym": tarfile.SYMTYPE,
        "hard": tarfile.LNKTYPE,
        "fifo": tarfile.FIFOTYPE,
        "chr": tarfile.CHRTYPE,
    }
    special = []
    for name, kind in kinds.items():
        info = tarfile.TarInfo(f"{name}.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        special.append(info)
    path = make_tar(tmp_path / "a.tar", GOOD, *special)
    assert dict(unpack(path, tmp_path / "out").refused) == {"link": 2, "device": 2}
    path = make_zip(tmp_path / "a.zip", GOOD, link=stat.S_IFLNK | 0o777, fifo=stat.S_IFIFO | 0o600)
    assert dict(unpack(path, tmp_path / "out2").refused) == {"link": 1, "device": 1}
    assert tree(tmp_path / "out") == tree(tmp_path / "out2") == GOOD


def test_nothing_is_written_through_links_that_stand_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere/mine.json").write_text("mine")
    (tmp_path / "out/train2014").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/notes.json").symlink_to(tmp_path / "elsewhere/mine.json")
    done = unpack(make_zip(tmp_path / "a.zip", GOOD), tmp_path / "out")
    assert dict(done.refused) == {"in_the_way": 3}
    assert tree(tmp_path / "elsewhere") == {"mine.json": b"mine"}


def test_a_data_root_that_is_a_link_itself_is_the_user_s_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    unpack(make_zip(tmp_path / "a.zip", GOOD), tmp_path / "out")
    assert tree(tmp_path / "disk") == GOOD


def test_bombs_and_giants_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"bomb.jpg": bytes(3 << 20), "small.json": bytes(5000), **GOOD})
    done = unpack(path, tmp_path / "out")
    assert dict(done.refused) == {"bomb": 1}
    assert (done.written, done.first) == (4, "bomb.jpg")
    path = make_tar(tmp_path / "a.tar", {"giant.jpg": bytes(3000), **GOOD})
    assert dict(unpack(path, tmp_path / "out2", most_bytes=2000).refused) == {"too_large": 1}


def test_a_member_that_is_larger_than_it_says_is_an_error(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"a.jpg": b"x" * 5000})
    content = bytearray(path.read_bytes())
    for at in (content.find(b"PK\x03\x04") + 22, content.find(b"PK\x01\x02") + 24):
        content[at : at + 4] = (50).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip: member 'a\.jpg' cannot be unpacked"):
        unpack(path, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_cut_archive_is_an_error_that_keeps_what_is_whole(tmp_path: Path, name: str) -> None:
    members = {f"{n}.jpg": bytes([n]) * 40_000 for n in range(8)}
    path = make(tmp_path / name, members)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        unpack(path, tmp_path / "out")
    kept = tree(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert kept.items() <= members.items()
    path.write_bytes(whole)
    done = unpack(path, tmp_path / "out")
    assert done.there == len(kept)
    assert tree(tmp_path / "out") == members


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "a.tar", {f"{n}.jpg": bytes([n + 1]) * 4096 for n in range(3)})
    content = bytearray(path.read_bytes())
    content[4608 : 4608 + 512] = b"\xee" * 512
    (tmp_path / name).write_bytes(gzip.compress(bytes(content)) if name.endswith("gz") else bytes(content))
    with pytest.raises(DataError, match="breaks off before its end"):
        unpack(tmp_path / name, tmp_path / "out")
    assert tree(tmp_path / "out") == {"0.jpg": b"\1" * 4096}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz"])
def test_what_is_no_archive_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>Not Found</html>" * 40)
    with pytest.raises(DataError, match=r"is it complete\?"):
        unpack(tmp_path / name, tmp_path / "out")


def test_encrypted_members_are_counted(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"a.jpg": b"x"})
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert dict(unpack(path, tmp_path / "out").refused) == {"encrypted": 1}


def test_a_full_disk_is_told_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 20})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: free)
    path = make_zip(tmp_path / "a.zip", {"a.jpg": b"x" * 30})
    with pytest.raises(DataError, match="too small for what it holds; make room"):
        unpack(path, tmp_path / "out")


def test_archives_of_equal_names_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "images.zip", {"images/1.jpg": b"x"})
    assert [holds(path, start) for start in ("images/", "", "VG_100K/")] == [True, True, False]
    blind = make_zip(tmp_path / "val.zip", {"val/": b"", "val/VizWiz_val_1.jpg": b"x"})
    school = make_zip(tmp_path / "other.zip", {"val/1/image.png": b"x", "val/2/image.png": b"x"})
    some = {name: CATALOG[name].archives for name in ("vizwiz_vqa", "scienceqa")}
    table = {
        name: [holds(path, one.holds) for path in (blind, school) for one in of if one.names == "val.zip"]
        for name, of in some.items()
    }
    assert table == {"vizwiz_vqa": [True, False], "scienceqa": [False, True]}


def test_prepare_unpacks_pictures_and_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "root"))
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5)).save(buffer, "jpeg")
    incoming = tmp_path / "in/sub"
    incoming.mkdir(parents=True)
    make_zip(incoming / "images.zip", {"images/24.jpg": buffer.getvalue(), "images/../../x.jpg": b"bad"})
    question = {"q1": {"question": "Is it?", "imageId": "24", "answer": "no"}}
    named = {
        f"{split}_balanced_questions.json": json.dumps(question).encode()
        for split in ("train", "val", "testdev")
    }
    make_zip(incoming / "questions1.2.zip", named)
    assert main(["prepare", "gqa", "--from", str(tmp_path / "in")]) == 0
    out = capsys.readouterr().out
    assert "1 files unpacked, 0 were there, 0 of other kinds left out; refused: 1 outside" in out
    assert json.loads((tmp_path / "root/gqa/annotations/val_balanced_questions.json").read_text()) == [
        {"image": "24.jpg", "question": "Is it?", "question_id": "q1", "answer": "no"}
    ]
    assert not (tmp_path / "x.jpg").exists()
    assert main(["check", "gqa"]) == 0
    assert main(["prepare", "vg_caption", "--from", str(tmp_path / "in")]) == 2  # its images.zip is another
    assert not (tmp_path / "root/vg/images").exists()


def test_annotations_among_the_pictures_of_an_archive_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "root"))
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5)).save(buffer, "png")
    splits = ("train", "val", "test")
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
    inside = {f"iconqa/{split}/choose_txt/{split}1/image.png": buffer.getvalue() for split in splits}
    inside["problems.json"] = json.dumps({f"{split}1": problem for split in splits}).encode()
    inside["pid_splits.json"] = json.dumps({f"choose_txt_{s}": [f"{s}1"] for s in splits}).encode()
    (tmp_path / "in").mkdir()
    make_zip(tmp_path / "in/iconqa_data.zip", {f"iconqa_data/{name}": text for name, text in inside.items()})
    assert main(["prepare", "iconqa", "--from", str(tmp_path / "in")]) == 0
    assert json.loads((tmp_path / "root/iconqa/annotations/val.json").read_text()) == [
        {"sample_id": "val1", "image": "iconqa_data/iconqa/val/choose_txt/val1/image.png", **problem}
    ]
    assert main(["prepare", "iconqa"]) == 0
    assert main(["check", "iconqa"]) == 0
