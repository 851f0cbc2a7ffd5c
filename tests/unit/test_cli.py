from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from blip.cli import run_command
from blip.config.load import load_config
from blip.config.schema import Config, ModelConfig, RunConfig
from blip.errors import DataError, Stopped
from blip.registry import MODELS, PROCESSORS, TASKS

RECIPE = "model: {arch: stub}\ndatasets:\n  scenes:\nrun: {task: stub, max_iters: 5}\n"


class StubModel:
    config_class = ModelConfig
    presets: ClassVar = {"base": {}}


class StubTask:
    run_config_class = RunConfig


class Main:
    """Remembers what it was called with."""

    def __init__(self, result: int | BaseException | None = None) -> None:
        self.result = result
        self.calls: list[tuple[Config, argparse.Namespace]] = []

    def __call__(self, config: Config, args: argparse.Namespace) -> int | None:
        self.calls.append((config, args))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, classes in ((MODELS, {"stub": StubModel}), (TASKS, {"stub": StubTask}), (PROCESSORS, {})):
        monkeypatch.setattr(registry, "_searched", True)
        monkeypatch.setattr(registry, "_classes", classes)
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    # `run_command` sets up the package's logger for a process of its own.
    log = logging.getLogger("blip")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    Path("recipe.yaml").write_text(RECIPE)


@pytest.mark.parametrize(
    "argv",
    [
        ["--cfg", "recipe", "run.seed=7", "run.max_iters=9"],
        ["--cfg-path", "recipe.yaml", "--options", "run.seed=7", "run.max_iters=9"],
        ["--cfg", "recipe", "--options", "run.seed", "7", "run.max_iters", "9"],
        ["run.seed=7", "--cfg", "recipe", "run.max_iters=9"],
        ["--cfg=recipe", "--options", "run.seed=8", "--options", "run.max_iters=9", "--debug", "run.seed=7"],
    ],
)
def test_overrides_are_read_in_every_spelling(argv: list[str]) -> None:
    main = Main()
    assert run_command(main, argv) == 0
    [(config, args)] = main.calls
    assert (config.run.seed, config.run.max_iters, args.dry_run) == (7, 9, False)


def test_a_command_may_force_values() -> None:
    main = Main()
    assert run_command(main, ["--cfg", "recipe", "run.evaluate=false"], forced=["run.evaluate=true"]) == 0
    assert main.calls[0][0].run.evaluate is True


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (None, 0),
        (0, 0),
        (1, 1),
        (DataError("x.json: empty"), 2),
        (Stopped("saved"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_code_tells_what_happened(result: int | BaseException | None, code: int) -> None:
    assert run_command(Main(result), ["--cfg", "recipe"]) == code


def test_a_bug_is_not_dressed_up_as_a_users_mistake() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(Main(ZeroDivisionError()), ["--cfg", "recipe"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cfg", "recip.yaml"], "error: --cfg recip.yaml: no such file or recipe"),
        (
            ["--cfg", "recipe", "run.max_iter=3"],
            "error: run.max_iter (command line): no such key; did you mean",
        ),
        (["--cfg", "recipe", "run.max_iters"], "error: command line: 'run.max_iters' is no override"),
        (
            ["--cfg", "recipe", "--import", "no_such_module_x"],
            "error: --import no_such_module_x: it fails with",
        ),
    ],
)
def test_a_mistake_is_one_paragraph_without_a_traceback(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = Main()
    assert run_command(main, argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert "\n\n" not in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert main.calls == []


def test_debug_shows_the_traceback_and_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Main(DataError("x.json: empty")), ["--cfg", "recipe", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: x.json: empty\n")


@pytest.mark.parametrize("argv", [[], ["--cfg"], ["--cfg", "recipe", "--no-such-flag"]])
def test_a_wrong_command_line_is_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Main(), argv, prog="blip train") == 2
    assert capsys.readouterr().err.startswith("usage: blip train")


def test_help_is_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Main(), ["--help"], "Train a model.") == 0
    assert "Train a model." in capsys.readouterr().out


def test_print_config_prints_yaml_that_reruns_and_calls_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main = Main()
    argv = ["--cfg", "recipe", "run.seed=7", "run.use_dist_eval_sampler=true", "--print-config"]
    assert run_command(main, argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("# command line: run.use_dist_eval_sampler: True ignored: ")
    assert any("seed: 7" in line and line.endswith("# command line") for line in text.splitlines())
    Path("printed.yaml").write_text(text)
    assert load_config("printed.yaml") == load_config("recipe.yaml", ["run.seed=7"])
    assert main.calls == []


def test_ignored_keys_are_warned_of_once_on_rank_0_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--cfg", "recipe", "run.runner=runner_iter"]
    run_command(Main(), argv)
    assert capsys.readouterr().err.count("run.runner: runner_iter ignored: ") == 1
    monkeypatch.setenv("RANK", "1")
    run_command(Main(), argv)
    assert "run.runner" not in capsys.readouterr().err


def test_other_ranks_name_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_command(Main(DataError("x.json: empty")), ["--cfg", "recipe"]) == 2
    assert capsys.readouterr().err == "[rank 3] error: x.json: empty\n"


def test_rank_0_logs_from_info_and_others_from_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, level in (("0", logging.INFO), ("2", logging.WARNING)):
        monkeypatch.setenv("RANK", rank)
        run_command(Main(), ["--cfg", "recipe"])
        assert logging.getLogger("blip").level == level


def test_import_registers_a_users_own_parts_from_the_working_directory() -> None:
    Path("my_parts_of_test_cli.py").write_text(
        "from blip.config.schema import ModelConfig\nfrom blip.registry import MODELS\n"
        "@MODELS.register('mine')\nclass Mine:\n    config_class = ModelConfig\n    presets = {'only': {}}\n"
    )
    main = Main()
    argv = ["--cfg", "recipe", "model.arch=mine", "--import", "my_parts_of_test_cli", "--import", "json"]
    assert run_command(main, argv) == 0
    assert main.calls[0][0].model.model_type == "only"


def test_unknown_datasets_are_checked_against_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Main(), ["--cfg", "recipe"], known_datasets=lambda: ["scenes"]) == 0
    assert run_command(Main(), ["--cfg", "recipe"], known_datasets=lambda: ["scenes_web"]) == 2
    assert "did you mean 'scenes_web'?" in capsys.readouterr().err
