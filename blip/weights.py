"""Safe reading and writing of weight files, and loading them with an account of every name.

Files are read with safetensors or `torch.load(weights_only=True)` only, so reading one runs no code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip import atomic
from blip.errors import CheckpointError
from blip.stored.files import inside, shown, some
from blip.stored.reading import ENDINGS, read_file, shards
from blip.stored.safetensors_files import ALIASES
from blip.stored.torch_writer import write_torch

WEIGHTS_FILE = "model.safetensors"
INDEX_ENDING = ".index.json"
MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"
GIVEN = "blip-given-"
"""Start of the names of folders that hold tokenizers which were given as objects, while a process lasts."""

_FOLDER_FILES = (
    WEIGHTS_FILE,
    WEIGHTS_FILE + INDEX_ENDING,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_ENDING,
)
_POINTER_BYTES = 256


@dataclass
class LoadReport:
    """What became of every name when weights were loaded."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names of the module that the weights do not give."""
    unexpected: list[str] = field(default_factory=list)
    """Names of the weights that the module has no place for."""
    reshaped: list[str] = field(default_factory=list)
    """Loaded after the module adapted them, such as interpolated position embeddings."""
    misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Not loaded, because the shape differs: name -> (given, wanted). Also in `missing` and `unexpected`."""
    rounded: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Loaded into a type of fewer digits: name -> (given, wanted)."""
    nan: list[str] = field(default_factory=list)
    """Loaded, and some of their numbers are none."""

    def text(self) -> str:
        """One line: counts, and the first names of each kind."""
        parts = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        for word in ("reshaped", "missing", "unexpected"):
            names = [name for name in getattr(self, word) if name not in self.misfits]
            if names:
                parts.append(f"{len(names)} {word} ({some(names)})")
        for types in dict.fromkeys(self.rounded.values()):
            names = [name for name, pair in self.rounded.items() if pair == types]
            parts.append(f"{len(names)} rounded from {types[0]} to {types[1]} ({some(names)})")
        if self.nan:
            parts.append(f"{len(self.nan)} with values that are no numbers ({some(self.nan)})")
        if self.misfits:
            shapes = [f"{name} is {given}, needed {wanted}" for name, (given, wanted) in self.misfits.items()]
            parts.append(f"{len(shapes)} of another shape ({some(shapes)})")
        return ", ".join(parts)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The named tensors of a weight file or folder, on the CPU, memory-mapped where the format allows.

    Args:
        source: `.safetensors`, `.pth`, `.pt`, `.bin`, an `.index.json` of shards, or a folder: exported
            model, checkpoint, or run folder (its `model/`, else its best, else its newest checkpoint).

    Returns:
        name -> tensor; a surrounding `{"model": ...}` or `{"state_dict": ...}` and the `module.` that
        DataParallel puts before every name are taken off, what is not a tensor is left out.

    Raises:
        CheckpointError: missing, empty, truncated, of no known format, or holding Python objects.
    """
    return dict(StoredWeights(source))


class StoredWeights(Mapping[str, Tensor]):
    """The named tensors of a weight file or folder, each read when it is asked for.

    What is read is mapped into memory where the format allows, and counts as used as long as its file is
    open; `release` closes the files, so that whoever copies tensors in parts needs memory for one part.

    Args:
        source: as of `read_weights`, and with its errors, here and when tensors are asked for.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = find_weights(source)
        sharded = self.path.name.endswith(INDEX_ENDING)
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        self._unmapped: Path | None = None
        self._first: dict[Path, dict[str, str]] = {}
        self._files = shards(self.path) if sharded else dict.fromkeys(self._opened(self.path), self.path)
        if sharded:
            self._check_shards()

    def _check_shards(self) -> None:
        present = {file: dict.fromkeys(self._opened(file)) for file in dict.fromkeys(self._files.values())}
        absent = [name for name, file in self._files.items() if name not in present[file]]
        if absent:
            raise CheckpointError(
                f"'{self.path}': the shards lack {len(absent)} tensors ({some(absent)}); fetch them again"
            )
        # File by file. A shard may hold tensors that its index does not name.
        listed = self._files
        self._files = {name: listed.get(name, file) for file, names in present.items() for name in names}

    def _opened(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._open:
            if self._unmapped is not None:
                self._open.pop(self._unmapped, None)  # before the next one takes memory
            self._open[file], mapped = read_file(file)
            self._unmapped = None if mapped else file
        return self._open[file]

    def release(self) -> None:
        """Close the files; they are opened again when something is asked for.

        One that cannot be mapped stays, until the next such: to read it again would take as much memory.
        """
        self._open = {file: tensors for file, tensors in self._open.items() if file == self._unmapped}

    def origin(self, name: str) -> Hashable:
        """As of the function `origin`."""
        file = self._files[name]
        if file not in self._first:
            first: dict[Any, str] = {}
            opened = self._opened(file).items()
            self._first[file] = {
                other: first.setdefault(_identity(tensor), other) for other, tensor in opened
            }
        return file, self._first[file][name]

    def __getitem__(self, name: str) -> Tensor:
        return self._opened(self._files[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def origin(tensors: Mapping[str, Tensor], name: str) -> Hashable:
    """What is equal for two names of one tensor; mappings with a method of this name know it."""
    known = getattr(tensors, "origin", None)
    return known(name) if known else name


def find_weights(source: str | Path) -> Path:
    """The file that `read_weights` would read.

    Raises:
        CheckpointError: nothing there, a folder without weights, or links that lead out of it.
    """
    try:
        return _found(source)
    except (OSError, RuntimeError) as error:  # links in a circle, `~nobody`
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot look for weights at '{shown(str(source), 1000)}': {reason}") from error


def _found(source: str | Path) -> Path:
    path = pointed(Path(source).expanduser())
    if not path.exists():
        raise CheckpointError(
            f"no weights at '{source}': no such file or folder; give a weight file or a run folder"
        )
    if not path.is_dir():
        return path
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return inside(path / name)
    for name in (MODEL_FOLDER, f"{CHECKPOINT_FOLDER}/best", f"{CHECKPOINT_FOLDER}/last"):
        found = pointed(path / name) / WEIGHTS_FILE
        if found.is_file():
            return inside(found, path)
    only = sorted(p for p in path.iterdir() if p.suffix in ENDINGS and p.is_file())
    if len(only) == 1:
        return inside(only[0])
    several = f"; it has {some([p.name for p in only])}, name one of them" if only else ""
    raise CheckpointError(
        f"no weights in the folder '{source}': expected {WEIGHTS_FILE}, {MODEL_FOLDER}/{WEIGHTS_FILE} or"
        f" {CHECKPOINT_FOLDER}/last{several}"
    )


def pointed(path: Path) -> Path:
    """The folder that a pointer (`checkpoints/last`) names, where pointers are files instead of links."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _POINTER_BYTES or path.suffix:
        return path
    name = path.read_bytes().strip()
    if not re.fullmatch(rb"[\w-]+", name):
        return path
    target = path.parent / name.decode("ascii", "ignore")
    return target if target.is_dir() else path


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str = "the weights",
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> LoadReport:
    """Copy named tensors into `module` and account for every name.

    A tensor of another shape counts as missing and unexpected at once, unless the module adapts it itself.

    Args:
        module: gets the weights; names that share a tensor need it once.
        source: what messages call the weights.
        allow_missing: shell-style patterns of names that the weights need not give.
        allow_unexpected: patterns of names that are left out.

    Raises:
        CheckpointError: a name that is missing, unexpected or of another shape, and not allowed to be.
    """
    untie(module, tensors)
    wanted = module.state_dict()
    differing = {n: t for n, t in tensors.items() if n in wanted and t.shape != wanted[n].shape}
    _check_kinds(source, tensors, wanted)
    complaint = ""
    try:
        module.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:  # everything that fits is loaded all the same
        complaint = str(error)
    misfits = [n for n in differing if f"size mismatch for {n}:" in complaint]
    if complaint and not misfits:
        raise CheckpointError(f"{source}: cannot be loaded: {' '.join(complaint.split())}")
    loaded = [n for n in wanted if n in tensors and n not in misfits]
    shared = {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)}
    same = {n: shared.get(n, _identity(tensor)) for n, tensor in wanted.items()}
    present = {same[n] for n in loaded}
    report = LoadReport(
        source,
        loaded,
        missing=[n for n in wanted if n not in loaded and same[n] not in present],
        unexpected=[n for n in tensors if n not in wanted] + misfits,
        reshaped=[n for n in differing if n not in misfits],
        misfits={n: (tuple(differing[n].shape), tuple(wanted[n].shape)) for n in misfits},
        rounded={n: pair for n in loaded if (pair := _rounded(tensors[n], wanted[n]))},
        nan=[n for n in loaded if _has_nan(wanted[n])],
    )
    refused = LoadReport(
        source,
        loaded,
        missing=[n for n in report.missing if not matches(n, allow_missing)],
        unexpected=[n for n in report.unexpected if not matches(n, allow_unexpected)],
    )
    if refused.missing or refused.unexpected:
        names = {*refused.missing, *refused.unexpected}
        refused.misfits = {n: shapes for n, shapes in report.misfits.items() if n in names}
        raise CheckpointError(
            f"{refused.text()}; it is of another arch or other sizes, or needs 'blip convert' first"
        )
    return report


def _rounded(given: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    """Both types, if the one that is wanted has fewer digits."""
    if not given.is_floating_point() or torch.finfo(given.dtype).eps >= torch.finfo(wanted.dtype).eps:
        return None
    return str(given.dtype).removeprefix("torch."), str(wanted.dtype).removeprefix("torch.")


def _has_nan(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return False
    # The sum needs no memory, and is NaN if anything is; so is one of infinities.
    return bool(tensor.detach().sum().isnan()) and bool(tensor.isnan().any())


def _check_kinds(source: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where numbers of another kind would be cast without a word."""

    def kind(tensor: Tensor) -> str:
        if tensor.is_complex() or tensor.dtype == torch.bool:
            return str(tensor.dtype).removeprefix("torch.")
        return "floating-point" if tensor.is_floating_point() else "whole"

    for name in wanted:
        if name in tensors and kind(tensors[name]) != kind(wanted[name]):
            raise CheckpointError(
                f"{source}: {name} has {kind(tensors[name])} numbers ({tensors[name].dtype}), and"
                f" {kind(wanted[name])} ones are needed; it is damaged, or of another model"
            )


def untie(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give names that share a parameter one each, where the weights to come have different values for them.

    FlanT5's output embeddings are no copy of the word embeddings, but transformers builds all T5 as if they
    were, and finds out when it loads.

    Args:
        module: gets the weights afterwards.
        tensors: weights.
    """
    first: dict[int, str] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name not in tensors:
            continue
        other = first.setdefault(id(parameter), name)
        # Names and shapes alone do not tell; a module without memory takes no values.
        if other == name or parameter.is_meta or torch.equal(tensors[name], tensors[other]):
            continue
        owner, _, leaf = name.rpartition(".")
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), leaf, own)


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, atomically; a tensor with several names is stored once.

    Args:
        tensors: on any device, contiguous or not.
        path: file to make or replace; its folder must exist.
        metadata: further entries of the file's header.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        identity = _identity(tensor)
        if identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        data = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that overlap without being the same.
        storage = data.untyped_storage().data_ptr()
        kept[name] = data.clone() if storage in storages else data
        storages.add(storage)
    header = dict(metadata or {})
    if aliases:
        header[ALIASES] = json.dumps(aliases)
    try:
        atomic.write_file(Path(path), lambda place: save_file(kept, place, metadata=header or None))
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}") from error


def save_shards(
    tensors: Mapping[str, Tensor],
    folder: Path,
    shard_bytes: int,
    after_each: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write named tensors as one safetensors file, or as several with an index, as transformers does.

    Tensors are asked for one after the other, and forgotten once their file is written, so that no more than
    one file's tensors are in memory. Files are complete or absent; the index is written last.

    Args:
        tensors: on any device, contiguous or not; two that share memory are written twice.
        folder: must exist.
        shard_bytes: a file has no more, unless a single tensor has.
        after_each: told after each file, when its tensors are no longer needed.

    Returns:
        The files, without the index.

    Raises:
        CheckpointError: a file cannot be written.
    """
    parts: list[list[str]] = []
    part: dict[str, Tensor] = {}
    size = total = 0
    unnamed = f"{atomic.PARTIAL}{os.getpid()}-shard-"  # until their number is known

    def flush() -> None:
        nonlocal size
        save_safetensors(part, folder / f"{unnamed}{len(parts)}", {"format": "pt"})
        parts.append(list(part))
        part.clear()
        size = 0
        after_each()

    try:
        for name in tensors:
            tensor = tensors[name]
            own = tensor.numel() * tensor.element_size()
            if part and size + own > shard_bytes:
                del tensor  # or its file would stay open
                flush()
                tensor = tensors[name]
            part[name] = tensor
            size, total = size + own, total + own
        del tensor
        flush()
    except BaseException:
        for left in folder.glob(f"{unnamed}*"):
            left.unlink()
        raise
    stem, ending = WEIGHTS_FILE.rsplit(".", 1)
    files = [folder / WEIGHTS_FILE]
    if len(parts) > 1:
        files = [folder / f"{stem}-{k + 1:05d}-of-{len(parts):05d}.{ending}" for k in range(len(parts))]
    for number, file in enumerate(files):
        os.replace(folder / f"{unnamed}{number}", file)
    if len(parts) > 1:
        weight_map = {name: file.name for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic.write_text(folder / (WEIGHTS_FILE + INDEX_ENDING), json.dumps(index, indent=2) + "\n")
    return files


def save_torch(
    tensors: Mapping[str, Tensor],
    path: Path,
    wrapper: str,
    at_once: int,
    release: Callable[[], None] = lambda: None,
) -> None:
    """Write `{wrapper: tensors}` as `torch.save` does, atomically, and one tensor after the other.

    Args:
        tensors: on any device, contiguous or not; those of one `origin` are stored once.
        path: file to make or replace; its folder must exist.
        wrapper: the only key.
        at_once: bytes of tensors between two calls of `release`, unless a single one has more.
        release: told when no tensor is in use.

    Raises:
        CheckpointError: the file cannot be written.
    """
    same = partial(origin, tensors)
    try:
        atomic.write_file(path, lambda place: write_torch(tensors, place, wrapper, same, at_once, release))
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}") from error


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell-style patterns fits the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _identity(tensor: Tensor) -> Any:
    """Equal for two names of one tensor; empty tensors have no memory and are never the same."""
    if not tensor.numel() or tensor.is_meta:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
