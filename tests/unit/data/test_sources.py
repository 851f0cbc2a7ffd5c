from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip.config.schema import DatasetConfig
from blip.data.catalog.table import CATALOG
from blip.data.datasets import PairDataset
from blip.data.evaluation import EvalPairs
from blip.data.locate import MissingData, available_splits, locate, require_files
from blip.data.makers import Defaults, make_maker, make_processor
from blip.data.sources import build_dataset, open_features
from blip.data.streams.shards import ShardDataset
from blip.errors import ConfigError, DataError

SMALL = {"train": {"name": "blip2_image_train", "image_size": 16}}
ADVICE = r"which says what to bring where, or set run\.data_root \(or BLIP_DATA\) to where it is"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with four pictures in `own/pictures`, and nothing that describes them."""
    pictures = tmp_path / "root/own/pictures"
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(pictures / f"{name}.jpg")
    return tmp_path / "root"


def records(names: str, prefix: str = "") -> list[dict[str, Any]]:
    return [{"image": f"{prefix}{name}.jpg", "caption": f"picture {name}"} for name in names]


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def section(**values: Any) -> DatasetConfig:
    return DatasetConfig(**{"vis_processor": SMALL, **values})


def texts(dataset: Any) -> list[str]:
    return dataset.text if isinstance(dataset, EvalPairs) else [sample["text_input"] for sample in dataset]


def shard(path: Path, names: str, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            text = json.dumps({"TEXT": f"picture {name}"}).encode()
            for member, content in (
                (f"{name}.jpg", (folder / f"{name}.jpg").read_bytes()),
                (f"{name}.json", text),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def as_json(root: Path) -> dict[str, Any]:
    put(root / "own/list.json", records("abc", "pictures/"))
    return {"path": "own/list.json"}


def as_json_elsewhere(root: Path) -> dict[str, Any]:
    put(root / "lists/list.json", records("abc"))
    return {"path": "lists/list.json", "images": "own/pictures"}


def as_csv(root: Path) -> dict[str, Any]:
    put(root / "own/list.csv", "pic,said\n" + "".join(f"pictures/{n}.jpg,picture {n}\n" for n in "abc"))
    return {"path": {"train": "own/list.csv"}, "columns": {"image": "pic", "caption": "said"}}


def as_two_files(root: Path) -> dict[str, Any]:
    put(root / "own/1.jsonl", json.dumps(records("a", "pictures/")[0]))
    put(root / "lists/2.tsv", "image\tcaption\nb.jpg\tpicture b\nc.jpg\tpicture c\n")
    return {"path": ["own/1.jsonl", "lists/2.tsv"], "images": ["own", "own/pictures"]}


def as_folder(root: Path) -> dict[str, Any]:
    for name in "abc":
        put(root / f"own/pictures/{name}.txt", f"picture {name}\n")
    (root / "own/pictures/d.jpg").unlink()
    return {"path": "own/pictures"}


def as_folder_of_splits(root: Path) -> dict[str, Any]:
    put(root / "own/annotations/train.json", records("abc", "pictures/"))
    put(root / "own/annotations/validation.json", records("d", "pictures/"))
    return {"path": "own"}


def as_subfolders(root: Path) -> dict[str, Any]:
    for name in "abc":
        put(root / f"own/pictures/{name}.txt", f"picture {name}\n")
    (root / "own/pictures/d.jpg").unlink()
    shutil.move(root / "own/pictures", root / "own/train")
    return {"path": "own", "format": "folder"}


def as_lavis(root: Path) -> dict[str, Any]:
    put(root / "own/annotations/x.json", records("abc"))
    annotations = {"train": {"url": "https://nowhere/x.json", "storage": ["own/annotations/x.json"]}}
    return {"build_info": {"annotations": annotations, "images": {"storage": "own/pictures/"}}}


def as_absolute(root: Path) -> dict[str, Any]:
    return {"path": str(put(root.parent / "elsewhere/l.json", records("abc", f"{root}/own/pictures/")))}


@pytest.mark.parametrize(
    "described",
    [
        as_json,
        as_json_elsewhere,
        as_csv,
        as_two_files,
        as_folder,
        as_folder_of_splits,
        as_subfolders,
        as_lavis,
        as_absolute,
    ],
)
def test_own_data_needs_no_code(root: Path, described: Callable[[Path], dict[str, Any]]) -> None:
    dataset = build_dataset("mine", section(**described(root)), "train", root)
    assert isinstance(dataset, PairDataset)
    assert texts(dataset) == ["picture a", "picture b", "picture c"]
    assert dataset[0]["image"].shape == (3, 16, 16)


def test_a_path_below_the_working_directory_will_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    put(root / "own/list.json", records("ab", "pictures/"))
    assert len(build_dataset("mine", section(path="root/own/list.json"), "train", "other")) == 2


def test_splits_are_told_by_path_name_and_setting(root: Path) -> None:
    as_folder_of_splits(root)
    cases = [
        ("mine", section(path="own"), ["train", "val"]),
        ("mine", section(path="own", split="val"), ["val"]),
        ("mine", section(path="own/list.json"), ["train"]),
        ("mine", section(path="own/list.json", split="test"), ["test"]),
        ("mine", section(path={"train": "x", "val": None, "test": "y"}), ["train", "test"]),
        ("coco_caption", section(), ["train", "val", "test"]),
        ("coco_caption", section(split="test"), ["test"]),
        ("vg_caption", section(), ["train"]),
    ]
    assert [available_splits(name, config, root) for name, config, _ in cases] == [
        found for *_, found in cases
    ]


@pytest.mark.parametrize(
    "pattern", ["own/tars", "own/tars/*.tar", "own/tars/p{0..1}.tar", "own/tars/p{0,1}.tar"]
)
def test_shards_are_found_and_read(root: Path, pattern: str) -> None:
    shard(root / "own/tars/p0.tar", "ab", root / "own/pictures")
    shard(root / "own/tars/p1.tar", "c", root / "own/pictures")
    config = section(path=pattern, columns={"caption": "TEXT"}, window=1, lanes=1, prompt="say ")
    dataset = build_dataset("mine", config, "train", root)
    assert isinstance(dataset, ShardDataset)
    assert (dataset.labels, dataset.num_samples) == (["p0.tar", "p1.tar"], 3)
    ref = next(iter(dataset.scan(1)))
    with dataset.shards.open(1) as file:
        sample = dataset.sample(ref, file, 0, 0)  # type: ignore[arg-type]
    assert sample["text_input"] == "say picture c"


def test_shards_cannot_be_evaluated_or_cut(root: Path) -> None:
    shard(root / "own/p0.tar", "ab", root / "own/pictures")
    with pytest.raises(
        ConfigError, match=r"datasets\.mine\.path: shards are for training; .*{val: val.json}"
    ):
        build_dataset("mine", section(path={"val": "own/p0.tar"}), "val", root, train=False)
    with pytest.raises(ConfigError, match=r"datasets\.mine\.max_samples: shards are not cut"):
        build_dataset("mine", section(path="own/p0.tar", max_samples=1), "train", root)


def coco(root: Path) -> None:
    put(root / CATALOG["coco_caption"].splits["train"], records("abc"))
    several = [
        {"image": "d.jpg", "caption": ["picture d", "again d"]},
        {"image": "none.jpg", "caption": ["gone"]},
    ]
    put(root / CATALOG["coco_caption"].splits["val"], several)
    shutil.copytree(root / "own/pictures", root / "coco/images")


def test_a_named_dataset_needs_only_its_name(root: Path) -> None:
    coco(root)
    assert texts(build_dataset("coco_caption", section(), "train", root)) == [
        "picture a",
        "picture b",
        "picture c",
    ]
    data = build_dataset("coco_retrieval", section(), "val", root, train=False)
    assert isinstance(data, EvalPairs)
    assert (data.text, data.txt2img, [error.cause for error in data.bad]) == (
        ["picture d", "again d"],
        [0, 0],
        ["missing_image"],
    )


def test_settings_of_a_section_reach_the_samples(root: Path) -> None:
    coco(root)
    config = section(prompt="a photo of ", image_ids=False, max_samples=2)
    dataset = build_dataset("coco_caption", config, "train", root)
    assert (len(dataset), dataset[0]["text_input"], "image_id" in dataset[0]) == (
        2,
        "a photo of picture a",
        False,
    )  # type: ignore[index]


def test_foreign_absolute_paths_of_lavis_give_way_to_the_catalogue(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco(root)
    info = {
        "annotations": {"train": {"storage": "/export/home/x.json"}},
        "images": {"storage": "/export/share/datasets/vision/coco/images"},
    }
    dataset = build_dataset("coco_caption", section(build_info=info), "train", root)
    assert len(dataset) == 3
    assert "using the catalogue's" in caplog.text
    variant = section(build_info={"images": info["images"]}, path="coco/annotations/coco_karpathy_train.json")
    dataset = build_dataset("coco_caption", variant, "train", root)  # also where other files are named
    assert len(dataset) == 3
    assert dataset[0] is not None
    with pytest.raises(MissingData, match=r"datasets\.mine\.path: no file '/export/home/x.json'"):
        build_dataset("mine", section(build_info=info), "train", root)


MISSING: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "catalogue": (
        "coco_caption",
        {},
        "train",
        rf"^datasets\.coco_caption\.path: no file 'coco/annotations/coco_karpathy_train.json' under '.*';"
        rf" run 'blip data prepare coco_caption', {ADVICE}$",
    ),
    "embedded": (
        "scenes",
        {},
        "train",
        r"no file 'scenes/annotations/train.json' .*; run 'blip data make scenes'$",
    ),
    "shards": (
        "laion400M",
        {},
        "train",
        rf"no \.tar file there.*run 'blip data prepare laion400M', {ADVICE}",
    ),
    "some shards": (
        "mine",
        {"path": "own/{0..3}.tar"},
        "train",
        r"datasets\.mine\.path: .* none of 4 files is there",
    ),
    "own": (
        "mine",
        {"path": "own/lits.json"},
        "train",
        r"no file 'own/lits.json' .*did you mean 'list.json'",
    ),
    "unknown": ("coco_capton", {}, "train", r"datasets\.coco_capton: not in the catalogue .*'coco_caption'"),
    "split": ("mine", {"path": "own/list.json"}, "val", r"no split 'val', only train; .*path: {val: \.\.\.}"),
    "no such split": ("coco_caption", {"split": "dev"}, "train", r"no split 'train', only none"),
    "folder": (
        "mine",
        {"path": "own/list.json", "images": "pics"},
        "train",
        r"images: no folder 'pics' under .*; give the folder that the records' image paths start from$",
    ),
    "pictures": (
        "mine",
        {"path": "own/list.json", "images": "own"},
        "train",
        r"datasets\.mine\.images: none of the first 3 pictures is there.*folder that holds 'a.jpg'",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named_with_what_to_do(root: Path, case: str) -> None:
    put(root / "own/list.json", records("abc"))
    name, values, split, message = MISSING[case]
    with pytest.raises(DataError, match=message) as error:
        build_dataset(name, section(**values), split, root)
    assert "\n" not in str(error.value)


def test_everything_missing_is_named_at_once(root: Path) -> None:
    put(root / "own/list.json", records("abc"))
    wanted = [(name, section(), "train") for name in ("coco_caption", "vg_caption", "laion400M")]
    with pytest.raises(MissingData) as error:
        require_files([*wanted, ("mine", section(path="own/list.json"), "train")], root)
    text = str(error.value)
    assert [
        f"datasets.{name}.path" in text for name in ("coco_caption", "vg_caption", "laion400M", "mine")
    ] == [
        True,
        True,
        True,
        False,
    ]
    assert re.search(rf"; run 'blip data prepare coco_caption vg_caption laion400M', {ADVICE}$", text)
    require_files([("mine", section(path="own/list.json"), "train")], root)
    with pytest.raises(MissingData, match=r"laion400M', which says .*; correct datasets\.mine\.path or"):
        require_files([*wanted, ("mine", section(path="own/lits.json"), "train")], root)


def test_folders_and_files_must_match_in_number(root: Path) -> None:
    config = section(**{**as_two_files(root), "path": ["own/1.jsonl"]})
    with pytest.raises(ConfigError, match=r"images: 2 folders for 1 annotation files"):
        locate("mine", config, "train", root)


def test_features_are_of_pictures_in_files(root: Path) -> None:
    missing = section(**as_two_files(root), features="nowhere")
    with pytest.raises(DataError, match=r"^datasets\.mine\.features: no complete store of features in"):
        build_dataset("mine", missing, "train", root)
    clips = section(**as_two_files(root), features="nowhere", data_type="videos")
    with pytest.raises(ConfigError, match=r"^datasets\.mine\.features: there are features of pictures only"):
        open_features("mine", clips, root)


def test_a_missing_processor_follows_from_the_other() -> None:
    clip = {"train": {"name": "clip_image_train", "image_size": 20, "mean": [0.5, 0.5, 0.5]}}
    table = {
        "given": (section(), "train", None, ("Blip2ImageTrain", 16)),
        "eval from train": (section(), "eval", None, ("BlipImageEval", 16)),
        "clip": (section(vis_processor=clip), "eval", None, ("ClipImageEval", 20)),
        "train from model": (section(vis_processor={}), "train", 24, ("Blip2ImageTrain", 24)),
        "eval from model": (section(vis_processor={}), "eval", 24, ("BlipImageEval", 24)),
    }
    for case, (config, stage, size, expected) in table.items():
        vis: Any = make_maker("mine", config, stage, Defaults(size)).vis_processor
        assert (type(vis).__name__, vis.image_size) == expected, case
    told = Defaults(24, train="blip_image_train", eval="clip_image_eval")
    for stage, name in (("train", "BlipImageTrain"), ("eval", "ClipImageEval")):
        assert type(make_maker("mine", section(vis_processor={}), stage, told).vis_processor).__name__ == name
    vis = make_maker("mine", section(vis_processor=clip), "eval").vis_processor
    assert torch.equal(vis.norm()[0], torch.tensor([0.5, 0.5, 0.5]))


def test_text_processors_stand_in_for_each_other() -> None:
    short = {"name": "blip_caption", "max_words": 2}
    for given, expected in (({"train": short}, 2), ({"eval": short}, 2), ({}, 50)):
        for stage in ("train", "eval"):
            text: Any = make_maker("mine", section(text_processor=given), stage).text_processor
            assert text.max_words == expected


def test_captions_to_train_on_begin_with_the_default_prompt_where_nothing_else_is_named() -> None:
    told, named = Defaults(prompt="a photo of "), {"train": {"name": "blip_caption"}}
    table = {
        "train": (section(), "train", "caption", "a photo of a dog"),
        "eval": (section(), "eval", "caption", "a dog"),
        "named processor": (section(text_processor=named), "train", "caption", "a dog"),
        "prompt of the section": (section(prompt="look: "), "train", "caption", "look: a dog"),
        "question": (section(), "train", "vqa", "a dog"),
    }
    for case, (config, stage, kind, expected) in table.items():
        assert make_maker("mine", config, stage, told, kind).text("A dog.", "x") == expected, case


def test_training_without_an_image_processor_is_an_error() -> None:
    evaluation = {"eval": {"name": "blip_image_eval", "image_size": 16}}
    for processors in ({}, evaluation):
        with pytest.raises(
            ConfigError, match=r"datasets\.mine\.vis_processor\.train: not given; .*blip_image_train"
        ):
            make_maker("mine", section(vis_processor=processors), "train")


@pytest.mark.parametrize(
    ("entry", "images", "message"),
    [
        ({"name": "blip_image_tain"}, True, r"p\.train\.name: unknown processor .*'blip_image_train'"),
        (
            {"name": "blip_caption"},
            True,
            r"p\.train\.name: blip_caption is for texts, not pictures; .*clip_image_eval",
        ),
        ({"name": "blip_image_eval"}, False, r"blip_image_eval is for pictures, not texts; .*blip_question"),
        ({"name": "blip_image_eval", "imagesize": 3}, True, r"p\.train\.imagesize: no option .*'image_size'"),
        ({"name": "blip_image_eval", "image_size": 0}, True, r"p\.train\.image_size: 0 is no size"),
        ({"name": "blip_image_eval", "image_size": "x"}, True, r"p\.train: blip_image_eval cannot use"),
    ],
)
def test_processors_that_cannot_be_are_refused(entry: dict[str, Any], images: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_processor(entry, "p.train", images)
