from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest

from blip.config import schema
from blip.config.schema import Config, DatasetConfig, ModelConfig, RunConfig
from blip.errors import ConfigError


def test_every_field_has_a_docstring_under_it() -> None:
    tree = ast.parse(inspect.getsource(schema))
    bare = []
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.dump(field.annotation):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                named = f"{cls.name}.{ast.unparse(field.target)}"
                if not documented and named not in ("Config.model", "Config.datasets", "Config.run"):
                    bare.append(named)
    assert bare == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "run.max_iters"),
        ({"max_iters": 0}, "run.max_iters"),
        ({"max_epoch": 1, "accum_grad_iters": 0}, "run.accum_grad_iters"),
        ({"max_iters": 1, "min_lr": 1e-3}, "run.min_lr"),
        ({"max_iters": 1, "init_lr": 0.0}, "run.init_lr"),
        ({"max_iters": 1, "batch_size_train": 0}, "run.batch_size_train"),
        ({"max_iters": 1, "batch_size_eval": 0}, "run.batch_size_eval"),
        ({"max_iters": 1, "warmup_steps": -1}, "run.warmup_steps"),
        ({"max_iters": 1, "warmup_steps": 1, "warmup_lr": 1.0}, "run.warmup_lr"),
        ({"max_iters": 1, "monitor_mode": "most"}, "run.monitor_mode"),
        ({"max_iters": 1, "max_bad_ratio": 1.5}, "run.max_bad_ratio"),
        ({"max_iters": 1, "train_splits": []}, "run.train_splits"),
        ({"max_iters": 1, "lr_per_epoch": True}, "run.lr_per_epoch"),
        ({"max_iters": 1, "eval_freq": 0}, "run.eval_freq"),
    ],
)
def test_an_impossible_run_is_refused_by_the_name_of_its_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        RunConfig(**values)


def test_all_impossible_values_of_a_section_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(batch_size_train=0, log_freq=0)
    assert [text.split(":")[0] for text in str(caught.value).split("; ")[:3]] == [
        "run.batch_size_train",
        "run.log_freq",
        "run.max_iters",
    ]


def test_an_evaluation_needs_no_length() -> None:
    assert RunConfig(evaluate=True).max_iters is None


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lanes": 0}, "lanes"),
        ({"sample_ratio": -1.0}, "sample_ratio"),
        ({"path": []}, "path"),
        ({"vis_processor": {"test": {"name": "x"}}}, "vis_processor.test"),
        ({"text_processor": {"train": {"prompt": "x"}}}, "text_processor.train"),
    ],
)
def test_an_impossible_dataset_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^datasets\.{key}: "):
        DatasetConfig(**values)


def test_configs_are_equal_whatever_their_origins() -> None:
    one, two = (
        Config(ModelConfig(), {}, RunConfig(max_iters=1), origins={"run.seed": origin}) for origin in "ab"
    )
    assert one == two


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"templates": "captoin"}, r"templates: no list 'captoin'; did you mean 'caption'\?"),
        ({"templates": ["Q: {q}"]}, r"templates: 'Q: \{q\}' has no place \{q\}"),
        ({"types": ["a", "b", "a"]}, "types: 'a' stands there twice"),
    ],
)
def test_instructions_that_cannot_be_made_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DatasetConfig(**values)
    DatasetConfig(templates=["vqa", "Q: {} A:", "[{context} ]{question}"], types=["a", "b"])
