"""Facts about recall: a naive loop agrees, ties count against the model, gaps are not found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from blip.errors import DataError
from blip.metrics import retrieval
from blip.metrics.retrieval import (
    NOT_FOUND,
    ndcg,
    rank_scores,
    ranks_of_images,
    ranks_of_texts,
    recalls,
    recalls_from_ranks,
    roc_auc,
)


def naive_rank(scores: list[float], right: set[int]) -> int:
    """Sort with the right answers behind whatever they tie with; count what is ahead of the first."""
    candidates = [i for i, s in enumerate(scores) if s > -math.inf]
    order = sorted(candidates, key=lambda i: (-scores[i], i in right))
    return next((ahead for ahead, i in enumerate(order) if i in right), NOT_FOUND)


def naive(i2t: Tensor, t2i: Tensor, txt2img: list[int]) -> dict[str, float]:
    texts_of = {i: {t for t, image in enumerate(txt2img) if image == i} for i in range(len(i2t))}
    image_ranks = [naive_rank(i2t[i].tolist(), texts_of[i]) for i in texts_of if texts_of[i]]
    text_ranks = [naive_rank(t2i[t].tolist(), {image}) for t, image in enumerate(txt2img)]
    table = {}
    for name, ranks in (("txt", image_ranks), ("img", text_ranks)):
        for k in (1, 5, 10):
            table[f"{name}_r{k}"] = 100 * sum(rank < k for rank in ranks) / len(ranks)
        table[f"{name}_r_mean"] = (table[f"{name}_r1"] + table[f"{name}_r5"] + table[f"{name}_r10"]) / 3
    table["r_mean"] = (table["txt_r_mean"] + table["img_r_mean"]) / 2
    return table


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
@pytest.mark.parametrize("seed", range(4))
def test_recalls_are_those_of_a_naive_loop(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several captions per image, ties, and pairs that were not re-ranked."""
    monkeypatch.setattr(retrieval, "_CHUNK", block)
    rng = np.random.default_rng(seed)
    txt2img = rng.integers(0, 20, 60).tolist()
    i2t = torch.from_numpy(rng.integers(0, 12, (20, 60)).astype(np.float32))
    t2i = torch.from_numpy(rng.integers(0, 12, (60, 20)).astype(np.float32))
    i2t[torch.from_numpy(rng.random((20, 60)) < 0.5)] = -torch.inf
    t2i[torch.from_numpy(rng.random((60, 20)) < 0.5)] = -torch.inf
    assert recalls(i2t, t2i, txt2img) == pytest.approx(naive(i2t, t2i, txt2img))
    assert recalls(i2t.numpy(), t2i.numpy(), txt2img) == recalls(i2t, t2i, txt2img)


def test_the_names_are_those_of_lavis() -> None:
    table = recalls_from_ranks(np.array([0, 4, 9, 10]), np.array([0, 1, 7]))
    assert table == pytest.approx(
        {
            "txt_r1": 25.0,
            "txt_r5": 50.0,
            "txt_r10": 75.0,
            "txt_r_mean": 50.0,
            "img_r1": 100 / 3,
            "img_r5": 200 / 3,
            "img_r10": 100.0,
            "img_r_mean": 200 / 3,
            "r_mean": (50 + 200 / 3) / 2,
        }
    )


def test_median_ranks_count_from_one_and_what_is_not_found_is_last() -> None:
    lost = NOT_FOUND
    table = recalls_from_ranks(np.array([0, 1, 2, lost]), np.array([0, lost, lost]), medians=True)
    assert (table["txt_mdR"], table["img_mdR"]) == (2.5, 4.0)
    table = recalls_from_ranks(np.arange(7), np.array([0, 1, 1, 3, 0, 2, 2, 6]), medians=True)
    assert (table["txt_mdR"], table["img_mdR"]) == (4.0, 2.5)
    assert "txt_mdR" not in recalls_from_ranks(np.arange(7), np.arange(4))


def test_an_image_is_found_by_the_best_of_its_captions() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    assert ranks_of_images(scores, torch.tensor([0, 0, 1])).tolist() == [0, 2]


def test_a_tie_counts_against_the_model() -> None:
    """With LAVIS's argsort the order of the data decides: a constant score may find everything."""
    scores = torch.zeros(12, 12)
    own = torch.arange(12)
    assert ranks_of_images(scores, own).tolist() == [11] * 12
    assert recalls(scores, scores, own.tolist())["r_mean"] == 0.0


def test_a_pair_that_was_not_reranked_is_not_found_whatever_k_is() -> None:
    """LAVIS fills with -100 and sums over ranks, so the rest is ordered by chance."""
    scores = torch.full((3, 3), -torch.inf)
    scores[0, 1] = -200.0
    scores[1, 1] = -300.0
    own = torch.arange(3)
    assert ranks_of_texts(scores, own).tolist() == [NOT_FOUND, 0, NOT_FOUND]
    assert recalls(scores, scores, own.tolist())["img_r10"] == pytest.approx(100 / 3)


def test_a_score_that_is_nan_finds_nothing() -> None:
    scores = torch.full((4, 4), torch.nan)
    assert recalls(scores, scores, [0, 1, 2, 3])["r_mean"] == 0.0
    scores = torch.eye(4)
    scores[0, 1] = torch.nan
    assert recalls(scores, scores, [0, 1, 2, 3])["r_mean"] == 100.0


def test_images_without_a_text_are_left_out() -> None:
    scores = torch.eye(3)
    assert recalls(scores[:, :2], scores[:2], [0, 1])["r_mean"] == 100.0


def test_the_gain_of_a_ranking_is_the_plain_sum() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        count = int(rng.integers(2, 101))
        relevance = rng.choice([0.0, 0.0, 0.2, 0.5, 1.0], count)
        relevance[int(rng.integers(count))] = 0.6
        ranks = (rng.permutation(count) + 1).tolist()
        k = sum(1 for gain in relevance if gain > 0)
        gained = sum(relevance[i] / math.log2(place + 1) for i, place in enumerate(ranks) if place <= k)
        ideal = sum(gain / math.log2(place + 1) for place, gain in enumerate(sorted(relevance)[::-1][:k], 1))
        assert ndcg(ranks, relevance.tolist()) == pytest.approx(gained / ideal, abs=1e-12)


def test_the_gain_of_the_ideal_ranking_is_one_and_candidates_have_to_be_the_same() -> None:
    assert ndcg([2, 1, 3, 4], [0.5, 1.0, 0.0, 0.0]) == pytest.approx(1.0)
    with pytest.raises(DataError, match="3 candidates are ranked and 1 of 2 relevant"):
        ndcg([1, 2, 3], [1.0, 0.0])
    with pytest.raises(DataError, match="0 of 2 relevant"):
        ndcg([1, 2], [0.0, 0.0])


def test_scores_of_ranks_are_the_plain_means() -> None:
    ranks = np.random.default_rng(2).integers(1, 101, 333).tolist()
    expected = {f"R_{k}": 100 * sum(rank <= k for rank in ranks) / 333 for k in (1, 5, 10)}
    expected |= {"MRR": 100 * sum(1 / rank for rank in ranks) / 333, "mean_rank": sum(ranks) / 333}
    assert rank_scores(ranks) == pytest.approx(expected)
    assert rank_scores([]) == {}


def test_no_queries_give_zero_and_no_error() -> None:
    assert recalls_from_ranks(np.array([]), np.array([]))["r_mean"] == 0.0


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(3)
    scores, positive = rng.integers(0, 8, 60) / 4, rng.random(60) < 0.3  # with ties
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert roc_auc(scores.tolist(), positive.tolist()) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert roc_auc([1.0, 2.0, 3.0], [False, False, True]) == 1.0
