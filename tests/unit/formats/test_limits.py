"""Folders whose configuration was made to do harm: refused before anything large is built."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blip
from blip.convert import convert
from blip.convert import main as convert_main
from blip.errors import EXIT_USAGE, BlipError, CheckpointError, ConfigError, UsageError
from blip.formats.limits import check_size, sketch
from blip.models.llm import build_llm
from blip.models.llm_config import LLMConfig
from blip.models.llm_tokenizer import LlmTokenizer
from blip.models.tokenizer import WordPieces
from blip.stored.values import MOST_VALUES, check_values
from tests.unit.stored.test_hostile import as_archive
from tests.unit.test_convert import small


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small model as ours and as transformers' folder."""
    place = tmp_path_factory.mktemp("folders")
    ours = small("blip_caption").save_pretrained(place / "ours")
    convert(ours, place / "hf", "hf")
    return {"ours": ours, "hf": place / "hf"}


def changed(folder: Path, place: Path, change: dict[str, Any]) -> Path:
    """A copy of the folder whose `config.json` has other values at dotted keys."""
    place.mkdir()
    for file in folder.iterdir():
        os.link(file, place / file.name)
    tree = json.loads((folder / "config.json").read_text())
    for dotted, value in change.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(tree))
    return place


def refusal(folder: Path) -> str:
    with pytest.raises(BlipError) as caught:
        blip.from_pretrained(folder)
    text = str(caught.value)
    assert folder.name in text or "model." in text
    assert len(text) < 3000
    return text


@pytest.mark.parametrize(
    ("layout", "change", "reason"),
    [
        ("ours", {"config.vit.depth": 10**9}, "depth is beyond 1000"),
        ("ours", {"config.image_size": 10**30}, "image_size is beyond"),
        ("ours", {"config.image_size": 10**400}, "image_size is beyond"),
        ("ours", {"config.image_size": 1e308}, "image_size is beyond"),
        ("ours", {"config.dropout": math.nan}, "dropout is nan"),
        ("ours", {"config.image_size": 80_000}, "a model with"),
        ("ours", {"config.vit.width": 10**6}, "a model with"),
        ("ours", {"config.vocab_size": 2**31 - 1}, "a model with"),
        ("ours", {"config.med.num_heads": 3}, "num_heads"),
        ("ours", {"config.arch": 1}, "arch is no name but 1"),
        ("ours", {"config.arch": ["blip_caption"]}, "arch is no name"),
        ("ours", {"config.model_type": {}}, "model_type is no name"),
        ("ours", {"config.arch": "a" * 100_000}, "text of more than 2000 letters"),
        ("ours", {"config.tokenizer": "a\x1b" * 300}, "tokenizer"),
        ("ours", {"config": []}, "no section 'config'"),
        ("hf", {"architectures": "BlipForConditionalGeneration"}, "architectures is no list"),
        ("hf", {"architectures": ["x" * 1900]}, "has no counterpart here"),
        ("hf", {"num_labels": 10**9}, "num_labels is beyond 100000"),
        ("hf", {"text_config.num_hidden_layers": 10**9}, "num_hidden_layers is beyond 1000"),
        ("hf", {"text_config": [1]}, "config.json does not say text_config."),
        ("hf", {"vision_config": 5}, "config.json is none of a Blip"),
        ("hf", {"text_config.hidden_size": {}}, "hidden_size"),
        ("hf", {"text_config.vocab_size": 2**31 - 1}, "a model with"),
        ("hf", {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "is none of a Blip"),
    ],
)
def test_values_that_no_model_has_are_refused(
    folders: dict[str, Path], tmp_path: Path, layout: str, change: dict[str, Any], reason: str
) -> None:
    place = changed(folders[layout], tmp_path / "given", change)
    (place / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    assert reason in refusal(place)
    assert not (tmp_path / "touched").exists()
    assert convert_main([str(place), str(tmp_path / "out"), "--to", "blip"]) == EXIT_USAGE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe{}", "is no model configuration"),
        (b'{"a":' * 100_000, "is no model configuration"),
        (b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}", "deeper ones"),
        (b'{"a": [' + b"1, " * MOST_VALUES + b"1]}", "has more values"),
    ],
)
def test_a_configuration_that_is_none(
    folders: dict[str, Path], tmp_path: Path, content: bytes, reason: str
) -> None:
    place = changed(folders["ours"], tmp_path / "given", {})
    (place / "config.json").write_bytes(content)
    assert reason in refusal(place)


def test_a_configuration_larger_than_any_is_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    place = changed(folders["ours"], tmp_path / "given", {})
    os.truncate(place / "config.json", 10**12)  # of holes, which take no disk
    assert "1000000000000 bytes" in refusal(place)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "vocab.txt", "tokenizer", "llm_tokenizer/x.json"]
)
def test_links_beside_weights_do_not_lead_out(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    place = changed(folders["ours"], tmp_path / "given", {})
    secret = tmp_path / "secret"
    secret.mkdir() if name == "tokenizer" else secret.write_text("{}")
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(secret)
    assert "a link that leads out of its folder" in refusal(place)


def test_a_run_whose_recipe_is_hostile(folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    place = changed(folders["ours"], run / "model", {})
    (place / "config.json").unlink()
    for text, reason in (
        ("model: {arch: blip_caption, vit: {depth: 100000000}}", "depth is beyond 1000"),
        ("model: {arch: [blip_caption]}", "arch is no name"),
        ("model: " + "[" * 5000, "sections in sections"),
        ("x" * 2_000_000, "2000000 bytes"),
    ):
        (run / "config.yaml").write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match=reason):
            blip.from_pretrained(run)


def test_a_language_model_s_folder_is_looked_at_before_transformers_reads_it(tmp_path: Path) -> None:
    small("blip2_llm").llm.model.save_pretrained(tmp_path)
    sizes = (tmp_path / "config.json").read_text()
    (tmp_path / "model.safetensors").unlink()
    bomb = b"\x80\x02}(K\x01" + b"\x85" * 1_000_000 + b"K\x01u."  # torch crashes at it
    as_archive(tmp_path / "pytorch_model.bin", bomb, {})
    llm = build_llm(str(tmp_path), LLMConfig(tokenizer="scenes"))
    with pytest.raises(CheckpointError, match=r"no weights could be read from .*tuples in tuples"):
        llm.load_initial()
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(sizes), "num_labels": 10**9}))
    with pytest.raises(CheckpointError, match="num_labels is beyond"):
        build_llm(str(tmp_path), LLMConfig())
    with pytest.raises(UsageError, match="num_labels is beyond"):
        blip.load_model("blip2_llm", pretrained=False, llm={"sizes": str(tmp_path)})


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/w.pth", "https://here/" + "x" * 5000])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        blip.from_pretrained(name)
    assert convert_main([name, str(tmp_path / "out"), "--to", "blip"]) == EXIT_USAGE
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: File name too long"):
        convert(folders["ours"], tmp_path / ("x" * 300), "hf")


# Parts


def test_usual_values_pass() -> None:
    check_values(
        {"a": [1, 2.5, None, True, "x", -(2**31)], "num_labels": 21_843, "id2label": {"1": "x"}}, "it"
    )
    tree: dict[str, Any] = {}
    tree["a"] = tree  # as an alias of YAML
    with pytest.raises(CheckpointError, match="it has more values"):
        check_values(tree, "it")


def test_a_model_is_measured_by_its_weights() -> None:
    large = sketch(lambda: nn.Linear(100_000, 100_000), "it")
    with pytest.raises(CheckpointError, match="a model with 10000100000 numbers, but it has 1;"):
        check_size(large, {"weight": torch.ones(1)}, [], "it")
    check_size(large, {"weight": torch.ones(1).expand(2_500_000_000)}, [], "it")


def test_parts_that_lie_elsewhere_must_fit_into_the_machine() -> None:
    part = nn.ModuleDict({"vision": sketch(lambda: nn.Linear(10**7, 10**7), "it")})
    with pytest.raises(CheckpointError, match="a model of 400000 GB, but this machine has"):
        check_size(part, {}, ["vision."], "it")


def test_whatever_a_module_raises_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"it: no model can be built of its configuration"):
        sketch(lambda: nn.Linear(-1, 2), "it")
    with pytest.raises(ConfigError, match="mine"):
        sketch(lambda: _raise(ConfigError("mine")), "it")


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("read", [WordPieces, lambda place: LlmTokenizer.load(place, "causal")])
@pytest.mark.parametrize("change", ["{", '{"version": 1}', "unknown"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, read: Callable[[str], Any], change: str) -> None:
    LlmTokenizer.load("scenes", "causal").save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["model"]["unk_token"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree) if change == "unknown" else change)
    with pytest.raises(ConfigError, match="tokenizer"):
        read(str(tmp_path))
