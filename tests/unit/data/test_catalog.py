from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from blip.config.load import load_config
from blip.config.schema import SPLITS
from blip.data.__main__ import main
from blip.data.catalog import table as catalog
from blip.data.catalog.instruct import QUESTIONS_OF
from blip.data.catalog.table import CATALOG
from blip.data.kinds import KINDS
from blip.data.streams.tars import expand
from blip.errors import ConfigError, DataError


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


# The names that LAVIS's builders of the BLIP family have, by the table of the reference.
LAVIS = re.findall(
    r"\w+",
    """coco_caption coco_caption_instruct flickr30k_caption flickr30k_caption_instruct nocaps vg_caption
vg_caption_instruct conceptual_caption_3m conceptual_caption_3m_instruct conceptual_caption_12m
conceptual_caption_12m_instruct sbu_caption sbu_caption_instruct textcaps_caption
textcaps_caption_instruct vsr_caption vsr_caption_instruct capfilt14m capfilt14m_instruct coco_retrieval
flickr30k msrvtt_retrieval didemo_retrieval coco_vqa coco_vqa_instruct vg_vqa vg_vqa_instruct ok_vqa
ok_vqa_instruct aok_vqa aok_vqa_instruct gqa gqa_instruct iconqa iconqa_instruct scienceqa
scienceqa_instruct ocr_vqa ocr_vqa_instruct vizwiz_vqa nlvr snli_ve snli_ve_instruct vsr_classification
vsr_classification_instruct visdial visdial_instruct llava150k_dialogue_instruct msrvtt_caption
msrvtt_caption_instruct msvd_caption msvd_caption_instruct vatex_caption vatex_caption_instruct msrvtt_qa
msrvtt_qa_instruct msvd_qa msvd_qa_instruct laion400M laion400M_instruct laion2B_multi""",
)
OTHERS = re.findall(
    r"\w+",
    """audiocaps_mm_caption audiocaps_mm_caption_instruct audiocaps_mm_qa avsd_dialogue clotho_mm_qa
charade_caption coin_caption_instruct esc50_cls imagenet modelnet40_cls objaverse_mm_caption
valor_mm_caption violin_caption violin_entailment_instruct vlep_caption webvid2m_caption_instruct
youcook_caption blip_diffusion_finetune""",
)


def test_lavis_s_names_are_valid_or_refused_with_the_reason() -> None:
    assert set(LAVIS) <= set(CATALOG)
    assert set(OTHERS).isdisjoint(CATALOG)
    for name in OTHERS:
        message = rf"LAVIS's {name} (has|is|serves) .*; to read files .* give datasets\.{name}\.path"
        with pytest.raises(DataError, match=message):
            catalog.row(name)


def test_a_recipe_with_another_of_lavis_s_datasets_hears_why(tmp_path: Path) -> None:
    text = "model: {arch: blip_caption}\ndatasets: {audiocaps_mm_caption: {}}\nrun: {task: captioning}\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"audiocaps_mm_caption has sound, which no model here hears"):
        load_config(str(tmp_path / "a.yaml"), known_datasets=catalog.names())


def test_every_row_says_its_group_licence_and_where_its_files_come_from() -> None:
    for name, row in CATALOG.items():
        if name in QUESTIONS_OF:
            continue  # has a part of the files of another row
        assert row.group, name
        assert row.embedded or row.licence, name
        assert set(row.sizes) <= set(row.splits), name
        assert all(min(size) >= 0 and max(size) > 0 for size in row.sizes.values()), name
        # Nothing here depends on an address alone: what is fetched is a file, archive or list of the row.
        known = {Path(text).name for text in [*row.files, *row.others]}
        known |= {f"{Path(text).parent.parent.name}_{Path(text).name}" for text in row.files}
        known |= {file for one in row.takes for names in one.files for file in names.split("|")}
        known |= {file for one in row.archives for file in one.names.split("|")}
        known |= {file for names in (row.urls.files if row.urls else ()) for file in names.split("|")}
        assert set(row.remote) <= known, name
        assert all(
            address.startswith(("https://", "http://images.cocodataset.org/"))
            for address in row.remote.values()
        )


def test_the_list_can_be_read_by_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {name for name, row in CATALOG.items() if not row.same_as}
    flickr = rows["flickr30k"]
    assert flickr["sizes"]["test"] == {"records": 5000, "pictures": 1000}
    assert (flickr["group"], flickr["format"], flickr["held"]) == ("image-text retrieval", "json", None)
    assert flickr["missing"] == [f"flickr30k/annotations/{s}.json" for s in ("train", "val", "test")] + [
        "flickr30k/images/"
    ]
    assert rows["snli_ve"]["also_called"] == ["snli_ve_instruct"]
    assert set(rows) | {name for row in rows.values() for name in row["also_called"]} == set(CATALOG)
    assert main(["list", "--group", "entail"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "missing" in line] == ["snli_ve"]
    assert main(["list", "--group", "video-captioning"]) == 2
    assert "did you mean 'video captioning'" in capsys.readouterr().err


def test_everything_about_a_dataset_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))
    for name in CATALOG:
        assert main(["list", name]) == 0
        row, out = CATALOG[name], capsys.readouterr().out
        assert all(
            text in out for text in (row.about, row.group, row.licence, *row.files, *row.remote.values())
        )
    assert main(["list", "nlvr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  test:         6,967 records; json, nlvr/annotations/test.json" in lines
    assert "  made of:      test1.json -> nlvr/annotations/test.json" in lines
    assert f"  missing:      {tmp_path}/nlvr/images" in lines


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


def test_files_of_lavis_that_have_an_address_can_be_fetched_and_coco_s_pictures_are_checked() -> None:
    addresses = {
        "capfilt14m": ["capfilt14m/annotation.json"],
        "ocr_vqa": ["ocrvqa/ocrvqa.json"],
        "vsr_classification": [f"vsr/{name}.jsonl" for name in ("train", "dev", "test")],
    }
    base = "https://storage.googleapis.com/sfr-xinstructblip-data-research/data/"
    for name, places in addresses.items():
        assert {base + place for place in places} <= set(CATALOG[name].remote.values())
    for name, row in CATALOG.items():
        zips = [one for one in row.archives if re.fullmatch(r"(train|val|test)20\d\d\.zip", one.names)]
        assert all(re.fullmatch("md5:[0-9a-f]{32}", one.check) for one in zips), name
    pictures = {"train2014.zip", "val2014.zip", "test2015.zip"}  # of all splits
    assert pictures <= {one.names for one in CATALOG["aok_vqa"].archives} & CATALOG["aok_vqa"].remote.keys()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("TextVQA", "'text_vqa'"),
        ("GQA", "'gqa'"),
        ("VQAv2", "'coco_vqa'"),
        ("nlvr2", "'nlvr'"),
        ("VSR", "'vsr_classification' or 'vsr_caption'"),
        ("cc3m", "'conceptual_caption_3m'"),
        ("vg", "'vg_caption' or 'vg_vqa'"),
        (
            "LLaVA-Instruct",
            "'llava_conversation', 'llava_detail', 'llava_reasoning' or 'llava150k_dialogue_instruct'",
        ),
    ],
)
def test_what_papers_and_files_call_a_dataset_leads_to_its_name(name: str, known: str) -> None:
    with pytest.raises(DataError) as caught:
        catalog.row(name)
    assert str(caught.value) == f"no dataset {name!r} in the catalogue; did you mean {known}?"


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
