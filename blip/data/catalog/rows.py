"""A row of the catalogue: where a named dataset lies, and how to get it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

BLIP = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/datasets/"
LISTS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/datasets/"
INSTRUCTED = "https://storage.googleapis.com/sfr-xinstructblip-data-research/data/"
COCO = "http://images.cocodataset.org/zips/"
VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
"""Where BLIP's, LAVIS's and the benchmarks' own files lie."""

COCO_LICENCE = "annotations CC BY 4.0; pictures under the terms of their Flickr owners"
FLICKR_LICENCE = "research only, to be requested; pictures under the terms of their Flickr owners"
WEB_LICENCE = "list free to use; each picture under the terms of the site that shows it"


_COCO_SUMS = {
    "train2014": "0da8c0bd3d6becc4dcb32757491aca88",
    "val2014": "a3d79f5ed8d289b7a7554ce06a5782b3",
    "test2014": "04127eef689ceac55e3a572c2c92f264",
    "test2015": "65562e58af7d695cc47356951578c041",
    "train2017": "cced6f7f71b7629ddf16f17bbcfab6b2",
    "val2017": "442b8da7639aecaf257c1dceb8ba8c80",
    "test2017": "77ad2c53ac5d0aea611d422c0938fb35",
}
"""MD5 of the zip files of COCO's pictures."""
RENAMED = "renamed"
"""Format of official files that are ours but for their names."""


class Size(NamedTuple):
    """How large a split is; 0: not known."""

    records: int
    """Texts: captions, questions, sentences or conversations."""
    pictures: int = 0
    """Different pictures or videos."""


class Official(NamedTuple):
    """Files of a benchmark's own authors that become one of ours."""

    makes: str
    """Path of ours below the data root."""
    format: str
    """A key of `blip.data.official.formats.FORMATS`, or of its `DOCUMENTS`; or `renamed`."""
    files: tuple[str, ...]
    """Names of all that it takes; where a file has several names, with `|` between them."""
    options: Mapping[str, str] = MappingProxyType({})
    """What the format has to be told."""


class Archive(NamedTuple):
    """A zip or tar file that is unpacked below the data root."""

    names: str
    """Its name; where it has several, with `|` between them."""
    to: str
    """Folder below the data root that it is unpacked in."""
    holds: str
    """Pattern that members start with, by which archives of equal names are told apart; empty: all."""
    check: str = ""
    """`md5:...` or `sha256:...` of the file, where known."""

    @property
    def folder(self) -> str:
        """What is there below the data root once it is unpacked; empty where that cannot be told."""
        first = re.match(r"[\w./-]*/", self.holds)
        return f"{self.to}/{first[0]}" if first else ""


class UrlList(NamedTuple):
    """Lists of the addresses of pictures, which become webdataset shards."""

    files: tuple[str, ...]
    """Names of the lists, all of which are taken; where one has several, with `|` between them."""
    shards: str
    """Folder of the shards below the data root."""
    columns: tuple[str, ...] = ()
    """Names of the columns, where the list has no header."""


@dataclass(frozen=True)
class Row:
    """A named dataset. Paths are relative to the data root."""

    kind: str
    """What a record is, as `datasets.NAME.kind`; or retrieval: captions that are evaluated as retrieval."""
    splits: dict[str, str | tuple[str, ...]]
    """Split -> annotation file, or several, or pattern of shards."""
    images: str = ""
    """Folder that the records' image paths start from; empty for shards."""
    format: str = "auto"
    """Layout of the files, as `datasets.NAME.format`."""
    about: str = ""
    """What it is, and how large."""
    pictures: str = ""
    """Which pictures belong below `images`, for `prepare`."""
    annotations: str = ""
    """Which official files become the annotations, for `prepare`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the files' name."""
    answer_list: str = ""
    """JSON list of the answers that are ranked."""
    official: dict[str, str] = field(default_factory=dict)
    """Split -> official annotations that evaluation compares with, as `datasets.NAME.annotation_file`."""
    classes: tuple[str, ...] = ()
    """Labels in the order of their class numbers."""
    uncaptioned: tuple[str, ...] = ()
    """Splits of kind caption whose annotation files have pictures only: the captions are secret, or apart."""
    suffix: str = ""
    """Added to names of pictures that have none."""
    judged: dict[str, str] = field(default_factory=dict)
    """Split -> file that says what is in each picture of the embedded scenes, for judging captions."""
    corrupted: dict[str, str] = field(default_factory=dict)
    """Split -> file that says what was done to the texts of the embedded web scenes, for CapFilt."""
    templates: str = ""
    """List of instructions that training takes where none is named, as `datasets.NAME.templates`."""
    ocr: dict[str, str] = field(default_factory=dict)
    """Split -> file of words read in the pictures, as `datasets.NAME.ocr_file`."""
    within: dict[str, str] = field(default_factory=dict)
    """Split -> what its records have in the column `split`, where one file holds several."""
    within_column: str = "split"
    """The column that `within` speaks of."""
    same_as: str = ""
    """The dataset whose files these are, under another name of LAVIS's."""
    group: str = ""
    """What the task is: InstructBLIP's groups (figure 2 of the paper), and some beside them."""
    held: Literal["in", "out", ""] = ""
    """Whether InstructBLIP trains on it or only evaluates; empty: it does neither."""
    licence: str = ""
    """Under what terms it may be used, in short; the set's own page decides."""
    sizes: dict[str, Size] = field(default_factory=dict)
    """Split -> how large it is as published."""
    takes: tuple[Official, ...] = ()
    """What `prepare` makes our files of, beside those that already are as we read them."""
    archives: tuple[Archive, ...] = ()
    """Pictures, and packed annotations, that `prepare` unpacks."""
    remote: dict[str, str] = field(default_factory=dict)
    """Name of a file or archive -> its address, for `prepare --fetch`."""
    urls: UrlList | None = None
    """The list of addresses that the pictures are downloaded by."""

    @property
    def downloaded(self) -> str:
        """Pattern of the shards that stand for the files, once pictures are downloaded by their addresses."""
        return f"{self.urls.shards}/*.tar" if self.urls is not None else ""

    @property
    def layout(self) -> str:
        """Layout of the files: that of `format`, else what their names tell."""
        return self.format if self.format != "auto" else self.files[0].rpartition(".")[2]

    @property
    def embedded(self) -> bool:
        """Whether `blip data make scenes` makes it."""
        return self.files[0].startswith("scenes/")

    @property
    def files(self) -> list[str]:
        """Annotation files of all splits, or patterns of shards."""
        return list(dict.fromkeys(text for split in self.splits for text in self.of(split)))

    @property
    def others(self) -> list[str]:
        """What is read beside the annotation files."""
        others = [self.answer_list, *self.official.values(), *self.ocr.values()]
        return list(dict.fromkeys(filter(None, others)))

    def of(self, split: str) -> tuple[str, ...]:
        """The annotation files of one split."""
        value = self.splits[split]
        return (value,) if isinstance(value, str) else value


ALL = ("train", "val", "test")
CLIPS = (
    "{}'s clips (.{}), or for each a folder of its name without the ending that holds its frames as pictures"
)


def sizes(*counts: int | tuple[int, int], splits: tuple[str, ...] = ALL) -> dict[str, Size]:
    """Sizes of `splits` in order, each the records, or (records, pictures)."""
    some = zip(splits, counts, strict=False)
    return {split: Size(*count) if isinstance(count, tuple) else Size(count) for split, count in some}


def remote(base: str, *names: str) -> dict[str, str]:
    """Name -> address of files that lie in one place; `place/name` for those in a folder of it."""
    return {name.rpartition("/")[2]: base + name for name in names}


def coco(release: str, to: str = "coco/images") -> Archive:
    """A release of COCO's pictures, such as train2014, which is unpacked in a folder."""
    return Archive(f"{release}.zip", to, f"{release}/", f"md5:{_COCO_SUMS[release]}")


def web(
    folder: str, file: str, images: str, about: str, size: Size, urls: UrlList, licence: str = WEB_LICENCE
) -> Row:
    """Pictures of the web with a caption each."""
    return Row(
        kind="caption",
        splits={"train": f"{folder}/annotations/{file}.json"},
        images=f"{folder}/{images}",
        about=about,
        pictures=f"the pictures behind the set's list of addresses: 'prepare --fetch' downloads them into"
        f" shards below {urls.shards}, which are read in place of {file}.json",
        annotations=f"{file}.json: a list of {{image, caption}} of the pictures that you could download; or"
        f" the set's own list ({' and '.join(urls.files).replace('|', ' or ')}) with --fetch",
        licence=licence,
        sizes={"train": size},
        urls=urls,
    )


def lists(name: str, about: str, size: int) -> Row:
    """A list of addresses and captions that BLIP's authors released."""
    return Row(
        kind="caption",
        splits={"train": f"capfilt/{name}/*.tar"},
        format="shards",
        about=f"CapFilt: {about}; a list of addresses",
        pictures=f"shards, which 'prepare --fetch' makes of {name}.json",
        licence=WEB_LICENCE,
        sizes={"train": Size(size)} if size else {},
        remote=remote(LISTS, f"{name}.json"),
        urls=UrlList((f"{name}.json",), f"capfilt/{name}"),
    )


def video_qa(name: str, ending: str, size: dict[str, Size], licence: str) -> Row:
    """A set of questions about video clips, as LAVIS lays it out."""
    folder = name.lower()
    notes = {f"qa_{split}.json": f"{LAVIS}{folder}/qa_{split}.json" for split in ALL}
    listed = ("youtube_mapping.txt",) if folder == "msvd" else ()
    made = {f"{folder}/annotations/qa_{split}.json": (f"{split}_qa.json", *listed) for split in ALL}
    answers = f"{folder}/annotations/qa_ans2label.json"
    return Row(
        kind="vqa",
        splits={split: f"{folder}/annotations/qa_{split}.json" for split in ALL},
        images=f"{folder}/videos",
        about=f"{name}-QA: questions about video clips, one answer each",
        pictures=CLIPS.format(name, ending),
        annotations="qa_train.json, _val.json, _test.json and qa_ans2label.json (train_ans2label.json) as"
        " LAVIS"
        f" distributes them; or {name}-QA's own train_qa.json, val_qa.json, test_qa.json"
        + (" and youtube_mapping.txt" if listed else ""),
        answer_list=answers,
        licence=licence,
        sizes=size,
        takes=(
            *(Official(target, "video_qa", files, {"ending": ending}) for target, files in made.items()),
            Official(answers, RENAMED, ("train_ans2label.json",)),
            Official(answers, "answer_numbers", ("train_qa.json",)),
        ),
        archives=(
            Archive("YouTubeClips.tar" if listed else "MSRVTT.zip|MSRVTT_Videos.zip", f"{folder}/videos", ""),
        ),
        remote={**notes, "train_ans2label.json": f"{LAVIS}{folder}/train_ans2label.json"},
    )


def clips(kind: str, file: str, name: str, ending: str, size: dict[str, Size], licence: str) -> Row:
    """Video clips with captions, or with texts that find them, as LAVIS lays them out.

    Args:
        kind: caption or retrieval.
        file: start of the names of the annotation files.
        name: of the set, whose folder is called the same in small letters.
        ending: of the clips.
        size: of the splits.
        licence: a note.
    """
    folder = name.lower()
    files = {split: f"{file}_{split}.json" for split in ALL}
    return Row(
        kind=kind,
        splits={split: f"{folder}/annotations/{named}" for split, named in files.items()},
        images=f"{folder}/videos",
        about=f"{name}: video clips "
        + ("with captions" if kind == "caption" else "and the texts that find them"),
        pictures=CLIPS.format(name, ending),
        annotations=f"{file}_train.json, _val.json and _test.json as LAVIS distributes them",
        licence=licence,
        sizes=size,
        remote=remote(f"{LAVIS}{folder}/", *files.values()),
    )


def words_read(folder: str, annotations: str, of: str) -> dict[str, Any]:
    """What TextVQA's and TextCaps's rows have in common: pictures of OpenImages, and the words read in them.

    Args:
        folder: of the set.
        annotations: name of its annotation files, with `{}` for the split.
        of: folder of their addresses.
    """
    words = {split: f"TextVQA_Rosetta_OCR_v0.2_{split}.json" for split in ALL}
    zips = {"train_val_images.zip": "train_images/", "test_images.zip": "test_images/"}
    base = "https://dl.fbaipublicfiles.com/textvqa/"
    return {
        "splits": {split: f"{folder}/annotations/{annotations.format(split)}" for split in ALL},
        "images": f"{folder}/images",
        "columns": {"image": "image_id"},
        "suffix": ".jpg",
        "pictures": "TextVQA's pictures, train_val_images.zip and test_images.zip",
        "annotations": f"{annotations.format('train')}, _val.json and _test.json, and the words read in"
        f" the pictures, {words['train']}, _val.json and _test.json",
        "licence": "CC BY 4.0; pictures of Open Images CC BY 2.0",
        "ocr": {split: f"textvqa/annotations/{name}" for split, name in words.items()},
        "archives": tuple(Archive(name, f"{folder}/images", inside) for name, inside in zips.items()),
        "remote": {
            **remote(f"{base}data/{of}", *(annotations.format(split) for split in ALL)),
            **remote(f"{base}data/", *words.values()),
            **remote(f"{base}images/", *zips),
        },
    }
