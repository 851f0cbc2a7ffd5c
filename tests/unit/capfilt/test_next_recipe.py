"""The recipe that trains on what was kept is that of pre-training, with other datasets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blip.capfilt.next_recipe import next_recipe
from blip.capfilt.output import Made
from blip.capfilt.rounds import _size
from blip.capfilt.select import Tally
from blip.capfilt.units import open_pool
from blip.capfilt.work import web_sets
from blip.config.load import load_config
from blip.config.schema import Config, DatasetConfig
from blip.errors import ConfigError

OWN = "datasets.web={path: {train: a.csv, extra-web: b.csv}}"
TWO = ["datasets.scenes_web=null", OWN, "run.train_splits=[train,extra-web]"]


def config(*options: str) -> Config:
    return load_config("tiny/capfilt.yaml", ["model.init_from=x", *options])


def recipe(made: dict[str, int], before: dict[str, int], *options: str) -> dict[str, Any]:
    own = config(*options)
    files = {name: Made([f"{name}/web.json"], ["/pictures"], count) for name, count in made.items()}
    found = next_recipe(own, own.run, Path("/kept"), files, before)
    assert found is not None
    return found.datasets


def test_splits_of_any_name_become_datasets_of_their_own() -> None:
    assert web_sets(config(*TWO)) == {"web": ["train", "extra-web"]}
    made = {"web-train": 3, "web-extra-web": 4}
    found = recipe(made, made, *TWO)
    assert [name for name in found if name.startswith("web")] == list(made)
    assert found["web-extra-web"].path == ["/kept/web-extra-web/web.json"]


def test_two_datasets_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.web-train: a split of another dataset is called so"):
        web_sets(config(*TWO, "datasets.web-train={path: c.csv}"))


def test_human_texts_come_from_where_capfilts_section_says() -> None:
    own = "datasets.scenes={path: mine.json, images: photos, columns: {caption: said}}"
    found = recipe({"scenes_web": 3}, {"scenes_web": 6}, own)["scenes"]
    assert (found.path, found.images, found.columns) == ("mine.json", "photos", {"caption": "said"})
    assert found.vis_processor["train"]["image_size"] == 63
    assert recipe({"scenes_web": 3}, {"scenes_web": 6})["scenes"].path is None


def test_what_the_recipe_is_evaluated_on_stays_where_its_dataset_is_cleaned(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text("[]")
    paths = f"path: {{train: {tmp_path}/train.json, val: {tmp_path}/val.json}}, images: {tmp_path}"
    options = f'run.pretrain.options=["datasets.scenes_web={{{paths}}}","run.valid_splits=[val]"]'
    found = recipe({"scenes_web": 3}, {"scenes_web": 6}, options)
    assert found["scenes_web"].path == ["/kept/scenes_web/web.json"]
    assert found["scenes_web-eval"].path == {"val": [str(tmp_path / "val.json")]}
    assert found["scenes_web-eval"].images == {"val": [str(tmp_path)]}


def test_of_shards_samples_are_counted_and_not_their_texts(tmp_path: Path) -> None:
    """A sample of five texts stays one sample: what is drawn of it does not become rarer."""
    for name in ("a.tar", "b.json"):
        (tmp_path / name).write_text('[{"image": "b.json", "caption": "c"}]')
    tally = Tally(pictures=10, texts=Counter(web=50))
    shards, records = (
        open_pool("mine", DatasetConfig(path=str(tmp_path / name)), "train", 2)
        for name in ("a.tar", "b.json")
    )
    assert (_size(shards, tally), _size(records, tally)) == (10, 50)
    assert _size(shards, Tally(pictures=10)) == _size(records, Tally(pictures=10)) == 10
