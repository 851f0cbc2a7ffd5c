"""What a task is: the training step, the evaluation, and which model methods they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from blip.batch import Batch, EvalContext, Output
from blip.config.schema import RunConfig
from blip.errors import ConfigError

Prediction = dict[str, Any]


class EvalData(Protocol):
    """One split of one dataset, as evaluation sees it: this rank's share of it, in batches."""

    name: str

    def __len__(self) -> int:
        """Number of samples on all ranks."""
        ...

    def instance_id(self, index: int) -> str:
        """Name of a sample, for predictions and reports."""
        ...

    def picture(self, index: int) -> str | None:
        """Path of its (first) picture, where it is a file of its own."""
        ...

    def batches(self) -> Iterator[Batch]:
        """This rank's samples in order, `dist.slices(len(self))`, with `index` (B,) their numbers."""
        ...


@dataclass
class WritingRun(RunConfig):
    """Run keys of tasks that have texts written."""

    num_beams: int = 5
    """Texts that are followed at once."""
    max_len: int = 30
    """Longest text, in tokens, as the model counts them."""
    min_len: int = 1
    """Shortest text, likewise."""
    length_penalty: float | None = None
    """Scores of beams are divided by the length to this power; None: the model's own."""

    def problems(self) -> list[str]:
        """Settings of generation that make no sense."""
        found = super().problems() + self._at_least(1, "num_beams", "max_len") + self._at_least(0, "min_len")
        if self.min_len > self.max_len:
            found.append(f"min_len: {self.min_len} is above max_len ({self.max_len})")
        return found


@dataclass
class Evaluation:
    """What one evaluation gives: what the model said about each sample, and how to score it."""

    predictions: list[Prediction]
    """This rank's share."""
    metrics: Callable[[], dict[str, float]]
    """Computes the scores, complete on every rank; called on every rank, after predictions are written."""


class Task:
    """What counts as success.

    `needs` lists the model methods the task calls and is checked before training; `monitor` names the
    metric that decides the best checkpoint; `data_kind` says what evaluations read of a dataset.
    """

    run_config_class: ClassVar[type[RunConfig]] = RunConfig
    needs: ClassVar[tuple[str, ...]] = ()
    monitor: ClassVar[str] = "loss"
    data_kind: ClassVar[str] = "retrieval"
    """`retrieval`, `caption`, `vqa`, `classification` or `instruct`."""

    def __init__(self, config: RunConfig) -> None:
        self.config: Any = config

    def check(self, model: Any) -> None:
        """Raise where `model` cannot do this task.

        Raises:
            ConfigError: a method is missing.
        """
        missing = [name for name in self.needs if not hasattr(model, name)]
        if missing:
            raise ConfigError(
                f"run.task: {type(self).__name__} needs a model with {', '.join(missing)}, which"
                f" model.arch {model.config.arch!r} has not; choose another task or arch"
            )

    def check_data(self, data: Any) -> None:
        """Raise where evaluation on `data` would lack something; asked before training.

        Raises:
            ConfigError: the dataset and the run's settings do not go together.
        """

    def scores(self, data: Any = None) -> list[str]:
        """Names of the metrics that an evaluation on `data` gives; without it, all that there may be.

        Without `data`, a name may end in `*` for what only the data can tell, such as types of questions.
        Empty means that nothing is measured.
        """
        return []

    def less_is_better(self, score: str) -> bool:
        """Whether a smaller value of a metric means a better model."""
        return False

    def submission(self, data: Any, predictions: Sequence[Prediction]) -> Any:
        """What the benchmark's server takes, as JSON; None where all can be scored here.

        Args:
            data: what the predictions are about.
            predictions: of all ranks, in the order of the samples.
        """
        return None

    def train_step(self, model: Any, batch: dict[str, Any]) -> Output:
        """The losses of one micro-batch; `model` may be wrapped for distributed training."""
        return model(batch)

    def evaluate(self, model: Any, data: Any, context: EvalContext) -> Evaluation:
        """What the model says on one split; called on every rank, in eval mode and without gradient."""
        raise ConfigError(
            f"run.task: {type(self).__name__} has no evaluation; leave valid_splits and test_splits empty"
        )


def rows_of(batch: dict[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """Some rows of a batch of `total`, by their numbers; what is not there for each row stays."""

    def some(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == total:
            return value[list(rows)]
        if isinstance(value, list) and len(value) == total:
            return [value[row] for row in rows]
        return value

    return {key: some(value) for key, value in batch.items()}


def seen_once(model: Any, samples: dict[str, Any]) -> dict[str, Any]:
    """Samples with the tower's states in the place of pictures, for a model that is asked several times.

    Videos stay as they are: models read their frames one by one.
    """
    if not hasattr(model, "image_states") or "image" not in samples or samples["image"].ndim != 4:
        return samples
    others = {key: value for key, value in samples.items() if key != "image"}
    return {**others, "image_embeds": model.image_states(samples)}
