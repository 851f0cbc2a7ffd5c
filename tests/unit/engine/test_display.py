"""Facts about what rank 0 shows: a bar or lines, and warnings of objectives that learn nothing."""

from __future__ import annotations

import io
import logging
import math
import time
from typing import Any

import pytest

from blip.engine.display import ITM_CHANCE, ChanceWatch, Display, format_figures


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_makes_room_for_messages() -> None:
    terminal = Terminal()
    logger = logging.getLogger("blip")
    handler = logging.StreamHandler(terminal)
    logger.addHandler(handler)
    try:
        display = Display(total_steps=200, stream=terminal)
        display.figures({"split": "train", "step": 50, "loss": 2.0})
        assert "[#####...............] 50/200 eta " in terminal.getvalue()
        assert terminal.getvalue().endswith("loss 2")
        logger.warning("look here")
        assert terminal.getvalue().endswith("\r\x1b[Klook here\n")
        display.close()
        assert not handler.filters
    finally:
        logger.removeHandler(handler)


def test_a_bar_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    Display(100, stream=terminal).figures({"step": 1, "loss": 1.0, "a_long_name": 2.0, "another_one": 3.0})
    assert len(terminal.getvalue().removeprefix("\r\x1b[K")) == 39


def test_a_bar_is_not_redrawn_more_often_than_eyes_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    terminal = Terminal()
    display = Display(1000, stream=terminal)
    for step in range(1, 101):
        now += 0.01
        display.step(step)
    assert 9 <= terminal.getvalue().count("\r") <= 11


def test_the_time_left_is_that_of_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    display = Display(total_steps=10_000, start_step=5000, stream=io.StringIO())
    assert display.eta(5000) == "?"
    now = 200.0
    assert display.eta(5100) == "2:43:20"
    assert display.eta(10_000) == "0:00:00"


def test_a_file_gets_no_bar() -> None:
    stream = io.StringIO()
    display = Display(10, stream=stream)
    display.step(1)
    display.close()
    assert stream.getvalue() == ""


def test_figures_are_short() -> None:
    line = {"split": "train", "step": 3, "epoch": 0, "loss": 1.23456, "lr": 1.5e-5, "skipped": 2, "zero": 0.0}
    assert format_figures(line) == "loss 1.235  lr 1.5e-05  skipped 2  zero 0"
    assert format_figures({"step": 1, "samples_per_s": 210.04, "data_wait": 0.031}) == "210.0/s  wait 3%"
    assert format_figures({"step": 1, "loss": None}) == "loss None"


# Chance level


def warnings(watch: ChanceWatch, figures: list[dict[str, Any]], every: int = 50) -> list[str]:
    return [text for i, line in enumerate(figures, 1) for text in watch.look({"step": i * every, **line})]


def test_the_chance_level_of_itm_is_the_entropy_of_one_in_three() -> None:
    assert pytest.approx(0.6365, abs=1e-4) == ITM_CHANCE
    assert pytest.approx(-(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)) == ITM_CHANCE


def test_an_objective_at_chance_is_told_once_with_advice(caplog: pytest.LogCaptureFixture) -> None:
    watch = ChanceWatch(patience=200, num_candidates=64)
    found = warnings(watch, [{"loss_itc": math.log(64), "loss_itm": 0.637}] * 20)
    assert [text.split(" ")[0] for text in found] == ["loss_itc", "loss_itm"]
    assert "at chance level for 200 steps (4.159, and choosing blindly among 64 gives 4.159)" in found[0]
    assert "blip data check" in found[0]
    assert "loss_itc has" in found[1]
    assert all(text in caplog.text for text in found)


@pytest.mark.parametrize(
    "line",
    [
        {"loss_itc": 0.9 * math.log(64)},
        {"loss_itm": 0.60},
        {"loss_itm": 0.55, "itm_acc": 2 / 3},
        {"loss_lm": 4.1},
        {"loss_itc": None, "loss_itm": None},
    ],
)
def test_an_objective_that_learns_is_not_told(line: dict[str, Any]) -> None:
    assert warnings(ChanceWatch(100, num_candidates=64), [line] * 20) == []


@pytest.mark.parametrize("line", [{"loss_itm": 0.7}, {"loss_itm": 0.62, "itm_acc": 0.6667}])
def test_worse_than_chance_and_always_no_count_as_chance(line: dict[str, Any]) -> None:
    assert len(warnings(ChanceWatch(100, None), [line] * 20)) == 1


def test_only_steps_in_a_row_count_and_a_late_collapse_is_seen() -> None:
    bad, good = {"loss_itm": 0.64}, {"loss_itm": 0.3}
    assert warnings(ChanceWatch(200), [bad, bad, bad, bad, good] * 5) == []
    assert len(warnings(ChanceWatch(200), [good] * 20 + [bad] * 20)) == 1


def test_itc_is_left_out_where_its_candidates_are_not_known() -> None:
    assert warnings(ChanceWatch(100, None), [{"loss_itc": 9.0}] * 20) == []
    assert warnings(ChanceWatch(100, 1), [{"loss_itc": 0.0}] * 20) == []
