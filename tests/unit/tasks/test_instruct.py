"""Facts about instruction tuning: what is written, what is ranked, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.batch import Output
from blip.config.schema import SectionError
from blip.errors import ConfigError
from blip.registry import TASKS
from blip.tasks.instruct import InstructRun
from tests.unit.tasks.conftest import CONTEXT, FakeData

TRUTHS = [["Red"], ["a dog"], ["yes"], [], ["2"] * 4 + ["3"] * 6]
SAID = ["red.", "a cat", "no", "whatever", "two"]
TYPES = ["color", "name", "verify", "color", ""]
CHOICES = [[], [], ["yes", "no"], [], []]


class Told(FakeData):
    in_words = False

    def columns(self, indices: list[int]) -> dict[str, Any]:
        return {"text_input": [f"do {i}" for i in indices]}

    def instruction(self, index: int) -> str:
        return f"do {index}"

    def references(self, index: int) -> list[str]:
        return TRUTHS[index]

    def task_type(self, index: int) -> str:
        return TYPES[index]

    def choices(self, index: int) -> list[str]:
        return CHOICES[index]

    def candidates(self, index: int) -> list[str]:
        return CHOICES[index] or (["red", "green", "blue"] if TYPES[index] == "color" else [])


class Writer:
    """Writes what `SAID` says, and takes the last candidate for the likeliest."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []

    def generate(self, samples: dict[str, Any], prompt: list[str], **how: Any) -> list[str]:
        self.calls.append(("generate", prompt, how))
        assert len(samples["image"] if "image" in samples else samples["image_embeds"]) == len(prompt)
        return [SAID[int(text.split()[1])] for text in prompt]

    def predict_answers(self, samples: dict[str, Any], answer_list: list[str], **how: Any) -> list[str]:
        self.calls.append(("rank", samples["text_input"], {"answer_list": answer_list, **how}))
        return [answer_list[-1]] * len(samples["text_input"])


class Ranker(Writer):
    """Ranks candidates from the last to the first."""

    def image_states(self, samples: dict[str, Any]) -> Tensor:
        return samples["image"].flatten(1)

    def class_scores(self, samples: dict[str, Any], candidates: list[str], prompt: list[str]) -> Tensor:
        assert "text_input" not in samples
        self.calls.append(
            ("order", prompt, {"candidates": candidates, "rows": len(samples.get("image_embeds", prompt))})
        )
        return torch.arange(len(candidates)).float().expand(len(prompt), -1)


def task(**run: Any) -> Any:
    return TASKS.get("instruct_tuning")(InstructRun(evaluate=True, **run))


def test_training_is_the_model_s_own_loss() -> None:
    loss = torch.tensor(2.0)
    assert task().train_step(lambda batch: Output(loss=batch["x"]), {"x": loss}).loss is loss


def test_what_is_written_is_right_where_it_equals_what_people_wrote() -> None:
    found = task().evaluate(Writer(), Told(5), CONTEXT)
    vote = (4 * 1.0 + 6 * 1.0) / 10  # "two" is "2", which four of ten people wrote
    assert found.metrics() == pytest.approx(
        {
            "acc": 100 * (1 + 0 + 0 + vote) / 4,
            "type_color": 100.0,
            "type_name": 0.0,
            "type_verify": 0.0,
        }
    )
    assert found.predictions[0] == {
        "index": 0,
        "instance_id": "fake/0",
        "image": None,
        "type": "color",
        "question": "do 0",
        "answer": "red.",
        "ranked": False,
        "truth": ["Red"],
        "accuracy": 1.0,
        "right": True,
    }
    assert "right" not in found.predictions[3]


def test_answers_are_as_short_as_the_model_has_them_and_captions_are_not() -> None:
    """InstructBLIP's answers have a length penalty of -1 (FlanT5) or 0, its captions 1."""
    model: Any = Writer()
    model.answer_length_penalty = -1.0
    words = Told(1)
    words.in_words = True
    task().evaluate(model, Told(1), CONTEXT)
    task(length_penalty=0.5).evaluate(model, Told(1), CONTEXT)
    task().evaluate(model, words, CONTEXT)
    assert [how.get("length_penalty") for _, _, how in model.calls] == [-1.0, 0.5, None]


def test_choices_are_ranked_and_the_rest_is_written() -> None:
    model = Writer()
    found = task(num_beams=2, max_len=9, length_penalty=0.5).evaluate(model, Told(3), CONTEXT)
    how = {"num_beams": 2, "max_length": 9, "min_length": 1, "length_penalty": 0.5}
    assert model.calls == [
        ("generate", ["do 0", "do 1"], how),
        ("rank", ["do 2"], {"answer_list": ["yes", "no"], "inference_method": "rank", "prompt": "{}"}),
    ]
    assert [(p["answer"], p["ranked"]) for p in found.predictions] == [
        ("red.", False),
        ("a cat", False),
        ("no", True),
    ]


@pytest.mark.parametrize("in_words", [False, True])
@pytest.mark.parametrize("method", ["auto", "generate", "rank"])
def test_scores_are_known_before_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, method: str, in_words: bool
) -> None:
    monkeypatch.setattr(Told, "references", lambda self, index: [] if index == 1 else ["green"])
    data, tuning = Told(5), task(inference_method=method)
    data.in_words = in_words
    found = tuning.evaluate(Ranker(), data, CONTEXT).metrics()
    assert tuning.scores(data) == list(found)
    assert "type_name" not in found  # what is secret has no score
    assert ("MRR" in found, "CIDEr" in found) == (method == "rank", in_words)
    maybe = tuple(score.removesuffix("*") for score in tuning.scores())
    assert all(score.startswith(maybe) for score in found)


@pytest.mark.parametrize(
    ("method", "more", "ranked"),
    [
        ("auto", {}, [False, False, True, False]),
        ("generate", {}, [False] * 4),
        ("rank", {}, [True, False, True, True]),
        ("rank", {"num_ans_candidates": 2}, [False, False, True, False]),
    ],
)
def test_what_is_ranked_depends_on_the_method(method: str, more: dict[str, Any], ranked: list[bool]) -> None:
    found = task(inference_method=method, **more).evaluate(Ranker(), Told(4), CONTEXT)
    assert [p["ranked"] for p in found.predictions] == ranked


def test_a_batch_of_several_lists_looks_at_its_pictures_once() -> None:
    model = Ranker()
    task(inference_method="rank").evaluate(model, Told(4), CONTEXT)
    assert model.calls[:2] == [
        ("order", ["do 0"], {"candidates": ["red", "green", "blue"], "rows": 1}),
        ("generate", ["do 1"], {"num_beams": 5, "max_length": 30, "min_length": 1}),
    ]


def test_the_reciprocal_rank_is_that_of_the_right_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "references", lambda self, index: ["green"])
    found = task(inference_method="rank").evaluate(Ranker(), Told(4), CONTEXT)
    assert [p.get("rank") for p in found.predictions] == [2, None, None, 2]  # of two, the rank says no more
    assert found.metrics()["MRR"] == pytest.approx(50.0)


class Dialogs(Told):
    """Two turns of a dialog with five candidates each; people looked at the second one's."""

    measure, server = "ranks", "visdial"

    def references(self, index: int) -> list[str]:
        return [["d"], ["b"]][index]

    def choices(self, index: int) -> list[str]:
        return list("abcde")

    def question_id(self, index: int) -> str:
        return f"17#{index}"

    def relevance(self, index: int) -> list[float] | None:
        return [0.5, 1.0, 0.0, 0.0, 0.0] if index else None


def test_dialogs_are_measured_by_the_places_of_their_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = task().evaluate(Ranker(), Dialogs(2), CONTEXT)  # e, d, c, b, a
    assert [p["rank"] for p in evaluation.predictions] == [2, 4]
    assert [p["ranks"] for p in evaluation.predictions] == [[5, 4, 3, 2, 1]] * 2
    found = evaluation.metrics()
    assert {
        name: found[name] for name in ("MRR", "R_1", "R_5", "R_10", "mean_rank", "NDCG")
    } == pytest.approx(
        {
            "MRR": 100 * (1 / 2 + 1 / 4) / 2,
            "R_1": 0.0,
            "R_5": 100.0,
            "R_10": 100.0,
            "mean_rank": 3.0,
            "NDCG": 0.0,
        }
    )
    assert task().scores(Dialogs(2)) == list(found)
    assert "NDCG" not in task().scores(Dialogs(1))
    assert task().less_is_better("mean_rank")
    assert not task().less_is_better("NDCG")
    assert task().submission(Dialogs(2), evaluation.predictions) is None
    monkeypatch.setattr(Dialogs, "references", lambda self, index: [])
    secret = task().evaluate(Ranker(), Dialogs(2), CONTEXT)
    assert task().submission(Dialogs(2), secret.predictions) == [
        {"image_id": 17, "round_id": 1, "ranks": [5, 4, 3, 2, 1]},
        {"image_id": 17, "round_id": 2, "ranks": [5, 4, 3, 2, 1]},
    ]
    written = task().evaluate(Writer(), Dialogs(2), CONTEXT)  # it tells the likeliest one only
    assert task().submission(Dialogs(2), written.predictions) is None


@pytest.mark.parametrize(
    ("measure", "accuracy"),
    [("", 0.6), ("direct", 2 / 3), ("exact", 1.0), ("pairs", 1.0)],
)
def test_the_datas_own_measure_counts(measure: str, accuracy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "measure", measure)
    monkeypatch.setattr(Told, "references", lambda self, index: ["2"] * 2 + ["3"] * 8)
    monkeypatch.setitem(globals(), "SAID", ["2"] * 5)
    found = task(inference_method="generate").evaluate(Writer(), Told(1), CONTEXT)
    assert found.metrics()["acc"] == pytest.approx(100 * accuracy)


@pytest.mark.parametrize(
    ("server", "content"),
    [
        ("", [{"question_id": 70, "answer": "red."}, {"question_id": 71, "answer": "no"}]),
        ("vizwiz", [{"image": "None", "answer": "red."}, {"image": "1.png", "answer": "no"}]),
        ("gqa", [{"questionId": "70", "prediction": "red."}, {"questionId": "71", "prediction": "no"}]),
        (
            "aok_vqa",
            {
                "70": {"multiple_choice": "", "direct_answer": "red."},
                "71": {"multiple_choice": "no", "direct_answer": ""},
            },
        ),
    ],
)
def test_what_is_secret_is_written_for_each_server(server: str, content: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Told, "references", lambda self, index: [])
    monkeypatch.setattr(Told, "choices", lambda self, index: ["yes", "no"] if index else [])
    predictions = task().evaluate(Writer(), Told(2), CONTEXT).predictions
    assert task().submission(Told(2), predictions) is None  # nobody would know which question it is
    monkeypatch.setattr(Told, "question_id", lambda self, index: str(70 + index), raising=False)
    monkeypatch.setattr(Told, "server", server)
    assert task().submission(Told(2), predictions) == content
    monkeypatch.setattr(Told, "references", lambda self, index: ["red"])
    known = task().evaluate(Writer(), Told(2), CONTEXT).predictions
    assert task().submission(Told(2), known) is None


def test_secret_captions_are_written_for_coco_and_nocaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "references", lambda self, index: [])
    monkeypatch.setattr(Told, "in_words", True)
    monkeypatch.setattr(Told, "image_id", lambda self, index: 900 + index, raising=False)
    predictions = task().evaluate(Writer(), Told(2), CONTEXT).predictions
    assert task().submission(Told(2), predictions) == [
        {"image_id": 900, "caption": "red."},
        {"image_id": 901, "caption": "a cat"},
    ]


def test_yes_and_no_have_synonyms_and_are_compared_by_their_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Log-probabilities of yes, true, no, false for each instruction.
    scores = torch.tensor([[-1.0, -9, -2, -9], [-3, -1, -2, -9], [-3, -9, -2, -2.5], [-4, -9, -2, -9]])

    class Judge(Ranker):
        def class_scores(self, samples: dict[str, Any], candidates: list[str], prompt: list[str]) -> Tensor:
            assert candidates == ["yes", "true", "no", "false"]
            return scores[[int(text.split()[1]) for text in prompt]]

    truths = [["yes"], ["yes"], ["yes"], ["no"]]
    monkeypatch.setattr(Told, "references", lambda self, index: truths[index])
    monkeypatch.setattr(Told, "choices", lambda self, index: ["yes", "no"])
    found = task(inference_method="auto").evaluate(Judge(), Told(4), CONTEXT)
    assert [p["answer"] for p in found.predictions] == ["yes", "yes", "no", "no"]
    odds = (scores[:, :2].logsumexp(1) - scores[:, 2:].logsumexp(1)).tolist()
    assert [p["log_odds"] for p in found.predictions] == pytest.approx(odds)
    measured = found.metrics()
    assert measured["AUC"] == pytest.approx(100.0)  # the only "no" has the lowest odds
    assert measured["acc"] == pytest.approx(75.0)
    assert "AUC" in task().scores(Told(4))
    monkeypatch.setattr(Told, "references", lambda self, index: ["yes"])
    assert "AUC" not in task(inference_method="auto").evaluate(Judge(), Told(4), CONTEXT).metrics()


@pytest.mark.parametrize("monitor", ["AUC", "memes/MRR"])
def test_what_a_model_cannot_tell_decides_nothing(monitor: str) -> None:
    model = Writer()
    model.config = SimpleNamespace(arch="blip2_opt")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"run\.monitor: model\.arch 'blip2_opt' tells which candidate"):
        task(monitor=monitor).check(model)
    task(monitor=monitor).check(Ranker())
    task(monitor="acc").check(model)


def test_captions_are_also_scored_as_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "in_words", True)
    truths = [["a red ball", "red."], ["a small dog runs"], ["no way", "yes"], [], ["two big balls"]]
    monkeypatch.setattr(Told, "references", lambda self, index: truths[index])
    found = task(inference_method="generate").evaluate(Writer(), Told(5), CONTEXT).metrics()
    assert found["acc"] == pytest.approx(100 * 1 / 4)  # one of the captions, as it stands
    assert {"CIDEr", "Bleu_4", "ROUGE_L"} <= set(found)
    assert "METEOR" not in found


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_scores_of_all(
    world: int, on_ranks: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    def scores() -> dict[str, float]:
        return task(inference_method="rank").evaluate(Ranker(), Told(5), CONTEXT).metrics()

    alone = scores()
    assert on_ranks(world, scores) == [pytest.approx(alone)] * world


def test_ranking_without_candidates_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    task(inference_method="rank").check_data(Told(5))
    monkeypatch.setattr(Told, "candidates", lambda self, index: [])
    task().check_data(Told(5))
    with pytest.raises(
        ConfigError, match=r"run\.inference_method: rank needs candidates, and datasets\.fake"
    ):
        task(inference_method="rank").check_data(Told(5))
    monkeypatch.setattr(Told, "in_words", True)
    task(inference_method="rank").check_data(Told(5))


def test_a_model_that_writes_nothing_is_refused() -> None:
    class Blind:
        config = InstructRun(evaluate=True)

    Blind.config.arch = "blip2"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="InstructTuning needs a model with generate, predict_answers"):
        task().check(Blind())


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        ({"min_len": 40}, r"min_len: 40 is above max_len \(30\)"),
        ({"num_beams": 0}, "num_beams: 0 is below 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is below"),
        ({"num_ans_candidates": 0}, "num_ans_candidates: 0 is below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(run: dict[str, Any], problem: str) -> None:
    with pytest.raises(SectionError, match=problem):
        InstructRun(evaluate=True, **run)
