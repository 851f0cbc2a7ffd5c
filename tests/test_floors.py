"""Imports flow down only: the floors of the house, and what each file of `blip/` may import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# A room is a file or a folder right under blip/. A file imports lower floors and its own room; rooms of
# one floor do not know each other. A new room is a new entry here; a new file of a folder needs none.
FLOORS: dict[int, tuple[str, ...]] = {
    6: ("__main__", "train", "evaluate", "estimate", "cache_features", "capfilt"),
    5: ("build", "predict", "convert"),
    4: ("cli", "expected", "zoo"),
    3: ("models", "processors", "data", "tasks", "engine", "formats"),
    2: ("config", "weights"),
    1: ("layers", "losses", "metrics", "registry", "stored", "templates", "together"),
    0: ("__init__", "atomic", "batch", "dist", "errors", "keyed", "meta", "places"),
}
COMMAND = 6
"""The floor of every `__main__.py`, whatever folder it lies in."""
ROOMS = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# `blip/__init__.py` loads its public functions on first use, the registry its folder at the first look-up,
# and `--import` a user's own module.
MAY_IMPORT_BY_NAME = ("__init__.py", "registry.py", "cli.py")


class Import(NamedTuple):
    """One `blip` module that a file imports."""

    line: int
    module: str
    """Dotted, without `blip.`; `__init__` for the package itself."""
    in_function: bool


class Source(NamedTuple):
    """One file of the package."""

    path: Path
    """Relative to the package."""
    imports: list[Import]
    by_name: list[int]
    """Lines that import a module by a computed name."""

    @property
    def module(self) -> str:
        return ".".join(self.path.with_suffix("").parts)


def problems(package: Path) -> list[str]:
    """Everything that breaks the rules in a package, one line each."""
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    sources = [_read(package, path, files) for path in sorted(files)]
    found = [line for source in sources for line in _misplaced(source)]
    return found + _circles(sources)


def _read(package: Path, path: Path, files: set[Path]) -> Source:
    imports: list[Import] = []
    by_name: list[int] = []
    for node, in_function in _walk(ast.parse((package / path).read_text(encoding="utf-8")), False):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            names = []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("importlib.import_module", "import_module", "__import__"):
                by_name.append(node.lineno)
        mine = [name for name in names if name.split(".")[0] in ("blip", "")]
        imports.extend(Import(node.lineno, _module(name, files), in_function) for name in mine)
    return Source(path, imports, by_name)


def _walk(node: ast.AST, in_function: bool) -> Iterator[tuple[ast.expr | ast.stmt, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, (ast.expr, ast.stmt)):
            yield child, inside
        yield from _walk(child, inside)


def _module(name: str, files: set[Path]) -> str:
    """The longest part of a dotted name that is a file: `blip.data.streams.tars.scan` -> `data.tars`."""
    parts = name.split(".")[1:]
    if name.startswith("."):
        return name
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end])
        if path.with_suffix(".py") in files:
            return ".".join(parts[:end])
        if path / "__init__.py" in files:
            return ".".join([*parts[:end], "__init__"])
    return "__init__"


def _floor(module: str) -> int | None:
    return COMMAND if module.endswith("__main__") else ROOMS.get(_room(module))


def _room(module: str) -> str:
    return module.split(".")[0]


def _misplaced(source: Source) -> list[str]:
    """What is wrong with the imports of one file."""
    floor = _floor(source.module)
    if floor is None:
        where = f"FLOORS in {Path(__file__).relative_to(ROOT)}"
        return [f"blip/{source.path}: no floor; add its room {_room(source.module)!r} to {where}"]
    found = []
    for line, module, in_function in source.imports:
        at = f"blip/{source.path}:{line}"
        other = _floor(module)
        if module.startswith("."):
            found.append(f"{at}: relative import; write the full name, from 'blip.' on")
        elif other is None:
            continue  # that file is reported itself
        elif other > floor or (other == COMMAND and _room(module) != _room(source.module)):
            found.append(
                f"{at}: floor {floor} imports blip.{module} on floor {other}; imports flow down only"
            )
        elif other == floor and _room(module) not in (_room(source.module), "__init__"):
            found.append(
                f"{at}: imports blip.{module} on the same floor {floor}; rooms of one floor do not mix"
            )
        if in_function:
            found.append(f"{at}: imports blip.{module} inside a function; import it at the top of the file")
    if str(source.path) not in MAY_IMPORT_BY_NAME:
        found += [f"blip/{source.path}:{line}: imports by a computed name" for line in source.by_name]
    return found


def _circles(sources: list[Source]) -> list[str]:
    graph = {s.module: {i.module for i in s.imports} - {s.module, "__init__"} for s in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"circular import: {' <- '.join(error.args[1])}"]
    return []


def test_imports_flow_down_only() -> None:
    found = problems(ROOT / "blip")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"losses": "from blip import keyed, dist\nfrom blip.errors import hint"}, None),
        ({"data/a": "import blip.data.b", "data/b": "import blip\nimport torch"}, None),
        ({"data/__main__": "from blip.cli import guard", "cli": ""}, None),
        ({"__init__": "import importlib\n\ndef f(n): return importlib.import_module(n)"}, None),
        (
            {"losses": "from blip.models.med import Med", "models/med": ""},
            "blip/losses.py:1: floor 1 imports",
        ),
        (
            {"errors": "from blip import cli", "cli": ""},
            "blip/errors.py:1: floor 0 imports blip.cli on floor 4",
        ),
        (
            {"data/a": "from blip.models import b", "models/b": ""},
            "imports blip.models.b on the same floor 3",
        ),
        (
            {"data/a": "if x:\n    import blip.models.b", "models/b": ""},
            "blip/data/a.py:2: imports blip.models.b",
        ),
        ({"data/a": "from blip.data.__main__ import x", "data/__main__": ""}, "data.__main__ on floor 6"),
        ({"dist": "from blip.batch import Batch", "batch": ""}, "imports blip.batch on the same floor 0"),
        (
            {"cli": "def f():\n    from blip.errors import hint"},
            "blip/cli.py:2: imports blip.errors inside a function",
        ),
        ({"build": "class A:\n  async def f(self):\n    import blip.cli", "cli": ""}, "inside a function"),
        (
            {"build": "def f(n): return importlib.import_module(n)"},
            "blip/build.py:1: imports by a computed name",
        ),
        ({"data/a": "from . import b", "data/b": ""}, "blip/data/a.py:1: relative import"),
        ({"data/a": "import blip.data.b", "data/b": "from blip.data.a import x"}, "circular import: data."),
        ({"helpers": ""}, "add its room 'helpers' to FLOORS in tests/test_floors.py"),
        ({"extra/file": ""}, "add its room 'extra'"),
    ],
)
def test_each_kind_of_wrong_import_is_found(
    tmp_path: Path, files: dict[str, str], expected: str | None
) -> None:
    for name, text in ({"errors": "", "keyed": "", "dist": ""} | files).items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    found = problems(tmp_path)
    if expected is None:
        assert found == []
    else:
        assert found
        assert all(expected in line for line in found)


def test_import_blip_loads_nothing_heavy_and_opens_no_socket() -> None:
    code = """
        import json, socket, sys

        def refuse(*args, **kwargs):
            raise AssertionError("import blip opened a socket")

        socket.socket.__init__ = refuse
        import blip
        print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
    """
    loaded = set(json.loads(_python(code)))
    assert "blip" in loaded
    heavy = {"fairscale", "pycocoevalcap", "timm", "torch", "torchvision", "transformers", "webdataset"}
    assert loaded.isdisjoint(heavy)


def test_every_module_imports_without_the_optional_packages() -> None:
    """Whatever a module needs at its top is in the core; extras are asked for where they are used."""
    modules = [
        ".".join(("blip", *path.relative_to(ROOT / "blip").with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted((ROOT / "blip").rglob("*.py"))
    ]
    code = f"""
        import importlib, sys

        absent = {{"accelerate", "bitsandbytes", "fairscale", "gguf", "gradio", "onnx", "peft"}}
        absent |= {{"pycocoevalcap", "tensorboard", "wandb", "webdataset"}}

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in absent:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        for name in {modules}:
            importlib.import_module(name)
    """
    _python(code)


def _python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
