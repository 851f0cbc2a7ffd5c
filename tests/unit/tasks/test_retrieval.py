"""Facts about the retrieval task: the names of its scores, and what it keeps of pictures."""

from __future__ import annotations

import pytest

from blip.registry import TASKS
from blip.tasks.retrieval import Retrieval, RetrievalRun
from tests.unit.tasks.conftest import FakeData


def task(**run: object) -> Retrieval:
    found = TASKS.get("retrieval")(RetrievalRun(task="retrieval", max_iters=1, **run))  # type: ignore[arg-type]
    assert isinstance(found, Retrieval)
    return found


class Pictures(FakeData):
    of_videos = False


class Videos(FakeData):
    of_videos = True


MEDIANS = {f"{before}{way}_mdR" for before in ("", "itc_") for way in ("txt", "img")}


def test_median_ranks_are_scores_of_videos_alone() -> None:
    assert set(task().scores(Videos(2))) >= MEDIANS
    assert set(task().scores()) >= MEDIANS  # not known yet
    assert not MEDIANS & set(task().scores(Pictures(2)))
    assert {"img_mdR", "txt_mdR"} == MEDIANS & set(task(k_test=0).scores(Videos(2)))


@pytest.mark.parametrize(("score", "less"), [("img_mdR", True), ("itc_txt_mdR", True), ("r_mean", False)])
def test_of_median_ranks_less_is_better(score: str, less: bool) -> None:
    assert task().less_is_better(score) is less
