"""Models and data by name: lists, loading with published or own weights, processors, datasets.

What is known of a single model stands in its class (`presets`, `published`, `freezable`, `sizes_of`, ...).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip.config.typed import typed_section
from blip.data.browse import Pairs, open_splits
from blip.data.makers import make_processor
from blip.errors import CheckpointError, ConfigError, UsageError, hint
from blip.formats.hf_config import as_lavis, to_model
from blip.formats.hf_llm import with_rows, without_image_rows
from blip.formats.limits import check_size, sketch
from blip.formats.load import fill
from blip.formats.objects import as_values
from blip.formats.source import (
    Recognised,
    Source,
    cached_snapshot,
    downloaded,
    left_out,
    not_here,
    open_copy,
    open_source,
    recognise,
    torch_cache,
)
from blip.meta import on_meta
from blip.models.base import BlipModel
from blip.models.published import model_zoo
from blip.registry import MODELS
from blip.stored.values import check_values
from blip.weights import read_weights

log = logging.getLogger(__name__)

Processors = dict[str, Any]
"""`train` and `eval` -> what turns a picture into a tensor, or a text into a cleaned one."""


def list_models(pattern: str | None = None) -> dict[str, list[str]]:
    """Registry names, all or those that match a shell-style pattern -> model types, the default one first."""
    return {name: list(MODELS.get(name).presets) for name in MODELS.names(pattern or "*")}


def load_model(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    **overrides: Any,
) -> Any:
    """A model by its registry name, with weights.

    On a CPU published weights compute in float32, as in LAVIS.

    Args:
        name: see `list_models`.
        model_type: preset; None: that of the checkpoint, else the first one.
        is_eval: set evaluation mode.
        device: where to put it. With `pretrained=False`, `meta` gives sizes without memory, in seconds.
        checkpoint: weights to load, as `from_pretrained` takes them.
        pretrained: without `checkpoint`, load the weights that LAVIS publishes; they must be on this machine:
            in torch's cache or below the data root (BLIP_DATA), or else transformers' conversion of them in
            the hub's cache. Nothing is fetched; `model_zoo` has the addresses. False: random weights, but for
            parts whose files `overrides` name (`vit_init_from`).
        **overrides: configuration values, sections as dictionaries: `vit={"depth": 4}`.

    Raises:
        ConfigError: unknown name, type or key, or values that cannot be built.
        CheckpointError: weights that are missing, unreadable or of another model; the message has the address
            of published ones.
    """
    cls, device = MODELS.get(name), _device(device)
    _check_type(name, cls, model_type)
    if checkpoint is None:
        model_type = model_type or next(iter(cls.presets), "")
        if not pretrained:
            return _placed(_from_scratch(cls, name, model_type, overrides, device), is_eval, device)
        return _load(_official(name, model_type), name, model_type, is_eval, device, overrides)
    return _load(open_source(checkpoint), name, model_type, is_eval, device, overrides)


def from_pretrained(
    source: str | Path,
    device: str | torch.device = "cpu",
    is_eval: bool = True,
    arch: str | None = None,
    model_type: str | None = None,
    **overrides: Any,
) -> Any:
    """The model that weights belong to, with them.

    Args:
        source: run folder (its final model, else best, else newest checkpoint), checkpoint, folder that
            `save_pretrained` or transformers wrote, LAVIS's .pth, or hub id.
        device: where to put it.
        is_eval: set evaluation mode.
        arch: registry name; None: the one that is saved with the weights, else recognised by their names.
        model_type: preset for weights without a configuration; None: the one that fits their sizes.
        **overrides: configuration values that win over what comes with the weights, sections as
            dictionaries; a configuration of transformers may stand for `llm_model` and `llm["sizes"]`, a
            tokenizer, or its folder, for `tokenizer` and `llm["tokenizer"]`.

    Raises:
        CheckpointError: missing or unreadable, of no known model, or of other sizes.
        ConfigError: unknown name, type or key.
    """
    device = _device(device)
    if arch is not None:
        _check_type(arch, MODELS.get(arch), model_type)
    return _load(open_source(source), arch, model_type, is_eval, device, overrides)


def load_preprocess(
    model: BlipModel | str, model_type: str | None = None, **overrides: Any
) -> tuple[Processors, Processors]:
    """Processors of pictures and of texts, each for `train` and `eval`.

    Args:
        model: a model, whose own processors these are, or a registry name.
        model_type: preset, for a name.
        **overrides: as `load_model`, for a name.

    Raises:
        ConfigError: unknown name, type or key.
    """
    if isinstance(model, str):
        cls = MODELS.get(model)
        _check_type(model, cls, model_type)
        config = _config(cls, model, model_type or next(iter(cls.presets), ""), {}, overrides)
        sections = cls.default_processors
    else:
        config, sections = model.config, model.processors
    size = getattr(config, "image_size", None)
    made = []
    for kind, images in (("vis_processor", True), ("text_processor", False)):
        own = {"image_size": size} if images and size else {}  # the tower takes no other
        entries = sections[kind].items()
        made.append({s: make_processor({**entry, **own}, f"{kind}.{s}", images) for s, entry in entries})
    return made[0], made[1]


def load_model_and_preprocess(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    **options: Any,
) -> tuple[Any, Processors, Processors]:
    """A model, its processors of pictures, and those of texts; arguments and errors as `load_model`."""
    model = load_model(name, model_type, is_eval, device, **options)
    return model, *load_preprocess(model)


def to_hf(model: BlipModel) -> Any:
    """The transformers model with the weights of this one, in eval mode and float32.

    Raises:
        UsageError: transformers has no such model.
        CheckpointError: weights that its layout has no place for.
    """
    arch = model.config.arch or next((n for n in MODELS.names() if MODELS.get(n) is type(model)), "")
    return to_model(arch, model)


def load_dataset(
    name: str,
    root: str | Path | None = None,
    split: str | Sequence[str] | None = None,
    vis_path: str | Path | None = None,
    **options: Any,
) -> dict[str, Pairs]:
    """The image-text pairs of a dataset, by split: PIL pictures and texts as they are stored.

    Args:
        name: of the catalogue (`blip data list`), or any other with a `path`.
        root: data root; None: the environment variable BLIP_DATA, else `data`.
        split: one or several; None: all of which files are there.
        vis_path: LAVIS's name of `images`, the folder that the picture paths of the records start from.
        **options: what `datasets.NAME` of a configuration takes: `path`, `images`, `columns`, ...

    Raises:
        DataError: unknown name or split, or files that are missing; the message tells how to get them.
        ConfigError: unknown or wrong options.
    """
    if vis_path is not None:
        options["images"] = str(vis_path)
    return open_splits(name, root, [split] if isinstance(split, str) else split, options)


def _check_type(name: str, cls: type[BlipModel], model_type: str | None) -> None:
    if model_type is not None and model_type not in cls.presets:
        raise ConfigError(f"{name} has no model type {model_type!r}{hint(model_type, cls.presets)}")


def _config(
    cls: type[BlipModel],
    arch: str,
    model_type: str,
    found: Mapping[str, Any],
    overrides: Mapping[str, Any],
    preset: Mapping[str, Any] | None = None,
) -> Any:
    """What came with the weights (`found`), over it the preset, over it the overrides."""
    layers: dict[str, Mapping[str, Any]] = {
        "saved with the weights": found,
        f"preset {arch}/{model_type}": cls.presets.get(model_type, {}) if preset is None else preset,
        "argument": {**as_values(overrides), "arch": arch, "model_type": model_type},
    }
    return typed_section(cls.config_class, layers)


class Known(NamedTuple):
    """What weights are, before a model is built for them."""

    cls: type[BlipModel]
    config: Any
    weights: Recognised


def identify(
    source: Source,
    tensors: Mapping[str, Tensor],
    arch: str | None,
    model_type: str | None,
    device: torch.device,
    overrides: dict[str, Any],
) -> Known:
    """The model that weights belong to, its configuration, and the weights by our names.

    Args:
        source: where they were found.
        tensors: as they are stored; names and shapes are looked at, and few values.
        arch, model_type, overrides: as of `from_pretrained`.
        device: where the model will be: on a CPU foreign weights compute in float32.

    Raises:
        CheckpointError: of no known model, or its sizes remain open.
        ConfigError: an unknown name, type or key.
    """
    name = f"'{source.name}'"
    values = source.values or {}
    weights = recognise(tensors, arch or values.get("arch") or None, name)
    if source.values is not None and not source.own:
        source.values, own = without_image_rows(source.values, weights.tensors, source.image_token)
        weights = weights._replace(tensors=own)
    weights = weights._replace(absent=[*weights.absent, *source.absent])
    arch = arch or values.get("arch") or weights.arch
    if not arch:
        raise CheckpointError(
            f"{name}: nothing says which model these weights are of; give arch=, one of"
            f" {', '.join(MODELS.names())}"
        )
    cls = MODELS.get(arch)
    if source.own:
        model_type = model_type or values.get("model_type", "")
        if values.get("arch", arch) != arch:  # a relative, which has no place for some of it
            values = {key: value for key, value in values.items() if key in fields_of(cls)}
        config = _config(cls, arch, model_type, values, overrides, preset={})  # the values are complete
    else:
        config = _foreign_config(source, weights, cls, arch, model_type, device, overrides)
    return Known(cls, config, weights)


def _load(
    source: Source,
    arch: str | None,
    model_type: str | None,
    is_eval: bool,
    device: torch.device,
    overrides: dict[str, Any],
) -> Any:
    stored = read_weights(source.weights)
    known = identify(source, stored, arch, model_type, device, overrides)
    name = f"'{source.name}'"
    # A configuration from elsewhere may ask for more memory than there is.
    meant = sketch(lambda: known.cls.build(known.config, source.data_root), name)
    check_size(meant, stored, left_out(known.weights.tensors, meant.freezable), name)
    model = known.cls.build(known.config, source.data_root)
    if source.processors is not None:
        model.processors = source.processors
    _fill(model, known.weights, source)
    return _placed(model, is_eval, device)


def _foreign_config(
    source: Source,
    weights: Recognised,
    cls: type[BlipModel],
    arch: str,
    model_type: str | None,
    device: torch.device,
    overrides: dict[str, Any],
) -> Any:
    """The configuration of weights that others wrote: what their files tell, then the preset that fits."""
    found, unknown = measured = cls.sizes_of(weights.tensors)
    check_values(found, f"'{source.name}': what its tensors tell")
    if source.values is not None:
        found, unknown = dict(source.values), []
        if found.pop("arch", arch) != arch:  # a relative, which has no place for some of it
            found = {key: value for key, value in found.items() if key in fields_of(cls)}
    preset: Mapping[str, Any] | None = None
    if model_type is None:  # what was found out wins over a preset that nobody asked for
        model_type = _fitting_preset(cls, measured.values)
        preset = dict(cls.presets.get(model_type, {}))
        for key in preset.keys() & found.keys():
            if key == "llm" and source.values is None:  # tensors tell rows; how it is used the preset does
                preset[key] = {k: v for k, v in preset[key].items() if k not in found[key]}
            else:
                del preset[key]
    given = cls.presets.get(model_type, {}) if preset is None else preset
    open_keys = [key for key in unknown if not (_has(given, key) or _has(overrides, key))]
    if open_keys:
        raise CheckpointError(
            f"'{source.name}': its tensors do not tell {', '.join(open_keys)}; give them too, as in"
            f" {_example(open_keys[0])}"
        )
    overrides = with_rows(as_values(overrides), weights.tensors)
    if device.type == "cpu":
        overrides = {**cls.on_cpu, **overrides}
    return _config(cls, arch, model_type, found, overrides, preset)


def fields_of(cls: type[BlipModel]) -> set[str]:
    """Keys of the section `model` that a model has."""
    return {part.name for part in fields(cls.config_class)}


def _fitting_preset(cls: type[BlipModel], measured: Mapping[str, Any]) -> str:
    """The preset that agrees with most of what tensors tell, the first of several."""
    defaults = {part.name: part.default for part in fields(cls.config_class)}

    def agreement(name: str) -> int:
        whole = {**defaults, **cls.presets[name]}
        return sum(whole.get(key) == value for key, value in measured.items())

    return max(cls.presets, key=agreement, default="")


def _fill(model: BlipModel, weights: Recognised, source: Source) -> None:
    """Weights into the model; what they leave out on purpose from where the configuration says."""
    # A part that is trained first and then frozen in a precision of its own has been frozen by now.
    model.on_step(sys.maxsize)
    absent = left_out(weights.tensors, model.freezable)
    model.load_report = fill(model, weights, f"'{source.name}'", absent)
    for line in model.load_report:
        log.info("%s", line)
    for prefix in absent:
        load_frozen(model, prefix, source)


def _official(arch: str, model_type: str) -> Source:
    """The published weights of a preset, or transformers' conversion of them, from this machine.

    Raises:
        CheckpointError: there are none; or they are not here: where to get them and where to put them.
    """
    entry = model_zoo.get(arch, model_type)
    if entry.weights is None:
        raise CheckpointError(
            f"no weights are published for {arch} {model_type!r}; give checkpoint=PATH or a hub id, or"
            " pretrained=False for random ones"
        )
    if downloaded(entry.weights) is not None or entry.hub_id is None:
        return open_source(entry.weights)
    folder = cached_snapshot(entry.hub_id)
    other = entry.hub_of is not None
    conversion = f"transformers' conversion of {f'other weights, {entry.hub_of}' if other else entry.file}"
    if folder is None:
        raise CheckpointError(
            f"{not_here(entry.weights)}; or get {conversion}, into the hub's cache with"
            f" 'hf download {entry.hub_id}'"
        )
    report = log.warning if other else log.info
    report("%s is not on this machine; taken is %s, %s", entry.file, entry.hub_id, conversion)
    source = open_copy(folder, entry.hub_id)
    source.values = as_lavis(source.values or {})
    return source


def load_frozen(model: BlipModel, prefix: str, source: Source) -> None:
    """Load a frozen part that weights leave out: from where the run did, below the data root, and where LAVIS
    keeps its downloads.

    Args:
        model: gets it.
        prefix: one of `model.freezable`.
        source: of the weights.

    Raises:
        CheckpointError: nothing says where it is, or it is not there.
    """
    failure: CheckpointError | ConfigError | None = None
    for root in dict.fromkeys((source.data_root, None, str(torch_cache()))):
        try:
            if model.load_frozen([prefix], root):
                return
            failure = failure or CheckpointError("it was frozen, and nothing says where its weights are")
        except (CheckpointError, ConfigError) as error:
            failure = failure or error
    raise CheckpointError(f"'{source.name}' leaves out {prefix.rstrip('.')}: {failure}") from failure


def _from_scratch(
    cls: type[BlipModel],
    arch: str,
    model_type: str,
    overrides: Mapping[str, Any],
    device: torch.device,
) -> BlipModel:
    """Random weights; of the parts only those are read whose source an override names, none on `meta`."""
    preset = _without_sources(cls.presets.get(model_type, {}))
    if "llm_model" in preset and "llm_model" not in overrides:
        preset["load_llm"] = False
    config = _config(cls, arch, model_type, {}, overrides, preset)
    if device.type == "meta":
        with on_meta():
            return cls.build(config)
    model = cls.build(config)
    for line in model.load_parts():
        log.info("%s", line)
    return model


def _without_sources(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without `init_from`, `vit_init_from` and the like, in sections as well."""
    return {
        key: _without_sources(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not key.endswith("init_from")
    }


def _device(device: str | torch.device) -> torch.device:
    """Raises UsageError for a device that is not there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = (str(error).strip() or "unknown").splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used ({reason}); give 'cpu'") from error


def _placed(model: BlipModel, is_eval: bool, device: torch.device) -> Any:
    return model.to(device).train(not is_eval)


def _has(tree: Mapping[str, Any], dotted: str) -> bool:
    key, _, rest = dotted.partition(".")
    below = tree.get(key)
    if is_dataclass(below):
        return True
    return _has(below, rest) if rest and isinstance(below, Mapping) else not rest and key in tree


def _example(dotted: str) -> str:
    key, _, rest = dotted.partition(".")
    return f'{key}={{"{rest}": ...}}' if rest else f"{key}=..."
