"""Facts about classification: accuracy of all, of each class and of each kind of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blip.errors import ConfigError
from blip.tasks.classification import ClassificationRun, MultimodalClassification
from tests.unit.tasks.conftest import CONTEXT, FakeData

LABELS = [0, 1, 1, 0, 1]
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 0.5], [-1.0, 1.0]])


class Pairs(FakeData):
    classes = ("False", "True")

    def columns(self, indices: list[int]) -> dict[str, Any]:
        return {"label": torch.tensor([LABELS[i] for i in indices]), "text_input": ["x"] * len(indices)}

    def label(self, index: int) -> int:
        return LABELS[index]

    def text(self, index: int) -> str:
        return f"sentence {index}"


class Typed(Pairs):
    def sentence_type(self, index: int) -> str:
        return "same color" if index < 2 else ""

    def pictures(self, index: int) -> list[str]:
        return [f"/left/{index}.png", f"/right/{index}.png"]


class Judge:
    def predict(self, samples: dict[str, Any]) -> dict[str, Any]:
        return {"predictions": LOGITS[samples["index"]], "targets": samples["label"]}


def task(**run: Any) -> MultimodalClassification:
    return MultimodalClassification(ClassificationRun(evaluate=True, **run))


def test_accuracy_is_the_share_of_right_classes_in_percent() -> None:
    assert task().evaluate(Judge(), Pairs(5), CONTEXT).metrics() == pytest.approx({"acc": 60.0})


def test_classes_and_kinds_of_texts_have_their_own() -> None:
    found = task(per_class=True).evaluate(Judge(), Typed(5), CONTEXT).metrics()
    assert found == pytest.approx(
        {"acc": 60.0, "class_false": 50.0, "class_true": 200 / 3, "type_same_color": 100.0}
    )


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("data", [Pairs(5), Typed(5)])
def test_scores_are_known_before_an_evaluation(data: Pairs, per_class: bool) -> None:
    judging = task(per_class=per_class)
    found = judging.evaluate(Judge(), data, CONTEXT).metrics()
    assert judging.scores(data) == list(found)
    maybe = tuple(score.removesuffix("*") for score in judging.scores())
    assert all(score.startswith(maybe) for score in found)
    assert ("class_*" in judging.scores()) == per_class


def test_memes_are_measured_by_the_area_under_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "measure", "auc")
    found = task().evaluate(Judge(), Pairs(5), CONTEXT)
    odds = (LOGITS[:, 1] - LOGITS[:, 0]).tolist()
    assert [p["log_odds"] for p in found.predictions] == pytest.approx(odds)
    pairs = [(odds[i] > odds[j]) for i in (1, 2, 4) for j in (0, 3)]
    assert found.metrics() == pytest.approx({"acc": 60.0, "AUC": 100 * sum(pairs) / len(pairs)})
    assert task().scores(Pairs(5)) == ["acc", "AUC"]
    assert task().scores(Pairs(1)) == list(task().evaluate(Judge(), Pairs(1), CONTEXT).metrics()) == ["acc"]


def test_predictions_name_the_classes() -> None:
    predictions = task().evaluate(Judge(), Pairs(5), CONTEXT).predictions
    assert predictions[2] == {
        "index": 2,
        "instance_id": "fake/2",
        "image": "/pictures/2.png",
        "text": "sentence 2",
        "predicted": "False",
        "truth": "True",
        "score": 0.7311,
        "right": False,
    }
    both = task().evaluate(Judge(), Typed(5), CONTEXT).predictions[2]
    assert both["images"] == ["/left/2.png", "/right/2.png"]


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_accuracy_of_all(
    world: int, on_ranks: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    alone = task(per_class=True).evaluate(Judge(), Typed(5), CONTEXT).metrics()
    found = on_ranks(world, lambda: task(per_class=True).evaluate(Judge(), Typed(5), CONTEXT).metrics())
    assert found == [alone] * world


def test_a_model_with_another_number_of_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "classes", ("no", "maybe", "yes"))
    with pytest.raises(ConfigError, match=r"model\.num_classes: 2, but datasets\.fake has 3 classes"):
        task().evaluate(Judge(), Pairs(5), CONTEXT)
