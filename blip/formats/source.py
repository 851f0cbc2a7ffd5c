"""Where weights come from (path, cached file, hub id), what lies beside them, and whose names they have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from blip.config.files import read_yaml
from blip.errors import CheckpointError, brief
from blip.formats import hf, lavis
from blip.formats.hf_config import read_folder
from blip.formats.hf_llm import IMAGE_TOKEN
from blip.formats.rules import Line, Omit, Table
from blip.places import WEIGHTS_FOLDER, data_root
from blip.stored.files import inside, read_json
from blip.stored.values import check_values
from blip.weights import CHECKPOINT_FOLDER, MODEL_FOLDER, find_weights

HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
PICKLES = ("*.bin", "*.pth", "*.pt")
"""Fetched only where a repository has no safetensors; read with `weights_only`, so they run no code."""

_TOKENIZERS = ("tokenizer", "llm_tokenizer", "qformer_tokenizer")
"""Folders beside weights."""
_BESIDE = (".json", ".txt", ".model", ".jinja", ".yaml")
"""What is read beside weights."""
MOST_BESIDE = 256 << 20
"""Bytes of such a file; the largest tokenizers have 40 million."""
_CONFIGURATION = "model configuration"
_ADDRESS = re.compile(r"https?://")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Source:
    """Weights on this machine, and what the files beside them tell."""

    name: str
    """As it was asked for."""
    weights: Path
    """The weight file."""
    values: dict[str, Any] | None = None
    """Configuration of the model, from our own or Hugging Face's `config.json`, or a run's `config.yaml`."""
    own: bool = False
    """Whether the values are of our own making, and so complete."""
    processors: dict[str, Any] | None = None
    """`vis_processor` and `text_processor` of the run or model."""
    absent: list[str] = field(default_factory=list)
    """Names that the weights lack, and a model need not get from them."""
    image_token: int | None = None
    """Of Hugging Face's models with a language model: id that stands for a soft token."""
    data_root: str | None = None
    """`run.data_root` of the run: frozen weights may lie there."""


class Recognised(NamedTuple):
    """Weights under our names."""

    arch: str | None
    """Registry name of a model that they fit; None where they bear our names already."""
    tensors: Mapping[str, Tensor]
    """Each made when it is asked for."""
    absent: list[str]
    """Patterns of our names that their layout has no place for."""
    report: Sequence[Line] = ()
    """What became of their keys; empty where they bear our names already."""


def open_source(source: str | Path) -> Source:
    """Find weights and their configuration; a hub id is fetched where it is not in the cache.

    Args:
        source: weight file, exported model, run folder, checkpoint, Hugging Face folder or hub id, or the
            address of a file that was downloaded (`downloaded`).

    Raises:
        CheckpointError: nothing there, or its configuration is unreadable or of an unknown class.
    """
    return open_copy(local_copy(source), str(source))


def open_copy(place: Path, name: str) -> Source:
    """Weights at a path, and their configuration; errors as `open_source`.

    Args:
        place: file or folder.
        name: as it was asked for.
    """
    found = Source(name, find_weights(place))
    folder = found.weights.parent
    if (folder / "config.json").is_file():
        _read_json(found, folder / "config.json")
    run = next((place for place in (folder.parent, folder.parent.parent) if _is_run(place, folder)), None)
    if run is not None and (found.own or found.values is None):
        _read_run(found, run / "config.yaml")
    return found


def local_copy(source: str | Path, root: str | Path | None = None) -> Path:
    """The path of a file or folder on this machine that `source` means; need not exist.

    Args:
        source: as of `open_source`, or the mere name of a file that was downloaded.
        root: data root; None: the environment variable BLIP_DATA, else `data`.

    Raises:
        CheckpointError: an address whose file is not here, or a hub id that cannot be fetched.
    """
    # Unlike the methods of `Path`, these take names that no file can have.
    text, path = str(source), Path(os.path.expanduser(source))
    if _ADDRESS.match(text):
        if (here := downloaded(text, root)) is not None:
            return here
        raise CheckpointError(not_here(text, root))
    if os.path.exists(path) or path.is_absolute():
        return path
    if os.sep not in text and (here := downloaded(text, root)) is not None:
        return here
    if not _HUB_ID.fullmatch(text):
        return path
    return _snapshot(text)


def downloaded(address: str, root: str | Path | None = None) -> Path | None:
    """The file of an address, if it is on this machine: in torch's cache, in the folder `weights` below the
    data root, or right below that."""
    return next((place for place in _downloads(address, root) if os.path.isfile(place)), None)


def not_here(address: str, root: str | Path | None = None) -> str:
    """What to do about a file that is not on this machine; arguments as of `downloaded`."""
    first, second, *_ = _downloads(address, root)
    return (
        f"{address} is not on this machine: download it to '{first}' or '{second}', or anywhere and give its"
        " path, as model.init_from=PATH to a run, --checkpoint PATH to blip predict, or checkpoint=PATH in"
        " Python, where pretrained=False builds a model with random weights"
    )


def _downloads(address: str, root: str | Path | None) -> list[Path]:
    below = data_root(root)
    return [folder / address.rpartition("/")[2] for folder in (torch_cache(), below / WEIGHTS_FOLDER, below)]


def torch_cache() -> Path:
    """Where torch, timm and LAVIS keep the weight files that they have downloaded."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def recognise(
    tensors: Mapping[str, Tensor], arch: str | None = None, name: str = "the weights"
) -> Recognised:
    """Weights of any known layout under our names, by what they are called.

    Args:
        tensors: as they were read.
        arch: model that they are for: if they are not of it, they may be of another one of its family, which
            it can `adopt`. None: the first model that has a place for all of them.
        name: what messages call them.

    Raises:
        CheckpointError: the layout is known, but no model (of the family) has a place for all of them.
    """
    module = next((m for m in (lavis, hf) if m.looks_like(tensors)), None)
    if module is None:
        return Recognised(arch, tensors, [])
    known = sorted(module.TABLES, key=lambda other: other != arch)  # that model first, else in their order
    if arch is not None:
        known = [other for other in known if _family(other) == _family(arch)]
    if not known:
        raise CheckpointError(
            f"{name}: {arch!r} cannot be read from this layout of weights, but {', '.join(module.TABLES)} can"
        )
    valued = not any(tensor.is_meta for tensor in islice(tensors.values(), 1))
    tables = [(other, table) for other in known for table in _tables(module.TABLES[other], valued)]
    fitting = [(other, table) for other, table in tables if table.is_about(tensors)] or tables
    # To say what is nearest to unknown names takes a table a good part of a second.
    fitting = [(other, table) for other, table in fitting if table.knows(tensors)] or fitting
    failures = []
    for other, table in fitting:
        try:
            ours = table.ours(tensors)
        except CheckpointError as error:
            failures.append(error)
            continue
        omitted = [re.sub(r"\{\w+\}", "*", r.ours) for r in table.rules if isinstance(r, Omit)]
        return Recognised(other, ours, omitted, ours.report)
    nearest = min(failures, key=lambda error: len(str(error)))  # the one with the fewest names to complain of
    raise CheckpointError(f"{name}: {nearest}") from nearest


def _family(arch: str) -> str:
    """`blip` or `blip2`; the models of a family have names in common."""
    return arch.partition("_")[0]


def frozen_elsewhere(weights: Path) -> dict[str, str]:
    """Frozen parts that our own weights leave out -> where they came from, by the `config.json` beside."""
    file = find_weights(weights).parent / "config.json"
    try:
        said = read_json(inside(file), _CONFIGURATION)
    except CheckpointError:
        return {}
    found = said.get("frozen_parts")
    return {str(part): str(place) for part, place in found.items()} if isinstance(found, dict) else {}


def left_out(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> list[str]:
    """Those of `prefixes` that no name starts with."""
    return [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in tensors)]


def _tables(entry: Table | Mapping[str, Table], valued: bool) -> list[Table]:
    """Variants in their order; of weights without values, which do not tell them apart, the usual first."""
    if isinstance(entry, Table):
        return [entry]
    return list((entry if valued else {"": entry[""], **entry}).values())


def cached_snapshot(name: str) -> Path | None:
    """The folder of a hub id in the hub's cache, if that has its weights; nothing is fetched."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        find_weights(folder)
    except (OSError, CheckpointError):  # not there, or no more than its configuration
        return None
    return folder


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, *PICKLES]))
    except Exception as error:  # the hub client raises errors of many packages
        raise CheckpointError(
            f"'{name}' is no file or folder here, and the Hugging Face hub gave no such repository"
            f" ({type(error).__name__}: {brief(error)}); correct the path or id, or give the path of a copy"
        ) from error
    return folder


def _read_json(found: Source, file: Path) -> None:
    _check_beside(file.parent)
    content = read_json(file, _CONFIGURATION)
    check_values(content, f"'{file}'")
    architectures = content.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"'{file}': architectures is no list; fetch or write it again")
    if content.get("format") == "blip":
        if not isinstance(content.get("config"), dict):
            raise CheckpointError(f"'{file}' has no section 'config'; write it again with save_pretrained")
        _check_arch(content["config"], file)
        found.values, found.own = _beside(file.parent, content["config"]), True
        found.processors = _processors(content.get("processors"))
        absent = content.get("absent")
        found.absent = [str(name) for name in absent] if isinstance(absent, list) else []
    elif architectures:
        arch, values = read_folder(file.parent, [str(name) for name in architectures])
        found.image_token = values.pop(IMAGE_TOKEN, None)
        found.values = {"arch": arch, **values}


def _check_arch(values: Mapping[str, Any], file: Path) -> None:
    for key in ("arch", "model_type"):
        if not isinstance(values.get(key, ""), str):
            raise CheckpointError(f"'{file}': {key} is no name but {values[key]!r}; fetch or write it again")


def _check_beside(folder: Path) -> None:
    """Raise CheckpointError where what is read beside weights is huge, or a link that leads out."""
    places = [folder, *(place for name in _TOKENIZERS if (place := folder / name).is_dir())]
    for place in places:
        if place.is_symlink() and place != folder:
            inside(place, folder)
        for file in place.iterdir():
            if file.suffix not in _BESIDE or not file.is_file():
                continue
            if (size := inside(file, folder).stat().st_size) > MOST_BESIDE:
                raise CheckpointError(f"'{file}' has {size} bytes, and {MOST_BESIDE} are the most")


def _beside(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the places of the tokenizers that lie in the folder."""
    found = dict(values)
    llm = found.get("llm")
    found |= {"llm": dict(llm)} if isinstance(llm, dict) else {}
    for section, name in ((found, "./tokenizer"), (found.get("llm"), "./llm_tokenizer")):
        if isinstance(section, dict) and section.get("tokenizer") == name:
            section["tokenizer"] = str((folder / name).absolute())
    return found


def _is_run(place: Path, folder: Path) -> bool:
    """Whether `place` is the run folder that an exported model or checkpoint in `folder` belongs to."""
    inside = folder == place / MODEL_FOLDER or folder.parent == place / CHECKPOINT_FOLDER
    return inside and (place / "config.yaml").is_file()


def _read_run(found: Source, file: Path) -> None:
    tree = read_yaml(inside(file), str(file))
    if not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"'{file}' has no section 'model', so it is not the configuration of a run")
    check_values(tree["model"], f"'{file}'")
    _check_arch(tree["model"], file)
    if found.values is None:
        found.values, found.own = dict(tree["model"]), True
    run, datasets = tree.get("run") or {}, tree.get("datasets") or {}
    found.data_root = run.get("data_root") if isinstance(run, dict) else None
    sections = datasets.values() if isinstance(datasets, dict) else ()
    found.processors = next(filter(None, map(_processors, sections)), found.processors)


def _processors(section: Any) -> dict[str, Any] | None:
    """The processors of a dataset section or a `config.json`, if both kinds are named for `eval`."""
    if not isinstance(section, dict):
        return None
    kinds = {kind: section.get(kind) for kind in ("vis_processor", "text_processor")}
    for stages in kinds.values():
        if not isinstance(stages, dict) or "eval" not in stages:
            return None
        if not all(isinstance(entry, dict) for entry in stages.values()):
            return None
    return kinds
