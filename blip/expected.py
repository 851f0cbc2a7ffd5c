"""Which published scores a run may be held against, and what sets it apart from how they were reached."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from blip.config.load import COMMAND_LINE
from blip.config.published import Published, read_published
from blip.config.schema import Config, DatasetConfig
from blip.config.typed import typed_section
from blip.engine.comparison import Comparison, Expected
from blip.errors import ConfigError, hint
from blip.metrics.caption import score_names
from blip.models.published import model_zoo
from blip.registry import MODELS
from blip.tasks.captioning import BY_DOMAIN, DOMAINS

SIZES = ("vit_model", "vit_type", "vit", "med", "qformer", "num_query_token", "llm")
"""Keys of `model` that make a larger or smaller one of it."""
INNER = ("width", "depth", "heads", "num_heads", "mlp_dim", "patch_size", "sizes")
"""The same inside sections."""


def expected(config: Config, task: Any, start: str | None, trained: bool) -> Comparison:
    """What `run.published` says about this run's model and data.

    Args:
        task: of the run, which knows the names of metrics.
        start: where the weights come from; None: from nowhere.
        trained: they start a training, or are the result of one by this configuration.

    Raises:
        ConfigError: a dataset or a metric that the run does not have.
    """
    rows = read_published(config.run.published)
    if not rows:
        return Comparison()
    _check(rows, config, task)
    rows = [row for row in rows if row.model_type in ("", config.model.model_type)]
    captions = score_names() if "CIDEr" in task.scores() else []
    names = [*captions, *(name for row in rows for name in row.scores if name.split("_")[0] in captions)]
    rows = _of_weights(rows, config, start, trained)
    own = _differences(config)
    found = [
        Expected(row, (*_subset(config, row), *own, *_origin(row, config, start, trained))) for row in rows
    ]
    return Comparison(found, dict.fromkeys(names, 100.0))


def _check(rows: list[Published], config: Config, task: Any) -> None:
    known = task.scores()
    if "CIDEr" in known:
        by_domain = [f"{name}_{domain}" for domain in DOMAINS for name in BY_DOMAIN]
        known = [*known, *score_names(), *by_domain]  # also those that this machine cannot compute
    open_ended = tuple(name.removesuffix("*") for name in known if name.endswith("*"))
    for number, row in enumerate(rows):
        key = f"run.published.{number}"
        if row.dataset not in config.datasets:
            raise ConfigError(
                f"{key}.data: the run has no dataset {row.dataset!r}{hint(row.dataset, config.datasets)}"
            )
        for metric in row.scores:
            if known and metric not in known and not (open_ended and metric.startswith(open_ended)):
                raise ConfigError(
                    f"{key}.scores: run.task {config.run.task} gives no {metric!r}{hint(metric, known)};"
                    " run.published=[] leaves all of them out"
                )


def _file(address: str | None) -> str:
    return (address or "").rstrip("/").rpartition("/")[2]


def _names(row: Published, config: Config, trained: bool) -> tuple[str, ...]:
    """Files that the weights of a row may be; empty: nobody knows."""
    if row.weights:
        return row.weights
    if (key := (config.model.arch, config.model.model_type)) not in model_zoo:
        return ()  # of another package
    entry = model_zoo[key]
    names = [entry.starts_from] if trained else [entry.weights, entry.hub_id]
    return tuple(_file(name) for name in names if name)


def _of_weights(rows: list[Published], config: Config, start: str | None, trained: bool) -> list[Published]:
    """For each part of the data the rows of the very weights; where there are none, all."""
    fit = [row for row in rows if _file(start) in _names(row, config, trained)]
    covered = {row.data for row in fit}
    return [row for row in rows if row in fit or row.data not in covered]


def _origin(row: Published, config: Config, start: str | None, trained: bool) -> list[str]:
    names = _names(row, config, trained)
    if not names or _file(start) in names:
        return []
    if "unreleased" in names:
        return ["published for weights that were never released"]
    what = "for what starts from" if trained else "for"
    return [f"published {what} {' or '.join(names)}, and this is {_file(start) or 'nothing of the kind'}"]


def _subset(config: Config, row: Published) -> list[str]:
    """Settings by which less, or something else, is evaluated than the split."""
    section: DatasetConfig = config.datasets[row.dataset]
    name = f"datasets.{row.dataset}"
    found = []
    if section.max_samples is not None:
        found.append(f"a subset: {name}.max_samples={section.max_samples}")
    if section.types:
        found.append(f"a subset: {name}.types={','.join(section.types)}")
    if img_ids := getattr(config.run, "img_ids", None):
        found.append(f"a subset: run.img_ids has {len(img_ids)} pictures")
    if section.path is not None:
        found.append(f"other annotations: {name}.path")
    return found


def _differences(config: Config) -> list[str]:
    """Sizes that are not those of the model type; of pictures, sizes that the command line has changed."""
    cls, arch, model_type = MODELS.get(config.model.arch), config.model.arch, config.model.model_type
    layers = {"preset": cls.presets.get(model_type, {}), "argument": {"arch": arch, "model_type": model_type}}
    usual = typed_section(cls.config_class, layers)
    own = [key for key in SIZES if hasattr(usual, key)]
    keys = [key for key in own if _sizes(getattr(usual, key)) != _sizes(getattr(config.model, key))]
    if config.origins.get("model.image_size") == COMMAND_LINE:
        keys.append("image_size")
    found = ", ".join(f"model.{key}" for key in keys)
    return [f"other sizes than those of {arch}/{model_type}: {found}"] if keys else []


def _sizes(value: Any) -> Any:
    """Of a section, what makes it larger or smaller."""
    return {k: getattr(value, k) for k in INNER if hasattr(value, k)} if is_dataclass(value) else value
