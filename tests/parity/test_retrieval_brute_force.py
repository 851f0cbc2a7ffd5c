"""Re-ranked retrieval against brute force; run_scripts/bench/retrieval.py does the same at 1,000 x 5,000."""

from __future__ import annotations

from pathlib import Path

import pytest

from run_scripts.bench.retrieval import compare, make


@pytest.mark.parametrize("k", [10, 40])
def test_scores_candidates_and_recalls_are_those_of_brute_force(tmp_path: Path, k: int) -> None:
    make(tmp_path, 40)
    found = compare(tmp_path, 40, k)
    assert found["texts"] == 200
    assert (found["pairs"] == 40 * 200) == (k == 40)
    assert found["difference"] < 2e-5  # float32, of scores of the order of 1
    assert found["different_candidates"] == 0
    assert found["recalls"] == found["brute_recalls"]
    assert 0 < found["recalls"]["txt_r10"] < 100
