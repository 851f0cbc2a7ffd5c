"""What holds for every file of the repository: recipes load, nothing is half done, data stays data."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from blip.config.load import load_config

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "blip").rglob("*.py"))
RECIPES = sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
SCRIPTS = [*sorted((ROOT / "run_scripts").rglob("*.sh")), ROOT / ".ci" / "run"]

MOST_LINES = 500
# In two pieces, so that this file does not report itself.
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\s*\(#\d+\))|Not" + r"ImplementedError")

UNSAFE_CALLS = {
    "eval": "evaluates text",
    "exec": "executes text",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "yaml.load": "may build any object; use yaml.safe_load",
    "yaml.full_load": "may build any object; use yaml.safe_load",
    "yaml.unsafe_load": "may build any object; use yaml.safe_load",
    "os.system": "runs a shell",
}
UNSAFE_ARGUMENTS = {
    ("weights_only", False),
    ("allow_pickle", True),
    ("shell", True),
    ("trust_remote_code", True),
}


def unsafe(text: str) -> list[str]:
    """Calls that would let foreign data run code or write where it likes, as `line: reason`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in UNSAFE_CALLS:
            found.append(f"{node.lineno}: {name} {UNSAFE_CALLS[name]}")
        if name.endswith((".extractall", ".extract")):
            found.append(f"{node.lineno}: {name} may write outside its folder")
        if name == "torch.load" and ("weights_only", True) not in arguments:
            found.append(f"{node.lineno}: torch.load without weights_only=True unpickles")
        found += [f"{node.lineno}: {name}({key}={value})" for key, value in arguments & UNSAFE_ARGUMENTS]
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe: str) -> None:
    config = load_config(recipe, [])
    assert config.name == recipe.removesuffix(".yaml")
    assert config.run.task
    assert config.run.task == "capfilt" or config.model.arch


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_source_reads_foreign_data_as_code(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
        "tar.extractall(folder)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
    ],
)
def test_each_kind_of_unsafe_call_is_found(call: str) -> None:
    assert unsafe(f"x = {call}")


@pytest.mark.parametrize(
    "call", ["torch.load(f, weights_only=True)", "model.eval()", "yaml.safe_load(f)", "np.load(f)"]
)
def test_safe_calls_are_left_alone(call: str) -> None:
    assert unsafe(f"x = {call}") == []


def test_nothing_is_marked_as_unfinished() -> None:
    found = []
    for folder in ("blip", "configs", "run_scripts", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", ".yaml"):
                lines = path.read_text(encoding="utf-8").splitlines()
                found += [
                    f"{name_of(path)}:{n}: {line}"
                    for n, line in enumerate(lines, 1)
                    if UNFINISHED.search(line)
                ]
    assert not found, "\n".join(["give it an issue number, as in (#7), or finish it:", *found])


def test_files_stay_short_enough_for_one_responsibility() -> None:
    long = {
        name_of(path): count for path in SOURCES if (count := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_package_folders_are_empty_of_code_of_their_own() -> None:
    """Importing a file runs that file's imports only; `blip/__init__.py` alone names what is public."""
    filled = [name_of(path) for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()]
    assert filled == ["blip/__init__.py"]
    folders = {path.parent for path in SOURCES}
    assert [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shell_scripts_can_be_parsed(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines or path.name == "env.sh"
