"""What evaluations see of one split: its samples by number, and what the model's words are compared with.

Records that cannot be used are left out and stand in `bad`, so that scores are of the rest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from blip import dist, keyed
from blip.data.datasets import Records, causes, pictures_of
from blip.data.kinds import QuestionMaker, answers_of, choices_of, correct_choice_of
from blip.data.records import ById
from blip.data.samples import MALFORMED, BadRecord, Clip, Picture, Sample, SampleMaker, read_image
from blip.data.truth import Judge
from blip.errors import DataError

log = logging.getLogger(__name__)


class EvalData:
    """Samples by number.

    Args:
        name: of the dataset.
        records: of the split.
        maker: with the processors of evaluation.
        numbers: of the records that stand for a sample each; None: all that have what `maker` needs, but
            perhaps their picture.
        bad: what is left out already.
    """

    unit: ClassVar[str] = "records"
    """What is counted as left out."""
    measure: str = ""
    """What counts as right, as `datasets.NAME.measure`; empty: nothing is said about it."""
    server: str = ""
    """Format of what the evaluation server takes; empty: the usual one."""

    def __init__(
        self,
        name: str,
        records: Records,
        maker: SampleMaker,
        numbers: Sequence[int] | None = None,
        bad: Sequence[BadRecord] = (),
    ) -> None:
        if numbers is None:
            numbers, bad = _usable(name, records, maker)
        self.name = name
        self.records = records
        self.maker: Any = maker
        self.bad = list(bad)
        self.lost = len(self.bad)
        """Units that are left out, for themselves or for their picture."""
        self.damaged: list[BadRecord] = []
        """Frames of videos that others stand in for, once they have been looked for."""
        self._numbers = np.array(numbers, np.int64)
        self._require_some()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            BadRecord: it cannot be read.
        """
        name = self.instance_id(index)
        # Evaluation processors draw nothing; with a training one, pictures are at least the same each time.
        rng = keyed.generator(0, "evaluate", self.name, index)
        sample = self.maker(self.record(index), self._places(index), name, rng)
        sample.pop("damaged", None)
        return sample

    def shown(self, index: int) -> Sample:
        """The picture of sample `index`: image, image_norm and instance_id.

        Raises:
            BadRecord: it cannot be read.
        """
        sample = _picture(self, index, self._places(index))
        del sample["image_id"]
        return sample

    @property
    def total(self) -> int:
        """Units that there are, those that are left out among them."""
        return len(self) + self.lost

    @property
    def of_videos(self) -> bool:
        """Whether what stands for pictures here are videos."""
        return self.maker.of_videos

    def record(self, index: int) -> dict[str, Any]:
        """The annotation of sample `index`."""
        return self.records[int(self._numbers[index])]

    def instance_id(self, index: int) -> str:
        """Name of sample `index`."""
        return f"{self.name}/{self._numbers[index]}"

    def pictures(self, index: int) -> list[str | None]:
        """Paths of the pictures of sample `index`; None for one that is no file of its own.

        Of a video it is the frame in the middle, or the video file.
        """
        places: Any = self._places(index)
        places = _frame_of(places) if isinstance(places, Clip) else places
        several = places if isinstance(places, list) else [places]
        return [str(Path(p).absolute()) if isinstance(p, str) else None for p in several]

    def picture(self, index: int) -> str | None:
        """Path of its picture, of the first one where there are several."""
        return self.pictures(index)[0]

    def verify(self, threads: int | None = None) -> Any:
        """Leave out the samples whose picture cannot be decoded; every rank reads its share of them.

        What is left out is added to `bad`, frames that others stand in for to `damaged`; both are reported.
        Call it on every rank.

        Returns:
            Itself.
        """
        pictures = self.records.pictures[self._numbers]
        _, first, group = np.unique(pictures, return_index=True, return_inverse=True)
        start, end = dist.slices(len(first))[dist.rank()]
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:  # decoders release the lock
            own = [(k, e) for k, e in enumerate(pool.map(self._try, first[start:end].tolist()), start) if e]
        errors = [(k, error) for k, several in dist.gather_lists(own) for error in several]
        found = {k: error for k, error in errors if error.cause != "damaged_frame"}
        self.damaged = [error for _, error in errors if error.cause == "damaged_frame"]
        if found:
            self.leave_out(np.isin(group, list(found)), found.values())
        if self.bad:
            log.warning(
                "datasets.%s: %d records are left out of the evaluation (%s), the first is %s",
                *(self.name, len(self.bad), causes(self.bad), self.bad[0]),
            )
        if self.damaged:
            log.warning(
                "datasets.%s: %d frames cannot be read; the nearest ones stand in for them; the first is %s",
                *(self.name, len(self.damaged), self.damaged[0]),
            )
        return self

    def leave_out(self, lost: np.ndarray, bad: Iterable[BadRecord]) -> None:
        """Leave out some samples.

        Args:
            lost: bool, one of each sample: True = left out.
            bad: why.
        """
        self.bad += bad
        self.lost += sum(self._units(i) for i in np.flatnonzero(lost).tolist())
        self._keep(np.flatnonzero(~lost).tolist())
        self._require_some()

    def _units(self, index: int) -> int:
        return 1

    def _keep(self, kept: list[int]) -> None:
        self._numbers = self._numbers[kept]

    def _require_some(self) -> None:
        if not len(self._numbers):
            raise DataError(
                f"datasets.{self.name}: nothing to evaluate on, all {len(self.records)} records are unusable"
                f" ({causes(self.bad)}); see 'blip data check'"
            )

    def _try(self, index: int) -> list[BadRecord]:
        """What is wrong with a sample's pictures."""
        try:
            places = self._places(index)
            if isinstance(places, Clip):
                rng = keyed.generator(0, "evaluate", self.name, index)
                return self.maker.read(places, self.instance_id(index), rng)[1]
            for place in places if isinstance(places, list) else [places]:
                read_image(place, self.instance_id(index))
        except BadRecord as error:
            return [error]
        return []

    def _places(self, index: int) -> Picture | Clip | list[Picture]:
        number, name = int(self._numbers[index]), self.instance_id(index)
        return pictures_of(self.records, number, self.records[number], self.maker, name)


class EvalPairs(EvalData):
    """Pictures, texts, and who belongs to whom: what LAVIS's evaluation datasets of retrieval expose.

    A sample is a picture; its `image_id` is its number here. A picture without any text is left out.
    """

    unit = "texts"

    def __init__(self, name: str, records: Records, maker: SampleMaker) -> None:
        bad: list[BadRecord] = []
        texts: dict[int, list[str]] = {}
        first: dict[int, int] = {}
        for number in range(len(records)):
            picture = int(records.pictures[number])
            first.setdefault(picture, number)
            found = _texts(records[number], maker, f"{name}/{number}", bad)
            texts.setdefault(picture, []).extend(found)
        self._index([found for found in texts.values() if found])
        super().__init__(name, records, maker, [first[p] for p in texts if texts[p]], bad)

    def _index(self, texts: Sequence[Sequence[str]]) -> None:
        self.text = [text for several in texts for text in several]
        """All texts, through the text processor of evaluation."""
        self.txt2img = [image for image, several in enumerate(texts) for _ in several]
        """Number of each text's picture."""
        ends = np.cumsum([len(several) for several in texts]).tolist()
        self.img2txt = [list(range(end - len(s), end)) for s, end in zip(texts, ends, strict=True)]
        """Numbers of each picture's texts."""

    @property
    def total(self) -> int:
        """All texts."""
        return len(self.text) + self.lost

    def __getitem__(self, index: int) -> Sample:
        return self.image(index)

    def image(self, index: int) -> Sample:
        """Picture `index`: image, image_norm, image_id and instance_id, no text.

        Raises:
            BadRecord: it cannot be read.
        """
        return _picture(self, index, self._places(index))

    def pair(self, text: int) -> Sample:
        """Text number `text` with its picture, for losses on held-out pairs."""
        return {**self.image(self.txt2img[text]), "text_input": self.text[text]}

    def _units(self, index: int) -> int:
        return len(self.img2txt[index])

    def _keep(self, kept: list[int]) -> None:
        super()._keep(kept)
        self._index([[self.text[t] for t in self.img2txt[i]] for i in kept])


class EvalCaptions(EvalData):
    """Pictures to caption, one sample each, with what people wrote about them.

    Args:
        name: of the dataset.
        records: those of one picture count together.
        maker: with the processors of evaluation; texts do not go through it.
        official: captions by `image_id`, in place of the records' own.
        judge: of captions, where it is known what is in the pictures.
    """

    unit = "pictures"

    def __init__(
        self,
        name: str,
        records: Records,
        maker: SampleMaker,
        official: ById | None = None,
        judge: Judge | None = None,
    ) -> None:
        self._official, self._judge = official, judge
        self._order = np.argsort(records.pictures, kind="stable")
        self._sorted = records.pictures[self._order]
        numbers, bad = [], []
        for number in self._order[np.unique(self._sorted, return_index=True)[1]].tolist():
            record = records[number]
            if MALFORMED in record:
                bad.append(BadRecord("malformed_record", f"{name}/{number}", str(record[MALFORMED])))
            else:
                numbers.append(number)
        super().__init__(name, records, maker, numbers, bad)
        ids = [_number_of(self.record(i)) for i in range(len(self))]
        self._numbered = len(set(ids)) == len(ids)

    def __getitem__(self, index: int) -> Sample:
        """image, image_norm, instance_id, and `image_id`, its number here."""
        return _picture(self, index, self._places(index))

    def image_id(self, index: int) -> int | str:
        """The annotation's own name of a picture: `image_id`, if a number, else that in the file name.

        Where two pictures have the same, it is `image_id` as it stands, else the number of the record.
        """
        record = self.record(index)
        if self._numbered:
            return _number_of(record)
        return record.get("image_id", int(self._numbers[index]))

    def references(self, index: int) -> list[str]:
        """What people wrote, as it stands; empty where nothing is known."""
        if self._official is not None:
            found = self._official.get(self.image_id(index))
            return _strings(found.get("caption")) if found else []
        picture = self.records.pictures[self._numbers[index]]
        start, end = np.searchsorted(self._sorted, [picture, picture + 1])
        members = [self.records[int(number)] for number in self._order[start:end]]
        return [text for record in members for text in _strings(record.get("caption"))]

    def domain(self, index: int) -> str | None:
        """Which of NoCaps's domains a picture is of: `in`, `near` or `out`; None where nobody says."""
        found = self._official.get(self.image_id(index)) if self._official is not None else None
        domain = (found or {}).get("domain") or self.record(index).get("domain")
        return str(domain).removesuffix("-domain") if domain else None

    def judge(self, index: int, caption: str) -> dict[str, int] | None:
        """How much of a caption is right: `right`, `stated`, `whole` (0 or 1); None where nobody knows."""
        return self._judge(str(self.record(index)["image"]), caption) if self._judge else None


class EvalQuestions(EvalData):
    """Questions about pictures, with the answers that people gave.

    Args:
        name: of the dataset.
        records: one question each.
        maker: with the processors of evaluation.
        official: VQA's annotations by `question_id`, in place of the records' own answers.
        candidates: gives the answers that may be ranked; called at most once.
    """

    unit = "questions"
    relevances: Mapping[str, list[float]] = MappingProxyType({})
    """`question_id` -> how relevant people found each choice, of the questions that they were asked about."""

    def __init__(
        self,
        name: str,
        records: Records,
        maker: QuestionMaker,
        official: ById | None = None,
        candidates: Callable[[], list[str] | None] | None = None,
    ) -> None:
        self._official, self._candidates = official, candidates
        super().__init__(name, records, maker)

    @cached_property
    def answer_list(self) -> list[str] | None:
        """The answers that may be ranked; None where there is neither a list nor a training split.

        Raises:
            MissingData: its file is missing.
        """
        return self._candidates() if self._candidates else None

    def question(self, index: int) -> str:
        """The question as annotated."""
        return str(self.record(index)["question"])

    def question_id(self, index: int) -> int | str:
        """Its own number, else that of its record."""
        return self.record(index).get("question_id", int(self._numbers[index]))

    def answers(self, index: int) -> list[str]:
        """All answers as annotated, repeated ones too; empty where there are none."""
        try:
            return answers_of(self._annotation(index))
        except BadRecord:
            return []

    def question_type(self, index: int) -> str:
        """The kind of question, as the annotation calls it; empty where it says nothing."""
        found = self._annotation(index)
        return str(found.get("question_type", found.get("type", "")))

    def answer_type(self, index: int) -> str:
        """The kind of answer, likewise."""
        return str(self._annotation(index).get("answer_type", ""))

    def choices(self, index: int) -> list[str]:
        """The question's own candidates, as A-OKVQA has them; empty where it has none."""
        return choices_of(self.record(index))

    def correct_choice(self, index: int) -> str | None:
        """The right one of the question's choices, whose number the record has; None where it is secret."""
        return correct_choice_of(self.record(index))

    def relevance(self, index: int) -> list[float] | None:
        """How relevant people found each of the question's choices, 0 to 1; None where nobody was asked."""
        return self.relevances.get(str(self.question_id(index)))

    def _annotation(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        if self._official is None:
            return record
        return self._official.get(self.question_id(index)) or {}


class EvalLabels(EvalData):
    """Sentences about one or two pictures, each of one of several classes."""

    unit = "sentences"

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self.maker.classes)

    def label(self, index: int) -> int:
        """Number of the right class."""
        return self.maker.content(self.record(index), self.instance_id(index))["label"]

    def text(self, index: int) -> str:
        """The sentence as the model reads it."""
        return self.maker.content(self.record(index), self.instance_id(index))["text_input"]

    def sentence_type(self, index: int) -> str:
        """The kind of sentence, as the annotation calls it; empty where it says nothing."""
        return str(self.record(index).get("type", ""))


def _usable(name: str, records: Records, maker: SampleMaker) -> tuple[list[int], list[BadRecord]]:
    """Numbers of the records that have all but perhaps their picture, and what is wrong with the others."""
    numbers, bad = [], []
    for number in range(len(records)):
        try:
            maker.content(records[number], f"{name}/{number}")
        except BadRecord as error:
            bad.append(error)
        else:
            numbers.append(number)
    return numbers, bad


def _picture(data: EvalData, index: int, place: Any) -> Sample:
    rng = keyed.generator(0, "evaluate", data.name, index)
    sample = data.maker.picture(place, data.instance_id(index), rng)
    sample["image_id"] = index
    sample.pop("damaged", None)
    return sample


def _frame_of(clip: Clip) -> str | None:
    try:
        found = clip.files()
    except OSError:
        return None
    shown = found if isinstance(found, str) else found[len(found) // 2] if found else None
    return shown if isinstance(shown, str) else None


def _texts(record: dict[str, Any], maker: SampleMaker, name: str, bad: list[BadRecord]) -> list[str]:
    """The usable captions of a record; what is wrong with the others is added to `bad`."""
    try:
        captions = maker.captions(record, name)
    except BadRecord as error:
        bad.append(error)
        return []
    texts = []
    for which, caption in enumerate(captions if isinstance(captions, list) and captions else [captions]):
        try:
            texts.append(maker.text(caption, f"{name}#{which}" if which else name))
        except BadRecord as error:
            bad.append(error)
    return texts


def _number_of(record: dict[str, Any]) -> int | str:
    """`image_id` where it is a number, else the number that the picture's file name ends with."""
    own = record.get("image_id")
    if isinstance(own, int) or (isinstance(own, str) and own.isdecimal()):
        return int(own)
    stem = Path(str(record.get("image", record.get("video")))).stem
    digits = stem[len(stem.rstrip("0123456789")) :]
    return int(digits) if digits else str(own if own is not None else stem)


def _strings(captions: Any) -> list[str]:
    several = captions if isinstance(captions, list) else [captions]
    return [text for text in several if isinstance(text, str) and text.strip() and _is_text(text)]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
