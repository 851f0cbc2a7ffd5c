"""Facts about question answering: how the model is asked, and what each benchmark counts as right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from blip.config.schema import SectionError
from blip.errors import ConfigError
from blip.registry import TASKS
from blip.tasks.vqa import VisualQuestionAnswering, VqaRun
from tests.unit.tasks.conftest import CONTEXT, FakeData

SAID = ["2", "red", "a dog", "yes", "left"]
TRUTHS = [["two"], ["red"] * 2 + ["blue"] * 8, ["dog"] * 4 + ["cat"] * 6, [], ["right"]]
CHOICES = [["1", "3"], [], ["a cat", "a bird"], ["yes", "no"], ["up"]]
CORRECT = ["3", None, "a cat", None, "up"]
TYPES = ["count", "color", "what", "is", "where"]


class Questions(FakeData):
    answer_list: ClassVar[list[str] | None] = ["yes", "no"]

    def columns(self, indices: list[int]) -> dict[str, Any]:
        return {"text_input": [f"question {i}" for i in indices]}

    def question(self, index: int) -> str:
        return f"Question {index}?"

    def question_id(self, index: int) -> int:
        return 500 + index

    def answers(self, index: int) -> list[str]:
        return TRUTHS[index]

    def question_type(self, index: int) -> str | None:
        return TYPES[index]

    def answer_type(self, index: int) -> str | None:
        return "other" if index else None

    def choices(self, index: int) -> list[str]:
        return CHOICES[index]

    def correct_choice(self, index: int) -> str | None:
        return CORRECT[index]


class Answerer:
    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def predict_answers(self, samples: dict[str, Any], **how: Any) -> list[str]:
        self.asked.append(how)
        return [SAID[int(text.split()[1])] for text in samples["text_input"]]


def task(name: str = "vqa", **run: Any) -> Any:
    return TASKS.get(name)(VqaRun(evaluate=True, **run))


def test_accuracy_is_given_overall_and_per_type() -> None:
    found = task().evaluate(Answerer(), Questions(5), CONTEXT).metrics()
    assert found == pytest.approx(
        {
            "overall": 100 * (1 + 0.6 + 1 + 0) / 4,
            "answer_type_other": 100 * 1.6 / 3,
            "question_type_count": 100.0,
            "question_type_color": 60.0,
            "question_type_what": 100.0,
            "question_type_where": 0.0,
        }
    )


def test_predictions_hold_what_the_evaluation_server_wants_and_whether_it_is_right() -> None:
    predictions = task().evaluate(Answerer(), Questions(5), CONTEXT).predictions
    assert predictions[1] == {
        "index": 1,
        "instance_id": "fake/1",
        "question_id": 501,
        "image": "/pictures/1.png",
        "question": "Question 1?",
        "answer": "red",
        "truth": TRUTHS[1],
        "accuracy": 0.6,
        "right": True,
    }
    assert [p.get("right") for p in predictions] == [True, True, True, None, False]


def test_secret_answers_give_predictions_and_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Questions, "answers", lambda self, index: [])
    evaluation = task().evaluate(Answerer(), Questions(5), CONTEXT)
    assert len(evaluation.predictions) == 5
    assert evaluation.metrics() == {}


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_scores_of_all_answers(
    world: int, on_ranks: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    alone = task().evaluate(Answerer(), Questions(5), CONTEXT).metrics()
    found = on_ranks(world, lambda: task().evaluate(Answerer(), Questions(5), CONTEXT).metrics())
    assert found == [alone] * world


def test_ranking_and_generating_get_their_own_settings() -> None:
    model = Answerer()
    task(num_ans_candidates=3).evaluate(model, Questions(1), CONTEXT)
    task(
        inference_method="generate", num_beams=2, max_len=7, min_len=2, length_penalty=-1.0, prompt="Q: {}"
    ).evaluate(model, Questions(1), CONTEXT)
    assert model.asked == [
        {"inference_method": "rank", "num_ans_candidates": 3, "answer_list": ["yes", "no"]},
        {
            "inference_method": "generate",
            "num_beams": 2,
            "max_len": 7,
            "min_len": 2,
            "length_penalty": -1.0,
            "prompt": "Q: {}",
        },
    ]


def test_the_models_own_length_penalty_is_the_default() -> None:
    model = Answerer()
    task(inference_method="generate").evaluate(model, Questions(1), CONTEXT)
    assert model.asked == [{"inference_method": "generate", "num_beams": 3, "max_len": 10, "min_len": 1}]


@pytest.mark.parametrize("candidates", [None, []])
def test_ranking_without_candidates_is_refused_before_training(
    candidates: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Questions, "answer_list", candidates)
    with pytest.raises(ConfigError, match=r"run\.inference_method: rank needs a list of answers"):
        task().check_data(Questions(1))
    task(inference_method="generate").check_data(Questions(1))


def test_gqa_is_an_exact_match() -> None:
    found = task("gqa").evaluate(Answerer(), Questions(5), CONTEXT).metrics()
    assert found["acc"] == pytest.approx(100 * 3 / 4)


def test_aokvqa_compares_as_written() -> None:
    found = task("aok_vqa").evaluate(Answerer(), Questions(5), CONTEXT).metrics()
    assert found["acc"] == pytest.approx(100 * (2 / 3) / 4)


def test_answers_that_are_secret_are_written_for_each_server(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Questions(3)
    known = task().evaluate(Answerer(), data, CONTEXT).predictions
    for name in ("vqa", "gqa", "aok_vqa"):
        assert task(name).submission(data, known) is None
    monkeypatch.setattr(Questions, "answers", lambda self, index: [])
    said = task().evaluate(Answerer(), data, CONTEXT).predictions
    assert task().submission(data, said) == [
        {"question_id": 500, "answer": "2"},
        {"question_id": 501, "answer": "red"},
        {"question_id": 502, "answer": "a dog"},
    ]
    assert task("gqa").submission(data, said)[0] == {"questionId": "500", "prediction": "2"}
    monkeypatch.setattr(Questions, "question_id", lambda self, index: "7")
    assert task().submission(data, said)[0]["question_id"] == 7
    monkeypatch.setattr(Questions, "server", "vizwiz")
    assert task().submission(data, said)[1] == {"image": "1.png", "answer": "red"}
    monkeypatch.setattr(Questions, "server", "gqa")
    assert task().submission(data, said)[1] == {"questionId": "7", "prediction": "red"}


def test_aokvqa_answers_by_itself_and_among_each_question_s_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chooser(Answerer):
        def predict_answers(self, samples: dict[str, Any], **how: Any) -> list[str]:
            said = super().predict_answers(samples, **how)
            assert len(samples["image"]) == len(samples["index"]) == len(said)
            return said if how["answer_list"] == ["yes", "no"] and len(said) > 1 else how["answer_list"][-1:]

    monkeypatch.setattr(Questions, "answers", lambda self, index: [])
    data, model = Questions(4), Chooser()
    predictions = task("aok_vqa", num_ans_candidates=9).evaluate(model, data, CONTEXT).predictions
    assert [p.get("choice") for p in predictions] == ["3", None, "a bird", "no"]
    assert [how["num_ans_candidates"] for how in model.asked] == [9, 2, 9, 2, 2]
    assert task("aok_vqa").submission(data, predictions) == {
        "500": {"multiple_choice": "3", "direct_answer": "2"},
        "501": {"multiple_choice": "", "direct_answer": "red"},
        "502": {"multiple_choice": "a bird", "direct_answer": "a dog"},
        "503": {"multiple_choice": "no", "direct_answer": "yes"},
    }


class LastChoice(Answerer):
    """Takes the last of a question's own choices, and says of a whole batch what is in SAID."""

    def predict_answers(self, samples: dict[str, Any], **how: Any) -> list[str]:
        said = super().predict_answers(samples, **how)
        return how["answer_list"][-1:] if how["answer_list"] in CHOICES[:3] + CHOICES[4:] else said


def test_aokvqa_scores_choices_beside_direct_answers() -> None:
    evaluation = task("aok_vqa").evaluate(LastChoice(), Questions(5), CONTEXT)
    told = [(p.get("choice"), p.get("correct_choice"), p.get("choice_right")) for p in evaluation.predictions]
    assert told[:3] == [("3", "3", True), (None, None, None), ("a bird", "a cat", False)]
    assert told[3][1:] == (None, None)  # nobody knows which is right
    assert told[4] == ("up", "up", True)
    found = evaluation.metrics()
    assert found["mc_acc"] == pytest.approx(100 * 2 / 3)
    assert found["acc"] == pytest.approx(100 * (2 / 3) / 4)  # as without choices


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_score_of_all_choices(
    world: int, on_ranks: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    def score() -> dict[str, float]:
        return task("aok_vqa").evaluate(LastChoice(), Questions(5), CONTEXT).metrics()

    assert on_ranks(world, score) == [score()] * world


def test_choices_that_are_secret_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Questions, "correct_choice", lambda self, index: None)
    assert "mc_acc" not in task("aok_vqa").evaluate(LastChoice(), Questions(5), CONTEXT).metrics()


def test_pictures_are_looked_at_once_for_all_choices() -> None:
    class Model(Answerer):
        def image_states(self, samples: dict[str, Any]) -> torch.Tensor:
            self.asked.append({"looked": len(samples["image"])})
            return torch.arange(len(samples["image"]))

        def predict_answers(self, samples: dict[str, Any], **how: Any) -> list[str]:
            self.asked.append({"seen": samples.get("image_embeds", torch.zeros(0)).tolist()})
            return how["answer_list"][:1] * len(samples["text_input"])

    model = Model()
    task("aok_vqa").evaluate(model, Questions(1), CONTEXT)
    assert model.asked == [{"seen": []}, {"looked": 1}, {"seen": [0]}]


def test_the_metric_that_decides_has_the_tasks_name() -> None:
    for name in ("vqa", "gqa", "aok_vqa"):
        assert task(name).monitor in task(name).evaluate(Answerer(), Questions(5), CONTEXT).metrics()
        assert issubclass(TASKS.get(name), VisualQuestionAnswering)


@pytest.mark.parametrize("name", ["vqa", "gqa", "aok_vqa"])
def test_scores_are_known_before_an_evaluation(name: str) -> None:
    found = task(name).evaluate(Answerer(), Questions(5), CONTEXT).metrics()
    assert task(name).scores(Questions(5)) == list(found)
    assert ("mc_acc" in found) == (name == "aok_vqa")
    some = task(name).scores(Questions(1))
    assert some == list(task(name).evaluate(Answerer(), Questions(1), CONTEXT).metrics())
    assert len(some) < len(found)
    maybe = [score.removesuffix("*") for score in task(name).scores()]
    assert all(score.startswith(tuple(maybe)) for score in found)


def test_of_secret_answers_there_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Questions, "answers", lambda self, index: [])
    monkeypatch.setattr(Questions, "correct_choice", lambda self, index: None)
    assert task("vqa").scores(Questions(5)) == task("aok_vqa").scores(Questions(5)) == []


@pytest.mark.parametrize(
    ("measure", "overall"),
    [("", 2.6 / 4), ("vqa", 2.6 / 4), ("direct", (1 + 2 / 3) / 4), ("exact", 3 / 4), ("pairs", 3 / 4)],
)
def test_the_datas_own_measure_counts(measure: str, overall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Questions, "measure", measure)
    found = task().evaluate(Answerer(), Questions(5), CONTEXT)
    assert found.metrics()["overall"] == pytest.approx(100 * overall)
    scores = [p["accuracy"] for p in found.predictions if "accuracy" in p]
    assert sum(scores) / 4 == pytest.approx(overall, abs=1e-4)


def test_of_data_with_choices_the_best_one_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """ScienceQA and IconQA; what has no choices is answered freely, and what is secret has no score."""

    class Chooser(Answerer):
        def predict_answers(self, samples: dict[str, Any], **how: Any) -> list[str]:
            own = how["num_ans_candidates"] == len(how["answer_list"])
            return how["answer_list"][-1:] if own else super().predict_answers(samples, **how)

    monkeypatch.setattr(Questions, "measure", "choice")
    data = Questions(5)
    found = task().evaluate(Chooser(), data, CONTEXT)
    assert [p["answer"] for p in found.predictions] == ["3", "red", "a bird", "no", "up"]
    assert [p["truth"] for p in found.predictions] == [["3"], TRUTHS[1], ["a cat"], [], ["up"]]
    assert found.metrics()["overall"] == pytest.approx(100 * (1 + 1 + 0 + 1) / 4)
    assert task().scores(data) == list(found.metrics())
    monkeypatch.setattr(Questions, "answer_list", None)
    task().check_data(Questions(1))  # all of its questions have choices
    with pytest.raises(ConfigError, match="rank needs a list of answers"):
        task().check_data(data)


@pytest.mark.parametrize("run", [{"min_len": 11}, {"num_ans_candidates": 0}, {"max_len": 0}])
def test_settings_without_meaning_are_refused(run: dict[str, Any]) -> None:
    with pytest.raises(SectionError, match=next(iter(run))):
        task(**run)
