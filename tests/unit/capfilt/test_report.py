"""The page of a round shows what was kept and what was removed."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from blip.capfilt.report import write_report
from blip.capfilt.select import Tally, choose, thresholds
from blip.capfilt.units import open_pool
from blip.capfilt.work import work_of
from blip.config.schema import DatasetConfig
from blip.tasks.capfilt import KeepConfig


def test_what_is_not_among_the_best_is_shown_as_removed(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "own" / "a.png")
    pool = open_pool("mine", DatasetConfig(path=str(tmp_path / "own")), "train", 10)
    work = work_of([pool], tmp_path / "scored")
    scores = {"first": 0.9, "second": 0.8, "third": 0.7}
    texts = [{"caption": c, "origin": "synthetic", "itm": s, "itc": s} for c, s in scores.items()]
    line = {"picture": "mine/0", "texts": texts}
    work[0].journal.begin(1, 1)
    work[0].journal.add([line])
    work[0].journal.end([], 1)
    keep = KeepConfig(itm=None, best=1, best_by="itc")
    least = thresholds(keep, [line])
    tally = Tally()
    tally.add(line, choose(line, keep, least))
    summary = {"round": 1, "captioner": None, "filter": None, "thresholds": least}
    path = write_report(tmp_path, summary | {"datasets": {"mine": tally.values()}}, work, keep, least)
    shown = re.findall(r"synthetic texts (kept|removed)|<li>(first|second|third)</li>", path.read_text())
    assert ["".join(one) for one in shown] == ["kept", "first", "removed", "second", "third"]
