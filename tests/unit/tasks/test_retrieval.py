"""Facts about the retrieval task: the names of its scores, and what it keeps of pictures."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.batch import EvalContext
from blip.errors import ConfigError, DataError
from blip.registry import TASKS
from blip.tasks.retrieval import Retrieval, RetrievalRun
from tests.reference.small_blip import small_blip
from tests.unit.tasks.conftest import FakeData


def task(**run: object) -> Retrieval:
    found = TASKS.get("retrieval")(RetrievalRun(task="retrieval", max_iters=1, **run))  # type: ignore[arg-type]
    assert isinstance(found, Retrieval)
    return found


class Pictures(FakeData):
    of_videos = False

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.text = [f"text {i}" for i in range(2 * count)]
        self.txt2img = [i // 2 for i in range(2 * count)]
        self.img2txt = [[2 * i, 2 * i + 1] for i in range(count)]


class Videos(FakeData):
    of_videos = True


P, WIDTH = 5, 16
"""States of a picture."""


class Watched:
    """A retrieval model that knows how many bytes of the states it has given are still there."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[torch.UntypedStorage]] = []
        self.peak: dict[str, int] = {"encoding": 0, "ranking": 0}

    def look(self, stage: str) -> None:
        alive = [storage for ref in self.given if (storage := ref()) is not None]
        self.peak[stage] = max(self.peak[stage], sum(storage.nbytes() for storage in alive))

    def tokenize(self, texts: list[str], max_length: int) -> dict[str, Tensor]:
        ids = torch.tensor([[int(text.split()[1])] for text in texts])
        return {"text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}

    def retrieval_images(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self.look("encoding")
        index = batch["index"].float()
        states = index[:, None, None].expand(-1, P, WIDTH).contiguous()
        if torch.is_autocast_enabled("cpu"):
            states = states.to(torch.get_autocast_dtype("cpu"))
        self.given.append(weakref.ref(states.untyped_storage()))
        return torch.stack([index, torch.ones_like(index)], dim=-1)[:, None], states

    def retrieval_texts(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        return torch.stack([text_ids[:, 0].float(), torch.ones(len(text_ids))], dim=-1)

    def retrieval_scores(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        return torch.zeros(len(image_feats), len(text_feats))

    def retrieval_keys(self, states: Tensor) -> Tensor:
        assert states.shape == (1, P, WIDTH)
        return states.float()

    def rerank(self, keys: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        self.look("ranking")
        return -(text_ids[..., 0] // 2 - keys[:, 0, 0]).abs()  # right pairs are the closest ones


MEDIANS = {f"{before}{way}_mdR" for before in ("", "itc_") for way in ("txt", "img")}


def test_median_ranks_are_scores_of_videos_alone() -> None:
    assert set(task().scores(Videos(2))) >= MEDIANS
    assert set(task().scores()) >= MEDIANS  # not known yet
    assert not MEDIANS & set(task().scores(Pictures(2)))
    assert {"img_mdR", "txt_mdR"} == MEDIANS & set(task(k_test=0).scores(Videos(2)))


def test_fewer_pictures_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank alike; a rank without any would leave the others waiting."""
    monkeypatch.setattr("blip.dist.world_size", lambda: 3)
    context = EvalContext(torch.device("cpu"), 2, nullcontext)
    with pytest.raises(DataError, match="2 pictures and 4 texts are too few for 3 processes"):
        task().evaluate(Watched(), Pictures(2), context)


@pytest.mark.parametrize(("score", "less"), [("img_mdR", True), ("itc_txt_mdR", True), ("r_mean", False)])
def test_of_median_ranks_less_is_better(score: str, less: bool) -> None:
    assert task().less_is_better(score) is less


@pytest.mark.parametrize(
    ("autocast", "size"), [(nullcontext, 4), (partial(torch.autocast, "cpu", dtype=torch.bfloat16), 2)]
)
def test_what_is_kept_of_pictures_is_what_the_task_says(autocast: Callable[[], Any], size: int) -> None:
    model, data = Watched(), Pictures(12)
    with torch.no_grad():
        evaluation = task(k_test=24).evaluate(model, data, EvalContext(torch.device("cpu"), 2, autocast))
    assert model.peak["ranking"] == len(data) * P * WIDTH * size  # I x P x D_image numbers
    model.look("encoding")
    assert not [ref for ref in model.given if ref() is not None]  # nor do predictions hold them
    assert evaluation.metrics()["r_mean"] == 100.0


def test_keys_of_a_picture_are_computed_once_for_all_batches_of_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = EvalContext(torch.device("cpu"), 2, nullcontext)
    plain = task(k_test=24).evaluate(Watched(), Pictures(12), context)
    monkeypatch.setattr("blip.tasks.retrieval.RERANK_ROWS", 5)
    calls: dict[str, int] = {"retrieval_keys": 0, "rerank": 0}
    for name in calls:
        original = getattr(Watched, name)

        def counted(self: Any, *args: Any, _name: str = name, _original: Any = original) -> Tensor:
            calls[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(Watched, name, counted)
    found = task(k_test=24).evaluate(Watched(), Pictures(12), context)
    assert calls == {"retrieval_keys": 12, "rerank": 12 * 5}  # 24 texts
    assert found.predictions == plain.predictions
    assert found.metrics() == plain.metrics()


def test_nothing_is_kept_of_pictures_that_are_not_re_ranked() -> None:
    model, data = Watched(), Pictures(12)
    task(k_test=0).evaluate(model, data, EvalContext(torch.device("cpu"), 2, nullcontext))
    assert model.peak == {"encoding": 2 * P * WIDTH * 4, "ranking": 0}  # one batch at a time


def test_re_ranking_needs_a_judge_and_similarity_alone_does_not() -> None:
    features = small_blip("features")
    features.config.arch = "blip_feature_extractor"
    task(k_test=0).check(features)
    with pytest.raises(ConfigError, match="128, but 'blip_feature_extractor' has no matching head"):
        task(k_test=128).check(features)
    task(k_test=128).check(small_blip("matching"))
