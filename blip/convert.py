"""`python -m blip.convert IN OUT --to {blip,lavis,hf}`: weights from one layout to another.

Tensors are read, renamed and written one after the other, in the precision that they are stored in, so that
files larger than memory can be converted. Every key is accounted for. Frozen parts whose weights lie
elsewhere (a tower, a language model) are referred to, as LAVIS does, unless `--frozen copy` asks for them;
Hugging Face's layout has no references, so there they are always copied.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from blip.cli import guard, set_up_logging
from blip.config.typed import model_overrides
from blip.errors import CheckpointError, UsageError
from blip.formats import hf, lavis
from blip.formats.hf_config import theirs_of
from blip.formats.hf_folder import Picture, write_folder
from blip.formats.limits import check_size, sketch
from blip.formats.load import FROZEN_KEYS, fill
from blip.formats.rules import Line
from blip.formats.source import Recognised, Source, left_out, open_source
from blip.layers.vit import NAMED
from blip.models.base import BlipModel
from blip.models.blip2_llm import LLM
from blip.models.llm_tokenizer import locate
from blip.models.vision import DTYPES
from blip.weights import StoredWeights, matches, origin, save_shards, save_torch, some
from blip.zoo import Known, identify, load_frozen, load_preprocess

log = logging.getLogger("blip.convert")  # `__name__` is `__main__` in a command

Layout = Literal["blip", "lavis", "hf"]
Frozen = Literal["refer", "copy"]
SHARD_BYTES = 5_000_000_000
"""Largest file, as of transformers."""
AT_ONCE = 250_000_000
"""Of a single file, so much is in memory at most, or a tensor."""
TOWER = "vision.vit.patch_embed.proj.weight"
"""One of the tower's tensors."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


class Conversion(NamedTuple):
    """What was converted."""

    arch: str
    """Registry name of the model."""
    files: list[Path]
    """The weights that were written."""
    lines: list[Line]
    """What became of every key, from the source's names to the target's."""
    notes: list[str]
    """What was left out or referred to, and why."""


def convert(
    source: str | Path,
    out: str | Path,
    to: Layout,
    *,
    arch: str | None = None,
    model_type: str | None = None,
    frozen: Frozen = "refer",
    shard_bytes: int = SHARD_BYTES,
    **overrides: Any,
) -> Conversion:
    """Write weights in another layout.

    Args:
        source: as `blip.from_pretrained` takes it: LAVIS's .pth, Hugging Face folder or hub id, run folder.
        out: folder to make (`blip`, `hf`), or file to write (`lavis`), whose name ends in .pth.
        to: `blip`: what `from_pretrained` reads; `lavis`: `{"model": ...}`; `hf`: what transformers reads.
        arch, model_type, **overrides: as `from_pretrained`; what the tensors cannot tell.
        frozen: of parts that the source leaves out because they were frozen: `refer` to where the
            configuration says they are, or `copy` them. Hugging Face's layout always has them.
        shard_bytes: a file has no more, unless a single tensor has (`blip`, `hf`).

    Returns:
        What became of every key.

    Raises:
        CheckpointError: unreadable weights, a key that is missing, unexpected or of another shape, frozen
            parts that are nowhere to be found, or a target that cannot be written.
        UsageError: the target's layout has no such model, or `out` is there already.
    """
    place = Path(out)
    _check_target(place, to)
    found = open_source(source)
    stored = StoredWeights(found.weights)
    known = identify(found, stored, arch, model_type, torch.device("meta"), overrides)
    if not found.own and "vit_precision" not in overrides:
        known = _as_stored(known)
    model, notes, lacking = _checked(found, known, stored)
    name, state = known.config.arch, known.weights.tensors
    lines = list(known.weights.report)
    absent = left_out(state, model.freezable)
    opened = [stored]
    if absent and (frozen == "copy" or to == "hf"):
        state = _Joined([state, *(_fetched(model, prefix, found, opened) for prefix in absent)])
        absent = []

    def release() -> None:
        for weights in opened:
            weights.release()

    places = {prefix: _origin(model, prefix, found) for prefix in absent}
    notes += [f"{prefix.rstrip('.')} is referred to: {where}" for prefix, where in places.items()]
    release()
    room = place.parent if to == "lavis" else place
    if to == "blip":
        _make_room(room)
        files = save_shards(state, place, shard_bytes, release)
        model.describe(place, places, lacking)
        return Conversion(name, files, lines or [Line((k,), (k,), "the same") for k in state], notes)
    if to == "hf":  # whether they have such a model is said better by what it lacks than by names
        sketch(lambda: theirs_of(name, model), f"'{found.name}'")
    table = hf.table(name) if to == "hf" else lavis.table(name, _variant(known.config))
    theirs = table.theirs(state)
    _make_room(room)
    if to == "lavis":
        save_torch(theirs, place, "model", min(shard_bytes, AT_ONCE), release)
        files = [place]
        notes += untold(model)
    else:
        picture = _picture(model)
        files, more = write_folder(name, model, theirs, place, shard_bytes, release, picture)
        notes += more
    return Conversion(name, files, _through(lines, theirs.report), notes)


def _as_stored(known: Known) -> Known:
    """The configuration says the tower's precision in which it is stored, so that nothing is rounded."""
    tower = known.weights.tensors.get(TOWER)
    if tower is None or not hasattr(known.config, "vit_precision"):
        return known
    precision = next((name for name, dtype in DTYPES.items() if dtype == tower.dtype), "fp32")
    return known._replace(config=replace(known.config, vit_precision=precision))


def _variant(config: Any) -> str:
    """What chooses between tables of one model."""
    return getattr(config, "vit_model", None) or getattr(config, "share", None) or ""


def untold(model: BlipModel) -> list[str]:
    """What LAVIS's file says nothing of, and its readers take to be as published; empty if it is so."""
    config, tower = model.config, getattr(model.vision.vit, "config", None)
    values: list[tuple[str, Any, Any]] = []
    if tower is not None:
        named = NAMED[tower.name]
        values += [(f"vit.{key}", getattr(tower, key), getattr(named, key)) for key in ("heads", "norm_eps")]
    for section in ("med", "qformer"):
        part = getattr(config, section, None)
        for key in ("num_heads", "norm_eps") if part is not None else ():
            values.append((f"{section}.{key}", getattr(part, key), getattr(type(part), key)))
    if hasattr(config, "ln_vision_eps"):
        values.append(("ln_vision_eps", config.ln_vision_eps, type(config).ln_vision_eps))
    if hasattr(config, "llm"):
        values.append(("llm.sizes", config.llm.sizes, {}))
    other = [f"{key}={own!r}" for key, own, usual in values if own != usual]
    if not other:
        return []
    return [f"a file of LAVIS does not say {', '.join(other)}: give that again when it is read"]


def _picture(model: BlipModel) -> Picture:
    images, _ = load_preprocess(model)
    mean, std = images["eval"].norm().tolist()
    return Picture(model.config.image_size, mean, std)


def _fetched(
    model: BlipModel, prefix: str, found: Source, opened: list[StoredWeights]
) -> Mapping[str, Tensor]:
    """A frozen part from where it lies, by our names; files that are read bit by bit join `opened`."""
    if prefix == LLM:
        for root in (found.data_root, None):
            place = Path(locate(model.config.llm_model, root).name) if model.config.llm_model else None
            if place is not None and place.is_dir() and (kept := _stored_llm(model, place)):
                opened.append(kept.stored)
                return kept
        load_frozen(model, prefix, found)
        llm: Any = model.llm.cpu()
        return {prefix + key: tensor for key, tensor in llm.model.state_dict().items()}
    part = model.get_submodule(prefix.rstrip("."))
    part.to_empty(device="cpu")
    load_frozen(model, prefix, found)
    part = model.get_submodule(prefix.rstrip("."))
    return {prefix + key: tensor for key, tensor in part.state_dict().items()}


def _origin(model: BlipModel, prefix: str, found: Source) -> str:
    """Where a frozen part that is left out lies, as the configuration says it.

    Raises:
        CheckpointError: it does not say.
    """
    key = FROZEN_KEYS[prefix]
    where = getattr(model.config, key)
    if where is None:
        raise CheckpointError(
            f"'{found.name}' leaves out {prefix.rstrip('.')}, and nothing says where its weights are; give"
            f" {key}=..."
        )
    return str(where)


class _StoredLlm(Mapping[str, Tensor]):
    """A language model's tensors by our names, from the folder that transformers reads it from."""

    def __init__(self, stored: StoredWeights, names: dict[str, str]) -> None:
        self.stored, self._names = stored, names

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stored_llm(model: BlipModel, folder: Path) -> _StoredLlm | None:
    """What a folder holds of the language model; None where transformers has to change some of it."""
    try:
        stored = StoredWeights(folder)
    except CheckpointError:
        return None
    llm: Any = cast(Any, model.llm).model
    base = f"{llm.base_model_prefix}."
    first: dict[int, str] = {}
    shared = {n: first.setdefault(id(p), n) for n, p in llm.named_parameters(remove_duplicate=False)}
    names: dict[str, str] = {}
    for name, wanted in llm.state_dict().items():
        same = [name, shared.get(name, name)]
        spelled = [s for n in same for s in (n, n.removeprefix(base), base + n)]
        place = next((s for s in spelled if s in stored and stored[s].shape == wanted.shape), None)
        if place is None:
            return None
        names[LLM + name] = place
    return _StoredLlm(stored, names)


class _Joined(Mapping[str, Tensor]):
    """Several mappings as one; names are in one of them each."""

    def origin(self, name: str) -> Hashable:
        """As of `blip.weights.origin`."""
        return id(self._of[name]), origin(self._of[name], name)

    def __init__(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        self._of = {name: part for part in parts for name in part}

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _check_target(place: Path, to: str) -> None:
    if to not in get_args(Layout):
        raise UsageError(f"--to {to}: no such layout; choose from {', '.join(get_args(Layout))}")
    if to == "lavis" and place.suffix != ".pth":
        raise UsageError(f"'{place}': LAVIS's weights are one file; give a name that ends in .pth")
    if to != "lavis" and place.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise UsageError(f"'{place}': this layout is a folder of weights and configuration; give a folder")
    try:
        there = any(place.iterdir()) if place.is_dir() else place.exists()
    except OSError as error:
        raise UsageError(f"'{place}' cannot be written: {error.strerror or error}") from error
    if there:
        raise UsageError(f"'{place}' is there already; remove it, or give another name")


def _make_room(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to '{folder}': {error.strerror or error}") from error


def _checked(
    found: Source, known: Known, stored: Mapping[str, Tensor]
) -> tuple[BlipModel, list[str], list[str]]:
    """The model without memory, after weights of these names and shapes have been laid into it.

    Returns:
        It, lines of report, and names that the layout has no place for.

    Raises:
        CheckpointError: a name is missing, unexpected or of another shape.
    """
    model: BlipModel = sketch(lambda: known.cls.build(known.config, found.data_root), f"'{found.name}'")
    absent = left_out(known.weights.tensors, model.freezable)
    check_size(model, stored, absent, f"'{found.name}'")
    model.on_step(sys.maxsize)
    if found.processors is not None:
        model.processors = found.processors
    weights = known.weights
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in weights.tensors.items()}
    lines = fill(model, Recognised(weights.arch, shapes, weights.absent), f"'{found.name}'", absent)
    lacking = [key for key in model.state_dict() if key not in shapes and matches(key, weights.absent)]
    return model, lines, lacking


def _through(first: list[Line], second: list[Line]) -> list[Line]:
    """Two conversions as one: what became of the source's keys."""
    if not first:
        return second
    origin = {key: line.source for line in first for key in line.target}
    joined = [line for line in first if not line.target]
    for line in second:
        source = tuple(dict.fromkeys(key for ours in line.source for key in origin.get(ours, (ours,))))
        joined.append(Line(source, line.target, line.note))
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0 done, 2 what cannot be converted."""
    args = _parser().parse_intermixed_args(argv)
    set_up_logging()
    return guard(lambda: _run(args), debug=args.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip convert", description="Convert weights between our, LAVIS's and Hugging Face's layout."
    )
    add = parser.add_argument
    add("source", metavar="IN", help="LAVIS's .pth, a Hugging Face folder or hub id, or a run folder")
    add("out", metavar="OUT", help="folder to make, or a .pth to write (--to lavis)")
    add("--to", required=True, choices=get_args(Layout), help="layout to write")
    add("--arch", help="registry name of the model; default: recognised by its files")
    add("--model-type", help="preset, where the weights do not tell it")
    text = "of frozen parts that lie elsewhere: refer to them (default), or copy them"
    add("--frozen", choices=get_args(Frozen), default="refer", help=text)
    add("--shard-size", default="5GB", help="largest file, such as 500MB; default: 5GB")
    add("--keys", action="store_true", help="print what became of every key")
    add(
        "overrides", nargs="*", metavar="key=value", help="keys of the section model that tensors cannot tell"
    )
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _run(args: argparse.Namespace) -> None:
    done = convert(
        args.source,
        args.out,
        args.to,
        arch=args.arch,
        model_type=args.model_type,
        frozen=args.frozen,
        shard_bytes=_bytes(args.shard_size),
        **model_overrides(args.overrides, signature(convert).parameters),
    )
    if args.keys:
        for line in done.lines:
            print(line)
    for note in done.notes:
        print(note)
    counts: dict[str, int] = {}
    for line in done.lines:
        counts[line.note] = counts.get(line.note, 0) + max(len(line.source), len(line.target))
    print(f"{done.arch}: " + ", ".join(f"{count} {note}" for note, count in counts.items()))
    print(f"wrote {some([str(file) for file in done.files])}")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UsageError(f"--shard-size {text}: give a size such as 500MB or 5GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


if __name__ == "__main__":
    sys.exit(main())
