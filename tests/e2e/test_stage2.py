"""BLIP-2's stage 2 through the commands: from a run of stage 1, beside a frozen language model, resumed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import blip
from blip.models.llm import LLMConfig, build_llm
from blip.weights import read_weights
from tests.e2e.runs import (
    EYES,
    MODEL,
    RUN,
    Commands,
    Ended,
    contents,
    differences,
    lines,
    train_lines,
    write_recipe,
)
from tests.reference.small_stage2 import LLMS

KINDS = ["opt", "t5"]
STAGE1_ONLY = ("embed_dim", "vit_train_steps")
STAGE2 = {
    **{key: value for key, value in MODEL.items() if key not in STAGE1_ONLY},
    "arch": "blip2_llm",
    "model_type": "base",
    "max_txt_len": 60,
    "dropout": 0.1,
}
CAPTIONING = {
    "task": "captioning",
    "max_iters": 8,
    "eval_freq": 4,
    "num_beams": 2,
    "max_len": 8,
    "min_len": 1,
    "java_metrics": [],
    "batch_size_train": 12,
    "drop_last": False,
}
Start = Callable[..., Ended]


@pytest.fixture(scope="module")
def stage1(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 1."""
    place = tmp_path_factory.mktemp("stage1")
    run = {"max_iters": 4, "valid_splits": [], "test_splits": []}
    recipe = write_recipe(place / "recipe.yaml", data_root, "json", run=run)
    ended = commands("--cfg", recipe, f"run.output_dir={place / 'run'}")
    assert ended.code == 0, ended.output
    return place / "run"


@pytest.fixture(scope="module")
def start(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts, or goes on with, a run: `start(kind, folder, "key=value", ..., model={...}, run={...})`."""
    place, count = tmp_path_factory.mktemp("recipes"), iter(range(1000))
    for kind in KINDS:  # below the data root, where recipes find them
        torch.manual_seed(1)
        llm = build_llm(None, LLMConfig(sizes=LLMS[kind], tokenizer="scenes"))
        llm.model.save_pretrained(data_root / "llm" / kind)
        llm.tokenizer._tokenizer.save_pretrained(data_root / "llm" / kind)

    def begin(
        kind: str,
        folder: Path,
        *more: str,
        model: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        datasets: dict[str, Any] | None = None,
        **how: Any,
    ) -> Ended:
        path = place / f"{next(count)}.yaml"
        sections = {
            "model": {**STAGE2, "llm_model": f"llm/{kind}", **(model or {})},
            "datasets": datasets or {"scenes": EYES},
            "run": {
                **{key: value for key, value in RUN.items() if key not in ("k_test", "eval_max_txt_len")},
                **CAPTIONING,
                "data_root": str(data_root),
                **(run or {}),
            },
        }
        sections["run"] = {key: value for key, value in sections["run"].items() if value is not None}
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return commands("--cfg", path, f"run.output_dir={folder}", *more, **how)

    return begin


@pytest.fixture(scope="module")
def straight(
    start: Start, stage1: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, str]]:
    """Folder and output of an uninterrupted run, done once for each kind."""
    place, done = tmp_path_factory.mktemp("straight"), {}

    def run(kind: str) -> tuple[Path, str]:
        if kind not in done:
            dumps = place / f"{kind}-dumps"
            dumps.mkdir()
            folder = place / kind
            ended = start(kind, folder, f"model.init_from={stage1}", traps=[["dump_weights", str(dumps)]])
            assert ended.code == 0, ended.output
            done[kind] = folder, ended.output
        return done[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_stage_2_starts_from_a_run_of_stage_1_and_tells_what_became_of_its_weights(
    kind: str, straight: Callable[[str], tuple[Path, str]], stage1: Path
) -> None:
    _, output = straight(kind)
    assert f"tensors from llm/{kind}; frozen" in output
    assert f"tensors loaded from '{stage1}'" in output
    [left_out] = [line for line in output.splitlines() if "stage 1's own; a language model" in line]
    assert all(part in left_out for part in ("lm_head.* (5)", "itm_head.* (2)", "vision_proj.* (2)", "temp"))
    [no_text] = [line for line in output.splitlines() if "this Q-Former reads no text" in line]
    assert "qformer.* (" in no_text
    assert "has no llm_proj.* (2), which keep the values they start with" in output


@pytest.mark.parametrize("kind", KINDS)
def test_tower_and_language_model_are_bit_identical_after_training(
    kind: str, straight: Callable[[str], tuple[Path, str]], stage1: Path, data_root: Path
) -> None:
    folder, _ = straight(kind)
    dumps = folder.parent / f"{kind}-dumps"
    first, last = (torch.load(dumps / f"step-{step}.pt") for step in (1, 8))
    given = read_weights(stage1)
    file = read_weights(data_root / "llm" / kind / "model.safetensors")
    assert {f"llm.model.{name}" for name in file} <= set(last)
    for name, value in last.items():
        if name.startswith("llm.model."):
            known = name.removeprefix("llm.model.")
            assert known not in file or torch.equal(value, file[known]), name
        if name.startswith("vision."):
            assert torch.equal(value, given[name]), name
        frozen = name.startswith(("llm.model.", "vision."))
        assert torch.equal(value, first[name]) == frozen, name
    saved = read_weights(folder)
    assert not [name for name in saved if name.startswith("llm.model.")]
    assert "llm_proj.weight" in saved
    state = json.loads(((folder / "checkpoints" / "last").resolve() / "state.json").read_text())
    assert state["frozen"]["llm.model."]["source"] == f"llm/{kind}"


@pytest.mark.multi
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_and_killed_is_the_uninterrupted_one(
    kind: str, start: Start, straight: Callable[[str], tuple[Path, str]], stage1: Path, tmp_path: Path
) -> None:
    """Weights, optimizer, random parts of captions, figures and captions, bit by bit."""
    again: list[str] = [f"model.init_from={stage1}", "run.resume=auto"]
    stop = ["signal_at", "torch.optim.AdamW.step", 3, "after", signal.SIGTERM.value]
    assert start(kind, tmp_path / "run", *again, traps=[stop]).code == 3
    kill = ["die_at", "torch.optim.AdamW.step", 4, "after"]
    ended = start(kind, tmp_path / "run", *again, traps=[kill])
    assert "continuing after step 3" in ended.output
    ended = start(kind, tmp_path / "run", *again)
    assert ended.code == 0, ended.output
    assert "continuing after step 6" in ended.output
    found, wanted = contents(tmp_path / "run"), contents(straight(kind)[0])
    assert differences(found, wanted) == []
    assert any(name.startswith("predictions/test") for name in found)


@pytest.mark.multi
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(kind: str, start: Start, stage1: Path, tmp_path: Path) -> None:
    """Also where an epoch ends with a small batch, and captions have different lengths."""
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        run = {"batch_size_train": 24 // world, "valid_splits": [], "test_splits": []}
        more = [f"model.init_from={stage1}", "model.dropout=0", "datasets.scenes.max_samples=125"]
        ended = start(kind, folder, *more, run=run, world=world)
        assert ended.code == 0, ended.output
        found.append(train_lines(folder))
    one, two = found
    names = ("loss", "loss_lm", "grad_norm")
    assert len(one) == 8
    for mine, its in zip(two, one, strict=True):
        assert {n: mine[n] for n in names} == pytest.approx({n: its[n] for n in names}, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_leaves_is_evaluated_and_loaded(
    kind: str,
    start: Start,
    straight: Callable[[str], tuple[Path, str]],
    data_root: Path,
    tmp_path: Path,
) -> None:
    trained, _ = straight(kind)
    ended = start(kind, tmp_path / "scored", f"model.init_from={trained}", module="blip.evaluate")
    assert ended.code == 0, ended.output
    [again] = lines(tmp_path / "scored")
    [first] = [line for line in lines(trained) if line["split"] == "test"]
    assert {**again, "step": 0} == {**first, "step": 0}
    model = blip.from_pretrained(trained)
    file = read_weights(data_root / "llm" / kind / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[f"llm.model.{name}"], value) for name, value in file.items())


def test_answers_to_questions_are_generated_and_ranked(
    start: Start, straight: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    """Zero-shot, with the prompt of the paper."""
    trained, _ = straight("t5")
    ask = {
        "task": "vqa",
        "prompt": "question: {} short answer:",
        "max_len": 4,
        "inference_method": "generate",
    }
    for method in ("generate", "rank"):
        folder = tmp_path / method
        run = {**ask, "inference_method": method, "java_metrics": None}
        data = {"scenes_vqa": EYES}
        ended = start(
            "t5", folder, f"model.init_from={trained}", run=run, datasets=data, module="blip.evaluate"
        )
        assert ended.code == 0, ended.output
        [line] = lines(folder)
        assert 0 <= line["overall"] <= 100


def test_lavis_s_task_of_pre_training_needs_no_evaluation(start: Start, stage1: Path, tmp_path: Path) -> None:
    run = {"task": "image_text_pretrain", "valid_splits": [], "test_splits": [], "max_iters": 1}
    for key in ("num_beams", "max_len", "min_len", "java_metrics"):
        run[key] = None
    ended = start("opt", tmp_path / "run", f"model.init_from={stage1}", run=run)
    assert ended.code == 0, ended.output
    run |= {"test_splits": ["test"]}
    assert "needs a model with retrieval_images" in start("opt", tmp_path / "no", run=run).refusal()


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_tuning_starts_from_stage_2(
    kind: str, start: Start, straight: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    """Its Q-Former has a text side, which stage 2 has not."""
    trained, _ = straight(kind)
    model = {"arch": "blip2_llm_instruct", "max_txt_len": 40, "max_output_txt_len": 20}
    run = {"task": "instruct_tuning", "java_metrics": None, "max_iters": 2, "valid_splits": []}
    more = [f"model.init_from={trained}"]
    data = {"scenes_instruct": {"vis_processor": EYES["vis_processor"]}}
    ended = start(kind, tmp_path / "run", *more, model=model, run=run, datasets=data)
    assert ended.code == 0, ended.output
    assert "has no qformer.* (" in ended.output
    [scores] = [line for line in lines(tmp_path / "run") if line["split"] == "test"]
    assert 0 <= scores["acc"] <= 100
    assert len(train_lines(tmp_path / "run")) == 2


def test_a_dry_run_shows_sizes_and_one_step(start: Start, stage1: Path, tmp_path: Path) -> None:
    ended = start("opt", tmp_path / "run", f"model.init_from={stage1}", "--dry-run")
    assert ended.code == 0, ended.output
    assert "loss_lm" in ended.output
    assert "llm " in ended.output
    assert not (tmp_path / "run").exists()
