"""Where a run stands, and the figures since its last line of the log; both are part of every checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blip import dist


@dataclass
class Progress:
    """Where a run stands; the same on every rank."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    epoch: int = 0
    samples: int = 0
    skipped: int = 0
    """Steps left out because a gradient was not finite."""
    skipped_in_row: int = 0
    evaluated: int = -1
    """Step of the last evaluation."""
    best: float | None = None
    """Best value of the monitored metric."""
    best_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all fields."""
        for name, value in state.items():
            setattr(self, name, value)


class Intake:
    """Where this process's training data came from, and what was waited for; for a line at its end."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        """Source -> rows on all ranks."""
        self._window = Window()

    def add(
        self, micro_batches: Sequence[Mapping[str, Any]], seconds: float, waited: float, load: Sequence[Any]
    ) -> None:
        """Count a step, as `Window.time` and `Window.load` do."""
        for batch in micro_batches:
            self.rows[batch["source"]] += batch["batch_total"]
        self._window.time(0, seconds, waited)
        self._window.load(*load)

    def text(self) -> str:
        """The line; it says what to do where the data was what took the time."""
        rates, total = self._window.rates(), self.rows.total()
        parts = ", ".join(f"{name} {rows}" for name, rows in self.rows.most_common())
        found = f"data: {total} samples ({parts}); waited for {rates.get('data_wait', 0):.0%} of the time"
        busy, fetching = rates.get("loader_busy", 0.0), rates.get("fetch_wait", 0.0)
        found += f", loader processes busy {busy:.0%}"
        if "fetch_wait" in rates:
            size, speed = self._window.fetched / 1e6, rates["fetch_mb_per_s"]
            found += f" ({fetching:.0%} waiting for shards; {size:.1f} MB fetched at {speed:.1f} MB/s)"
        if rates.get("data_wait", 0) > 0.2:
            remedy = "more run.num_workers or faster disks would help"
            found += "; the network is too slow" if fetching > busy / 2 else f"; {remedy}"
        return found


class Window:
    """Sums of figures since the last line of the log, of this rank, in float64 on the figures' device.

    Steps add tensors, so that a GPU is not waited for; only a line of the log and a checkpoint read them.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self.samples = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.busy = self.fetch_wait = 0.0
        self.fetched = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add one step's figures, scalars; a step may lack some."""
        for name, value in figures.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def time(self, samples: int, seconds: float, waited: float) -> None:
        """Count a step's samples on all ranks, and its time here; these do not survive a restart."""
        self.samples += samples
        self.seconds += seconds
        self.waited += waited

    def load(self, busy: float, fetch_wait: float, fetched: int) -> None:
        """Count what it took this rank's loader: shares of its processes' time, and bytes from elsewhere."""
        self.busy += busy
        self.fetch_wait += fetch_wait
        self.fetched += fetched

    def means(self) -> dict[str, float]:
        """Mean of every figure over the steps that had it and over the ranks; call it on every rank."""
        if not self._sums:
            return {}
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        sums = torch.stack(list(self._sums.values()))
        values = dist.sum_tensor(sums / counts.to(sums.device)) / dist.world_size()
        return dict(zip(self._sums, values.tolist(), strict=True))

    def rates(self) -> dict[str, float]:
        """`samples_per_s` on all ranks, and of this one `data_wait` and `loader_busy`.

        These are shares: of the time, spent waiting for data; of its loader processes' time, spent on making
        batches. Where shards are fetched, also `fetch_mb_per_s`, and `fetch_wait`, the share of the
        processes' time spent waiting for them.
        """
        if not self.seconds:
            return {}
        rates = {
            "samples_per_s": self.samples / self.seconds,
            "data_wait": self.waited / self.seconds,
            "loader_busy": self.busy / self.seconds,
        }
        if self.fetched or self.fetch_wait:
            rates["fetch_mb_per_s"] = self.fetched / 1e6 / self.seconds
            rates["fetch_wait"] = self.fetch_wait / self.seconds
        return rates

    def clear(self) -> None:
        """Begin the next line."""
        self.__init__()  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, without the times."""
        return {"sums": {k: v.item() for k, v in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on adding to `state`."""
        self.clear()
        self._sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in state["sums"].items()}
        self._counts = dict(state["counts"])
