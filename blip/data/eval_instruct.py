"""What evaluations of instructions see of one split, whatever kind of records it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from blip.data.evaluation import EvalCaptions, EvalData, EvalLabels, EvalQuestions
from blip.data.instruct import InstructMaker, asks_for
from blip.data.kinds import choices_of, correct_choice_of
from blip.data.samples import BadRecord, Sample

ByType = Mapping[str, Sequence[str]]
"""Type of a record -> the different outputs of such records."""


class EvalTold(EvalData):
    """Records that are instructions themselves, one sample each."""

    unit = "instructions"


class EvalInstructions:
    """Instructions about pictures, with what may be written: `batches` hold `text_input`.

    Captions, questions and labelled sentences become instructions by the first template; those that it does
    not suit are left out. What is not said here is answered by the data that they come from.

    Args:
        data: the same records as data of their own kind.
        maker: record -> instruction.
        outputs: gives the outputs of the training records by type; called at most once.
    """

    def __init__(
        self, data: EvalData, maker: InstructMaker, outputs: Callable[[], ByType | None] | None = None
    ) -> None:
        self.data: Any = data
        self.maker = maker
        self._outputs = outputs
        self.asks = asks_for(maker.templates[0]) if maker.kind == "vqa" else ""
        bad: dict[int, BadRecord] = {}
        for index in range(len(data)):
            try:
                self.instruction(index)
            except BadRecord as error:  # it has nothing for a place of the template
                bad[index] = error
        if bad:
            data.leave_out(np.isin(np.arange(len(data)), list(bad)), bad.values())

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        """image, image_norm, instance_id, and `text_input`, the instruction.

        Raises:
            BadRecord: it cannot be read.
        """
        return {**self.data.shown(index), "text_input": self.instruction(index)}

    def instruction(self, index: int) -> str:
        """What the model is told."""
        return self.maker.content(self.data.record(index), self.data.instance_id(index))["text_input"]

    def references(self, index: int) -> list[str]:
        """What people wrote, as it stands; empty where it is secret."""
        if isinstance(self.data, EvalCaptions):
            return self.data.references(index)
        if isinstance(self.data, EvalLabels):
            return [self.data.classes[self.data.label(index)]]
        if isinstance(self.data, EvalQuestions):
            if self.asks == "question":
                return [self.data.question(index)]
            right = self.data.correct_choice(index)
            answers = [] if self.asks == "choice" and right is not None else self.data.answers(index)
            return answers or ([] if right is None else [right])
        record = self.data.record(index)
        right = correct_choice_of(record)
        found = self.maker.outputs(record, self.data.instance_id(index))
        return found or ([] if right is None else [right])

    @property
    def in_words(self) -> bool:
        """Whether a whole sentence is to be written about each picture: captions, or questions."""
        return isinstance(self.data, EvalCaptions) or self.asks == "question"

    def task_type(self, index: int) -> str:
        """The kind of instruction, as the annotation calls it; empty where it says nothing."""
        if isinstance(self.data, EvalQuestions):
            return self.data.question_type(index)
        return str(self.data.record(index).get("type", ""))

    def choices(self, index: int) -> list[str]:
        """The record's own candidates; empty where it has none."""
        if isinstance(self.data, EvalLabels):
            return list(self.data.classes)
        return [] if self.in_words else choices_of(self.data.record(index))

    def candidates(self, index: int) -> list[str]:
        """What may be ranked: its own candidates, a list of answers, or the outputs of its type in training.

        Raises:
            MissingData: the file of the list is missing.
        """
        own = self.choices(index)
        if own or self.in_words:
            return own
        if isinstance(self.data, EvalQuestions):
            return list(self.data.answer_list or ())
        return list((self._by_type or {}).get(self.task_type(index), ()))

    @cached_property
    def _by_type(self) -> ByType | None:
        return self._outputs() if self._outputs else None


def outputs_by_type(records: Iterable[Mapping[str, Any]], maker: InstructMaker) -> dict[str, list[str]]:
    """The different outputs of instructions by the type of their records, sorted; conversations have none."""
    found: dict[str, set[str]] = {}
    for record in records:
        if record.get("conversations") is None:
            try:
                texts = maker.outputs(record, "")
            except BadRecord:
                continue
            found.setdefault(str(record.get("type", "")), set()).update(t for t in texts if t.strip())
    return {name: sorted(texts) for name, texts in found.items()}
