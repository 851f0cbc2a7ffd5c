"""`blip convert`: every layout into every other and back, to the bit, and what it refuses."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import blip
from blip.convert import convert, main
from blip.errors import CheckpointError, UsageError
from blip.formats import hf, lavis
from blip.models.vision import VisionConfig
from blip.weights import INDEX_ENDING, WEIGHTS_FILE, read_weights
from tests.reference.small_blip import small_blip
from tests.reference.small_stage2 import small_stage2

BLIP_KINDS = {
    "blip_pretrain": "pretrain",
    "blip_retrieval": "retrieval",
    "blip_caption": "caption",
    "blip_vqa": "vqa",
    "blip_nlvr": "nlvr",
    "blip_classification": "classification",
    "blip_feature_extractor": "features",
    "blip_image_text_matching": "matching",
}
EVA = {"vit_model": "eva_clip_g"}
LLMS = {
    "blip2_opt": "opt",
    "blip2_t5": "t5",
    "blip2_t5_instruct": "t5",
    "blip2_vicuna_instruct": "llama",
    "blip2_llm": "llama",
    "blip2_llm_instruct": "opt",
}
STAGE1_SIZES: dict[str, Any] = {
    **EVA,
    "vit_precision": "fp32",
    "image_size": 16,
    "vit": {"patch_size": 8, "width": 12, "depth": 2, "heads": 2, "mlp_dim": 20},
    "num_query_token": 3,
    "qformer": {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24, "max_positions": 40},
    "embed_dim": 8,
    "tokenizer": "scenes",
}
STAGE1 = ("blip2", "blip2_feature_extractor", "blip2_image_text_matching")


def small(arch: str) -> Any:
    """A small model in float32, whose configuration says what it is."""
    if arch in BLIP_KINDS:
        more: dict[str, Any] = {"tokenizer": "scenes", "vocab_size": None}
        if arch == "blip_vqa":  # transformers' has a tower as wide as its text transformer
            more["vit"] = VisionConfig(
                vit_model="vit_base", patch_size=8, width=16, depth=2, heads=2, mlp_dim=20
            )
        model = small_blip(BLIP_KINDS[arch], **more)
    elif arch in STAGE1:
        model = blip.load_model(arch, pretrained=False, **STAGE1_SIZES)
    else:
        model = small_stage2(LLMS[arch], arch, **EVA)
    model.config.arch = arch
    return model.float().eval()


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model of stage 1."""
    return small("blip2_image_text_matching").save_pretrained(tmp_path_factory.mktemp("stage1") / "ours")


@pytest.mark.parametrize("layout", ["lavis", "hf"])
@pytest.mark.parametrize("arch", [*BLIP_KINDS, *STAGE1, *LLMS])
def test_there_and_back_is_the_same_to_the_bit(arch: str, layout: str, tmp_path: Path) -> None:
    tables = (lavis if layout == "lavis" else hf).TABLES
    model = small(arch)
    ours = model.save_pretrained(tmp_path / "ours")
    there = tmp_path / ("there.pth" if layout == "lavis" else "there")
    if arch not in tables:
        with pytest.raises((CheckpointError, UsageError), match=arch):
            convert(ours, there, layout)
        return
    done = convert(ours, there, layout)
    assert done.arch == arch
    config = {k: v for k, v in asdict(model.config).items() if k not in ("arch", "model_type")}
    back = convert(there, tmp_path / "back", "blip", arch=arch, **(config if layout == "lavis" else {}))
    assert back.files == [tmp_path / "back" / WEIGHTS_FILE]
    absent = {key for line in done.lines if not line.target for key in line.source}
    before, after = model.state_dict(), blip.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    for name in before.keys() - absent:
        assert torch.equal(after[name], before[name]), name


def test_shards_are_what_one_file_is(stage1: Path, tmp_path: Path) -> None:
    whole = convert(stage1, tmp_path / "whole", "hf")
    parts = convert(stage1, tmp_path / "parts", "hf", shard_bytes=3000)
    assert len(parts.files) > 3
    assert len(whole.files) == 1
    assert (tmp_path / "parts" / (WEIGHTS_FILE + INDEX_ENDING)).is_file()
    for file in parts.files:
        with safe_open(file, "pt") as shard:
            names = list(shard.keys())
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= 3000 or len(names) == 1
    one, several = read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts")
    assert one.keys() == several.keys()
    assert all(torch.equal(tensor, several[name]) for name, tensor in one.items())
    assert not list((tmp_path / "parts").glob(".partial*"))


def test_transformers_reads_the_folder(stage1: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    convert(stage1, tmp_path / "hf", "hf")
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", local_files_only=True)
    expected = blip.to_hf(blip.from_pretrained(stage1)).state_dict()
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    pieces = blip.from_pretrained(stage1).word_pieces(["a red circle"])["text_ids"]
    assert processor.tokenizer(["a red circle"])["input_ids"] == pieces.tolist()


def test_by_command(stage1: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip.convert", str(stage1), str(tmp_path / "x.pth"), "--to", "lavis"]
    done = subprocess.run([*command, "--keys"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "temp -> temp (renamed)" in done.stdout
    assert f"wrote {tmp_path / 'x.pth'}" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("to", "out", "told"),
    [
        ("lavis", "folder", "ends in .pth"),
        ("hf", "model.safetensors", "give a folder"),
        ("onnx", "x", "choose from blip, lavis, hf"),
    ],
)
def test_a_target_that_makes_no_sense(to: Any, out: str, told: str, stage1: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        convert(stage1, tmp_path / out, to)


def test_what_an_argument_says_is_no_override(
    stage1: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would meet the argument of the same name, and end in a traceback."""
    log = logging.getLogger("blip")  # a command sets it up for a process of its own
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    assert main([str(stage1), "x.pth", "--to", "lavis", "model.arch=blip2"]) == 2
    assert "'arch' is no key to override here" in capsys.readouterr().err


def test_a_key_that_nobody_knows_is_named(stage1: Path, tmp_path: Path) -> None:
    convert(stage1, tmp_path / "x.pth", "lavis")
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    state["Qformer.bert.pooler.dense.weight"] = torch.zeros(2, 2)
    torch.save({"model": state}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"Qformer\.bert\.pooler\.dense\.weight"):
        convert(tmp_path / "y.pth", tmp_path / "z", "blip", **STAGE1_SIZES)
    assert not (tmp_path / "z").exists()


def test_a_part_that_is_referred_to_and_copied(tmp_path: Path) -> None:
    """A language model that lies elsewhere is named in the configuration, or copied when asked for."""
    first = small("blip2_llm")
    llm = tmp_path / "llm"
    first.llm.model.save_pretrained(llm)
    first.llm.tokenizer.save_pretrained(llm)
    config = {k: v for k, v in asdict(first.config).items() if k not in ("arch", "model_type", "llm")}
    config |= {"llm_model": str(llm), "pretrained": False}
    model = blip.load_model("blip2_llm", **config)
    ours = model.eval().save_pretrained(tmp_path / "ours")
    done = convert(ours, tmp_path / "x.pth", "lavis")
    assert any("llm.model is referred to" in note for note in done.notes)
    convert(ours, tmp_path / "y.pth", "lavis", frozen="copy")
    given, more = (read_weights(tmp_path / name) for name in ("x.pth", "y.pth"))
    added = {name for name in more if name not in given}
    assert added == {f"llm_model.{name}" for name in model.llm.model.state_dict()}
    convert(ours, tmp_path / "hf", "hf")
    back = blip.from_pretrained(tmp_path / "hf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name][: len(tensor)] if tensor.ndim else tensor, tensor), name
