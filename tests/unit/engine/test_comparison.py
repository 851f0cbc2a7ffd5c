"""Scores beside published ones: scales, notes, the table and the file."""

from __future__ import annotations

import json
from pathlib import Path

from blip.config.published import Published
from blip.engine.comparison import Comparison, Expected, as_text, as_values
from blip.engine.report import write_report

CAPTIONS = Published("BLIP, table 7", "coco/test", {"CIDEr": 133.3, "SPICE": 24.0})
RECALL = Published("BLIP, table 5", "flickr/test", {"txt_r1": 97.2})
ANSWERS = Published("BLIP, table 8", "vqa/test", {"overall": 78.25}, server="test-dev")
ELSEWHERE = Published("BLIP, table 7", "nocaps/val", {"CIDEr": 109.6})
COMPARISON = Comparison(
    [
        Expected(CAPTIONS, ("a subset: run.img_ids has 3 pictures",)),
        Expected(RECALL),
        Expected(ANSWERS),
        Expected(ELSEWHERE),
    ],
    {"CIDEr": 100.0, "SPICE": 100.0},
)
FOUND = {"coco/test": {"CIDEr": 1.313, "Bleu_4": 0.39}, "flickr/test": {"txt_r1": 97.9}, "vqa/test": {}}


def test_figures_are_compared_as_papers_print_them() -> None:
    rows = COMPARISON.against(FOUND)
    assert [(r.dataset, r.split, r.metric, r.score, r.published, r.difference, r.scale) for r in rows] == [
        ("coco", "test", "CIDEr", 131.3, 133.3, -2.0, 100.0),
        ("coco", "test", "SPICE", None, 24.0, None, 100.0),
        ("flickr", "test", "txt_r1", 97.9, 97.2, 0.7, 1.0),
        ("vqa", "test", "overall", None, 78.25, None, 1.0),
    ]
    subset = "a subset: run.img_ids has 3 pictures"
    server = "of test-dev: the server scores the file in submissions/"
    assert [r.notes for r in rows] == [(subset,), ("not computed here", subset), (), (server,)]


def test_a_figure_of_the_server_is_never_compared_with_one_of_ours() -> None:
    [row] = Comparison([Expected(ANSWERS)]).against({"vqa/test": {"overall": 80.0}})
    assert (row.score, row.difference) == (None, None)


def test_the_table_says_the_scale_and_what_notes_are_about() -> None:
    assert as_text(as_values(COMPARISON.against(FOUND))).splitlines() == [
        "dataset  split  metric          here  published  difference  source",
        "coco     test   CIDEr (x100)  131.30     133.30       -2.00  BLIP, table 7",
        "coco     test   SPICE (x100)       -      24.00           -  BLIP, table 7",
        "flickr   test   txt_r1         97.90      97.20       +0.70  BLIP, table 5",
        "vqa      test   overall            -      78.25           -  BLIP, table 8",
        "  BLIP, table 7: a subset: run.img_ids has 3 pictures",
        "  BLIP, table 7: not computed here",
        "  BLIP, table 8: of test-dev: the server scores the file in submissions/",
        "  x100: times 100 beside metrics.jsonl, as papers print them",
    ]


def test_the_report_shows_the_same_figures(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    page = write_report(tmp_path).read_text()
    assert "Beside what is published" not in page
    rows = as_values(COMPARISON.against(FOUND))
    (tmp_path / "published.json").write_text(json.dumps(rows))
    page = write_report(tmp_path).read_text()
    for part in ("CIDEr (x100)", "131.30", "133.30", "-2.00", "BLIP, table 7: not computed here"):
        assert part in page
