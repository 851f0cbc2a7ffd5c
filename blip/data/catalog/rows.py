"""A row of the catalogue: where a named dataset lies, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    captioned: bool = True
    """Whether pictures of kind caption have captions in the annotation files."""
    suffix: str = ""
    """Added to names of pictures that have none."""
    judged: dict[str, str] = field(default_factory=dict)
    """Split -> file that says what is in each picture of the embedded scenes, for judging captions."""
    templates: str = ""
    """List of instructions that training takes where none is named, as `datasets.NAME.templates`."""
    ocr: dict[str, str] = field(default_factory=dict)
    """Split -> file of words read in the pictures, as `datasets.NAME.ocr_file`."""
    within: dict[str, str] = field(default_factory=dict)
    """Split -> what its records have in the column `split`, where one file holds several."""
    same_as: str = ""
    """The dataset whose files these are, under another name of LAVIS's."""

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


def web(folder: str, file: str, images: str, about: str) -> Row:
    """Pictures of the web with a caption each."""
    return Row(
        kind="caption",
        splits={"train": f"{folder}/annotations/{file}.json"},
        images=f"{folder}/{images}",
        about=about,
        pictures="the pictures behind the set's URL list, downloaded by you (img2dataset, for example)",
        annotations=f"{file}.json: a list of {{image, caption}} of the pictures that you could download",
    )


def video_qa(name: str, ending: str, counts: str) -> Row:
    """A set of questions about video clips, as LAVIS lays it out."""
    folder = name.lower()
    return Row(
        kind="vqa",
        splits={split: f"{folder}/annotations/qa_{split}.json" for split in ALL},
        images=f"{folder}/videos",
        about=f"{name}-QA: {counts} questions about video clips, one answer each",
        pictures=CLIPS.format(name, ending),
        annotations="qa_train.json, _val.json, _test.json and qa_ans2label.json as LAVIS distributes them",
        answer_list=f"{folder}/annotations/qa_ans2label.json",
    )


def video_captions(name: str, ending: str, counts: str) -> Row:
    """Video clips with captions, as LAVIS lays them out."""
    folder = name.lower()
    return Row(
        kind="caption",
        splits={split: f"{folder}/annotations/cap_{split}.json" for split in ALL},
        images=f"{folder}/videos",
        about=f"{name}: {counts} video clips with captions",
        pictures=CLIPS.format(name, ending),
        annotations="cap_train.json, _val.json and _test.json as LAVIS distributes them",
    )
