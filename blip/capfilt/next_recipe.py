"""The recipe that trains on what was kept: that of pre-training, with other datasets."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blip.capfilt.output import Made
from blip.config.load import load_config
from blip.config.schema import Config, DatasetConfig
from blip.data.locate import available_splits, locate
from blip.tasks.capfilt import CapFiltRun

log = logging.getLogger(__name__)

_PLACE = (
    *("path", "images", "format", "split", "columns", "types", "build_info", "features", "remote"),
    *("cache_dir", "num_samples", "max_samples"),
)
"""Keys of a section that tell where its data lies, and how it is read."""


def passed_on(run: CapFiltRun) -> list[str]:
    """What holds for the recipes of training, too, where it is given."""
    values = {"data_root": run.data_root, "device": run.device, "deterministic": run.deterministic}
    return [
        f"run.{key}={json.dumps(value)}"
        for key, value in values.items()
        if value not in (None, "auto", False)
    ]


def next_recipe(
    config: Config, run: CapFiltRun, folder: Path, made: Mapping[str, Made], before: Mapping[str, int]
) -> Config | None:
    """The recipe `run.pretrain`, to train on what was made and on what people wrote; None: there is none.

    What the recipe is evaluated on stays. A dataset that it knows keeps what it says of it, with a sample
    ratio that goes with the number of texts; others without processors get those of its first one.

    Args:
        config: of CapFilt.
        run: its section `run`.
        folder: of what was made.
        made: NAME, or NAME-SPLIT -> what was made of it.
        before: the same -> number of its texts before, or of its pictures if there were none.
    """
    if run.pretrain.recipe is None:
        return None
    found = load_config(run.pretrain.recipe, [*run.pretrain.options, *passed_on(run)])
    known = found.datasets
    first = next(iter(known.values()), DatasetConfig())
    sections = {}
    for name, one in made.items():
        if one.texts:
            like = known.get(name, _origin(config.datasets, name))
            sections[name] = _section(like, folder, one)
            if like.sample_ratio is not None:
                sections[name].sample_ratio = round(like.sample_ratio * one.texts / max(before[name], 1), 6)
    sections |= {name: _human(known.get(name), config.datasets[name]) for name in run.human}
    found.datasets = {}
    for name, section in sections.items():
        like = known.get(name, first)
        found.datasets[name] = replace(
            section,
            vis_processor=section.vis_processor or like.vis_processor,
            text_processor=section.text_processor or like.text_processor,
        )
    ratios = {name: section.sample_ratio for name, section in found.datasets.items()}
    if lacking := [name for name, ratio in ratios.items() if ratio is None and any(ratios.values())]:
        log.warning(
            "%s has sample ratios, and datasets.%s has none; give it one before you train on it",
            *(run.pretrain.recipe, lacking[0]),
        )
    wanted = [*found.run.valid_splits, *found.run.test_splits]
    for name, section in known.items():
        have = [s for s in available_splits(name, section, run.data_root) if s in wanted]
        if name not in found.datasets and have:
            found.datasets[name] = _only(name, section, have, run.data_root)
        elif name in made and have:  # what was made of it takes its name
            found.datasets[f"{name}-eval"] = _only(name, section, have, run.data_root, elsewhere=True)
    return found


def _origin(sections: Mapping[str, DatasetConfig], name: str) -> DatasetConfig:
    """The section that NAME, or NAME-SPLIT, was made of."""
    if name in sections:
        return sections[name]
    return sections[max((one for one in sections if name.startswith(f"{one}-")), key=len)]


def _human(known: DatasetConfig | None, own: DatasetConfig) -> DatasetConfig:
    """What people wrote, as the recipe of pre-training has it, but from where CapFilt's section says."""
    if known is None or (own.path is None and not own.build_info):
        return known or own
    return replace(known, **{name: getattr(own, name) for name in _PLACE})


def _section(web: DatasetConfig, folder: Path, made: Made) -> DatasetConfig:
    """What was made, to be trained on as the web's was."""
    places = [str((folder / path).resolve()) for path in made.paths]
    return replace(
        web,
        path=places,
        images=made.images or None,
        format="auto",
        split=None,
        columns={},
        types=[],
        build_info={},
        features=None,
        remote=False,
        cache_dir=None,
        num_samples=None,
        max_samples=None,
    )


def _only(
    name: str,
    section: DatasetConfig,
    splits: Sequence[str],
    data_root: str | Path | None,
    elsewhere: bool = False,
) -> DatasetConfig:
    """Some splits of a dataset; `elsewhere` it has another name, by which no catalogue knows it."""
    if len(splits) == 1 and not elsewhere:
        return replace(section, split=splits[0])
    sources = {split: locate(name, section, split, data_root) for split in splits}
    return replace(
        section,
        path={split: [str(path.resolve()) for path in source.paths] for split, source in sources.items()},
        images={
            split: [str(root) for root in source.roots]
            for split, source in sources.items()
            if all(source.roots)
        }
        or None,
        split=None,
        columns=next(iter(sources.values())).columns,
    )
