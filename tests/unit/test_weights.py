"""Facts about weight files: what is read, what is refused, and how every name is accounted for."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip.errors import CheckpointError
from blip.layers.vit import resize_on_load
from blip.weights import load_into, pointed, read_weights, save_safetensors, untie

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.tensor([1.5, -2.0]),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
}


def same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return given.keys() == wanted.keys() and all(
        torch.equal(given[n], wanted[n]) and given[n].dtype == wanted[n].dtype for n in wanted
    )


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    text = str(error.value)
    assert "\n" not in text
    return text


class Opens:
    """Pickles into a call of `os.system`."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.touched}",)


# Reading


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin", "old.pt"])
def test_every_format_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_safetensors(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.pt")
    assert same(read_weights(path), TENSORS)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_a_training_checkpoint_of_lavis_gives_its_model_alone(tmp_path: Path, wrapper: str) -> None:
    content = {wrapper: TENSORS, "optimizer": {"state": {}}, "config": {"run": {"lr": 1e-4}}, "epoch": 3}
    torch.save(content, tmp_path / "checkpoint_3.pth")
    assert same(read_weights(tmp_path / "checkpoint_3.pth"), TENSORS)


def test_the_prefix_of_data_parallel_is_taken_off(tmp_path: Path) -> None:
    torch.save({f"module.{n}": t for n, t in TENSORS.items()}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), TENSORS)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_put_together_by_their_index(tmp_path: Path, ending: str) -> None:
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    names = list(TENSORS)
    places: dict[str, str] = {}
    for i, part in enumerate((names[:2], names[2:])):
        file = f"{stem}-{i + 1:05d}-of-00002{ending}"
        tensors = {n: TENSORS[n] for n in part}
        save_safetensors(tensors, tmp_path / file) if stem == "model" else torch.save(
            tensors, tmp_path / file
        )
        places |= dict.fromkeys(part, file)
    (tmp_path / f"{stem}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(read_weights(tmp_path), TENSORS)
    (tmp_path / f"{stem}-00002-of-00002{ending}").unlink()
    assert f"shard '{stem}-00002-of-00002{ending}' is missing" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "notes.txt"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, file: str) -> None:
    save_safetensors(TENSORS, tmp_path / "outside.safetensors")
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": file}}))
    assert "is no weight file beside the index" in refusal(folder)


def test_a_run_folder_gives_its_export_else_the_best_else_the_last_checkpoint(tmp_path: Path) -> None:
    for i, place in enumerate(("checkpoints/step-00000002", "checkpoints/step-00000001", "model")):
        (tmp_path / place).mkdir(parents=True)
        save_safetensors({"which": torch.tensor(i)}, tmp_path / place / "model.safetensors")
    (tmp_path / "checkpoints" / "last").symlink_to("step-00000002")
    (tmp_path / "checkpoints" / "best").write_text("step-00000001\n")  # where links do not work
    assert int(read_weights(tmp_path)["which"]) == 2
    assert int(read_weights(tmp_path / "checkpoints/best")["which"]) == 1
    (tmp_path / "model" / "model.safetensors").unlink()
    assert int(read_weights(tmp_path)["which"]) == 1
    (tmp_path / "checkpoints" / "best").unlink()
    assert int(read_weights(tmp_path)["which"]) == 0


def test_a_folder_with_one_weight_file_gives_that_one(tmp_path: Path) -> None:
    assert "no weights in the folder" in refusal(tmp_path)
    torch.save(TENSORS, tmp_path / "blip_coco.pth")
    assert same(read_weights(tmp_path), TENSORS)
    torch.save(TENSORS, tmp_path / "other.pth")
    assert "blip_coco.pth, other.pth" in refusal(tmp_path)


def test_a_pointer_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "checkpoints").mkdir()
    pointer = tmp_path / "checkpoints" / "last"
    pointer.write_text("../target")
    assert pointed(pointer) == pointer


# Hostile and damaged files


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"model": TENSORS, "config": Opens(touched)}, tmp_path / "w.pth")
    assert "holds Python objects (posix.system)" in refusal(tmp_path / "w.pth")
    assert not touched.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    tensors = {"a": torch.randn(100, 100), "b": torch.randn(10)}
    save_safetensors(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    with path.open("r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    assert name in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
        ("w.safetensors", struct.pack("<Q", 4) + b"\xff\xfe\x00["),
        ("w.safetensors", b"<html><body>404</body></html>"),
        ("w.pth", b"<html><body>404</body></html>"),
        ("w.pth", b"PK\x03\x04" + bytes(100)),
        ("w.pth", b"\x80\x02" + b"(" * 5000),
        ("model.safetensors.index.json", b"[1, 2]"),
        ("model.safetensors.index.json", b"{" * 5000),
    ],
)
def test_bytes_that_are_no_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path / name)


def test_aliases_that_name_nothing_are_refused(tmp_path: Path) -> None:
    for aliases in ('{"b": "missing"}', "[1]", "{", '{"b": {}}'):
        save_safetensors({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"aliases": aliases})
        assert "is damaged" in refusal(tmp_path / "w.safetensors")


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    assert "git lfs pull" in refusal(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [torch.ones(2), [1, 2], {"epoch": 3}, {1: torch.ones(1)}, None])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert "holds no named tensors" in refusal(tmp_path / "w.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no weights at" in refusal(tmp_path / "gone.pth")


# Writing


def test_a_tensor_with_two_names_is_stored_once_and_read_under_both(tmp_path: Path) -> None:
    table = torch.randn(200, 50)
    save_safetensors({"embedding": table, "head": table, "other": table.clone()}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size < 2.1 * table.nbytes
    tensors = read_weights(tmp_path / "w.safetensors")
    assert same(tensors, {"embedding": table, "other": table, "head": table})
    assert tensors["head"].data_ptr() == tensors["embedding"].data_ptr()


def test_views_of_one_storage_keep_their_own_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    views = {"whole": whole, "row": whole[1], "column": whole[:, 2], "turned": whole.T, "tail": whole[1:]}
    save_safetensors(views, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), {n: t.clone() for n, t in views.items()})


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors({"a": torch.ones(2)}, path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_safetensors({"a": torch.zeros(2)}, path)
    assert same(read_weights(path), {"a": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    save_safetensors(TENSORS, tmp_path / "w.safetensors")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


# Loading


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.extra = nn.Linear(3, 2)


def test_loading_accounts_for_every_name() -> None:
    module = Tied()
    tensors = {
        "embedding.weight": torch.ones(5, 3),
        "extra.weight": torch.zeros(4, 3),
        "old.weight": torch.ones(1),
    }
    report = load_into(
        module,
        tensors,
        source="w.pth",
        allow_missing=["extra.*"],
        allow_unexpected=["old.*", "extra.weight"],
    )
    assert report.loaded == ["embedding.weight"]
    assert report.missing == ["extra.weight", "extra.bias"]  # head.weight is embedding.weight
    assert report.unexpected == ["old.weight", "extra.weight"]
    assert report.misfits == {"extra.weight": ((4, 3), (2, 3))}
    assert report.text() == (
        "1 tensors loaded from w.pth, 1 missing (extra.bias), 1 unexpected (old.weight),"
        " 1 of another shape (extra.weight is (4, 3), needed (2, 3))"
    )
    assert torch.equal(module.head.weight, torch.ones(5, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra.bias": None}, "1 missing (extra.bias)"),
        ({"more": torch.ones(1)}, "1 unexpected (more)"),
        ({"extra.bias": torch.ones(3)}, "1 of another shape (extra.bias is (3,), needed (2,))"),
    ],
)
def test_nothing_is_missing_left_over_or_misshapen_unless_allowed(
    change: dict[str, Tensor | None], words: str
) -> None:
    module = Tied()
    tensors = {n: t for n, t in {**module.state_dict(), **change}.items() if t is not None}
    with pytest.raises(CheckpointError) as error:
        load_into(module, tensors, source="w.pth")
    assert words in str(error.value)
    allowed = list(change)
    report = load_into(module, tensors, allow_missing=allowed, allow_unexpected=allowed)
    assert {*report.missing, *report.unexpected} == set(change)


def test_a_cast_that_rounds_and_values_that_are_no_numbers_are_reported() -> None:
    module = Tied().half()
    given = {name: tensor.float() for name, tensor in module.state_dict().items()}
    given["extra.weight"][1, 0] = float("nan")
    given["extra.bias"] = torch.full((2,), float("inf")).half()
    report = load_into(module, given)
    assert report.rounded == dict.fromkeys(
        ["embedding.weight", "head.weight", "extra.weight"], ("float32", "float16")
    )
    assert report.nan == ["extra.weight"]
    assert "3 rounded from float32 to float16 (embedding.weight, head.weight, extra.weight)" in report.text()
    assert "1 with values that are no numbers (extra.weight)" in report.text()
    back = load_into(Tied(), {name: tensor.half() for name, tensor in Tied().state_dict().items()})
    assert (back.rounded, back.nan) == ({}, [])


def test_position_embeddings_that_the_module_adapts_are_reported_as_reshaped() -> None:
    module = nn.Module()
    module.pos_embed = nn.Parameter(torch.zeros(1, 1 + 16, 8))
    resize_on_load(module, (4, 4), 1, align_corners=False)
    report = load_into(module, {"pos_embed": torch.ones(1, 1 + 4, 8)})
    assert report.reshaped == ["pos_embed"]
    assert "1 reshaped (pos_embed)" in report.text()
    torch.testing.assert_close(module.pos_embed.detach(), torch.ones(1, 17, 8))


def test_names_of_one_tensor_get_one_each_where_the_weights_differ() -> None:
    def made() -> nn.Module:
        module = nn.ModuleDict({"words": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        module["head"].weight = module["words"].weight
        return module

    same, other = torch.ones(3, 2), torch.zeros(3, 2)
    module = made()
    untie(module, {"words.weight": same, "head.weight": same.clone()})
    assert module["head"].weight is module["words"].weight
    untie(module, {"words.weight": same})
    assert module["head"].weight is module["words"].weight
    tensors = {"words.weight": same, "head.weight": other}
    load_into(module, tensors)
    assert torch.equal(module["words"].weight, same)
    assert torch.equal(module["head"].weight, other)
