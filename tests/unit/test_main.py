from __future__ import annotations

import subprocess
import sys
import types

import pytest

import blip
import blip.__main__ as command


def test_import_blip_is_light() -> None:
    heavy = "{'torch', 'transformers', 'omegaconf'}"
    code = f"import sys, blip, blip.__main__; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_functions_are_loaded_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = types.ModuleType("blip.zoo")
    zoo.__dict__["list_models"] = lambda: ["blip2"]
    monkeypatch.setitem(sys.modules, "blip.zoo", zoo)
    assert blip.list_models() == ["blip2"]
    assert set(blip.__all__) <= set(dir(blip))


def test_an_unknown_attribute_is_answered_with_what_there_is() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'lod_model'; it has __version__, list_models, load_model"
    ):
        blip.lod_model  # noqa: B018


def test_every_command_is_a_module_of_the_package() -> None:
    for name, (module, _) in command.COMMANDS.items():
        assert module == f"blip.{name}"


def test_a_command_hands_over_to_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run_module(module: str, run_name: str, alter_sys: bool) -> None:
        seen.append((module, run_name, alter_sys, sys.argv))
        raise SystemExit(3)

    monkeypatch.setattr(command.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["blip", "train", "--cfg", "x"])
    with pytest.raises(SystemExit, match="3"):
        command.main()
    assert seen == [("blip.train", "__main__", True, ["blip train", "--cfg", "x"])]


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["trian"], 2)])
def test_usage_lists_all_commands(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == code
    captured = capsys.readouterr()
    assert all(f"  {name} " in captured.out + captured.err for name in command.COMMANDS)
    if argv == ["trian"]:
        assert captured.err.startswith("error: blip trian: no such command; did you mean 'train'?")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"blip {blip.__version__}\n"
