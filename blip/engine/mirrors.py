"""Other places that metrics are shown in: TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from blip.errors import ConfigError, brief


class Mirror(Protocol):
    """Takes the lines of `metrics.jsonl` as they are written."""

    def put(self, line: Mapping[str, Any]) -> None:
        """Take one line."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """TensorBoard files in a folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "run.tensorboard: TensorBoard is not installed; pip install tensorboard, or set it to false"
            ) from error
        self._make = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def put(self, line: Mapping[str, Any]) -> None:
        """Add the scalars of one line, named `split/figure`."""
        if self._writer is None:
            # What an earlier process logged from this step on is hidden: it is done again.
            self._writer = self._make(str(self._folder), purge_step=int(line["step"]))
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project.

    Args:
        folder: the run folder; W&B keeps its files there.
        project: name of the project.
        identity: of the run; a resumed one goes on under the same.
        config: what the run is made of, as plain values.

    Raises:
        ConfigError: W&B is not installed, or cannot start.
    """

    def __init__(self, folder: Path, project: str, identity: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "run.wandb: Weights & Biases is not installed; pip install wandb, or leave run.wandb out"
            ) from error
        name = f"{config.get('name') or 'run'}/{folder.name}"
        try:
            self._run = wandb.init(
                project=project, id=identity, resume="allow", name=name, dir=str(folder), config=config
            )
        except Exception as error:  # network, login and version errors are of many kinds
            raise ConfigError(f"run.wandb: Weights & Biases cannot start: {brief(error)}") from error

    def put(self, line: Mapping[str, Any]) -> None:
        """Log the scalars of one line, named `split/figure`."""
        self._run.log(scalars(line), step=int(line["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, named `split/figure`."""
    return {
        f"{line['split']}/{k}": float(v) for k, v in line.items() if type(v) in (int, float) and k != "step"
    }
