"""Recipes as text: found by path or name, read as plain data, and written back."""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from blip.config.schema import Config
from blip.errors import ConfigError, nearest

SMALL_RECIPES = ("tiny", "laptop")
SUFFIXES = (".yaml", ".yml")
COMMENT_COLUMN = 48
MOST_BYTES = 1 << 20
MOST_VALUES = 50_000
_OVERRIDE = re.compile(r"(model|datasets|run)\.[\w.]+=")
DEEPEST = 32


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A configuration file."""

    path: Path
    """Where it is."""
    name: str
    """How runs of it are called, such as `tiny/pretrain_stage1`."""
    shown: str
    """How messages call it."""


def find_config(name: str) -> Recipe:
    """The file that `--cfg NAME` means: a path, or a name with or without folder and suffix.

    The working directory comes first, then its `configs/`, then the recipes shipped with the package.
    Among equal names a paper's recipe wins over `tiny/` and `laptop/`.

    Raises:
        ConfigError: no such file, or several; the message lists the candidates.
    """
    for path in _spellings(Path(name).expanduser()):
        if path.is_file():
            return _recipe(path)
    recipes: dict[str, Path] = {}
    for root in config_roots():
        for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES):
            recipes.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
    wanted = Path(name).as_posix()
    wanted = wanted.removesuffix(Path(wanted).suffix) if Path(wanted).suffix in SUFFIXES else wanted
    if wanted in recipes:
        return _recipe(recipes[wanted])
    matches = [known for known in recipes if known.endswith(f"/{wanted}")]
    papers = [known for known in matches if known.split("/")[0] not in SMALL_RECIPES]
    choice = papers or matches
    if len(choice) == 1:
        return _recipe(recipes[choice[0]])
    if choice:
        raise ConfigError(f"--cfg {name}: several recipes have this name; choose from {', '.join(choice)}")
    raise ConfigError(f"--cfg {name}: no such file or recipe{_similar(wanted, recipes)}")


def tiny_recipe(arch: str, task: str) -> str | None:
    """Name of the shipped recipe in `tiny/` that is nearest to a model and task; None: none is near.

    It has the same model, best with the same task, or else the same task with a model of the same family.
    Recipes that only evaluate want the run of another one, and are none.
    """
    near: dict[str, int] = {}
    for root in config_roots():
        for path in sorted((root / "tiny").glob("*.yaml")):
            try:
                tree = read_yaml(path, path.name)
                same_task, other = tree["run"]["task"] == task, str(tree["model"]["arch"])
                if tree["run"].get("evaluate"):
                    continue
            except (ConfigError, KeyError, TypeError):
                continue  # of the user's own, and unfinished
            if other == arch:
                near.setdefault(path.name, 2 + same_task)
            elif same_task and other.partition("_")[0] == arch.partition("_")[0]:
                near.setdefault(path.name, 1)
    return max(near, key=lambda name: near[name], default=None)


def config_roots() -> list[Path]:
    """Folders of recipes, first come first served: the working directory's, then the package's."""
    package = Path(str(importlib.resources.files("blip")))
    # A wheel carries the recipes inside the package; in a checkout they lie beside it.
    roots = [Path("configs"), package / "configs", package.parent / "configs"]
    found: dict[Path, Path] = {}
    for root in roots:
        if root.is_dir():
            found.setdefault(root.resolve(), root)
    return list(found.values())


def read_yaml(path: Path, shown: str) -> dict[str, Any]:
    """The sections of a YAML file. Nothing in it is executed, and no key may stand twice.

    Raises:
        ConfigError: unreadable, not YAML, or a key stands twice; the message names the line.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ConfigError(f"{shown}: has {size} bytes, and {MOST_BYTES} are the most")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: cannot be read ({error}); give a YAML text file") from error
    tree = _parse(text, shown)
    if tree is None:
        raise ConfigError(f"{shown}: the file is empty; a recipe has the sections model, datasets and run")
    if not isinstance(tree, dict):
        found = type(tree).__name__
        raise ConfigError(f"{shown}: expected the sections model, datasets and run, found a {found}")
    if _size(tree) > MOST_VALUES:
        raise ConfigError(f"{shown}: too many values, or aliases inside themselves; write the values out")
    return tree


def parse_overrides(overrides: Iterable[str]) -> list[tuple[tuple[str, ...], Any]]:
    """`key=value` arguments as (path, value); values are read as YAML. LAVIS's `key value` pairs work too.

    Raises:
        ConfigError: an argument without `=`, or without a key.
    """
    items = list(overrides)
    keys, values = items[::2], items[1::2]
    paired = len(keys) == len(values) and all("." in key and "=" not in key for key in keys)
    if items and paired and not any(map(_OVERRIDE.match, values)):
        items = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    parsed = []
    for item in items:
        key, equals, text = item.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(
                f"command line: {item!r} is no override; write key=value, as in run.max_iters=100"
            )
        parsed.append((path, _override_value(text)))
    return parsed


def plain(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, without origins and notes."""
    sections = {"model": config.model, "datasets": config.datasets, "run": config.run}
    tree: dict[str, Any] = {"name": config.name}
    for key, section in sections.items():
        tree[key] = _plain(section)
    return tree


def dump(config: Config, origins: bool = False) -> str:
    """YAML text that loads back to an equal configuration.

    Args:
        origins: end each line with a comment that tells where the value came from.
    """
    lines: list[str] = []
    _write(plain(config), (), config.origins if origins else None, lines)
    return "\n".join(lines) + "\n"


def _size(tree: Any, count: int = 0, depth: int = 0) -> int:
    """`count` plus the values of the tree with aliases unfolded; gives up above `MOST_VALUES`."""
    if depth > DEEPEST:
        return MOST_VALUES + 1
    count += 1
    if isinstance(tree, (dict, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            count = _size(item, count, depth + 1) if count <= MOST_VALUES else count
    return count


def _spellings(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES if path.name)]


def _recipe(path: Path) -> Recipe:
    here = Path.cwd()
    absolute = path.resolve()
    shown = absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else str(path)
    for root in config_roots():
        if absolute.is_relative_to(root.resolve()):
            name = absolute.relative_to(root.resolve()).with_suffix("").as_posix()
            return Recipe(path, name, shown if absolute.is_relative_to(here) else f"{name}{path.suffix}")
    return Recipe(path, path.stem, shown)


def _similar(wanted: str, recipes: dict[str, Path]) -> str:
    names: dict[str, list[str]] = {}
    for known in recipes:
        names.setdefault(known, []).append(known)
        names.setdefault(known.rpartition("/")[2], []).append(known)
    close = [known for name in nearest(wanted, names, count=3) for known in names[name]]
    if close:
        return f"; did you mean {' or '.join(dict.fromkeys(close))}?"
    return f"; choose from {', '.join(recipes)}" if recipes else "; there is no configs/ folder here either"


class _DataLoader(yaml.SafeLoader):
    """YAML 1.1 without dates, with `1e-4` as a number, and with an error where a key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(
                    f"{self.name}, line {line}: the key {key.value!r} is not text; put it in quotes"
                )
            if key.value in seen:
                raise ConfigError(
                    f"{self.name}, line {line}: the key {key.value!r} stands twice in this section, first on"
                    f" line {seen[key.value]}; keep one of them"
                )
            seen[key.value] = line
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put in what `<<` names; sections that double each other could fill the memory."""
        count = len(node.value)
        for key, value in list(node.value):
            if key.tag == "tag:yaml.org,2002:merge":
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(part, yaml.MappingNode):
                        self.flatten_mapping(part)
                        count += len(part.value)
        if count > MOST_VALUES:
            raise ConfigError(f"{self.name}: too many values put in by '<<'; write the values out")
        super().flatten_mapping(node)


class _DataDumper(yaml.SafeDumper):
    """Quotes what `_DataLoader` would read as something else, and keeps every text on one line."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_DataDumper.add_representer(str, _DataDumper.represent_text)


# YAML 1.1 takes 1e-4 and 1e6 for text, since it wants a dot and a sign.
_NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_DataLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_DataLoader, _DataDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def _parse(text: str, shown: str) -> Any:
    loader = _DataLoader(text)
    loader.name = shown
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{shown}, line {mark.line + 1}" if mark else shown
        raise ConfigError(f"{place}: not valid YAML ({error.problem})") from error
    except RecursionError as error:
        raise ConfigError(f"{shown}: sections in sections, more than can be read") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{shown}: not valid YAML ({str(error).splitlines()[0]})") from error
    finally:
        loader.dispose()


def _override_value(text: str) -> Any:
    try:
        value = _parse(text, "command line")
    except ConfigError:
        return text
    # `run.output_dir=` means the empty text, and only braces or brackets make a section or list.
    if value is None and not text.strip():
        return ""
    literal = isinstance(value, (dict, list)) and not text.lstrip().startswith(("{", "["))
    return text if literal else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _write(
    tree: dict[str, Any], path: tuple[str, ...], origins: dict[str, str] | None, lines: list[str]
) -> None:
    indent = "  " * len(path)
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{_flow({key: None}).removesuffix(' null')}")
            _write(value, here, origins, lines)
            continue
        line = indent + _flow({key: value})
        if origins is not None and (origin := origins.get(".".join(here))):
            line = f"{line:<{COMMENT_COLUMN}}  # {origin}"
        lines.append(line)


def _flow(pair: dict[str, Any]) -> str:
    text: str = yaml.dump(
        pair, Dumper=_DataDumper, default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.strip()[1:-1]
