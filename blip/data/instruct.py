"""Samples of instructions: as records have them, or made of captions, questions, sentences by templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from numpy.random import Generator

from blip.data.kinds import SENTENCE, answers_of, choices_of, correct_choice_of, label_number
from blip.data.records import ById
from blip.data.samples import BadRecord, Sample, SampleMaker, sound
from blip.errors import ConfigError
from blip.templates import MAIN, OF_KIND, dialog, fill, lettered, named, places, resolve, words_read

T = TypeVar("T")

IMAGE_MARK = "<image>"
"""Where LLaVA's messages have the picture."""

PLACES = {
    "caption": ("ocr", "context"),
    "vqa": ("question", "answer", "choices", "ocr", "context", "history", "caption"),
    "classification": ("sentence", "choices", "ocr", "context"),
}
"""Kind of records -> places of templates that it may have something for."""


def asks_for(template: str) -> str:
    """What is to be written to a template of questions: `question`, `choice` or `answer`."""
    shown = places(template)
    return "question" if "answer" in shown else "choice" if "choices" in shown else "answer"


def unfit(templates: Sequence[str], kind: str) -> str:
    """Why these templates cannot be used with records of a kind; empty if they can."""
    if kind not in PLACES:
        return "are instructions already" if kind == "instruct" else "take no instructions"
    for template in templates:
        for place in places(template):
            if (place or MAIN.get(kind, "")) not in PLACES[kind]:
                return f"have nothing for the place {{{place}}} of {template!r}"
    return ""


@dataclass
class InstructMaker(SampleMaker):
    """Instructions, `text_input`, and what is to be written, `text_output`.

    In training one of the templates, one of several answers (as often as people gave it) and one message of
    a conversation are drawn; where nothing draws, the first ones are taken.

    The text processor cleans captions, questions and sentences; answers stand as they are. Of records that
    are instructions already it cleans both texts.
    """

    kind: str = "instruct"
    """Of the records, a key of `kinds.KINDS`."""
    templates: Sequence[str] = ()
    """Of which one is drawn; none for `instruct`."""
    classes: Sequence[str] = ()
    """Names of the classes, in the order of their numbers, which are the outputs of `classification`."""
    answered: bool | None = True
    """Whether samples have `text_output`, as in training; None: where the record has one."""
    ocr: ById | None = None
    """`ocr_tokens` by `image_id`, where the records have none."""
    what: ClassVar[str] = "instruction"

    def __post_init__(self) -> None:
        self.templates = [named(template, MAIN.get(self.kind, "")) for template in self.templates]

    @property
    def per_caption(self) -> bool:
        """Whether a record with several captions counts once for each."""
        return self.kind == "caption"

    def single(self, record: dict[str, Any], which: int, name: str) -> dict[str, Any]:
        """The record with only one of several captions."""
        return super().single(record, which, name) if self.kind == "caption" else record

    def content(self, record: Mapping[str, Any], name: str, rng: Generator | None = None) -> Sample:
        """Instruction and output.

        Raises:
            BadRecord: no_instruction, no_output; no_caption, no_question, no_answer, no_sentence, no_label;
                no_X where a template has a place X that the record has nothing for; bad_text, bad_label.
        """
        sound(record, name)
        if self.kind == "instruct":
            instruction, output = self._told(record, name, rng)
        else:
            instruction, output = self._made(record, name, rng)
        wording = getattr(self.text_processor, "instruction", str)
        sample: Sample = {"text_input": self.prompt + wording(instruction)}
        if self.answered and output is None:
            raise BadRecord("no_answer" if self.kind == "vqa" else "no_output", name)
        if output is not None and self.answered is not False:
            sample["text_output"] = output
        return sample

    def outputs(self, record: Mapping[str, Any], name: str) -> list[str]:
        """All outputs that a record of instructions gives, as they stand; of a conversation the first reply.

        Raises:
            BadRecord: bad_text.
        """
        if record.get("conversations") is not None:
            return [turn[1] for turn in _turns(record, name)[:1]]
        return answers_of({"answer": record.get("text_output"), "answers": record.get("answers")}, name)

    def _told(self, record: Mapping[str, Any], name: str, rng: Generator | None) -> tuple[str, str | None]:
        """What a record says itself."""
        if record.get("conversations") is None:
            outputs = self.outputs(record, name)
            given = self.cleaned(_single(record.get("text_input"), name), name)
            return given, self.cleaned(_draw(outputs, rng), name, what="output") if outputs else None
        turns = _turns(record, name)
        which = 0 if rng is None else int(rng.integers(len(turns)))
        message = self.cleaned(turns[which][0], name)
        return dialog(message, turns[:which]), self.cleaned(turns[which][1], name, what="output")

    def _made(self, record: Mapping[str, Any], name: str, rng: Generator | None) -> tuple[str, str | None]:
        """A template, filled, and the output that it asks for."""
        template = _draw(self.templates, rng)
        values = {key: _text_of(record.get(key)) for key in ("context", "history", "caption")}
        values["ocr"] = self._words_read(record) if "ocr" in places(template) else ""
        output: str | None
        if self.kind == "caption":
            captions = self.captions(record, name)
            captions = captions if isinstance(captions, list) else [captions]
            wanted = self.answered or any(captions)
            output = self.cleaned(_draw(captions or [None], rng), name, what="caption") if wanted else None
        elif self.kind == "classification":
            sentence = next((record[key] for key in SENTENCE if record.get(key) is not None), None)
            values["sentence"] = self.cleaned(_single(sentence, name), name, what="sentence")
            values["choices"] = lettered(self.classes)
            output = self._class_name(record, name)
        else:
            output = self._answer(record, name, rng, asks_for(template), values)
        try:
            return fill(template, values), output
        except KeyError as error:
            raise BadRecord(f"no_{error.args[0]}", name, f"for the template {template!r}") from None

    def _answer(
        self,
        record: Mapping[str, Any],
        name: str,
        rng: Generator | None,
        wanted: str,
        values: dict[str, str],
    ) -> str | None:
        """What is to be written to a question; adds what its template may show to `values`."""
        question = self.cleaned(_single(record.get("question"), name), name, what="question")
        answers = [answer for answer in answers_of(record, name) if answer.strip()]
        right = correct_choice_of(record)
        answers = answers or ([] if right is None else [right])
        answer = _draw(answers, rng) if answers else None
        values |= {"question": question, "answer": answer or "", "choices": lettered(choices_of(record))}
        return {"question": question, "choice": right or answer, "answer": answer}[wanted]

    def _class_name(self, record: Mapping[str, Any], name: str) -> str | None:
        label = record.get("label")
        if label is None or label == "":
            if self.answered:
                raise BadRecord("no_label", name)
            return None
        number = label_number(label, self.classes)
        if number is None:
            raise BadRecord("bad_label", name, f"{str(label)[:40]!r} is none of the classes")
        return self.classes[number]

    def _words_read(self, record: Mapping[str, Any]) -> str:
        """The first words that were read in the picture, with commas between them."""
        found = record.get("ocr_tokens")
        if found is None and self.ocr is not None:
            keys = (record.get("image_id"), Path(str(record.get("image", ""))).stem)
            known = next((row for key in keys if key is not None and (row := self.ocr.get(key))), {})
            found = known.get("ocr_tokens")
        words = found.split() if isinstance(found, str) else found if isinstance(found, list) else []
        return words_read([str(word) for word in words])


def _turns(record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """(message, reply) of each turn of LLaVA's `conversations`, without the mark of the picture."""
    told = record.get("conversations")
    texts: list[str] = []
    for number, message in enumerate(told if isinstance(told, list) else []):
        sender = message.get("from") if isinstance(message, Mapping) else None
        text = message.get("value") if isinstance(message, Mapping) else None
        if not isinstance(text, str) or sender != ("human", "gpt")[number % 2]:
            raise BadRecord(
                "bad_text", name, f"message {number} of the conversation is no turn of human, gpt"
            )
        texts.append(text.replace(IMAGE_MARK, "").strip())
    if len(texts) < 2:
        raise BadRecord("no_instruction", name, "the conversation has no message with a reply")
    return list(zip(texts[::2], texts[1::2], strict=False))


def _draw(several: Sequence[T], rng: Generator | None) -> T:
    return several[0] if rng is None or len(several) == 1 else several[int(rng.integers(len(several)))]


def _single(text: Any, name: str) -> Any:
    if isinstance(text, list) and text:
        raise BadRecord("bad_text", name, "a list where one text is wanted")
    return text


def _text_of(value: Any) -> str:
    """A text, or several in a row; empty for anything else."""
    if isinstance(value, list):
        return " ".join(item for item in value if isinstance(item, str))
    return value.strip() if isinstance(value, str) else ""


def chosen_templates(
    name: str,
    given: str | Sequence[str] | None,
    listed: str,
    kind: str,
    wanted: str | None,
    train: bool,
) -> list[str] | None:
    """The templates that records are shown by; empty: they are instructions; None: they stay as they are.

    Args:
        name: of the dataset.
        given: by its section or its text processor.
        listed: by the catalogue; empty: the list of the kind.
        kind: of the records.
        wanted: what the task evaluates; `instruct` wants instructions of any kind of records.
        train: whether they are to train on; other tasks evaluate without templates.

    Raises:
        ConfigError: templates that have places for what such records do not have.
    """
    if kind == "instruct" and given is None:
        return []
    if given is None and wanted == "instruct":
        given = listed or OF_KIND.get(kind)
    if given is None or not (train or wanted == "instruct"):
        return None
    templates = resolve(given)
    if problem := unfit(templates, kind):
        raise ConfigError(
            f"datasets.{name}.templates: its records are of kind {kind} and {problem}; leave"
            " templates out, or name others"
        )
    return templates
