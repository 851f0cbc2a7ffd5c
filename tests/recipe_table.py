"""Writes `configs/README.md` from the recipes: python -m tests.recipe_table > configs/README.md"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from blip.build import start_of
from blip.config.load import load_config
from blip.config.published import Published, read_published
from blip.data.catalog.table import names
from blip.registry import MODELS

CONFIGS = Path(__file__).parents[1] / "configs"
PAPERS = ("BLIP, ", "BLIP-2, ", "InstructBLIP, ", "LAVIS")
UNRELEASED = "unreleased"

HEAD = """# Recipes and the figures that they are to reach

What each recipe does, its command and what it needs stand at its top. This table has every published figure
that the recipes know (`run.published`), by the paper's table, with the override that takes the row's model
where it is not the recipe's own: `python -m blip.evaluate --cfg RECIPE OVERRIDE`, or `blip.train` where a
recipe trains. A run shows its last scores beside them, on the terminal, in `report.html` and in
`published.json`.

Figures are as papers print them: in percent, and the metrics of captions times 100 (`metrics.jsonl` has
CIDEr 1.333 for 133.3). `txt_r1` is TR@1, image to text, and `img_r1` IR@1, text to image. `CIDEr_near` is
CIDEr on NoCaps's near-domain pictures as a corpus of their own, as its server counts. Where a server's
split is named, only the file in `submissions/` can be compared. `published` as `model.finetuned` or
`model.pretrained` stands for the weights of the model type, so that `model.model_type` alone takes others;
a file that `model.init_from` names is looked for as given, then where BLIP's weights are kept (see the
error of a run without them).

`python -m tests.recipe_table > configs/README.md` writes this file, and a test compares it with the
recipes.
"""
TAIL = """
## Not covered

- **BLIP, table 9 (VisDial)**: MRR 69.41, R@1 56.44, R@5 85.90, R@10 93.30, mean rank 3.20. The paper's
  model encodes caption and history with a dialog encoder of its own, and judges answers with a head of its
  own. Neither code nor weights were released, and no architecture here does this.
  `instructblip/zeroshot_visdial.yaml` ranks the same answers with InstructBLIP.
- **InstructBLIP, table 1, BLIP-2 with Vicuna-13B**: no weights were published, and there is no model type
  for it. Of BLIP-2 with FlanT5-XL no more than one, unconfirmed figure is known to us.
- **InstructBLIP, table 3, BLIP-2 with Vicuna-7B**: its stage 2 was not published; that with FlanT5-XXL is
  there.
- **BLIP-2, table 1** repeats rows of tables 2, 3 and 5.
- Rows that say *never released*: another recipe trains such a model (of the same data, its name ends in
  `_ft`), and `model.init_from=RUN_FOLDER` scores it.
"""


class Row(NamedTuple):
    """One published row of one recipe."""

    recipe: str
    row: Published
    override: list[str]
    """What takes the row's model: `key=value` of a command line."""
    released: bool


def rows() -> Iterator[Row]:
    """All of them, recipe by recipe."""
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        recipe = f"{path.parent.name}/{path.name}"
        config = load(str(path))
        for row in read_published(getattr(config.run, "published", [])):
            override = _model(config, row)
            chosen = load(str(path), *override)
            released = UNRELEASED not in row.weights
            if row.weights and released and _file(start_of(chosen)) not in row.weights:
                override.append(f"model.init_from={row.weights[0]}")
            yield Row(recipe, row, override, released)


@cache
def load(path: str, *override: str) -> Any:
    """The configuration of a recipe."""
    return load_config(path, override, known_datasets=names())


def _model(config: Any, row: Published) -> list[str]:
    """What takes the model type of a row."""
    own = config.model
    if row.model_type in ("", own.model_type):
        return []
    types = [name for name in MODELS.names() if row.model_type in MODELS.get(name).presets]
    arch = own.arch if own.arch in types else types[0]
    return ([f"model.arch={arch}"] if arch != own.arch else []) + [f"model.model_type={row.model_type}"]


def _file(address: str | None) -> str:
    return (address or "").rpartition("/")[2]


def table() -> str:
    """The whole file."""
    parts = [HEAD]
    found = list(rows())
    for paper in PAPERS:
        mine = [row for row in found if row.row.source.startswith(paper)]
        mine.sort(key=lambda row: (_number(row.row.source), row.recipe, row.row.source))
        title = paper.removesuffix(", ") + ("'s own evaluation" if paper == "LAVIS" else "")
        parts.append(f"\n## {title}\n\n| row | data | recipe | override | figures |\n|---|---|---|---|---|\n")
        parts += [_line(row, paper) for row in mine]
    return "".join([*parts, TAIL])


def _number(source: str) -> int:
    digits = source.partition("table ")[2].partition(",")[0]
    return int(digits) if digits.isdigit() else 0


def _line(row: Row, paper: str) -> str:
    override = " ".join(f"`{part}`" for part in row.override)
    if not row.released:
        override = f"{override} (never released)".strip()
    figures = ", ".join(f"{name} {value:g}" for name, value in row.row.scores.items())
    notes = "; ".join(filter(None, [row.row.server and f"on {row.row.server}", row.row.note]))
    source = row.row.source.removeprefix(paper)
    figures += f" ({notes})" if notes else ""
    return f"| {source} | {row.row.data} | {row.recipe} | {override} | {figures} |\n"


if __name__ == "__main__":
    print(table(), end="")
