"""Facts about captioning: every run key acts, and scores are those of all ranks' captions together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blip.config.schema import SectionError
from blip.errors import ConfigError
from blip.metrics import java
from blip.metrics.caption import caption_scores
from blip.tasks import captioning
from blip.tasks.captioning import Captioning, CaptioningRun
from tests.unit.tasks.conftest import CONTEXT, FakeData

SAID = ["a dog runs", "two cats on a mat", "a red bus", "a red bus", "people eat pizza"]
WRITTEN = [
    ["A dog is running.", "the dog runs"],
    ["Two cats sit on a mat."],
    ["a big red bus", "A bus!"],
    [],
    ["Some people eat a pizza.", "pizza"],
]
SCORED = [0, 1, 2, 4]


class Pictures(FakeData):
    def __init__(self, count: int = 5, references: list[list[str]] = WRITTEN) -> None:
        super().__init__(count)
        self.written = references

    def image_id(self, index: int) -> int:
        return 100 + index

    def references(self, index: int) -> list[str]:
        return self.written[index]


class Judged(Pictures):
    def judge(self, index: int, caption: str) -> dict[str, int] | None:
        assert caption in (SAID[index], "")  # asked without one, whether there is a judge
        return None if index == 3 else {"right": index, "stated": 4, "whole": int(index == 4)}


class OfDomains(Pictures):
    """Like NoCaps's; one picture is of none."""

    def domain(self, index: int) -> str | None:
        return ["out", "in", "out", "in", None][index]


class Writer:
    """Says what is in SAID about the picture with that number, and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def generate(self, samples: dict[str, Any], **how: Any) -> list[str]:
        self.asked.append(how | {"source": samples["source"], "index": samples["index"].tolist()})
        assert samples["image"].dtype == torch.float32
        return [SAID[int(image[0, 0, 0])] for image in samples["image"]]


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "problem", lambda *jars: "no java here")


def task(**run: Any) -> Captioning:
    return Captioning(CaptioningRun(evaluate=True, **run))


def test_predictions_tell_what_was_said_and_what_is_true() -> None:
    predictions = task().evaluate(Writer(), Pictures(), CONTEXT).predictions
    assert predictions[1] == {
        "index": 1,
        "instance_id": "fake/1",
        "image_id": 101,
        "image": "/pictures/1.png",
        "caption": "two cats on a mat",
        "truth": ["Two cats sit on a mat."],
    }
    assert [p["caption"] for p in predictions] == SAID


def test_scores_are_those_of_the_pictures_with_references(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = task().evaluate(Writer(), Pictures(), CONTEXT).metrics()
    expected = caption_scores([SAID[i] for i in SCORED], [WRITTEN[i] for i in SCORED])
    assert found == expected | {"agg_metrics": expected["CIDEr"] + expected["Bleu_4"]}
    assert "4 of 5 pictures have references" in caplog.text


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_has_the_scores_of_all_captions(
    world: int, on_ranks: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    alone = task().evaluate(Writer(), Judged(), CONTEXT).metrics()

    def evaluate() -> tuple[list[int], dict[str, float]]:
        evaluation = task().evaluate(Writer(), Judged(), CONTEXT)
        return [p["index"] for p in evaluation.predictions], evaluation.metrics()

    found = on_ranks(world, evaluate)
    assert [index for part, _ in found for index in part] == [0, 1, 2, 3, 4]
    assert all(metrics == alone for _, metrics in found)


def test_a_failure_while_scoring_is_an_error_on_every_rank(
    on_ranks: Callable[[int, Callable[[], Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> dict[str, float]:
        raise ConfigError("no scores today")

    monkeypatch.setattr(captioning, "caption_scores", fails)
    found = on_ranks(2, lambda: task().evaluate(Writer(), Pictures(), CONTEXT).metrics())
    assert [str(error) for error in found] == ["no scores today"] * 2


def test_captions_are_judged_where_it_is_known_what_is_in_the_pictures() -> None:
    evaluation = task().evaluate(Writer(), Judged(), CONTEXT)
    found = evaluation.metrics()
    assert found["attr_acc"] == pytest.approx(100 * (0 + 1 + 2 + 4) / 16)
    assert found["caption_acc"] == 25.0
    shown = [(p.get("stated_right"), p.get("stated"), p.get("right")) for p in evaluation.predictions]
    assert shown == [(0, 4, False), (1, 4, False), (2, 4, False), (None, None, None), (4, 4, True)]


def test_pictures_without_references_are_captioned_and_not_scored() -> None:
    evaluation = task().evaluate(Writer(), Pictures(5, [[]] * 5), CONTEXT)
    assert len(evaluation.predictions) == 5
    assert evaluation.metrics() == {}
    assert task(report_metric=False).evaluate(Writer(), Judged(), CONTEXT).metrics() == {}


def test_only_the_wanted_images_are_kept() -> None:
    evaluation = task(img_ids=[101, 104]).evaluate(Writer(), Pictures(), CONTEXT)
    assert [p["image_id"] for p in evaluation.predictions] == [101, 104]
    expected = caption_scores([SAID[1], SAID[4]], [WRITTEN[1], WRITTEN[4]])
    assert evaluation.metrics()["CIDEr"] == expected["CIDEr"]


def test_every_key_of_generation_acts() -> None:
    writer = Writer()
    task().evaluate(writer, Pictures(), CONTEXT)
    assert writer.asked[-1] == {
        "num_beams": 5,
        "max_length": 30,
        "min_length": 1,
        "source": "fake",
        "index": [4],
    }
    keys = {"num_beams": 2, "max_len": 9, "min_len": 3, "repetition_penalty": 1.1, "length_penalty": 0.0}
    task(**keys).evaluate(writer, Pictures(), CONTEXT)
    assert writer.asked[-1] == {
        "num_beams": 2,
        "max_length": 9,
        "min_length": 3,
        "repetition_penalty": 1.1,
        "length_penalty": 0.0,
        "source": "fake",
        "index": [4],
    }


def test_sampling_follows_no_beams_and_is_keyed_by_the_seed() -> None:
    writer = Writer()
    run = task(use_nucleus_sampling=True, top_p=0.5, top_k=7, temperature=0.8, seed=11)
    run.evaluate(writer, Pictures(), CONTEXT)
    asked = writer.asked[0]
    assert asked == {
        "use_nucleus_sampling": True,
        "top_p": 0.5,
        "top_k": 7,
        "temperature": 0.8,
        "seed": 11,
        "max_length": 30,
        "min_length": 1,
        "source": "fake",
        "index": [0, 1],
    }


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"min_len": 31}, "min_len: 31 is above max_len"),
        ({"num_beams": 0}, "num_beams: 0 is below 1"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"java_metrics": ["SPICY"]}, "did you mean 'SPICE'"),
    ],
)
def test_settings_without_meaning_are_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(SectionError, match=message):
        task(**run)


def test_what_cannot_be_computed_is_said_before_training(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        task().check(Writer())
    assert "METEOR will not be computed: no java here" in caplog.text
    with pytest.raises(ConfigError, match=r"run\.java_metrics: SPICE is not available: no java here"):
        task(java_metrics=["SPICE"]).check(Writer())
    with pytest.raises(ConfigError, match="needs a model with generate"):
        task().check(type("Mute", (), {"config": type("Config", (), {"arch": "mute"})})())


def test_the_names_of_scores_are_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    own = ["agg_metrics", "attr_acc", "caption_acc"]
    assert task().scores() == [*plain, own[0], "CIDEr_in", "CIDEr_near", "CIDEr_out", *own[1:]]
    assert "METEOR" in task(java_metrics=["METEOR"]).scores()
    assert task(report_metric=False).scores() == []
    assert task().monitor in task().scores()
    assert set(task().evaluate(Writer(), Judged(), CONTEXT).metrics()) == {*plain, *own}


@pytest.mark.parametrize("references", [WRITTEN, [[]] * 5])
@pytest.mark.parametrize("kind", [Pictures, Judged, OfDomains])
def test_the_names_of_scores_are_those_that_the_data_gives(
    kind: type[Pictures], references: list[list[str]]
) -> None:
    data = kind(references=references)
    found = task().evaluate(Writer(), data, CONTEXT).metrics()
    assert task().scores(data) == list(found)
    assert task(report_metric=False).scores(data) == []


def test_each_domain_is_scored_as_a_corpus_of_its_own() -> None:
    """Only what people wrote about, and CIDEr's weights of words are the domain's."""
    found = task().evaluate(Writer(), OfDomains(), CONTEXT).metrics()
    own = {"in": [1], "out": [0, 2]}
    wanted = {d: caption_scores([SAID[i] for i in n], [WRITTEN[i] for i in n], []) for d, n in own.items()}
    assert {name: found[name] for name in found if name.startswith("CIDEr_")} == {
        f"CIDEr_{domain}": scores["CIDEr"] for domain, scores in wanted.items()
    }
    assert found["CIDEr"] == task().evaluate(Writer(), Pictures(), CONTEXT).metrics()["CIDEr"]


def test_captions_that_are_not_scored_here_are_written_for_the_server() -> None:
    predictions = task().evaluate(Writer(), Pictures(), CONTEXT).predictions
    wanted = [{"image_id": 100 + i, "caption": said} for i, said in enumerate(SAID)]
    assert task().submission(Pictures(), predictions) == wanted  # nobody wrote about picture 3
    known = [p for p in predictions if p["truth"]]
    assert task().submission(Pictures(), known) is None
    assert task(report_metric=False).submission(Pictures(), known) == wanted[:3] + wanted[4:]
