"""From a recipe's name and overrides to a typed `Config`.

Four sources are laid over each other: dataclass defaults, the preset of `model_type`, the YAML file, the
command line. Each value remembers its source, and all errors are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip.config import lavis
from blip.config.files import Recipe, find_config, parse_overrides, plain, read_yaml
from blip.config.schema import Config, DatasetConfig, ModelConfig, RunConfig, SectionError
from blip.config.values import Path, Values
from blip.errors import ConfigError, hint, nearest
from blip.registry import MODELS, PROCESSORS, TASKS, Registry

T = TypeVar("T")

SECTIONS = ("model", "datasets", "run")
DICTS = (dict[str, Any], dict[str, str], dict[str, dict[str, Any]])
PROCESSOR_KINDS = ("vis_processor", "text_processor")
COMMAND_LINE = "command line"
PUBLISHED = "published"
"""As `model.finetuned` or `model.pretrained`: the address that the zoo has for the model type."""
FEW_KEYS = 16


def load_config(
    name: str, overrides: Iterable[str] = (), *, known_datasets: Iterable[str] | None = None
) -> Config:
    """The configuration that `--cfg name key=value ...` means.

    Args:
        name: path or name of a recipe, see `find_config`.
        overrides: `key=value` with dotted keys; a later one wins.
        known_datasets: names of the dataset catalogue; other datasets need a `path`. None: not checked.

    Raises:
        ConfigError: everything that is wrong with it, in one message.
    """
    recipe = find_config(name)
    given = Values()
    for path, value in parse_overrides(overrides):
        if len(path) == 1 and path[0] in SECTIONS and not isinstance(value, dict):
            raise ConfigError(
                f"{path[0]} ({COMMAND_LINE}): {_shown(value)} is not a section of keys and values"
            )
        given.put(path, value, COMMAND_LINE)
    sources = {recipe.shown: read_yaml(recipe.path, recipe.shown), COMMAND_LINE: given.tree()}
    return _Loader(recipe, sources, known_datasets).config()


class _Loader:
    """One configuration in the making; problems gather until all of it has been looked at."""

    def __init__(
        self, recipe: Recipe, sources: dict[str, dict[str, Any]], known_datasets: Iterable[str] | None
    ) -> None:
        self.recipe = recipe
        told = sources.get(COMMAND_LINE, {}).get("datasets")
        told = told if isinstance(told, dict) else {}
        self.left_out = [name for name, section in told.items() if section is None]
        """Datasets that the command line sets to null."""
        for name in self.left_out:
            del told[name]
        self.sources = {origin: self._sections(tree) for origin, tree in sources.items()}
        self.known_datasets = None if known_datasets is None else list(known_datasets)
        self.values = Values()
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.valid: list[str] = []
        """All dotted keys that exist in this configuration, to suggest the right one."""

    def config(self) -> Config:
        task_name = self._given("run", "task")
        known = TASKS.get(task_name) if isinstance(task_name, str) and task_name in TASKS else None
        # A task that is not about one model has a section `model` of its own.
        own: type[Any] | None = getattr(known, "model_config_class", None)
        model_class = None if own else self._choose("model", "arch", MODELS)
        task_class = self._choose("run", "task", TASKS)
        model_type: type[Any] = own if own else getattr(model_class, "config_class", ModelConfig)
        run_type: type[Any] = getattr(task_class, "run_config_class", RunConfig)
        self._gather(model_class, model_type, run_type)
        if task_class is None:
            self._forget_task_keys()
        names = self._dataset_names()
        self.valid = ["name", *keys_of(model_type, "model."), *keys_of(run_type, "run.")]
        for name in names:
            self.valid += [*keys_of(DatasetConfig, f"datasets.{name}."), *self._processor_keys(name)]
        self._roots()

        # Without its class the model's own keys cannot be told from mistakes.
        model = self.build(model_type, ("model",)) if model_class or own else None
        run = self.build(run_type, ("run",))
        datasets = {name: self._dataset(name) for name in names}
        name = self.values.leaves.get(("name",), self.recipe.name)
        if self.problems or model is None or run is None or not all(datasets.values()):
            raise ConfigError(report(self.recipe.shown, self.problems))
        typed = {key: dataset for key, dataset in datasets.items() if dataset is not None}
        config = Config(model, typed, run, str(name), notes=self.notes)
        config.origins = {".".join(path): self.values.origin(path) for path in _paths(plain(config))}
        return config

    def problem(self, path: Path, text: str, origin: str | None = None) -> None:
        self.problems.append(f"{'.'.join(path)} ({origin or self.values.origin(path)}): {text}")

    def build(self, cls: type[T], path: Path, tree: dict[str, Any] | None = None) -> T | None:
        """The section at `path` (or `tree` in its place) as a `cls`; None after problems."""
        before = len(self.problems)
        node = OmegaConf.structured(cls)
        self._fill(node, cls, self.values.tree(path) if tree is None else tree, path)
        if len(self.problems) > before:
            return None  # impossible combinations may only follow from what is wrong already
        try:
            return typing.cast(T, OmegaConf.to_object(node))
        except ConfigError as error:
            texts = error.problems if isinstance(error, SectionError) else [str(error)]
            section = getattr(error, "section", "")  # a part of this one, perhaps
            base = tuple(section.split(".")) if section.startswith(".".join((*path, ""))) else path
            for text in texts:
                key, _, reason = text.partition(": ")
                exact = self._below(base, key)
                self.problem(exact or base, reason if exact else text)
        return None

    def _below(self, path: Path, key: str) -> Path | None:
        """The key that a section or one of its parts calls `key` in an error message."""
        above = f"{'.'.join(path)}."
        if above + key.partition(".")[0] in self.valid:
            return (*path, *key.split("."))
        inside = [known for known in self.valid if known.startswith(above) and known.endswith(f".{key}")]
        return (*path, *inside[0].removeprefix(above).split(".")) if len(inside) == 1 else None

    def _sections(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Sections that are empty or absent become empty dictionaries."""
        tree = {key: {} if value is None and key in SECTIONS else value for key, value in tree.items()}
        if isinstance(tree.get("datasets"), dict):
            tree["datasets"] = {k: {} if v is None else v for k, v in tree["datasets"].items()}
        return tree

    def _given(self, section: str, key: str) -> Any:
        """What the last source says."""
        return _section(self.sources[self._source(section, key)], section).get(key)

    def _source(self, section: str, key: str) -> str:
        """The last source that has the key, else the file."""
        having = [origin for origin, tree in self.sources.items() if key in _section(tree, section)]
        return having[-1] if having else self.recipe.shown

    def _choose(self, section: str, key: str, registry: Registry) -> type[Any] | None:
        name = self._given(section, key)
        if isinstance(name, str) and name in registry:
            return registry.get(name)
        if section == "run" and str(name) in lavis.REFUSED_TASKS:
            return None  # refused with a better reason
        text = f"missing; choose from {', '.join(registry.names())}"
        if name:
            text = f"unknown {registry.kind} {name!r}{hint(str(name), registry.names())}"
        self.problem((section, key), text, self._source(section, key))
        return None

    def _gather(self, model_class: type[Any] | None, model_type: type[Any], run_type: type[Any]) -> None:
        """Lay preset, file and command line over each other."""
        run_keys, model_keys = (list(keys_of(cls, "")) for cls in (run_type, model_type))
        from_lavis = any(map(lavis.is_lavis, self.sources.values()))
        for origin, tree in self.sources.items():
            translation = lavis.translate(tree, run_keys, model_keys)
            self.sources[origin] = translation.tree
            self.notes += [f"{origin}: {note}" for note in translation.notes]
            for text in translation.problems:
                key, _, reason = text.partition(": ")
                self.problem(tuple(key.split(".")), reason, origin)
        if model_class is not None:
            self._preset(model_class, from_lavis)
        for origin, tree in self.sources.items():
            for section, content in tree.items():
                if section in SECTIONS and not isinstance(content, dict):
                    self.problem((section,), f"{_shown(content)} is not a section of keys and values", origin)
                else:
                    self.values.put((section,), content, origin)
            if origin == self.recipe.shown:
                self._leave_out()
        for path, value in list(self.values.leaves.items()):
            self._refuse_code(path, value)
        if model_class is not None:
            self._find_weights(model_class)

    def _find_weights(self, model_class: type[Any]) -> None:
        """Put the zoo's addresses in the place of the word `published`."""
        arch, model_type = (self.values.leaves.get(("model", key)) for key in ("arch", "model_type"))
        for key, table in (("finetuned", "published"), ("pretrained", "starts")):
            path = ("model", key)
            if self.values.leaves.get(path) != PUBLISHED:
                continue
            addresses: dict[str, str] = getattr(model_class, table, {})
            if (address := addresses.get(str(model_type))) is not None:
                self.values.leaves[path] = address
                continue
            text = f"no such weights of {arch}/{model_type or '?'} are published; name a file"
            if addresses:
                text += f", or choose model.model_type from {', '.join(addresses)}"
            self.problem(path, text)

    def _leave_out(self) -> None:
        """Drop the file's datasets that the command line sets to null, and what is published of them."""
        there = dict.fromkeys(path[1] for path in self.values.leaves if path[0] == "datasets" and path[1:])
        for name in self.left_out:
            if name not in there:
                text = f"not in {self.recipe.shown}, so it cannot be left out{hint(name, there)}"
                self.problem(("datasets", name), text, COMMAND_LINE)
            self.values.drop(("datasets", name))
        rows = self.values.leaves.get(where := ("run", "published"))
        if isinstance(rows, list) and self.values.origin(where) != COMMAND_LINE:
            self.values.leaves[where] = [row for row in rows if _published_of(row) not in self.left_out]

    def _forget_task_keys(self) -> None:
        """Drop the keys that some task adds: without the task, they cannot be told from mistakes."""
        classes = [getattr(TASKS.get(name), "run_config_class", RunConfig) for name in TASKS.names()]
        added = {key for cls in classes for key in keys_of(cls, "")} - set(keys_of(RunConfig, ""))
        for path in [path for path in self.values.leaves if path[0] == "run" and path[-1] in added]:
            del self.values.leaves[path]

    def _preset(self, model_class: type[Any], from_lavis: bool) -> None:
        presets: dict[str, dict[str, Any]] = getattr(model_class, "presets", {})
        arch, model_type = self._given("model", "arch"), self._given("model", "model_type")
        if not model_type and presets:
            model_type = next(iter(presets))
            self.values.put(("model", "model_type"), model_type, "default")
            for tree in self.sources.values():
                _section(tree, "model").pop("model_type", None)
        if isinstance(model_type, str) and model_type in presets:
            self.values.put(("model",), presets[model_type], f"preset {arch}/{model_type}")
            if from_lavis:  # its recipes leave to its model configurations which weights they start from
                self.values.put(
                    ("model",), lavis.weights(model_class, model_type), f"LAVIS's {arch}/{model_type}"
                )
        elif model_type:
            text = f"{arch} has no type {model_type!r}{hint(str(model_type), presets)}"
            self.problem(("model", "model_type"), text, self._source("model", "model_type"))

    def _refuse_code(self, path: Path, value: Any) -> None:
        """A configuration is data: OmegaConf's interpolations and missing markers are not used."""
        texts = [item for item in _items(value) if isinstance(item, str)]
        reason = ""
        if any("${" in text for text in texts):
            reason = f"{_shown(value)} would be computed, and a recipe is data; write the value out"
        elif "???" in texts:
            reason = "'???' stands for a missing value; give one"
        if reason:
            self.problem(path, reason)
            del self.values.leaves[path]

    def _roots(self) -> None:
        for root in dict.fromkeys(path[0] for path in self.values.leaves):
            if root not in (*SECTIONS, "name"):
                self.problem((root,), f"no such key{self._suggest((root,))}")
        if "name" in self.values.tree() and not isinstance(self.values.leaves.get(("name",)), str):
            self.problem(("name",), f"{_shown(self.values.tree()['name'])} is not a text")

    def _fill(self, node: Any, cls: type[Any], tree: dict[str, Any], path: Path) -> None:
        """Set the values of `tree` in the OmegaConf section `node`, which checks their types."""
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for key, value in tree.items():
            here = (*path, key)
            if key not in known:
                self.problem(here, f"no such key{self._suggest(here)}")
                continue
            part = section_of(hints[key])
            if value is None and hints[key] in (part, *DICTS):
                continue  # a section of which all lines are commented out
            if part is not None and isinstance(value, dict):
                if node._get_node(key) is None or OmegaConf.is_missing(node, key) or node[key] is None:
                    node[key] = OmegaConf.structured(part)
                part = OmegaConf.get_type(node, key) or part
                self._fill(node[key], part, value, here)
                continue
            try:
                node.merge_with({key: _convert(value, hints[key])})  # assigning takes no dict for a union
            except (OmegaConfBaseException, ValueError):
                self.problem(here, f"{_shown(value)} is not {describe(hints[key], value)}")

    def _suggest(self, path: Path) -> str:
        """The end of a message about the unknown key `path`: the nearest key anywhere in the tree."""
        section, key = ".".join(path[:-1]), path[-1]
        elsewhere = [known for known in self.valid if known.rpartition(".")[2] == key]
        if elsewhere:
            return f"; did you mean {' or '.join(elsewhere[:2])}?"
        here = {root: root for root in SECTIONS if not section}
        everywhere: dict[str, str] = {}
        for known in self.valid:
            above, _, name = known.rpartition(".")
            everywhere.setdefault(name, known)
            if above == section:
                here[name] = known
        close = [names[found] for names in (here, everywhere) for found in nearest(key, names)]
        if close:  # the same section's, unless another one's is clearly nearer
            best = max(close, key=lambda known: _likeness(key, known) + 0.1 * (known in here.values()))
            return f"; did you mean {best}?"
        if 0 < len(here) <= FEW_KEYS:
            return f"; choose from {', '.join(here)}"
        return "; --print-config lists the keys"

    def _dataset_names(self) -> list[str]:
        return list(dict.fromkeys(p[1] for p in self.values.leaves if p[0] == "datasets" and len(p) > 1))

    def _dataset(self, name: str) -> DatasetConfig | None:
        path = ("datasets", name)
        if self.values.leaves.get(path, {}) != {}:
            value = self.values.leaves[path]
            advice = f"; write {'.'.join(path)}.path={value}" if isinstance(value, str) else ""
            self.problem(path, f"{_shown(value)} is not a section of keys and values{advice}")
            return None
        tree = self.values.tree(path)
        located = tree.get("path") is not None or "build_info" in tree
        if self.known_datasets is not None and name not in self.known_datasets and not located:
            others = [*self.known_datasets, *(known for known in self._dataset_names() if known != name)]
            reason = lavis.refused_dataset(name)
            self.problem(path, reason or f"has no path and is not in the catalogue{hint(name, others)}")
        dataset = self.build(DatasetConfig, path)
        if dataset is None:
            return None
        checked = [self._processor(dataset, (*path, k, s)) for k, s in _stages(dataset)]
        return dataset if all(checked) else None

    def _processor(self, dataset: DatasetConfig, path: Path) -> bool:
        """Check the options of one processor against its fields, and convert their types."""
        options: dict[str, Any] = getattr(dataset, path[-2])[path[-1]]
        if options["name"] not in PROCESSORS:
            if options["name"] not in lavis.REFUSED_PROCESSORS:
                text = f"unknown processor {options['name']!r}{hint(options['name'], PROCESSORS.names())}"
                self.problem((*path, "name"), text)
            return False
        given = {key: value for key, value in options.items() if key != "name"}
        built = self.build(PROCESSORS.get(options["name"]), path, given)
        if built is not None:
            options.update({key: getattr(built, key) for key in given})
        return built is not None

    def _processor_keys(self, name: str) -> Iterator[str]:
        """Keys of the processors that the dataset `name` uses."""
        for kind in PROCESSOR_KINDS:
            for stage, options in _section(self.values.tree(("datasets", name)), kind).items():
                processor = options.get("name") if isinstance(options, dict) else None
                if isinstance(processor, str) and processor in PROCESSORS:
                    prefix = f"datasets.{name}.{kind}.{stage}."
                    yield from [f"{prefix}name", *keys_of(PROCESSORS.get(processor), prefix)]


def report(shown: str, problems: list[str]) -> str:
    """One paragraph for any number of problems."""
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{shown}: {len(problems)} problems:{lines}"


def keys_of(cls: type[Any], prefix: str) -> Iterator[str]:
    """Dotted keys of a config class, nested sections included."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.init:
            yield f"{prefix}{f.name}"
            if (part := section_of(hints[f.name])) is not None:
                yield from keys_of(part, f"{prefix}{f.name}.")


def section_of(annotation: Any) -> type[Any] | None:
    """The dataclass in `annotation`, if it is one or an optional one."""
    found = (
        part for part in _options(annotation) if isinstance(part, type) and dataclasses.is_dataclass(part)
    )
    return next(found, None)


def describe(annotation: Any, value: Any = None) -> str:
    """What a field takes, in words, with the allowed values of a choice."""
    words: list[str] = []
    suggestion = ""
    for part in _options(annotation):
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if origin is Literal:
            words.append(f"one of {', '.join(map(str, arguments))}")
            if close := nearest(str(value), map(str, arguments)):
                suggestion = f"; did you mean {close[0]!r}?"
        elif dataclasses.is_dataclass(part):
            words.append("a section of keys and values")
        elif origin in (list, tuple):
            words.append(f"a list of {describe(arguments[0]).removeprefix('a ')}s" if arguments else "a list")
        else:
            words.append(WORDS.get(origin or part, getattr(part, "__name__", str(part))))
    return " or ".join(words) + suggestion


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a section of keys and values",
    type(None): "null",
}


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _convert(value: Any, annotation: Any) -> Any:
    """`value`, where OmegaConf is stricter or laxer: 1e3 is an int, true is no text, one text is a list."""
    kinds = [typing.get_origin(part) or part for part in _options(annotation)]
    if isinstance(value, bool):
        if bool not in kinds and Any not in kinds and Literal not in kinds:
            raise ValueError(value)
        return value
    if bool in kinds and isinstance(value, (int, float)) and value not in (0, 1):
        raise ValueError(value)
    if list in kinds and str not in kinds and isinstance(value, str):
        return [value]
    numeric = not {str, Any, Literal} & set(kinds)
    number = value
    if numeric and isinstance(value, str) and {int, float} & set(kinds):
        number = float(value) if not value.strip().lstrip("+-").isdigit() else int(value)
    if isinstance(number, float):
        if not math.isfinite(number):
            raise ValueError(value)
        if int in kinds and float not in kinds and number.is_integer():
            return int(number)
    return number


def _likeness(key: str, known: str) -> float:
    return difflib.SequenceMatcher(None, key, known.rpartition(".")[2]).ratio()


def _published_of(row: Any) -> str:
    """The dataset that a row of `run.published` is of."""
    return str(row.get("data")).rpartition("/")[0] if isinstance(row, dict) else ""


def _items(value: Any) -> list[Any]:
    """The leaves of lists, and of sections in them."""
    inner = list(value.values()) if isinstance(value, dict) else value
    return [leaf for item in inner for leaf in _items(item)] if isinstance(inner, list) else [value]


def _paths(tree: dict[str, Any], path: Path = ()) -> Iterator[Path]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, (*path, key))
        else:
            yield (*path, key)


def _section(tree: dict[str, Any], section: str) -> dict[str, Any]:
    content = tree.get(section)
    return content if isinstance(content, dict) else {}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _stages(dataset: DatasetConfig) -> list[tuple[str, str]]:
    return [(kind, stage) for kind in PROCESSOR_KINDS for stage in getattr(dataset, kind)]
