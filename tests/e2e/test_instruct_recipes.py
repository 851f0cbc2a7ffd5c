"""Instruction tuning by the tiny recipe, and what the claim about it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip.models.llm import LLMConfig, build_llm
from blip.weights import read_weights
from tests.e2e.runs import Commands, lines, train_lines
from tests.reference.small_stage2 import LLMS

HELD_IN = ("scenes", "scenes_vqa", "detail", "locate", "refer", "compare")
HELD_OUT = ("held_out_kinds", "held_out_data")
SMALL = [
    "model.image_size=32",
    "model.vit={patch_size: 8, width: 32, depth: 2, heads: 2, mlp_dim: 64, stem_width: 0}",
    "model.num_query_token=2",
    "run.warmup_steps=1",
    "run.log_freq=1",
]
QFORMER = "width: 32, depth: 2, num_heads: 2, mlp_dim: 64, max_positions: 48"


def sized(names: tuple[str, ...], stages: tuple[str, ...] = ("train", "eval")) -> list[str]:
    return [f"datasets.{name}.vis_processor.{stage}.image_size=32" for name in names for stage in stages]


@pytest.fixture(scope="module")
def stage1(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 1; beside it a small language model below the data root."""
    torch.manual_seed(1)
    llm = build_llm(None, LLMConfig(sizes=LLMS["opt"], tokenizer="scenes"))
    llm.model.save_pretrained(data_root / "llm" / "small")
    llm.tokenizer._tokenizer.save_pretrained(data_root / "llm" / "small")
    folder = tmp_path_factory.mktemp("stage1") / "run"
    more = [f"model.qformer={{{QFORMER}, init_from: null}}", "model.vit_train_steps=1", "run.max_iters=2"]
    more += ["run.batch_size_train=8", "run.test_splits=[]"]
    more += [f"run.data_root={data_root}", f"run.output_dir={folder}", *sized(("scenes",))]
    ended = commands("--cfg", "tiny/pretrain_stage1.yaml", *SMALL, *more)
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def stage2(commands: Commands, data_root: Path, stage1: Path) -> Path:
    """A run of stage 2 whose Q-Former keeps its text side."""
    folder = stage1.parent / "stage2"
    more = [f"model.qformer={{{QFORMER}}}", "model.qformer_text_input=true", "model.max_txt_len=40"]
    more += [
        f"model.init_from={stage1}",
        "model.llm_model=llm/small",
        "run.max_iters=1",
        "run.test_splits=[]",
    ]
    more += [f"run.data_root={data_root}", f"run.output_dir={folder}", *sized(("scenes",))]
    ended = commands("--cfg", "tiny/pretrain_stage2.yaml", *SMALL, *more)
    assert ended.code == 0, ended.output
    return folder


def tuned(commands: Commands, start: Path, root: Path, folder: Path, *more: str) -> Path:
    """A run of the recipe made small."""
    small = [f"model.qformer={{{QFORMER}}}", "model.llm_model=llm/small", "run.max_len=4", "run.max_iters=3"]
    small += ["run.batch_size_train=2", *sized(HELD_IN + HELD_OUT), f"model.init_from={start}"]
    place = [f"run.data_root={root}", f"run.output_dir={folder}"]
    ended = commands("--cfg", "tiny/instruct.yaml", *SMALL, *small, *place, *more)
    assert ended.code == 0, ended.output
    return folder


def test_what_is_held_in_is_trained_and_what_is_held_out_is_scored(
    commands: Commands, stage2: Path, data_root: Path, tmp_path: Path
) -> None:
    folder = tuned(commands, stage2, data_root, tmp_path / "run")
    assert len(train_lines(folder)) == 3
    scores = lines(folder)[-1]
    assert scores["split"] == "test"
    wanted = {f"held_out_kinds/type_{kind}" for kind in ("choice", "count", "verify")}
    wanted |= {f"{name}/acc" for name in HELD_OUT}
    assert wanted <= scores.keys()
    assert "held_out_data/type_vqa" in scores
    assert not any("scenes" in key for key in scores)
    assert any(name.startswith("qformer.") and "text" in name for name in read_weights(folder))


def test_the_other_arms_are_overrides(
    commands: Commands, stage2: Path, data_root: Path, tmp_path: Path
) -> None:
    """A Q-Former that reads nothing, other sampling, pictures' features in place of pictures."""
    stored = tmp_path / "features"
    ended = commands(
        *("--cfg", "tiny/pretrain_stage2.yaml", *SMALL, f"model.qformer={{{QFORMER}}}"),
        *(f"model.init_from={stage2}", "model.llm_model=llm/small", *sized(("scenes",))),
        *(f"run.data_root={data_root}", f"run.output_dir={stored}"),
        module="blip.cache_features",
    )
    assert ended.code == 0, ended.output
    seen = [f"datasets.{name}.features={stored}/scenes" for name in HELD_IN]
    blind = ["model.qformer_text_input=false", "run.sampling=uniform", "run.test_splits=[]"]
    runs = [
        tuned(commands, stage2, data_root, tmp_path / name, *blind, *more)
        for name, more in (("pictures", []), ("features", seen))
    ]
    assert train_lines(runs[0]) == train_lines(runs[1])
    assert not any(name.startswith("qformer.") and "text" in name for name in read_weights(runs[0]))
