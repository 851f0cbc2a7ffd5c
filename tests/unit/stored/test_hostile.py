"""Weight files that were made to do harm: each is refused with the reason, and does nothing.

What `torch.load(weights_only=True)` itself would do with most of these is crash the interpreter, fill the
memory, or not come back.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blip.errors import CheckpointError
from blip.stored.files import shown, some
from blip.stored.pickles import MAGIC, Refused, follow
from blip.weights import read_weights, save_safetensors

LEGACY = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
"""What a file of torch before 1.6 begins with."""
PERIOD = (1 << 61) - 1
"""Whole numbers this far apart have the same hash."""


def refusal(path: Path) -> str:
    """Why a file is not read: one paragraph that names it."""
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    text = str(error.value)
    assert path.name in text or path.parent.name in text
    assert text.isprintable()
    assert len(text) < 1000
    return text


def text(value: str, times: int = 1) -> bytes:
    data = value.encode() * times
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def as_archive(path: Path, content: bytes, members: dict[str, bytes], compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in {"a/data.pkl": content, "a/version": b"3\n", **members}.items():
            archive.writestr(name, data)
    return path


def as_legacy(path: Path, content: bytes) -> Path:
    path.write_bytes(b"".join([*LEGACY, content, pickle.dumps([], 2)]))
    return path


def tensor(count: int = 2, key: str = "0") -> bytes:
    """Steps that make a tensor of two numbers, in a storage of float32."""
    storage = b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + whole(count)
    rest = b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + storage + b"tQ" + rest + b"tR"


def named(value: bytes) -> bytes:
    """A pickle of a dictionary with one entry."""
    return b"\x80\x02}" + text("a") + value + b"s."


BOMBS: dict[str, tuple[bytes, str]] = {
    "a key of a million tuples": (
        b"\x80\x02}(K\x01" + b"\x85" * 1_000_000 + b"K\x01u.",
        "tuples in tuples, more than 50 deep",
    ),
    "a tuple for a key": (b"\x80\x02}K\x01\x85K\x01s.", "keys that are neither text nor numbers"),
    "keys of one hash": (
        b"\x80\x02}(" + b"".join(whole(k * PERIOD**2) + b"K\x01" for k in range(1, 50_000)) + b"u.",
        "a number of more than 9 bytes",
    ),
    "bytes without end": (named(b"c__builtin__\nbytearray\n" + whole(10**12) + b"\x85R"), "bytearray"),
    "text encoded anew": (
        named(b"c_codecs\nencode\n" + text("a", 1 << 20) + text("utf-32") + b"\x86R"),
        "encodes text",
    ),
    "bytes again and again": (
        b"\x80\x02](c_codecs\nencode\nq\x00"
        + text("a", 1 << 20)
        + text("latin1")
        + b"\x86q\x01R"
        + b"h\x00h\x01R" * 100
        + b"e.",
        "the same text again and again",
    ),
    "memory for a tensor": (named(b"ctorch\nFloatTensor\n" + whole(10**11) + b"\x85R"), "torch.FloatTensor"),
    "a tensor's attributes": (
        named(b"ctorch._tensor\n_rebuild_from_type_v2\n(" + tensor() + b"t)R"),
        "torch._tensor._rebuild_from_type_v2",
    ),
    "a dictionary's attributes": (
        b"\x80\x02ccollections\nOrderedDict\n)R}" + text("keys") + b"K\x01sb.",
        "damaged or no weight file",
    ),
    "a tensor without memory": (
        named(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\nK\x02\x85K\x01\x85\x89tR"),
        "_rebuild_meta_tensor_no_storage",
    ),
    "a million million numbers": (named(tensor(count=10**12)), "4000000000000 bytes"),
    "negative numbers": (named(tensor(count=-1)), "names a storage in another way"),
    "a function that is none": (named(b"K\x01)R"), "calls what is no function"),
    "nothing to be popped": (b"\x80\x02" + b"\x85.", "damaged or cut off"),
    "no end": (b"\x80\x02](", "damaged or cut off"),
    "text beyond the file": (b"\x80\x02X\xff\xff\xff\xff", "damaged or cut off"),
    "a newer pickle": (pickle.dumps({"a": {1}}, 4), "which torch.save does not write"),
}


@pytest.mark.parametrize("write", [as_archive, as_legacy], ids=["archive", "legacy"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_wants_too_much_is_refused(
    tmp_path: Path, name: str, write: Callable[..., Path]
) -> None:
    content, reason = BOMBS[name]
    path = write(tmp_path / "w.pth", content, *([{}] if write is as_archive else []))
    assert reason in refusal(path)


def test_the_steps_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip.stored.pickles.MOST_STEPS", 1000)
    path = as_archive(tmp_path / "w.pth", b"\x80\x02](" + b"K\x01" * 1000 + b"e.", {})
    assert "more than 1000 steps" in refusal(path)


class Calls:
    """Pickles into a call of `os.system`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.place}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: [{"a": (x,)}]])
def test_code_is_not_run_wherever_it_stands(tmp_path: Path, zipped: bool, wrap: Callable[[Any], Any]) -> None:
    content = wrap({"a": torch.ones(2), "b": Calls(tmp_path / "touched")})
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert "holds Python objects (posix.system)" in refusal(tmp_path / "w.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_checkpoints_hold_beside_weights_is_let_through(tmp_path: Path, zipped: bool) -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = module.state_dict()  # an OrderedDict with an attribute of its own
    state["shared"] = state["weight"]
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "milestones": Counter([3, 3, 5]),
        "rng": torch.get_rng_state(),
        "bytes": b"\x00\xff",
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "parameter": nn.Parameter(torch.ones(1)),
        "complex": 1j,
        "nested": [OrderedDict(a=(1, 2.5, None, True)), 2**40, -3],
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "w.pth")
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in state.items()
    }
    assert found["shared"].data_ptr() == found["weight"].data_ptr()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.ones(2, device="meta"), "_rebuild_meta_tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_are_no_plain_ones_are_refused(
    tmp_path: Path, value: Callable[[], Any], kind: str
) -> None:
    torch.save({"a": value()}, tmp_path / "w.pth")
    assert kind in refusal(tmp_path / "w.pth")


def test_a_tensor_larger_than_its_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "w.pth")
    assert "only 4 bytes of it are there" in refusal(tmp_path / "w.pth")
    torch.save({"a": torch.ones((1,) * 70)}, tmp_path / "w.pth")
    assert "70 dimensions" in refusal(tmp_path / "w.pth")


PLAIN = pickle.dumps({}, 2)


@pytest.mark.parametrize(
    ("content", "members", "reason"),
    [
        (PLAIN, {"a/../../x": b"1"}, "outside of the folder"),
        (PLAIN, {"b/data/0": b"1"}, "outside of the folder"),
        (PLAIN, {"a/DATA.pkl": PLAIN}, "two members of the same name"),
        (PLAIN, {"a/constants.pkl": PLAIN, "a/code/x.py": b"1"}, "TorchScript"),
        (named(tensor()), {}, "which are missing"),
        (named(tensor()), {"a/data/0": b"1234"}, "which are only 4"),
        (named(tensor(key="../x")), {"a/data/0": bytes(8)}, "which are missing"),
    ],
)
def test_an_archive_that_torch_would_not_write(
    tmp_path: Path, content: bytes, members: dict[str, bytes], reason: str
) -> None:
    assert reason in refusal(as_archive(tmp_path / "w.pth", content, members))


def test_an_archive_with_packed_members_is_not_unpacked(tmp_path: Path) -> None:
    bomb = {"a/data/0": bytes(10_000_000)}
    path = as_archive(tmp_path / "w.pth", named(tensor(count=2_500_000)), bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    assert "packed members" in refusal(path)


def test_an_archive_with_two_lists_of_members_is_refused(tmp_path: Path) -> None:
    """Python reads the list that stands before the end, torch the one whose place is written there."""
    packed = as_archive(tmp_path / "p", PLAIN, {}, zipfile.ZIP_DEFLATED).read_bytes()
    plain = as_archive(tmp_path / "q", PLAIN, {}).read_bytes()
    (tmp_path / "w.pth").write_bytes(packed[:-22] + plain[:-22] + packed[-22:])
    assert "list of members is not where" in refusal(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(plain + b"more")
    assert "behind its end" in refusal(tmp_path / "w.pth")


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    data = bytearray(as_archive(tmp_path / "w.pth", PLAIN, {"a/data/0": bytes(100)}).read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = struct.pack("<I", 10)
    (tmp_path / "w.pth").write_bytes(data)
    assert "lies over another one" in refusal(tmp_path / "w.pth")


def test_tar_archives_are_not_unpacked(tmp_path: Path) -> None:
    content = b"".join(LEGACY) + PLAIN
    for name in ("storages", content.decode("latin1").replace("\0", "x")[:99]):
        with tarfile.open(tmp_path / "w.pth", "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"1234"))
        assert "does not begin as files of torch.save do" in refusal(tmp_path / "w.pth")
    head = bytearray(tarfile.TarInfo("x").tobuf())  # both at once
    head[: len(LEGACY[0])] = LEGACY[0]
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    (tmp_path / "w.pth").write_bytes(head)
    assert "is a tar archive" in refusal(tmp_path / "w.pth")


def test_a_legacy_file_needs_no_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "w.pth").read_bytes()
    assert b"K\x05Nt" in data  # the storage's numbers
    (tmp_path / "w.pth").write_bytes(data.replace(b"K\x05Nt", b"J\x00\x00\x00\x7fNt"))
    assert "its tensors need 8522825728 bytes, but only" in refusal(tmp_path / "w.pth")


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        ({}, 1 << 60, "1152921504606846976 bytes"),
        ({}, 500, "cut off"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, None, "damaged"),
        ({"a": entry(0, 8, [2])}, None, "damaged"),
        ({"a": entry(0, 2, [1], "F16")}, None, "damaged"),
        ({"a": entry(0, 4, [-1])}, None, "damaged"),
        ({"a": entry(-4, 0, [1])}, None, "damaged"),
        ({"a": entry(0, 4, [1 << 62, 1 << 62])}, None, "damaged"),
        ({"a": entry(0, 4, [1.0])}, None, "damaged"),
        ({"a": entry(0, 4, [1], "F6_E2M3")}, None, "damaged"),
        ({"__metadata__": [1]}, None, "damaged"),
        ({"a\x1b[31m\n": entry(0, 4, [1])}, None, r"whose name is none: 'a\x1b[31m\n'"),
        ({"a" * 1_000_000: entry(0, 4, [1])}, None, "(1000000 letters)"),
        ({"a": entry(0, 4, [1] * 65)}, None, "65 dimensions"),
        (b'{"a":' + b"[" * 100_000, None, "damaged"),
        (b'{"\xff": 1}', None, "damaged"),
    ],
)
def test_a_header_of_safetensors_that_lies(
    tmp_path: Path, header: Any, length: int | None, reason: str
) -> None:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(data) if length is None else length)
    (tmp_path / "w.safetensors").write_bytes(start + data + b"1234")
    assert reason in refusal(tmp_path / "w.safetensors")


# Folders


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weight_map": {"a": INDEX}}, "is no weight file beside the index"),
        ({"weight_map": {"a": "x" * 5000 + ".bin"}}, "is missing"),
        ({"weight_map": {"a": "\0.bin"}}, "is no weight file beside the index"),
        ({"weight_map": {"a": "\ud800.bin"}}, "is no weight file beside the index"),
        ({"weight_map": {"a": 5}}, "is no weight file beside the index"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({"weight_map": {"\x1b" * 100_000: "w.safetensors"}}, "the shards lack 1 tensors"),
        (b'{"weight_map": {"a": ' + b"9" * 100_000 + b"}}", "is no index of weight files"),
        (b"\xff\xfe", "is no index of weight files"),
    ],
)
def test_an_index_that_names_what_is_no_shard(tmp_path: Path, content: Any, reason: str) -> None:
    save_safetensors({"b": torch.ones(1)}, tmp_path / "w.safetensors")
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / INDEX).write_bytes(data)
    assert reason in refusal(tmp_path)


def test_an_index_larger_than_any_is_not_read(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 10**12)  # nothing of it is on the disk
    assert "1000000000000 bytes" in refusal(tmp_path)


@pytest.mark.parametrize("name", [INDEX, "w.pth", "w.safetensors"])
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is no regular file" in refusal(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "is no regular file" in refusal(tmp_path / name)


@pytest.mark.parametrize("link", ["model.safetensors", "model", "checkpoints/last", "checkpoints/best"])
def test_links_do_not_lead_out_of_a_folder(tmp_path: Path, link: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_safetensors({"a": torch.ones(1)}, other / "model.safetensors")
    folder = tmp_path / "given"
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(other / "model.safetensors" if link == "model.safetensors" else other)
    assert "a link that leads out of its folder" in refusal(folder)
    assert list(read_weights(other)) == ["a"]


def test_links_of_the_hub_lead_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_safetensors({"a": torch.ones(1)}, blobs / "w")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    assert list(read_weights(snapshot)) == ["a"]
    (tmp_path / "snapshots").rename(tmp_path / "others")
    assert "a link that leads out" in refusal(tmp_path / "others" / "0123")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/w.pth", "x" * 5000])
def test_a_path_that_cannot_be_is_an_error_like_others(source: str) -> None:
    with pytest.raises(CheckpointError, match="cannot look for weights"):
        read_weights(source)


# Parts


def test_names_in_messages_are_short_and_printable() -> None:
    assert shown("a.weight") == "a.weight"
    assert shown("größe") == "größe"
    assert shown("a\n\x1b") == r"a\n\x1b"
    assert shown("ab" * 100, 4) == "abab... (200 letters)"
    assert some(["a", "b", "c"], 2) == "a, b, ... and 1 more"


def test_following_a_pickle_tells_what_it_wants() -> None:
    two = b"(" + text("a") + tensor() + text("b") + tensor(count=5, key="1") + b"u."
    found = follow(b"xyz\x80\x02}" + two + b"more", 3)
    assert found.storages == {"0": 8, "1": 20}
    assert found.end == 3 + 3 + len(two)
    with pytest.raises(Refused):
        follow(b"", 0)
