"""Bad records are counted, listed once, and too large a share of them ends the run on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip.data.samples import BadRecord
from blip.data.skips import SkipLog
from blip.errors import DataError


def test_skips_are_counted_and_listed_once(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "run", max_bad_ratio=0.5, min_reads=10)
    log.update([], good=3)
    three = [("coco", BadRecord("missing_image", f"coco/{i % 2}", "x.jpg")) for i in range(3)]
    log.update([*three, ("vg", BadRecord("no_caption", "vg/1"))], good=5)
    assert (log.total, log.good) == (4, 8)
    assert log.summary() == "coco: 3 missing_image; vg: 1 no_caption"
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [(line["dataset"], line["record"], line["cause"]) for line in lines] == [
        ("coco", "coco/0", "missing_image"),
        ("coco", "coco/1", "missing_image"),
        ("vg", "vg/1", "no_caption"),
    ]
    assert lines[0]["detail"] == "x.jpg"


def test_a_resumed_run_counts_on_and_lists_nothing_twice(tmp_path: Path) -> None:
    first = SkipLog(tmp_path)
    first.update([("coco", BadRecord("missing_image", "coco/0"))], good=9)
    state = json.loads(json.dumps(first.state_dict()))
    with first.path.open("a") as file:  # type: ignore[union-attr]
        file.write('{"dataset": "co')  # killed while writing
    second = SkipLog(tmp_path)
    second.load_state_dict(state)
    second.update([("coco", BadRecord("missing_image", f"coco/{i}")) for i in (0, 1)], good=1)
    assert second.state_dict() == {
        "good": 10,
        "bad": {"coco": {"missing_image": 3}},
        "epochs": [[0, 10, {"coco": {"missing_image": 3}}]],
    }
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in (lines[0], lines[2])] == ["coco/0", "coco/1"]
    assert len(lines) == 3


def bad(count: int, cause: str = "missing_image") -> list[tuple[str, BadRecord]]:
    return [("coco", BadRecord(cause, f"coco/{i}")) for i in range(count)]


def test_the_share_of_a_finished_epoch_is_judged_exactly(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, max_bad_ratio=0.25)
    log.update(bad(3), good=9)
    log.update([], good=1, epoch=1)
    log.judge()  # 3 of 12 are as many as allowed
    log.update(bad(1), good=1, epoch=1)
    log.judge()  # 1 of 3, but more of this epoch may be to come
    log.update([], good=2, epoch=1)
    log.update([], good=1, epoch=2)
    log.judge()
    log.update(bad(2), good=4, epoch=2)
    log.update([], good=1, epoch=3)
    with pytest.raises(DataError, match=r"^2 of 7 records cannot be read \(coco: 2 missing_image\)"):
        log.judge()
    with pytest.raises(
        DataError, match=r"more than run.max_bad_ratio=0.25 allows; they are listed in .*skipped"
    ):
        log.judge()


def test_an_epoch_whose_share_will_be_exceeded_anyway_is_not_waited_for() -> None:
    log = SkipLog(max_bad_ratio=0.1)
    log.epoch_rows = 36
    log.update(bad(4), good=1)
    log.judge()  # 4 of 40, when the epoch is over
    log.update(bad(1), good=1)
    with pytest.raises(DataError, match=r"^5 of 7 records cannot be read"):
        log.judge()


def test_an_epoch_is_over_with_its_last_row() -> None:
    log = SkipLog(max_bad_ratio=0.1)
    log.epoch_rows = 36
    log.update(bad(4), good=36)
    log.judge()
    log.update(bad(3), good=3, epoch=1)
    log.judge()  # does not weigh the two epochs together: nothing is known of the rest of this one


def test_a_long_epoch_ends_early_only_by_more_than_chance_explains() -> None:
    log = SkipLog(max_bad_ratio=0.05, min_reads=200)
    log.epoch_rows = 10**6
    log.update(bad(20), good=179)
    log.judge()  # 10 %, of too few to judge
    log.update([], good=101)
    log.judge()  # 20 of 300: a share of 5 % gives more than that in one of ten epochs
    log.update(bad(30), good=200)
    with pytest.raises(DataError, match=r"^50 of 530 records"):
        log.judge()


def test_where_nothing_may_be_bad_the_first_bad_record_ends_the_run() -> None:
    log = SkipLog(max_bad_ratio=0)
    log.epoch_rows = 10**6
    log.update([], good=10)
    log.judge()
    log.update(bad(1))
    with pytest.raises(DataError, match=r"^1 of 11 records"):
        log.judge()


def test_ranks_judge_their_reads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SkipLog(max_bad_ratio=0.1)
    other.update(bad(1), good=19)
    log = SkipLog(max_bad_ratio=0.1)
    log.epoch_rows = 40
    log.update(bad(3), good=17)
    monkeypatch.setattr("blip.dist.gather_objects", lambda value: [value, dict(other._epochs)])
    log.judge()  # 4 of 40, though 3 of its own 20
    log.update(bad(1))
    with pytest.raises(DataError, match=r"^5 of 41 records cannot be read \(coco: 5 missing_image\)"):
        log.judge()


def test_a_set_that_was_looked_at_as_a_whole_is_judged_at_once(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, max_bad_ratio=0.25)
    two = [error for _, error in bad(2)]
    log.judge_all("coco", two, 2, 8, "shards")
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2
    with pytest.raises(
        DataError,
        match=r"^2 of 7 shards cannot be read \(coco: 2 missing_image\), .*; the first is coco/0",
    ):
        log.judge_all("coco", two, 2, 7, "shards")
    assert log.total == 0  # it is no part of what training reads


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SkipLog().update([("coco", BadRecord("missing_image", "coco/0"))], good=1)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_list_in_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip.dist.rank", lambda: 3)
    SkipLog(tmp_path).update([("coco", BadRecord("missing_image", "coco/0"))], good=1)
    assert [path.name for path in tmp_path.iterdir()] == ["skipped-3.jsonl"]
