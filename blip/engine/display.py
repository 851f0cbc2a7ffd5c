"""What rank 0 shows while it trains: a bar on a terminal, lines elsewhere, warnings of idle objectives."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

log = logging.getLogger(__name__)

ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)
"""Entropy of one match among three pairs (0.6365): the ITM loss of a model that knows nothing."""

_BAR_EVERY_S = 0.1
_RATES = ("samples_per_s", "data_wait", "loader_busy", "fetch_mb_per_s", "fetch_wait")
_HIDDEN = ("split", "step", "epoch")


class Display:
    """Progress on a stream.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps done before this process.
        stream: stderr unless given; a bar that is redrawn where it is a terminal.
        unit: what is counted.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, stream: TextIO | None = None, unit: str = "step"
    ) -> None:
        self.unit = unit
        self.total_steps = total_steps
        self.start_step = start_step
        self.stream = stream if stream is not None else sys.stderr
        self.is_terminal = self.stream.isatty()
        self._figures = ""
        self._started = time.monotonic()
        self._drawn_at = 0.0
        self._drawn = False
        self._handlers = logging.getLogger("blip").handlers if self.is_terminal else []
        for handler in self._handlers:
            handler.addFilter(self._make_room)

    def step(self, step: int) -> None:
        """Redraw the bar, where there is one; call after every step."""
        now = time.monotonic()
        if not self.is_terminal or now - self._drawn_at < _BAR_EVERY_S:
            return
        self._drawn_at = now
        share = step / max(self.total_steps, 1)
        filled = round(20 * share)
        bar = "#" * filled + "." * (20 - filled)
        text = f"[{bar}] {step}/{self.total_steps} eta {self.eta(step)}  {self._figures}"
        width = shutil.get_terminal_size().columns
        self.stream.write("\r\x1b[K" + text[: width - 1])
        self.stream.flush()
        self._drawn = True

    def figures(self, line: Mapping[str, Any]) -> None:
        """Show a line of training figures: in the bar, or as a line of the log."""
        self._figures = format_figures(line)
        step = int(line["step"])
        if self.is_terminal:
            self._drawn_at = 0.0
            self.step(step)
        else:
            shown = (self.unit, step, self.total_steps, self._figures, self.eta(step))
            log.info("%s %d/%d  %s  eta %s", *shown)

    def eta(self, step: int) -> str:
        """Time to the end at the pace so far, as h:mm:ss."""
        done = step - self.start_step
        if done <= 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / done * max(self.total_steps - step, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Leave the terminal tidy."""
        self.erase()
        for handler in self._handlers:
            handler.removeFilter(self._make_room)

    def erase(self) -> None:
        """Take the bar away, for something else to be printed."""
        if self._drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
        self._drawn = False

    def _make_room(self, record: logging.LogRecord) -> bool:
        self.erase()
        return True


def format_figures(line: Mapping[str, Any]) -> str:
    """Training figures as one short text."""
    parts = [f"{k} {_short(v)}" for k, v in line.items() if k not in (*_HIDDEN, *_RATES)]
    if line.get("samples_per_s") is not None:
        parts.append(f"{line['samples_per_s']:.1f}/s")
    if line.get("data_wait") is not None:
        parts.append(f"wait {100 * line['data_wait']:.0f}%")
    return "  ".join(parts)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


class ChanceWatch:
    """Warns once per objective that has been at chance level for long.

    Args:
        patience: steps in a row at chance before the warning.
        num_candidates: what ITC chooses from (global batch, plus queue); None leaves ITC out.
    """

    def __init__(self, patience: int, num_candidates: int | None = None) -> None:
        self.patience = patience
        self.num_candidates = num_candidates
        self._since: dict[str, int] = {}
        self._warned: set[str] = set()

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """Warnings that a line of training figures (means since the line before) brings; logged, too."""
        step = int(line["step"])
        warnings = []
        for name, text in (("loss_itc", self._itc(line)), ("loss_itm", self._itm(line))):
            if text is None:
                self._since.pop(name, None)
                continue
            since = self._since.setdefault(name, step)
            if step - since >= self.patience and name not in self._warned:
                self._warned.add(name)
                warnings.append(
                    f"{name} is at chance level for {step - since} steps ({text}); {_ADVICE[name]}"
                )
        for warning in warnings:
            log.warning("%s", warning)
        return warnings

    def _itc(self, line: Mapping[str, Any]) -> str | None:
        loss, candidates = line.get("loss_itc"), self.num_candidates
        if loss is None or candidates is None or candidates < 2 or loss < 0.97 * math.log(candidates):
            return None
        return f"{loss:.3f}, and choosing blindly among {candidates} gives {math.log(candidates):.3f}"

    def _itm(self, line: Mapping[str, Any]) -> str | None:
        loss, accuracy = line.get("loss_itm"), line.get("itm_acc")
        at_prior = accuracy is not None and abs(accuracy - 2 / 3) < 0.005
        if loss is None or (loss < ITM_CHANCE - 0.01 and not (at_prior and loss > 0.6)):
            return None
        return f"{loss:.3f}, and always saying no gives {ITM_CHANCE:.4f} and an accuracy of 2/3"


_ADVICE = {
    "loss_itc": (
        "see whether images and texts belong together (blip data check) and whether the vision tower learned"
        " anything before it was frozen, and try a longer run.warmup_steps or a lower run.init_lr"
    ),
    "loss_itm": (
        "it often starts to fall only after loss_itc has; if that has fallen, see whether pictures have"
        " several captions (datasets.*.image_ids), and try a lower run.init_lr or a larger batch"
    ),
}
