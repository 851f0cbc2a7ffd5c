"""The loop: step, log, evaluate, save, stop. One runner for all tasks and models."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip import dist, keyed
from blip.batch import Output, to_device
from blip.config.schema import Config, RunConfig
from blip.engine.cached import cached_step
from blip.engine.checkpoint import Checkpoints
from blip.engine.optim import Ema, Schedule, build_optimizer
from blip.engine.parallel import Parallel
from blip.engine.signals import StopSignals
from blip.engine.tracker import Tracker
from blip.errors import Stopped, TrainingError

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint."""

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
    best_step: int | None = None
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the figures since the last line of the log, in float64."""
    window_steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all fields."""
        for name, value in state.items():
            setattr(self, name, value)


class Runner:
    """Trains what it is handed and keeps the run folder.

    `stateful` is all that a resumed run needs beside the model's weights: what is not in it is not resumed.

    Args:
        config: the resolved configuration.
        model: unwrapped, on its device.
        task: training step and evaluation.
        parallel: device, precision, gradient averaging.
        loader: training micro-batches; None to evaluate only.
        evaluations: split -> datasets to evaluate on.
        tracker: the run folder.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        task: Any,
        parallel: Parallel,
        loader: Any | None,
        evaluations: dict[str, list[Any]],
        tracker: Tracker,
    ) -> None:
        self.config: RunConfig = config.run
        self.model = model
        self.task = task
        self.parallel = parallel
        self.loader = loader
        self.evaluations = evaluations
        self.tracker = tracker
        self.progress = Progress()
        self.checkpoints = Checkpoints(tracker.folder, keep_last=self.config.keep_last)
        self.signals = StopSignals()
        if loader is not None:
            self._prepare_training(loader)

    # The loop

    def run(self) -> dict[str, float]:
        """Train to the end, then score the test splits; returns the last scores.

        Raises:
            Stopped: a stop signal came; the state is saved.
            TrainingError: too many non-finite steps in a row.
        """
        with self.signals:
            if self.loader is not None:
                self._train()
            return self._finish()

    def _train(self) -> None:
        self._settle()
        steps = self.loader.steps()
        while self.progress.step < self.total_steps:
            started = time.perf_counter()
            micro_batches = next(steps)
            waited = time.perf_counter() - started
            figures = self.train_step(micro_batches)
            self._log_step(figures, micro_batches, time.perf_counter() - started, waited)
            self._settle()

    def train_step(self, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One optimizer step. If any rank sees a non-finite gradient, no rank steps and the step is counted.

        Returns:
            Detached scalars: the losses over the global batch of the step, `grad_norm`.
        """
        step = self.progress.step
        if self.model.on_step(step):
            self.trained = self.parallel.wrap(self.model)
        batches = self._on_device(micro_batches)
        if self.config.accum_mode == "cached":
            output = cached_step(
                self.model, batches, self.parallel.scaler.scale, self.parallel.autocast, partial(self._seed, step)
            )
            self.parallel.average_grads(self.model.parameters())
            outputs = [output]
        else:
            outputs = [self._micro_step(step, i, batch, len(batches)) for i, batch in enumerate(batches)]

        scaler = self.parallel.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = self.parallel.clip_grads(self.model.parameters(), self.config.max_grad_norm)
        finite = dist.all_true(torch.isfinite(grad_norm))
        if finite:
            scaler.step(self.optimizer)
            self.model.after_step(outputs)  # momentum twin, queues, temperature
            if self.ema is not None:
                self.ema.update()
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self._advance(finite, micro_batches)
        means = {k: torch.stack([o.scalars()[k].float() for o in outputs]).mean() for k in outputs[0].scalars()}
        return means | {"grad_norm": grad_norm.detach().float()}

    def _micro_step(self, step: int, micro: int, batch: dict[str, Any], count: int) -> Output:
        self._seed(step, micro)
        with self.parallel.sync_grads(self.trained, last=micro == count - 1):
            with self.parallel.autocast():
                output = self.task.train_step(self.trained, batch)
            self.parallel.scaler.scale(output.loss / count).backward()
        return Output({k: v.detach() if isinstance(v, Tensor) else v for k, v in output.items()})

    def _seed(self, step: int, micro: int) -> None:
        """Dropout is keyed by step, micro-batch and rank, so it does not depend on what was drawn before."""
        keyed.seed_torch(self.config.seed, "dropout", step, micro, dist.rank())

    def _on_device(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches on the device, with what the losses are divided by.

        Rows and tokens are counted over the whole step and all ranks, so that unequal micro-batches and
        ranks weigh by what they hold; each is the mean per micro-batch and rank, because those means are
        averaged afterwards.
        """
        shares = dist.world_size() * (1 if self.config.accum_mode == "cached" else len(micro_batches))
        rows = sum(batch["batch_total"] for batch in micro_batches)
        targets = [int(batch["text_mask"][:, 1:].sum()) for batch in micro_batches if "text_mask" in batch]
        device = self.parallel.device
        tokens = dist.sum_tensor(torch.tensor(float(sum(targets)), device=device))
        batches = []
        for i, batch in enumerate(micro_batches):
            moved = to_device(batch, device)
            moved.update(
                iters=self.progress.step,
                num_iters_per_epoch=self.loader.steps_per_epoch,
                seed=self.config.seed,
                loss_rows=rows / shares,
                loss_tokens=tokens / shares,
                num_targets=targets[i] if targets else None,
            )
            batches.append(moved)
        return batches

    def _advance(self, finite: bool, micro_batches: list[dict[str, Any]]) -> None:
        progress = self.progress
        progress.step += 1
        progress.epoch = micro_batches[-1]["epoch"]
        progress.samples += sum(batch["batch_total"] for batch in micro_batches)
        progress.skipped_in_row = 0 if finite else progress.skipped_in_row + 1
        if finite:
            return
        progress.skipped += 1
        names = [name for batch in micro_batches for name in batch.get("instance_id", [])]
        log.warning("step %d: a gradient is not finite; the step is skipped", progress.step)
        self.tracker.event("nonfinite", step=progress.step, samples=names)
        if progress.skipped_in_row >= self.config.max_nonfinite:
            shown = ", ".join(names[:8])
            raise TrainingError(
                f"run.max_nonfinite: {progress.skipped_in_row} steps in a row had non-finite gradients, the last with"
                f" the samples {shown}; lower run.init_lr, set run.max_grad_norm or run.precision=fp32, or look at"
                " those samples"
            )

    # Between steps: evaluate, save, stop

    def _settle(self) -> None:
        """What is due at this step: first a checkpoint, then an evaluation, then a stop that was asked for.

        The checkpoint comes first, so that a run killed during an evaluation loses nothing: the continued
        run finds that this step has not been evaluated and does it.
        """
        progress = self.progress
        stop, late = dist.any_flags([self.signals.received is not None, self._minutes_due()], self.parallel.device)
        evaluate = self._evaluation_due() and progress.evaluated != progress.step
        ends = progress.step >= self.total_steps
        if progress.step and self.saved != progress.step and (stop or late or evaluate or ends or self._save_due()):
            self._save()
        if stop:
            raise Stopped(
                f"stopped by {self.signals.received or 'a signal on another rank'} after step {progress.step};"
                f" continue with run.resume=auto run.output_dir={self.tracker.folder}"
            )
        if evaluate:
            self._validate()

    def _save_due(self) -> bool:
        return bool(self.config.save_freq) and self.progress.step % self.config.save_freq == 0

    def _minutes_due(self) -> bool:
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def _evaluation_due(self) -> bool:
        if not self.progress.step or not any(self.evaluations.get(split) for split in self.config.valid_splits):
            return False
        every = self.config.eval_freq or self.config.val_freq * self.loader.steps_per_epoch
        return self.progress.step % every == 0 or self.progress.step >= self.total_steps

    def _validate(self) -> None:
        """Evaluate the valid splits; the first one's monitored metric decides the best checkpoint."""
        progress = self.progress
        for i, split in enumerate(self.config.valid_splits):
            metrics = self._evaluate(split)
            if i == 0 and metrics:
                self._note_best(metrics)
        progress.evaluated = progress.step

    def _note_best(self, metrics: dict[str, float]) -> None:
        name = self.config.monitor or self.task.monitor
        if name not in metrics:
            raise TrainingError(f"run.monitor: the evaluation gives no {name!r}{hint(name, metrics)}")
        value, best = metrics[name], self.progress.best
        sign = 1 if self.config.monitor_mode == "max" else -1
        if best is None or sign * value > sign * best:
            self.progress.best, self.progress.best_step = value, self.progress.step
            self.checkpoints.mark_best(self.progress.step)

    def _evaluate(self, split: str) -> dict[str, float]:
        """Scores of one split, the datasets' names in front where there are several; predictions are written first."""
        found: dict[str, float] = {}
        datasets = self.evaluations.get(split, [])
        for data in datasets:
            evaluation = self._evaluate_on(data)
            parts = dist.gather_objects(evaluation.predictions)
            name = f"{split}-{data.name}-step-{self.progress.step:08d}"
            self.tracker.predictions(name, [prediction for part in parts for prediction in part])
            prefix = f"{data.name}/" if len(datasets) > 1 else ""
            found |= {prefix + key: value for key, value in evaluation.metrics.items()}
        if found:
            self.tracker.metrics({"split": split, "step": self.progress.step, **found})
            shown = "  ".join(f"{k} {v:.2f}" for k, v in found.items())
            log.info("%s after step %d: %s", split, self.progress.step, shown)
        return found

    def _evaluate_on(self, data: Any) -> Any:
        context = EvalContext(self.parallel.device, self.config.batch_size_eval, self.parallel.autocast)
        self.model.eval()
        averaged = self.ema.averaged() if self.ema is not None else nullcontext()
        with averaged, torch.no_grad():
            evaluation = self.task.evaluate(self.model, data, context)
        self.model.train()
        return evaluation
