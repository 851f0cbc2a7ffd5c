"""What is written one tensor after the other is what `torch.save` would have written."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import CheckpointError
from blip.formats.rules import Copy, Rename, Table, Transform
from blip.weights import StoredWeights, origin, read_weights, save_safetensors, save_torch

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
TENSORS = {
    **{str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
    "one": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(6.0).view(2, 3).T,
    "part": torch.arange(100.0)[10:12],
}


def saved(path: Path, tensors: Mapping[str, Tensor], at_once: int = 1 << 20, **more: Any) -> Path:
    save_torch(tensors, path, "model", at_once, **more)
    return path


def same(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return list(given) == list(wanted) and all(
        torch.equal(given[n], wanted[n]) and given[n].dtype == wanted[n].dtype for n in wanted
    )


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 20])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_it(tmp_path: Path, mmap: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", limit)  # the smaller one: as if members were large
    path = saved(tmp_path / "w.pth", TENSORS)
    content = torch.load(path, weights_only=True, mmap=mmap)
    assert list(content) == ["model"]
    assert same(content["model"], TENSORS)
    assert same(read_weights(path), TENSORS)
    if mmap:
        assert all(t.data_ptr() % 64 == 0 for t in content["model"].values() if t.numel())
    assert path.stat().st_size < 10_000  # of a part, the whole is not written
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


class Counted(Mapping[str, Tensor]):
    """Knows how many tensors are asked for between two calls of `release`."""

    def __init__(self, count: int) -> None:
        self.count, self.asked, self.rounds = count, 0, []

    def __getitem__(self, name: str) -> Tensor:
        self.asked += 1
        return torch.full((250,), float(name))  # 1000 bytes

    def __iter__(self) -> Iterator[str]:
        return iter(map(str, range(self.count)))

    def __len__(self) -> int:
        return self.count

    def release(self) -> None:
        self.rounds.append(self.asked)
        self.asked = 0


def test_no_more_is_asked_for_than_may_be_in_memory(tmp_path: Path) -> None:
    tensors = Counted(7)
    path = saved(tmp_path / "w.pth", tensors, 3000, release=tensors.release)
    assert tensors.rounds == [4, 4]  # the fourth one is put back
    assert [float(tensor[0]) for tensor in read_weights(path).values()] == list(range(7))
    tensors = Counted(3)
    saved(tmp_path / "w.pth", tensors, 1, release=tensors.release)
    assert tensors.rounds == [2, 2]


def test_two_names_of_one_tensor_are_written_once(tmp_path: Path) -> None:
    table = torch.randn(1000)
    save_safetensors({"a": table, "b": table, "c": table.clone()}, tmp_path / "w.safetensors")
    stored = StoredWeights(tmp_path / "w.safetensors")
    assert origin(stored, "a") == origin(stored, "b") != origin(stored, "c")
    rules = [
        Rename("x", "a"),
        Rename("y", "b"),
        Transform(("z",), ("c",), lambda t: (t,), lambda t: (t,)),
        Copy("w", "z", "the same"),
    ]
    theirs = Table("a layout", rules).theirs(stored)
    path = saved(tmp_path / "w.pth", theirs)
    assert path.stat().st_size < 2.5 * table.nbytes
    found = read_weights(path)
    assert same(dict(sorted(found.items())), dict.fromkeys("wxyz", table))
    assert found["x"].data_ptr() == found["y"].data_ptr()
    assert found["z"].data_ptr() == found["w"].data_ptr() != found["x"].data_ptr()


def test_a_type_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no place for torch\.uint16"):
        saved(tmp_path / "w.pth", {"a": torch.ones(2).to(torch.uint16)})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        saved(tmp_path / "w.pth", TENSORS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("zipped", "times"), [(False, 1), (True, 2)])
def test_a_file_that_cannot_be_mapped_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, times: int
) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    load, loads = torch.load, []

    def counted(*args: Any, **options: Any) -> Any:
        loads.append(args)
        return load(*args, weights_only=True, **{k: v for k, v in options.items() if k != "weights_only"})

    monkeypatch.setattr(torch, "load", counted)
    stored = StoredWeights(tmp_path / "w.pth")
    stored.release()
    assert torch.equal(stored["a"], torch.ones(3))
    assert len(loads) == times


def test_of_shards_that_cannot_be_mapped_one_is_in_memory(tmp_path: Path) -> None:
    places = {}
    for number in range(3):
        file = f"pytorch_model-{number}.bin"
        part = {f"{number}.{name}": torch.full((4,), float(number)) for name in "ab"}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=False)
        places |= dict.fromkeys(part, file)
    index = {"weight_map": dict(sorted(places.items(), key=lambda item: item[0][::-1]))}  # 0.a, 1.a, 2.a, 0.b
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    stored = StoredWeights(tmp_path)
    assert list(stored) == ["0.a", "0.b", "1.a", "1.b", "2.a", "2.b"]  # file by file
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.full((4,), float(name[0])))
        assert [file.name for file in stored._open] == [places[name]]
