"""Files as benchmarks' own authors distribute them -> our records, one function per layout of files.

A row of the catalogue names the layout, the files and what the layout has to be told (`rows.Official`).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from blip.data.catalog.rows import Official
from blip.data.kinds import answers_of
from blip.data.readers import Record, detect, read_file
from blip.errors import DataError
from blip.metrics.vqa import clean_answer

FREQUENT = 9
"""How often an answer of VQAv2 occurs at least to be among those that are ranked."""


def records_of(official: Official, paths: Sequence[Path]) -> Iterator[Record]:
    """The records that a set's own files give.

    Args:
        official: what they are.
        paths: of `official.files`, in their order.

    Raises:
        DataError: they are something else.
    """
    return _checked(official, paths, lambda: FORMATS[official.format](paths, **official.options))


def document_of(official: Official, paths: Sequence[Path]) -> Any:
    """The content of a file that is no list of records: captions to compare with, or answers to rank.

    Raises:
        DataError: the files are something else.
    """
    (content,) = _checked(
        official, paths, lambda: iter([DOCUMENTS[official.format](paths, **official.options)])
    )
    return content


def _checked(official: Official, paths: Sequence[Path], read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    names = " and ".join(str(path) for path in paths)
    try:
        yield from read()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"{names}: not the official files that {official.makes} is made of, layout {official.format!r}"
            f" ({type(error).__name__}: {error}); is the download the right one, and complete?"
        ) from error


def _whole(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); is the download complete?") from error


def _each(path: Path) -> Iterator[Record]:
    return read_file(path, detect(path))


def karpathy(paths: Sequence[Path], split: str, prefix: str, folder: str = "") -> Iterator[Record]:
    """Karpathy's splits of COCO and Flickr30k: a record per caption in train, per picture elsewhere.

    Args:
        paths: `dataset_NAME.json`.
        split: `restval` counts as train.
        prefix: of the numbers of pictures.
        folder: of the pictures, where the file does not name it.
    """
    for image in _of_split(paths[0], split):
        place = str(PurePosixPath(image.get("filepath", folder), image["filename"]))
        captions = [sentence["raw"] for sentence in image["sentences"]]
        if split == "train":
            image_id = f"{prefix}{_number(image)}"
            yield from ({"image": place, "caption": text, "image_id": image_id} for text in captions)
        else:
            yield {"image": place, "caption": captions}


def _of_split(path: Path, split: str) -> Iterator[Record]:
    for image in _whole(path)["images"]:
        if ("train" if image["split"] == "restval" else image["split"]) == split:
            yield image


def _number(image: Mapping[str, Any]) -> int:
    stem = PurePosixPath(image["filename"]).stem
    return int(image.get("cocoid", stem.rpartition("_")[2]))


def coco_truth(paths: Sequence[Path], split: str) -> dict[str, Any]:
    """Karpathy's captions of a split in COCO's layout, as pycocotools reads them."""
    images: list[Record] = []
    annotations: list[Record] = []
    for image in _of_split(paths[0], split):
        images.append({"id": _number(image)})
        for sentence in image["sentences"]:
            text = {"image_id": _number(image), "id": len(annotations), "caption": sentence["raw"]}
            annotations.append(text)
    return {"images": images, "annotations": annotations}


def coco_pictures(paths: Sequence[Path], folder: str) -> Iterator[Record]:
    """The pictures of a file in COCO's layout, as LAVIS lists those of NoCaps."""
    for image in _whole(paths[0])["images"]:
        yield {"image": f"{folder}/{PurePosixPath(image['file_name']).name}", "img_id": image["id"]}


def vqa(paths: Sequence[Path], pictures: str, dataset: str) -> Iterator[Record]:
    """VQA's pairs of questions and annotations; without the second file no answers.

    Args:
        paths: questions, annotations.
        pictures: folder of COCO's pictures, such as `train2014`.
        dataset: goes into each record.
    """
    answers: dict[Any, list[str]] = {}
    if len(paths) > 1:
        answers = {note["question_id"]: answers_of(note) for note in _whole(paths[1])["annotations"]}
    for question in _whole(paths[0])["questions"]:
        number = question["question_id"]
        yield {
            "question_id": number,
            "question": question["question"],
            **({"answer": answers[number]} if len(paths) > 1 else {}),
            "image": f"{pictures}/COCO_{pictures}_{int(question['image_id']):012d}.jpg",
            "dataset": dataset,
        }


def frequent_answers(paths: Sequence[Path], least: str = str(FREQUENT)) -> list[str]:
    """The normalised first answers that occur at least so often in VQA's annotations, most frequent first."""
    count = Counter(
        clean_answer(note["multiple_choice_answer"])
        if "multiple_choice_answer" in note
        else Counter(answers_of(note)).most_common(1)[0][0]
        for path in paths
        for note in _whole(path)["annotations"]
    )
    return [answer for answer, number in count.most_common() if number >= int(least) and answer]


def aokvqa(paths: Sequence[Path], split: str) -> Iterator[Record]:
    """A-OKVQA's own records, which number COCO's pictures of 2017."""
    for record in _each(paths[0]):
        yield {**record, "image": f"{split}2017/{int(record['image_id']):012d}.jpg"}


def vocabulary(paths: Sequence[Path]) -> list[str]:
    """Answers of a table with one column, as A-OKVQA's authors list them."""
    with paths[0].open(encoding="utf-8-sig", newline="") as file:
        return [row[0] for row in csv.reader(file) if row and row[0].strip()]


def gqa(paths: Sequence[Path]) -> Iterator[Record]:
    """GQA's own questions, an object by question id."""
    for record in _each(paths[0]):
        given = {key: record[key] for key in ("answer", "fullAnswer") if record.get(key) is not None}
        yield {
            "image": f"{record['imageId']}.jpg",
            "question": record["question"],
            "question_id": record["sample_id"],
            **given,
        }


def genome_regions(paths: Sequence[Path]) -> Iterator[Record]:
    """Visual Genome's descriptions of regions, a caption each."""
    places = _genome_places(paths[1])
    for image in _each(paths[0]):
        for region in image["regions"]:
            if text := region["phrase"].strip():
                yield {"image": places[image["id"]], "caption": text}


def genome_questions(paths: Sequence[Path]) -> Iterator[Record]:
    """Visual Genome's questions; answers lose their full stop, which those of VQA do not have."""
    places = _genome_places(paths[1])
    for image in _each(paths[0]):
        for pair in image["qas"]:
            yield {
                "image": places[image["id"]],
                "question": pair["question"],
                "answer": pair["answer"].strip().removesuffix("."),
                "question_id": pair["qa_id"],
                "dataset": "vg",
            }


def _genome_places(path: Path) -> dict[int, str]:
    """Number of a picture -> its folder and name, from the address that Visual Genome gives it."""
    found = {}
    for image in _each(path):
        *_, folder, name = image["url"].split("/")
        found[image["image_id"]] = f"{folder}/{name}"
    return found


def nlvr2(paths: Sequence[Path], folder: str) -> Iterator[Record]:
    """NLVR2's own records, one per line.

    Args:
        paths: one file.
        folder: of the pictures; `{directory}` stands for what a record names so.
    """
    for record in _each(paths[0]):
        stem = record["identifier"].rpartition("-")[0]
        place = folder.format(directory=record.get("directory", ""))
        yield {
            "images": [f"{place}{stem}-img{side}.png" for side in (0, 1)],
            "sentence": record["sentence"],
            "label": record["label"],
            "identifier": record["identifier"],
        }


def snli_ve(paths: Sequence[Path]) -> Iterator[Record]:
    """SNLI-VE's own records; those on which people did not agree have no label and are left out."""
    for record in _each(paths[0]):
        if record["gold_label"] != "-":
            image = record.get("Flickr30K_ID", record.get("Flickr30kID"))
            yield {
                "image": str(image).removesuffix(".jpg"),
                "sentence": record["sentence2"],
                "label": record["gold_label"],
            }


def problems(paths: Sequence[Path], split: str, place: str) -> Iterator[Record]:
    """ScienceQA's and IconQA's problems by id, those of a split that have a picture.

    Args:
        paths: `problems.json`, `pid_splits.json`.
        split: name of the list of ids.
        place: of the pictures; `{}` stands for the id.
    """
    content = _whole(paths[0])
    for number in _whole(paths[1])[split]:
        problem = content[str(number)]
        if problem.get("image", "image.png"):
            rest = {key: value for key, value in problem.items() if key not in ("image", "split")}
            yield {"sample_id": str(number), "image": place.format(number), **rest}


def video_qa(paths: Sequence[Path], ending: str) -> Iterator[Record]:
    """MSVD-QA's and MSRVTT-QA's own questions, which number the videos.

    Args:
        paths: questions; for MSVD also the list of names of the numbered videos.
        ending: of the video files.
    """
    names: dict[int, str] = {}
    if len(paths) > 1:
        for line in paths[1].read_text(encoding="utf-8").splitlines():
            if line.strip():
                name, label = line.split()
                names[int(label.removeprefix("vid"))] = name
    for record in _each(paths[0]):
        number = int(record["video_id"])
        yield {
            "video": f"{names[number] if names else f'video{number}'}.{ending}",
            "question": record["question"],
            "answer": record["answer"],
            "question_id": record["id"],
        }


def ivqa(paths: Sequence[Path], ending: str) -> Iterator[Record]:
    """iVQA's own table: a video and five answers in each row."""
    for number, record in enumerate(_each(paths[0])):
        yield {
            "video": f"{record['video_id']}.{ending}",
            "question": record["question"],
            "answer": [text for n in range(1, 6) if (text := record[f"answer{n}"].strip())],
            "question_id": number,
        }


def _numbered(answers: Iterator[str]) -> dict[str, int]:
    return {answer: n for n, (answer, _) in enumerate(Counter(answers).most_common())}


def answer_numbers(paths: Sequence[Path]) -> dict[str, int]:
    """All answers of records, numbered from the most frequent one on."""
    return _numbered(answer for record in _each(paths[0]) for answer in answers_of(record))


def ivqa_answers(paths: Sequence[Path]) -> dict[str, int]:
    """The answers of iVQA that two people gave, numbered from the most frequent one on."""
    count = Counter(answer for record in ivqa(paths, "mp4") for answer in record["answer"])
    return _numbered(answer for answer, number in count.items() if number > 1 for _ in range(number))


FORMATS: dict[str, Callable[..., Iterator[Record]]] = {
    function.__name__: function
    for function in (
        *(karpathy, coco_pictures, vqa, aokvqa, gqa, genome_regions, genome_questions, nlvr2),
        *(snli_ve, problems, video_qa, ivqa),
    )
}
"""Layouts that give records."""
DOCUMENTS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (coco_truth, frequent_answers, vocabulary, answer_numbers, ivqa_answers)
}
"""Layouts that give one whole file."""
