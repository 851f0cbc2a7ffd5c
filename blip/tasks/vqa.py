"""Visual question answering: answers generated or ranked, scored by the rules of each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from blip import dist
from blip.batch import EvalContext, to_device
from blip.errors import ConfigError
from blip.metrics.vqa import AnswerScores, answer_accuracy, any_match, direct_accuracy
from blip.registry import TASKS
from blip.tasks.base import EvalData, Evaluation, Prediction, Task, WritingRun, rows_of, seen_once
from blip.tasks.submissions import SERVERS

RIGHT = 0.5
"""An answer of at least this accuracy counts as right in predictions; of ten people, two gave it."""


class QuestionData(EvalData, Protocol):
    """Questions about pictures, as evaluation sees them; batches hold them under `text_input`."""

    answer_list: list[str] | None
    """Candidates for ranking."""
    measure: str
    """What counts as right, as `datasets.NAME.measure`; empty: the task's own rule."""
    server: str
    """Format of what the evaluation server takes; empty: the task's own."""

    def question(self, index: int) -> str:
        """The question as annotated."""
        ...

    def question_id(self, index: int) -> int | str:
        """The annotation's own name of a question."""
        ...

    def answers(self, index: int) -> list[str]:
        """What people answered, repeated ones too; empty where the answers are secret."""
        ...

    def question_type(self, index: int) -> str | None:
        """Kind of question, such as `how many`."""
        ...

    def answer_type(self, index: int) -> str | None:
        """Kind of answer, such as `yes/no`."""
        ...

    def choices(self, index: int) -> list[str]:
        """The question's own candidates; empty where it has none."""
        ...

    def correct_choice(self, index: int) -> str | None:
        """The right one of them; None where it is secret."""
        ...


@dataclass
class VqaRun(WritingRun):
    """Run keys of question answering."""

    inference_method: Literal["rank", "generate"] = "rank"
    """Take the most likely answer of a list, or write one."""
    num_ans_candidates: int = 128
    """Answers of the list that are scored in full (`rank`)."""
    num_beams: int = 3
    """Answers that are followed at once (`generate`)."""
    max_len: int = 10
    """Longest generated answer, in tokens."""
    prompt: str = ""
    """Put around each question, which stands where the prompt has `{}`."""

    def problems(self) -> list[str]:
        """Settings of generation and ranking that make no sense."""
        return super().problems() + self._at_least(1, "num_ans_candidates")

    def inference(self) -> dict[str, Any]:
        """Arguments of the model's `predict_answers`; what is left to the model is not among them."""
        given: dict[str, Any] = {"inference_method": self.inference_method}
        if self.inference_method == "rank":
            given["num_ans_candidates"] = self.num_ans_candidates
        else:
            given |= {"num_beams": self.num_beams, "max_len": self.max_len, "min_len": self.min_len}
            given["length_penalty"] = self.length_penalty
        given["prompt"] = self.prompt or None
        return {name: value for name, value in given.items() if value is not None}


@TASKS.register("vqa")
class VisualQuestionAnswering(Task):
    """`overall` accuracy in percent by the official VQA evaluation, and that of each type.

    A dataset may have another measure than the VQA accuracy. Of those whose measure is `choice` the answer is
    the most likely of a question's own choices. Questions with a single reference answer are right if theirs
    equals it. Questions without one are answered, not scored.
    """

    run_config_class = VqaRun
    needs = ("predict_answers",)
    monitor: ClassVar[str] = "overall"
    data_kind: ClassVar[str] = "vqa"

    server: ClassVar[str] = "vqa"
    """Format of what the evaluation server takes, where the data does not say."""

    def accuracy(self, answer: str, truths: Sequence[str], measure: str = "") -> float:
        """How right an answer is, 0 to 1."""
        return answer_accuracy(answer, truths, measure)

    def truths(self, data: QuestionData, index: int) -> list[str]:
        """What an answer is compared with; empty where it is secret."""
        right = data.correct_choice(index) if data.measure == "choice" else None
        return data.answers(index) if right is None else [right]

    def check_data(self, data: QuestionData) -> None:
        """Raise where answers are to be ranked and there is no list of them.

        Raises:
            ConfigError: there is none.
        """
        if data.measure == "choice" and all(data.choices(index) for index in range(len(data))):
            return
        if self.config.inference_method == "rank" and not data.answer_list:
            raise ConfigError(
                f"run.inference_method: rank needs a list of answers, and datasets.{data.name} has none; give"
                " it one, or use run.inference_method=generate"
            )

    def scores(self, data: QuestionData | None = None) -> list[str]:
        """The accuracy, and that of each type of question and answer."""
        if data is None:
            return [self.monitor, "answer_type_*", "question_type_*"]
        own = AnswerScores()
        for index in range(len(data)):
            if self.truths(data, index):
                own.add(0.0, data.question_type(index), data.answer_type(index))
        return list(own.means(self.monitor))

    def evaluate(self, model: Any, data: QuestionData, context: EvalContext) -> Evaluation:
        """What the model answers to every question of this rank's share."""
        self.check_data(data)
        inference = self.config.inference()
        if self.config.inference_method == "rank":
            inference["answer_list"] = data.answer_list
        predictions: list[Prediction] = []
        for batch in data.batches():
            samples = to_device(dict(batch), context.device)
            with context.autocast():
                if data.measure == "choice":
                    answers = self._chosen(model, data, samples, inference)
                else:
                    answers = model.predict_answers(samples, **inference)
                chosen = self.choose(model, data, samples)
            for index, answer, choice in zip(batch["index"].tolist(), answers, chosen, strict=True):
                predictions.append(self._prediction(data, index, answer, choice))
        return Evaluation(predictions, lambda: self._metrics(data, predictions))

    def choose(self, model: Any, data: QuestionData, samples: dict[str, Any]) -> list[str | None]:
        """The best of each question's own choices, where the benchmark asks for it, else None."""
        return [None] * len(samples["index"])

    def submission(self, data: QuestionData, predictions: Sequence[Prediction]) -> Any:
        """What the benchmark's server takes, where answers are secret."""
        if all(p["truth"] for p in predictions):
            return None
        return SERVERS[data.server or self.server](data, predictions)

    def best_choices(self, model: Any, data: QuestionData, samples: dict[str, Any]) -> list[str | None]:
        """The most likely of each question's choices; None where it has none."""
        listed = [data.choices(index) for index in samples["index"].tolist()]
        if any(listed):
            samples = seen_once(model, samples)
        how = {**self.config.inference(), "inference_method": "rank"}
        found: list[str | None] = []
        for row, choices in enumerate(listed):
            own = rows_of(samples, [row], len(listed))
            how |= {"answer_list": choices, "num_ans_candidates": len(choices)}
            found.append(model.predict_answers(own, **how)[0] if choices else None)
        return found

    def _chosen(
        self, model: Any, data: QuestionData, samples: dict[str, Any], inference: dict[str, Any]
    ) -> list[str]:
        """The most likely of each question's choices, and an answer to those without any."""
        found = self.best_choices(model, data, samples)
        rows = [row for row, choice in enumerate(found) if choice is None]
        free = model.predict_answers(rows_of(samples, rows, len(found)), **inference) if rows else []
        for row, answer in zip(rows, free, strict=True):
            found[row] = answer
        return [str(answer) for answer in found]

    def _prediction(self, data: QuestionData, index: int, answer: str, choice: str | None) -> Prediction:
        truths = self.truths(data, index)
        found: Prediction = {
            "index": index,
            "instance_id": data.instance_id(index),
            "question_id": data.question_id(index),
            "image": data.picture(index),
            "question": data.question(index),
            "answer": answer,
            **({} if choice is None else {"choice": choice}),
            "truth": truths,
        }
        if truths:
            found["accuracy"] = round(self.accuracy(answer, truths, data.measure), 4)
            found["right"] = found["accuracy"] >= RIGHT
        return found

    def _metrics(self, data: QuestionData, predictions: list[Prediction]) -> dict[str, float]:
        own = AnswerScores()
        for prediction in predictions:
            if prediction["truth"]:
                index = prediction["index"]
                accuracy = self.accuracy(prediction["answer"], prediction["truth"], data.measure)
                own.add(accuracy, data.question_type(index), data.answer_type(index))
        return self._means(own, self.monitor)

    def _means(self, own: AnswerScores, name: str) -> dict[str, float]:
        """Means over the answers of all ranks."""
        return AnswerScores(dist.gather_lists(own.rows)).means(name)


@TASKS.register("gqa")
class GraphQuestionAnswering(VisualQuestionAnswering):
    """GQA: `acc`, the percentage of answers that equal the one reference answer after cleaning both."""

    monitor: ClassVar[str] = "acc"
    server: ClassVar[str] = "gqa"

    def accuracy(self, answer: str, truths: Sequence[str], measure: str = "") -> float:
        """1.0 if the answer equals a reference answer, whatever the data's measure."""
        return any_match(answer, truths)


@TASKS.register("aok_vqa")
class KnowledgeQuestionAnswering(VisualQuestionAnswering):
    """A-OKVQA: `acc` of direct answers in percent; an answer that three of ten people gave is right.

    Where a question has choices, the most likely of them is its second answer, and `mc_acc` the percentage of
    those that are the right choice; LAVIS leaves this second answer empty.
    """

    monitor: ClassVar[str] = "acc"
    server: ClassVar[str] = "aok_vqa"

    def accuracy(self, answer: str, truths: Sequence[str], measure: str = "") -> float:
        """min(1, n / 3) for n equal reference answers, as they are written, whatever the data's measure."""
        return direct_accuracy(answer, truths)

    def scores(self, data: QuestionData | None = None) -> list[str]:
        """Those of direct answers, and that of choices where some are known to be right."""
        chosen = data is None or any(
            data.choices(index) and data.correct_choice(index) is not None for index in range(len(data))
        )
        return super().scores(data) + (["mc_acc"] if chosen else [])

    def choose(self, model: Any, data: QuestionData, samples: dict[str, Any]) -> list[str | None]:
        """The most likely of each question's choices."""
        return self.best_choices(model, data, samples)

    def _prediction(self, data: QuestionData, index: int, answer: str, choice: str | None) -> Prediction:
        found, correct = super()._prediction(data, index, answer, choice), data.correct_choice(index)
        if choice is not None and correct is not None:
            found |= {"correct_choice": correct, "choice_right": choice == correct}
        return found

    def _metrics(self, data: QuestionData, predictions: list[Prediction]) -> dict[str, float]:
        chosen = AnswerScores()
        for prediction in (p for p in predictions if "choice_right" in p):
            chosen.add(float(prediction["choice_right"]))
        return super()._metrics(data, predictions) | self._means(chosen, "mc_acc")
