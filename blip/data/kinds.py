"""Kinds of records, and what samples each gives: captions, questions, sentences about one or two pictures."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.random import Generator

from blip.data.collate import Flat
from blip.data.samples import BadRecord, Clip, Picture, Sample, SampleMaker, read_image, sound

SENTENCE = ("sentence", "caption", "text_input")
"""Columns that a sentence with a label may stand in, best first."""
TRUTH_VALUES = ("False", "True")
"""Classes of NLVR2."""

_SIDES = re.compile(r"\b(left|right)\b")
_NUMBER = re.compile(r"-?\d+")


@dataclass
class QuestionMaker(SampleMaker):
    """Questions with weighted answers, as BLIP trains on them.

    A sample has `text_input`, the question; and, where answers are wanted, `answer`, the different ones, as
    they stand; `weight`, the share of a record's answers that are this one; and their number, `n_answers`.
    """

    answer_weight: float = 1.0
    """Factor of all weights. BLIP's own training takes 0.2 for Visual Genome."""
    answered: bool | None = True
    """Whether samples have answers, as in training; None: where the record has any."""
    what: ClassVar[str] = "question"

    def content(self, record: Mapping[str, Any], name: str, rng: Generator | None = None) -> Sample:
        """Question and answers.

        Raises:
            BadRecord: no_question, no_answer, bad_text.
        """
        sound(record, name)
        sample: Sample = {"text_input": _one_text(self, record.get("question"), name)}
        answered = bool(answers_of(record, name)) if self.answered is None else self.answered
        if answered:
            answers = [answer for answer in answers_of(record, name) if answer.strip()]
            if not answers:
                raise BadRecord("no_answer", name)
            different = list(dict.fromkeys(answers))
            shares = [self.answer_weight * answers.count(answer) / len(answers) for answer in different]
            sample |= {"answer": Flat(different), "weight": Flat(shares), "n_answers": len(different)}
        return sample

    def single(self, record: dict[str, Any], which: int, name: str) -> dict[str, Any]:
        """The record: it has one question."""
        return record


@dataclass
class LabelMaker(SampleMaker):
    """Sentences about a picture that belong to one of several classes: `text_input` and `label`."""

    classes: Sequence[str] = ()
    """Names of the classes, in the order of their numbers."""
    what: ClassVar[str] = "sentence"

    def content(self, record: Mapping[str, Any], name: str, rng: Generator | None = None) -> Sample:
        """Sentence and class.

        Raises:
            BadRecord: no_sentence, bad_text, no_label, bad_label.
        """
        sound(record, name)
        sentence = next((record[key] for key in SENTENCE if record.get(key) is not None), None)
        text = _one_text(self, sentence, name)
        label = record.get("label")
        if label is None or label == "":
            raise BadRecord("no_label", name)
        number = label_number(label, self.classes)
        if number is None:
            known = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
            raise BadRecord("bad_label", name, f"{str(label)[:40]!r} is none of the classes {known}")
        return {"text_input": text, "label": number}

    def single(self, record: dict[str, Any], which: int, name: str) -> dict[str, Any]:
        """The record: it has one sentence."""
        return record


@dataclass
class PairMaker(LabelMaker):
    """Sentences about two pictures: `image0`, `image1`, `text_input`, `label`.

    In training, with probability 0.5, the pictures change places and the words left and right with them
    (whole words, as in BLIP's own code; LAVIS also changes parts of words).
    """

    classes: Sequence[str] = TRUTH_VALUES
    """Names of the classes, in the order of their numbers."""
    swap: bool = False
    """Whether pictures change places."""
    cut: float = 0.5
    """Where a single picture is cut into the two, as a share of its width."""

    def __call__(
        self,
        record: Mapping[str, Any],
        image: Picture | Clip | Sequence[Picture],
        name: str,
        rng: Generator | None = None,
    ) -> Sample:
        """The sample of a record and its two pictures, or the one that holds both.

        Raises:
            BadRecord: no usable text, label or picture.
        """
        rng = np.random.default_rng() if rng is None else rng
        content = self.content(record, name)
        first, second = self._both(image, name)
        if self.swap and rng.random() < 0.5:
            first, second = second, first
            content["text_input"] = exchange_sides(content["text_input"])
        if self.features is not None:
            return {"image0_embeds": first, "image1_embeds": second, "instance_id": name, **content}
        return {
            "image0": self.vis_processor.pixels(first, rng),
            "image1": self.vis_processor.pixels(second, rng),
            "image_norm": self.vis_processor.norm(),
            "instance_id": name,
            **content,
        }

    def places(self, record: Mapping[str, Any], name: str) -> list[Any]:
        """Two entries; or one, of the picture that holds both."""
        sound(record, name)
        images = record.get("images")
        if images is None:
            return super().places(record, name)
        if not isinstance(images, list) or len(images) != 2 or None in images:
            raise BadRecord("missing_image", name, f"'images' is {str(images)[:60]}, not a list of two")
        return images

    def _both(self, image: Picture | Clip | Sequence[Picture], name: str) -> tuple[Any, Any]:
        """The two pictures, or their states."""
        if isinstance(image, list | tuple) and len(image) == 2:
            if self.features is not None:
                return self.features.states(image[0], name), self.features.states(image[1], name)
            first, second = (read_image(one, name, self.decoder) for one in image)
            return first, second
        if self.features is not None:
            raise BadRecord("no_features", name, "one picture that holds both has no features of the two")
        whole = read_image(image, name, self.decoder)  # type: ignore[arg-type]
        if whole.width < 2:
            raise BadRecord("unreadable_image", name, "one pixel wide: it cannot be cut into two pictures")
        middle = min(max(round(whole.width * self.cut), 1), whole.width - 1)
        right = whole.crop((middle, 0, whole.width, whole.height))
        return whole.crop((0, 0, middle, whole.height)), right


def exchange_sides(text: str) -> str:
    """`text` with the words left and right in each other's place."""
    return _SIDES.sub(lambda found: "right" if found.group() == "left" else "left", text)


def answers_of(record: Mapping[str, Any], name: str = "") -> list[str]:
    """A record's answers as annotated, repeated ones too: of `answer`, else `answers`; numbers as texts.

    An answer may be an object with `answer`, as in the official VQA files.

    Raises:
        BadRecord: bad_text where one is neither.
    """
    given = record.get("answer")
    given = record.get("answers") if given is None else given
    found = []
    for answer in given if isinstance(given, list) else [] if given is None else [given]:
        answer = answer.get("answer") if isinstance(answer, Mapping) else answer
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise BadRecord("bad_text", name, f"an answer is {type(answer).__name__}, not text")
        found.append(str(answer))
    return found


def choices_of(record: Mapping[str, Any]) -> list[str]:
    """A record's own candidates, as A-OKVQA has them; empty where it has none."""
    return [text for text in _listed(record) if text.strip()]


def correct_choice_of(record: Mapping[str, Any]) -> str | None:
    """The right one of a record's choices, whose number it has; None where it is secret."""
    number, choices = record.get("correct_choice"), _listed(record)
    if isinstance(number, str) and number.isdecimal():  # of a table, whose cells are texts
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return choices[number] if 0 <= number < len(choices) else None


def _listed(record: Mapping[str, Any]) -> list[str]:
    listed = record.get("choices")
    plain = isinstance(listed, list) and all(isinstance(item, str | int | float) for item in listed)
    return [str(item) for item in listed or ()] if plain else []


def label_number(label: Any, classes: Sequence[str]) -> int | None:
    """Number of a class that is given by name, in any case of letters, or by number; None: there is no such.

    For true and false the numbers are 1 and 0, whatever they are written as.
    """
    text = str(label).strip()
    if text in classes:
        return classes.index(text)
    lower = [name.lower() for name in classes]
    if text.lower() in lower:
        return lower.index(text.lower())
    return int(text) if text.isdecimal() and int(text) < len(classes) else None


def sort_labels(labels: Collection[str]) -> list[str]:
    """Labels in the order of their class numbers: by value where all are whole numbers, else by name."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _one_text(maker: SampleMaker, text: Any, name: str) -> str:
    if isinstance(text, list) and text:
        raise BadRecord("bad_text", name, f"the {maker.what} is list, not text")
    return maker.text(text, name)


@dataclass(frozen=True)
class Kind:
    """What is common to all datasets of a kind."""

    needs: tuple[tuple[str, ...], ...]
    """Columns without which the data is useless; of several in one entry any will do."""
    noun: str
    """What its texts are called."""
    text_processor: str
    """The processor of texts where none is named."""
    serves: tuple[str, ...]
    """What tasks may ask for, as `Task.data_kind`; the first stands where no task asks."""


KINDS = {
    "instruct": Kind(
        (("image", "video"), ("text_input", "conversations"), ("text_output", "conversations")),
        "instructions",
        "plain_text",
        ("instruct",),
    ),
    "caption": Kind(
        (("image", "video"), ("caption",)), "captions", "blip_caption", ("retrieval", "caption", "instruct")
    ),
    "vqa": Kind((("image", "video"), ("question",)), "questions", "blip_question", ("vqa", "instruct")),
    "nlvr": Kind(
        (("images", "image"), SENTENCE, ("label",)), "sentences", "blip_caption", ("classification",)
    ),
    "classification": Kind(
        (("image", "video"), SENTENCE, ("label",)),
        "sentences",
        "blip_caption",
        ("classification", "instruct"),
    ),
}


def kind_of(present: Collection[str], wanted: str | None = None) -> str:
    """The kind of records that have these columns.

    Args:
        present: our names of the columns.
        wanted: what the task asks for; it decides where several kinds would do, as with labelled captions.
    """
    fitting = [name for name, kind in KINDS.items() if all(set(some) & set(present) for some in kind.needs)]
    if "images" not in present and "nlvr" in fitting:
        fitting.remove("nlvr")  # one picture that holds two looks like any other
    for name in fitting:
        if wanted in KINDS[name].serves:
            return name
    signs = {"images": "nlvr", "question": "vqa", "sentence": "classification"}
    signs |= {"text_output": "instruct", "conversations": "instruct"}
    likely = [name for sign, name in signs.items() if sign in present]
    return next(iter([*(name for name in likely if name in fitting), *fitting, *likely, "caption"]))
