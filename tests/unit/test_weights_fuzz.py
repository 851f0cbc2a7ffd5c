"""Weight files and configurations, changed at random: read, or refused in our own words, and nothing else.

Each batch of mutants is read by a process of its own, which may take little memory and time, so that a crash,
a hang or a bomb ends it and not the tests; the number of the mutant that did it is in the message. With
BLIP_FUZZ=50 there are fifty times as many, from other seeds.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.convert import convert
from blip.errors import BlipError
from blip.weights import INDEX_ENDING, WEIGHTS_FILE, read_weights, save_safetensors, save_shards
from tests.unit.test_convert import small

ROUNDS = int(os.environ.get("BLIP_FUZZ", "1"))
MEMORY = 1 << 30
"""Bytes of address space that a batch may take beyond what the process has."""
SECONDS = 300
TENSORS = {
    "a.weight": torch.arange(60.0).view(6, 10),
    "a.bias": torch.arange(10).bfloat16(),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
}
TOUCH = "touch touched-by-a-pickle"
CALL = b"cposix\nsystem\nX" + len(TOUCH).to_bytes(4, "little") + TOUCH.encode() + b"\x85R"
"""Steps of a pickle that leave a file in the working directory."""
NUMBERS = (0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64, 10**30, 1.5, 1e308)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "../x",
    "/dev/zero",
    [],
    {},
    [[]],
    {"a": 1},
    "\ud800",
)

Change = Callable[[random.Random, bytes], bytes]
Make = Callable[[random.Random], Callable[[], None]]


def scrambled(rng: random.Random, data: bytes) -> bytes:
    """Bits, bytes and whole regions in other places."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size, place = len(found), rng.randrange(len(found) + 1)
        length = rng.choice((1, 2, 4, 8, rng.randrange(1, 200)))
        match rng.randrange(8):
            case 0 if size:
                found[place % size] ^= 1 << rng.randrange(8)
            case 1 if size:
                found[place % size] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del found[place:]
            case 3:
                del found[place : place + length]
            case 4:
                found[place:place] = rng.randbytes(length)
            case 5:
                found[place:place] = found[place : place + length]
            case 6:
                other = rng.randrange(size + 1)
                here, there = found[place : place + length], found[other : other + length]
                found[place : place + len(there)], found[other : other + len(here)] = there, here
            case 7:
                found[place : place + length] = (rng.choice((0, 2**31, 2**63, -1)) % 2**64).to_bytes(
                    8, "little"
                )
    return bytes(found)


def renumbered(rng: random.Random, data: bytes) -> bytes:
    """Numbers of a text in JSON, or of a header of safetensors, replaced by others."""
    places = list(re.finditer(rb"\d+", data))
    place = rng.choice(places) if places else None
    if place is None:
        return scrambled(rng, data)
    number = str(rng.choice((*NUMBERS, int(place[0][:18]) + rng.choice((-1, 1, 4))))).encode()
    return data[: place.start()] + number + data[place.end() :]


def header_of(rng: random.Random, data: bytes) -> bytes:
    """A file of safetensors with another header, whose length is right."""
    length = int.from_bytes(data[:8], "little")
    header = rng.choice((renumbered, scrambled, revalued))(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def revalued(rng: random.Random, data: bytes) -> bytes:
    """JSON with another value somewhere, or without one."""
    tree = json.loads(data)
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    node, key = rng.choice(places)
    if rng.randrange(4):
        node[key] = rng.choice(VALUES)
    else:
        del node[key]
    return json.dumps(tree).encode()


def repickled(rng: random.Random, data: bytes) -> bytes:
    """An archive of torch whose pickle does something else, such as calling."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = rng.choice((scrambled, calling))(rng, content)
            new.writestr(name, content)
    return found.getvalue()


def calling(rng: random.Random, data: bytes) -> bytes:
    """A call between two bytes of what is a pickle, at least in its beginning."""
    place = rng.randrange(min(len(data), 600))
    return data[:place] + CALL + data[place:]


def looked_at(tensors: dict[str, Tensor], size: int) -> None:
    """All bytes of tensors, none of which may have more than there are in files."""
    for name, tensor in tensors.items():
        assert isinstance(name, str)
        assert tensor.device.type == "cpu"
        assert tensor.numel() * tensor.element_size() <= size
        tensor.contiguous().flatten().view(torch.uint8).sum()


def tell(read: Callable[[], None]) -> str:
    """`read`, `refused`, or what went wrong."""
    try:
        read()
    except BlipError as error:
        text = str(error)
        short = len(text) < 4000 and ("\n" not in text or "problems:\n" in text)
        return "refused" if short else f"a message of {len(text)} letters: {text[:300]!r}"
    except BaseException:
        return traceback.format_exc()
    return "read"


def batch(place: Path, name: str, mutants: int, make: Make) -> Counter[str]:
    """What became of each mutant; fails at the first wrong one. `make` writes it, and gives what reads it."""
    begin, end = os.pipe()
    child = os.fork()
    if not child:
        os.chdir(place)
        signal.alarm(SECONDS * ROUNDS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch, tokenizers and transformers say
        for number in range(mutants * ROUNDS):
            os.write(end, f"{name} {number} ".encode())
            found = tell(make(random.Random(f"{name} {number}")))
            os.write(end, f"{found}\0".encode())
            if found not in ("read", "refused"):
                break
        os._exit(0)
    os.close(end)
    with os.fdopen(begin) as stream:
        told = stream.read().split("\0")
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"ended by {status} at {told[-1]}"
    found = Counter(entry.split(" ", 2)[2] for entry in told if entry)
    assert set(found) <= {"read", "refused"}, told[-2]
    assert not list(place.rglob("touched*")), "code was run"
    return found


def as_safetensors(path: Path) -> None:
    save_safetensors({**TENSORS, "alias": TENSORS["a.weight"]}, path, {"more": "1"})


def as_archive(path: Path) -> None:
    torch.save({"model": TENSORS, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, path)


def as_legacy(path: Path) -> None:
    torch.save({"model": TENSORS, "epoch": 3, TOUCH: b"\0"}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write", "changes", "mutants"),
    [
        ("w.safetensors", as_safetensors, (scrambled, header_of), 1000),
        ("archive.pth", as_archive, (scrambled, repickled), 1000),
        ("legacy.pth", as_legacy, (scrambled, calling, renumbered), 1000),
    ],
)
def test_a_file(
    name: str, write: Callable[[Path], None], changes: tuple[Change, ...], mutants: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    data = path.read_bytes()

    def make(rng: random.Random) -> Callable[[], None]:
        path.write_bytes(rng.choice(changes)(rng, data))
        return lambda: looked_at(read_weights(path), path.stat().st_size)

    found = batch(tmp_path, name, mutants, make)
    assert min(found["read"], found["refused"]) > mutants * ROUNDS / 50, found


def test_shards_and_their_index(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    whole.mkdir()
    assert len(save_shards(TENSORS, whole, 30)) == 2
    outside = tmp_path / "x"  # what an index may name
    save_safetensors(TENSORS, outside)
    size = sum(file.stat().st_size for file in whole.iterdir())

    def make(rng: random.Random) -> Callable[[], None]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = (
            rng.choice(sorted(folder.iterdir()))
            if rng.randrange(3)
            else folder / (WEIGHTS_FILE + INDEX_ENDING)
        )
        change = rng.choice((scrambled, renumbered, revalued if file.suffix == ".json" else header_of))
        file.write_bytes(change(rng, file.read_bytes()))
        return lambda: looked_at(read_weights(folder), size + 1000)

    found = batch(tmp_path, "shards", 300, make)
    assert min(found["read"], found["refused"]) > 20 * ROUNDS, found


@pytest.mark.parametrize("layout", ["blip", "hf"])
def test_a_configuration(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = small("blip_caption").save_pretrained(tmp_path / "blip")
    if layout == "hf":
        convert(folder, tmp_path / "hf", "hf")
        folder = tmp_path / "hf"
    blip.from_pretrained(
        folder
    )  # the modules that are needed are imported once, before the memory is limited
    data = (folder / "config.json").read_bytes()

    def make(rng: random.Random) -> Callable[[], None]:
        (folder / "config.json").write_bytes(
            rng.choice((revalued, revalued, renumbered, scrambled))(rng, data)
        )
        return lambda: blip.from_pretrained(folder)

    found = batch(tmp_path, layout, 40, make)
    assert min(found["read"], found["refused"]) > 2 * ROUNDS, found


def test_the_call_would_leave_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted into pickles works, where it is let."""
    monkeypatch.chdir(tmp_path)
    pickle.Unpickler(io.BytesIO(b"\x80\x02" + CALL + b".")).load()
    assert [file.name for file in tmp_path.iterdir()] == ["touched-by-a-pickle"]
