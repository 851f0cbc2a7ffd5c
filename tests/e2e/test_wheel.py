"""What an installed wheel brings: the recipes inside the package, the version, both ways to start."""

from __future__ import annotations

import email
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import blip

ROOT = Path(__file__).parents[2]


class Installed:
    """The wheel, built from the sdist and unpacked into a folder of its own; commands run somewhere else."""

    def __init__(self, folder: Path) -> None:
        self.site, self.elsewhere = folder / "site", folder / "elsewhere"
        self.elsewhere.mkdir()
        # The sdist is built first and the wheel from it, so both are seen to be complete.
        _run("build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT))
        [self.wheel] = (folder / "dist").glob("*.whl")
        [self.sdist] = (folder / "dist").glob("*.tar.gz")
        _run(
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(self.site),
            str(self.wheel),
        )

    def run(self, *command: str) -> str:
        """What a command prints, started outside the checkout."""
        environment = os.environ | {"PYTHONPATH": str(self.site)}
        done = subprocess.run(
            command, cwd=self.elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_its_recipes_and_its_data_files(installed: Installed) -> None:
    def files(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(folder).as_posix() for path in paths}

    recipes = {f"configs/{name}" for name in files(ROOT / "configs")}
    assert "configs/tiny/pretrain_stage1.yaml" in recipes
    assert files(installed.site / "blip") == files(ROOT / "blip") | recipes
    assert {path.name for path in installed.site.iterdir() if not path.name.endswith(".dist-info")} == {
        "bin",
        "blip",
    }


def test_wheel_states_version_licence_and_lower_bounds_only(installed: Installed) -> None:
    [folder] = installed.site.glob("*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text())
    assert metadata["Version"] == blip.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (folder / "licenses" / "LICENSE").is_file()
    needed = [line.split(";")[0] for line in metadata.get_all("Requires-Dist", [])]
    assert any(line.startswith("torch>=") for line in needed)
    assert [line for line in needed if any(mark in line for mark in ("<", "==", "~", "!="))] == []


@pytest.mark.parametrize("command", ["module", "script"])
def test_recipe_of_the_wheel_resolves_in_any_folder(installed: Installed, command: str) -> None:
    start = {
        "module": [sys.executable, "-m", "blip.train"],
        "script": [str(installed.site / "bin" / "blip"), "train"],
    }
    arguments = ["--cfg", "tiny/pretrain_stage1.yaml", "run.max_iters=7", "--print-config"]
    config = yaml.safe_load(installed.run(*start[command], *arguments))
    assert config["name"] == "tiny/pretrain_stage1"
    assert config["run"]["max_iters"] == 7
    where = installed.run(sys.executable, "-c", "import blip; print(blip.__file__)").strip()
    assert Path(where) == installed.site / "blip" / "__init__.py"
