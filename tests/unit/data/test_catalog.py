from __future__ import annotations

from pathlib import Path

import pytest

from blip.config.schema import SPLITS
from blip.data.catalog import table as catalog
from blip.data.catalog.table import CATALOG
from blip.data.kinds import KINDS
from blip.data.tars import expand
from blip.errors import DataError


def test_names_of_lavis_and_of_the_embedded_data_are_known() -> None:
    assert {"coco_caption", "coco_retrieval", "vg_caption", "flickr30k", "laion400M"} <= set(catalog.names())
    assert {"coco_vqa", "vg_vqa", "ok_vqa", "aok_vqa", "nlvr", "snli_ve", "nocaps"} <= set(catalog.names())
    assert {"conceptual_caption_3m", "conceptual_caption_12m", "sbu_caption", "capfilt14m"} <= set(
        catalog.names()
    )
    assert [name for name in catalog.names() if CATALOG[name].embedded] == [
        "scenes",
        "scenes_vqa",
        "scenes_instruct",
        "scenes_nlvr",
        "scenes_answers",
        "scenes_web",
        "scenes_shards",
        "scenes_web_shards",
    ]


@pytest.mark.parametrize("name", CATALOG)
def test_every_row_is_complete_and_stays_below_the_root(name: str) -> None:
    row = catalog.row(name)
    assert row.kind in ("retrieval", *KINDS)
    assert set(row.splits) <= set(SPLITS)
    assert row.about
    assert row.embedded or row.pictures
    assert bool(row.images) == (row.format != "shards")
    assert row.format == "shards" or row.embedded or row.annotations
    assert set(row.official) | set(row.judged) <= set(row.splits)
    for text in [*row.files, *row.others, *row.judged.values(), row.images]:
        assert all(not Path(path).is_absolute() and ".." not in path for path in expand(text))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"no dataset 'coco_capton' in the catalogue; did you mean 'coco_caption'"
    ):
        catalog.row("coco_capton")


def test_the_root_is_configured_or_from_the_environment_or_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLIP_DATA", raising=False)
    assert catalog.data_root() == Path("data")
    monkeypatch.setenv("BLIP_DATA", "/big/disk")
    assert catalog.data_root() == Path("/big/disk")
    assert catalog.data_root("~/mine") == Path.home() / "mine"


def test_the_remedy_is_one_command_for_all_that_is_missing() -> None:
    more = ", which says what to bring where, or set run.data_root (or BLIP_DATA) to where it is"
    assert catalog.remedy(["mine"]) == ""
    assert catalog.remedy(["scenes_web", "scenes"]) == "run 'blip data make scenes'"
    assert catalog.remedy(["coco_caption"]) == f"run 'blip data prepare coco_caption'{more}"
    assert (
        catalog.remedy(["vg_caption", "mine", "coco_caption", "vg_caption", "scenes"])
        == f"run 'blip data make scenes' and run 'blip data prepare vg_caption coco_caption'{more}"
    )
