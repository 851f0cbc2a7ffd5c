"""On a GPU: losses and answers as on a CPU, half precision, continuing bit for bit, two GPUs as one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from blip.models.llm import LLMConfig, build_llm
from tests.e2e.runs import EYES, MODEL, ROOT, RUN, train_lines
from tests.reference.small_stage2 import LLMS

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = "run.device=cuda"
STEPS = 5
STEADY = "run.lr_sched=constant_lr"
"""The same rates, however long the run is to be."""

BLIP: dict[str, Any] = {
    "image_size": 32,
    "vit": MODEL["vit"],
    "med": MODEL["qformer"],  # the same sizes
    "vit_drop_path_rate": 0.0,
    "tokenizer": "scenes",
    "max_txt_len": 40,
    "dropout": 0.0,
}
PROMPTED = {"train": {"name": "blip_caption", "prompt": "a picture of "}, "eval": {"name": "blip_caption"}}
ASKED = {stage: {"name": "blip_question"} for stage in ("train", "eval")}
WRITTEN = {"task": "captioning", "num_beams": 2, "max_len": 12, "min_len": 1, "java_metrics": []}
# So that two processes contrast with what one does; LAVIS contrasts with the own rank's rows.
SHARED = {"itc_all_rank": True, "negative_all_rank": True}
PLAIN_RUN = {key: value for key, value in RUN.items() if key not in ("k_test", "eval_max_txt_len")}
"""Without the keys of retrieval."""

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "blip_pretrain": {
        "model": {
            **BLIP,
            "arch": "blip_pretrain",
            "model_type": "base",
            "vit_init_from": None,
            "embed_dim": 16,
            "queue_size": 32,
            **SHARED,
        },
        "datasets": {"scenes": EYES},
        "run": RUN,
    },
    "blip_caption": {
        "model": {**BLIP, "arch": "blip_caption", "model_type": "base_coco"},
        "datasets": {"scenes": {**EYES, "text_processor": PROMPTED}},
        "run": {**PLAIN_RUN, **WRITTEN},
    },
    "blip_vqa": {
        "model": {**BLIP, "arch": "blip_vqa", "model_type": "vqav2"},
        "datasets": {"scenes_vqa": {**EYES, "text_processor": ASKED}},
        "run": {**PLAIN_RUN, "task": "vqa", "inference_method": "rank", "num_ans_candidates": 8},
    },
    "stage1": {"model": MODEL, "datasets": {"scenes": EYES}, "run": RUN},
    "stage2": {
        "model": {
            **{key: value for key, value in MODEL.items() if key not in ("embed_dim", "vit_train_steps")},
            "arch": "blip2_llm",
            "model_type": "base",
            "max_txt_len": 40,
            "llm_model": "llm/small",
            "llm": {"precision": "fp32"},
        },
        "datasets": {"scenes": EYES},
        "run": {**PLAIN_RUN, **WRITTEN},
    },
}
SAID = {
    "blip_pretrain": "found",
    "blip_caption": "caption",
    "blip_vqa": "answer",
    "stage1": "found",
    "stage2": "caption",
}
"""What an evaluation's predictions hold that a model decided."""

Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Write:
    """Writes the recipe of a kind, without evaluations on the way."""
    place = tmp_path_factory.mktemp("recipes")
    if not (data_root / "llm" / "small").exists():
        torch.manual_seed(1)
        llm = build_llm(None, LLMConfig(sizes=LLMS["opt"], tokenizer="scenes"))
        llm.model.save_pretrained(data_root / "llm" / "small")
        llm.tokenizer._tokenizer.save_pretrained(data_root / "llm" / "small")

    def write(kind: str) -> Path:
        path, sections = place / f"{kind}.yaml", dict(KINDS[kind])
        own = {"data_root": str(data_root), "max_iters": STEPS, "valid_splits": [], "test_splits": []}
        sections["run"] = {**sections["run"], **own}
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    return write


def run(recipe: Path, output: Path, *overrides: str, module: str = "blip.train", world: int = 1) -> None:
    """A command in a process of its own, or in several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, *(torchrun if world > 1 else []), "-m", module, "--cfg", str(recipe)]
    command += [f"run.output_dir={output}", *overrides]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def train(recipe: Path, output: Path, *overrides: str, world: int = 1) -> list[dict[str, Any]]:
    """Train; returns the lines of training."""
    run(recipe, output, *overrides, world=world)
    return train_lines(output)


def losses(lines: list[dict[str, Any]]) -> torch.Tensor:
    """(steps, losses): the whole and its parts."""
    names = sorted(name for name in lines[0] if name.startswith("loss"))
    assert len(names) > 1
    return torch.tensor([[line[name] for name in names] for line in lines])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_a_cpu_does(kind: str, recipe: Write, tmp_path: Path) -> None:
    path, full = recipe(kind), "run.precision=fp32"
    cpu = train(path, tmp_path / "cpu", "run.device=cpu", full)
    gpu = train(path, tmp_path / "gpu", ON_GPU, full, "run.deterministic=true")
    assert len(gpu) == STEPS
    torch.testing.assert_close(losses(gpu), losses(cpu), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_follows_float32(kind: str, recipe: Write, tmp_path: Path) -> None:
    """Where the first steps of fp16 are skipped, not being finite, the losses stay those of the start."""
    path = recipe(kind)
    full = train(path, tmp_path / "fp32", ON_GPU, "run.precision=fp32")
    for precision in ("bf16", "fp16"):
        half = train(path, tmp_path / precision, ON_GPU, f"run.precision={precision}")
        assert len(half) == STEPS
        assert losses(half).isfinite().all()
        torch.testing.assert_close(losses(half)[:2], losses(full)[:2], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("blip_pretrain", "fp16"),
        ("blip_caption", "bf16"),
        ("blip_vqa", "fp16"),
        ("stage1", "fp32"),
        ("stage1", "fp16"),
        ("stage2", "bf16"),
    ],
)
def test_a_deterministic_run_goes_on_bit_for_bit(
    kind: str, precision: str, recipe: Write, tmp_path: Path
) -> None:
    """With dropout, twin, queue and, in fp16, the scale of the loss."""
    path, more = recipe(kind), [ON_GPU, STEADY, "run.deterministic=true", "model.dropout=0.1"]
    more.append(f"run.precision={precision}")
    whole = train(path, tmp_path / "whole", *more, "run.max_iters=8")
    train(path, tmp_path / "parts", *more, "run.max_iters=4")
    resumed = train(path, tmp_path / "parts", *more, "run.max_iters=8", "run.resume=auto")
    assert len(whole) == 8
    assert resumed == whole


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_on_a_gpu_says_what_one_on_a_cpu_does(kind: str, recipe: Write, tmp_path: Path) -> None:
    """Retrieval re-ranks, captions follow beams, answers are ranked. What is as likely may change places."""
    path = recipe(kind)
    train(path, tmp_path / "trained", "run.device=cpu", "run.precision=fp32", "run.max_iters=12")
    said = {}
    for device in ("cpu", "cuda"):
        given = ["run.device=cpu"] if device == "cpu" else [ON_GPU, "run.deterministic=true"]
        weights = [f"model.init_from={tmp_path / 'trained'}", "run.test_splits=[test]", "run.precision=fp32"]
        run(path, tmp_path / device, *given, *weights, module="blip.evaluate")
        [file] = (tmp_path / device / "predictions").glob("test-*.json")
        said[device] = [prediction[SAID[kind]] for prediction in json.loads(file.read_text())]
    same = [one == other for one, other in zip(said["cpu"], said["cuda"], strict=True)]
    assert len(same) >= 16
    assert sum(same) >= 0.75 * len(same)


# Several GPUs


@pytest.mark.multi
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_with_half_the_batch_take_the_steps_of_one(kind: str, recipe: Write, tmp_path: Path) -> None:
    path, more = recipe(kind), [ON_GPU, "run.precision=fp32", "run.deterministic=true"]
    one = train(path, tmp_path / "one", *more, "run.batch_size_train=16")
    two = train(path, tmp_path / "two", *more, "run.batch_size_train=8", world=2)
    assert len(two) == STEPS
    torch.testing.assert_close(losses(two), losses(one), atol=1e-3, rtol=1e-3)


@pytest.mark.multi
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", ["blip_pretrain", "stage1"])
def test_two_gpus_go_on_bit_for_bit(kind: str, recipe: Write, tmp_path: Path) -> None:
    path, more = recipe(kind), [ON_GPU, STEADY, "run.deterministic=true", "model.dropout=0.1"]
    more += ["run.precision=bf16", "run.batch_size_train=8"]
    whole = train(path, tmp_path / "whole", *more, "run.max_iters=8", world=2)
    train(path, tmp_path / "parts", *more, "run.max_iters=4", world=2)
    resumed = train(path, tmp_path / "parts", *more, "run.max_iters=8", "run.resume=auto", world=2)
    assert len(whole) == 8
    assert resumed == whole
