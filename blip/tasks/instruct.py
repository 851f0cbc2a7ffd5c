"""Instruction tuning: what is to be written is written or ranked, and right where it is what people wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from blip import dist
from blip.batch import EvalContext, to_device
from blip.errors import ConfigError
from blip.metrics.caption import JAVA_SCORES, caption_scores, score_names
from blip.metrics.retrieval import RECALL_AT, ndcg, rank_scores, roc_auc
from blip.metrics.vqa import AnswerScores, answer_accuracy, any_match
from blip.registry import TASKS
from blip.tasks.base import EvalData, Evaluation, Prediction, Task, WritingRun, rows_of, seen_once
from blip.tasks.submissions import SERVERS, captions
from blip.together import on_main

BINARY = {"yes": ("yes", "true"), "no": ("no", "false")}
"""Words that stand for the two answers of a question that has no others (InstructBLIP, section 2.6)."""
RIGHT = 0.5
"""An output of at least this accuracy counts as right in predictions."""


class InstructionData(EvalData, Protocol):
    """Instructions about pictures, as evaluation sees them; batches hold them under `text_input`."""

    in_words: bool
    """Whether captions or questions are to be written, which are also compared as captions are."""
    measure: str
    """What counts as right, as `datasets.NAME.measure`; empty: the VQA accuracy."""
    server: str
    """Format of what the evaluation server takes; empty: VQA's, or COCO's of captions."""

    def instruction(self, index: int) -> str:
        """What the model is told."""
        ...

    def references(self, index: int) -> list[str]:
        """What people wrote; empty where it is secret."""
        ...

    def choices(self, index: int) -> list[str]:
        """The record's own candidates; empty where it has none."""
        ...

    def candidates(self, index: int) -> list[str]:
        """What may be ranked: its own candidates, else a list; empty where there is neither."""
        ...

    def task_type(self, index: int) -> str:
        """Kind of instruction; empty where nothing is known."""
        ...


@dataclass
class InstructRun(WritingRun):
    """Run keys of instruction tuning."""

    inference_method: Literal["auto", "generate", "rank"] = "auto"
    """`rank`: take the most likely of an instruction's choices, of the dataset's answer list, or of what its
    type has as outputs in training; `generate`: write; `auto`: rank where a record has its own choices.
    Captions, and questions that are asked for, are written in any case."""
    num_ans_candidates: int = 1000
    """Instructions with more candidates than this, and without choices of their own, are written to."""
    length_penalty: float | None = None
    """Scores of beams are divided by the length to this power; None: the model's, of captions or answers."""
    repetition_penalty: float | None = None
    """Above 1, words that are there become less likely; None: the model's own."""

    def problems(self) -> list[str]:
        """Settings of generation and ranking that make no sense."""
        found = super().problems() + self._at_least(1, "num_ans_candidates")
        return found + self._at_least(1e-6, "repetition_penalty")

    def generation(self) -> dict[str, Any]:
        """Arguments of the model's `generate`; what is left to the model is not among them."""
        given = {
            "num_beams": self.num_beams,
            "max_length": self.max_len,
            "min_length": self.min_len,
            "length_penalty": self.length_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in given.items() if value is not None}


class Made(NamedTuple):
    """What a model makes of an instruction."""

    text: str
    order: Sequence[str] = ()
    """Candidates from the most to the least likely one, as far as the model tells; empty: it was written."""
    places: Sequence[int] = ()
    """Of each candidate in their own order its place among all, from 1, where that is asked for."""
    log_odds: float | None = None
    """Of yes against no, where these are all candidates and the model tells."""


@TASKS.register("instruct_tuning")
class InstructTuning(Task):
    """`acc`: the percentage of outputs that are what people wrote, and that of each type of instruction.

    Both are cleaned as answers to questions are; where several people answered, it is the VQA accuracy.
    A dataset may have another measure of its own. `MRR`, the mean reciprocal rank in percent, where more than
    two candidates are ranked; where the measure is `ranks`, as VisDial's, also `R_1`, `R_5`, `R_10` and
    `mean_rank`, and `NDCG` in percent where it is known how relevant each candidate is.
    `AUC`, in percent, of the odds of yes against no, where there is nothing else to choose (HatefulMemes).
    Where captions or questions are to be written, also `CIDEr`, `Bleu_1` to `Bleu_4` and `ROUGE_L`.
    """

    run_config_class = InstructRun
    needs = ("generate", "predict_answers")
    monitor: ClassVar[str] = "acc"
    data_kind: ClassVar[str] = "instruct"

    def check(self, model: Any) -> None:
        """Raise where `model` cannot do this task, or not tell what decides about the best checkpoint.

        Raises:
            ConfigError: a method is missing.
        """
        super().check(model)
        told = ("MRR", "AUC", "NDCG", "mean_rank", *(f"R_{k}" for k in RECALL_AT))
        decides = (self.config.monitor or "").rpartition("/")[2]
        if decides in told and not hasattr(model, "class_scores"):
            raise ConfigError(
                f"run.monitor: model.arch {model.config.arch!r} tells which candidate is the likeliest, not"
                f" how likely each is, so there is no {decides}; choose acc, or InstructBLIP"
            )

    def check_data(self, data: InstructionData) -> None:
        """Raise where outputs are to be ranked and nothing says which there may be.

        Raises:
            ConfigError: no instruction has candidates.
        """
        if self.config.inference_method != "rank" or data.in_words:
            return  # captions and questions are always written
        if any(data.candidates(index) for index in range(len(data))):
            return
        raise ConfigError(
            f"run.inference_method: rank needs candidates, and datasets.{data.name} has none; give it"
            " choices, an answer_list or a train split, or use run.inference_method=generate"
        )

    def scores(self, data: InstructionData | None = None) -> list[str]:
        """The accuracy, that of each type, and what is measured of rankings and of captions.

        `MRR` and `AUC` are there only if the model tells how likely candidates are, too.
        """
        in_words = score_names(JAVA_SCORES)
        if data is None:
            return ["acc", "type_*", *rank_scores([1]), "NDCG", "AUC", *in_words]
        own, ranked, binary = AnswerScores(), False, set[str]()
        for index in range(len(data)):
            if truths := data.references(index):
                own.add(0.0, data.task_type(index))
                listed = self.candidates(data, index)
                ranked = ranked or (len(listed) > 2 and truths[0] in listed)
                binary |= set(truths) if _is_binary(listed) and len(set(truths)) == 1 else set()
        found = list(own.means("acc", questions="type"))
        if ranked:
            found += rank_scores([1]) if data.measure == "ranks" else ["MRR"]
        if ranked and any(self._relevance(data, index) for index in range(len(data))):
            found.append("NDCG")
        found += ["AUC"] if binary.issuperset(BINARY) else []
        return found + (in_words if data.in_words and own.rows else [])

    def evaluate(self, model: Any, data: InstructionData, context: EvalContext) -> Evaluation:
        """What the model makes of every instruction of this rank's share."""
        predictions: list[Prediction] = []
        for batch in data.batches():
            samples = to_device(dict(batch), context.device)
            with context.autocast():
                outputs = self._outputs(model, data, samples)
            for index, made in zip(batch["index"].tolist(), outputs, strict=True):
                predictions.append(_prediction(data, index, made))
        return Evaluation(predictions, lambda: self._metrics(data, predictions))

    def candidates(self, data: InstructionData, index: int) -> list[str]:
        """What is ranked; empty: the output is written."""
        if self.config.inference_method == "generate":
            return []
        if self.config.inference_method == "auto":
            return data.choices(index)
        found = data.candidates(index)
        few = len(found) <= self.config.num_ans_candidates
        return found if few or data.choices(index) else []

    def _outputs(self, model: Any, data: InstructionData, samples: dict[str, Any]) -> list[Made]:
        """What the model makes of each instruction of a batch."""
        indices = samples["index"].tolist()
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, index in enumerate(indices):
            groups.setdefault(tuple(self.candidates(data, index)), []).append(row)
        if len(groups) > 1:
            samples = seen_once(model, samples)
        found: dict[int, Made] = {}
        for listed, rows in groups.items():
            own = rows_of(samples, rows, len(indices))
            if listed:
                made = _ranked(model, own, listed, data.measure == "ranks")
            else:
                texts = model.generate(own, prompt=list(own["text_input"]), **self._how(model, data))
                made = [Made(text) for text in texts]
            found |= dict(zip(rows, made, strict=True))
        return [found[row] for row in range(len(indices))]

    def _how(self, model: Any, data: InstructionData) -> dict[str, Any]:
        """Arguments of the model's `generate`."""
        given = self.config.generation()
        if not data.in_words and hasattr(model, "answer_length_penalty"):
            given.setdefault("length_penalty", model.answer_length_penalty)
        return given

    def _metrics(self, data: InstructionData, predictions: list[Prediction]) -> dict[str, float]:
        own = AnswerScores()
        for prediction in predictions:
            if prediction["truth"]:
                right = _accuracy(data, prediction["answer"], prediction["truth"])
                own.add(right, data.task_type(prediction["index"]))
        found = AnswerScores(dist.gather_lists(own.rows)).means("acc", questions="type")
        if ranks := rank_scores(dist.gather_lists(p["rank"] for p in predictions if "rank" in p)):
            found |= ranks if data.measure == "ranks" else {"MRR": ranks["MRR"]}
        judged = [(p["ranks"], self._relevance(data, p["index"])) for p in predictions if "ranks" in p]
        if gains := dist.gather_lists(ndcg(ranks, relevance) for ranks, relevance in judged if relevance):
            found["NDCG"] = 100 * math.fsum(gains) / len(gains)
        odds = dist.gather_lists((p["log_odds"], p["truth"][0] == "yes") for p in predictions if _judged(p))
        if len({positive for _, positive in odds}) == 2:
            found["AUC"] = 100 * roc_auc(*zip(*odds, strict=True))
        return found | (self._as_captions(data, predictions) if data.in_words else {})

    def less_is_better(self, score: str) -> bool:
        """The mean rank: the best is 1."""
        return score == "mean_rank"

    def submission(self, data: InstructionData, predictions: Sequence[Prediction]) -> Any:
        """What the benchmark's server takes, where what people wrote is secret."""
        if all(p["truth"] for p in predictions):
            return None
        source: Any = data
        if hasattr(source, "image_id"):
            return captions(source, predictions, "answer")
        asked = hasattr(source, "question_id") and not data.in_words
        return SERVERS[data.server or "vqa"](source, predictions) if asked else None

    @staticmethod
    def _relevance(data: Any, index: int) -> list[float] | None:
        """How relevant each of a question's choices is; None where nobody knows, or nothing is."""
        found = data.relevance(index) if hasattr(data, "relevance") else None
        return found if found and any(found) else None

    def _as_captions(self, data: InstructionData, predictions: list[Prediction]) -> dict[str, float]:
        """Scores of captions; rank 0 computes them, since CIDEr looks at the whole corpus."""
        every = dict(dist.gather_lists((p["index"], p["answer"]) for p in predictions if p["truth"]))

        def score() -> dict[str, float]:
            indices = sorted(every)
            if not indices:
                return {}
            truths = [data.references(index) for index in indices]
            return caption_scores([every[index] for index in indices], truths, [])

        return on_main(score)


def _is_binary(listed: Sequence[str]) -> bool:
    return len(listed) == len(BINARY) and set(listed) == set(BINARY)


def _judged(prediction: Prediction) -> bool:
    """Whether all who answered said yes, or all no, to a question that was compared by its odds."""
    return "log_odds" in prediction and set(prediction["truth"]) in ({"yes"}, {"no"})


def _ranked(model: Any, samples: dict[str, Any], listed: Sequence[str], places: bool = False) -> list[Made]:
    """The likeliest candidate for each instruction, and the others in order if the model tells.

    Args:
        places: whether the place of each candidate is asked for.
    """
    if not hasattr(model, "class_scores"):
        how = {"inference_method": "rank", "answer_list": list(listed), "prompt": "{}"}
        return [Made(text, [text]) for text in model.predict_answers(samples, **how)]
    samples = dict(samples)
    prompts = list(samples.pop("text_input"))
    binary = _is_binary(listed)
    words = [word for text in listed for word in (BINARY[text] if binary else (text,))]
    scores = model.class_scores(samples, candidates=words, prompt=prompts)  # (B, N)
    if binary:
        scores = scores.view(len(prompts), len(listed), -1).logsumexp(dim=2)
    made = []
    for row, order in zip(scores, scores.argsort(dim=1, descending=True, stable=True).tolist(), strict=True):
        ordered = [listed[number] for number in order]
        odds = float(row[listed.index("yes")] - row[listed.index("no")]) if binary else None
        ranks = {number: rank for rank, number in enumerate(order, start=1)} if places else {}
        made.append(Made(ordered[0], ordered, [ranks[number] for number in sorted(ranks)], odds))
    return made


def _prediction(data: InstructionData, index: int, made: Made) -> Prediction:
    truths, kind = data.references(index), data.task_type(index)
    found: Prediction = {
        "index": index,
        "instance_id": data.instance_id(index),
        "image": data.picture(index),
        **({"type": kind} if kind else {}),
        "question": data.instruction(index),
        "answer": made.text,
        "ranked": bool(made.order),
        "truth": truths,
    }
    if truths:
        found["accuracy"] = round(_accuracy(data, made.text, truths), 4)
        found["right"] = found["accuracy"] >= RIGHT
    if made.log_odds is not None:
        found["log_odds"] = made.log_odds
    if len(made.order) > 2 and truths and truths[0] in made.order:
        found["rank"] = 1 + made.order.index(truths[0])
    if made.places:
        found["ranks"] = list(made.places)
    return found


def _accuracy(data: InstructionData, output: str, truths: Sequence[str]) -> float:
    """How right an output is, 0 to 1; of several captions it has to equal one."""
    if data.in_words:
        return any_match(output, truths)
    return answer_accuracy(output, truths, data.measure)
