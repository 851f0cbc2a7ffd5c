"""The loop: step, log, evaluate, save, stop. One runner for all tasks and models."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from blip import dist, keyed
from blip.batch import EvalContext, Output, to_device
from blip.config.schema import Config, RunConfig
from blip.engine.cached import cached_step
from blip.engine.checkpoint import Checkpoints, Stateful, load_model, read_part
from blip.engine.comparison import Comparison, as_values
from blip.engine.optim import Ema, Schedule, build_optimizer
from blip.engine.parallel import Parallel
from blip.engine.progress import Intake, Progress, Window
from blip.engine.report import write_report
from blip.engine.signals import StopSignals
from blip.engine.tracker import Tracker
from blip.errors import Stopped, TrainingError, hint
from blip.together import on_all, on_main

log = logging.getLogger(__name__)


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
        skips: counts of bad records, as `blip.data.skips.SkipLog` keeps them.
        comparison: what the last scores are held against.
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
        skips: Any | None = None,
        comparison: Comparison | None = None,
    ) -> None:
        self.config: Any = config.run
        self.model = model
        self.task = task
        self.parallel = parallel
        self.evaluations = evaluations
        self.tracker = tracker
        self.comparison = comparison or Comparison()
        self.progress = Progress()
        self.window = Window()
        self.intake = Intake()
        self.checkpoints = Checkpoints(tracker.folder, keep_last=self.config.keep_last)
        self.ema: Ema | None = None
        if loader is not None:
            self._prepare(loader, skips)
        self.trains = loader is not None

    def _prepare(self, loader: Any, skips: Any | None) -> None:
        """Optimizer, schedule and average; then the state of the checkpoint to continue from, if any."""
        self.loader = loader
        self.skips = skips
        self.total_steps = total_steps(self.config, loader.steps_per_epoch)
        self.optimizer = build_optimizer(self.model, self.config)
        self.schedule = Schedule(self.optimizer, self.config, self.total_steps, loader.steps_per_epoch)
        if self.config.ema_decay is not None:
            self.ema = Ema(self.model, self.config.ema_decay)
        found = self.checkpoints.find(self.config.resume)
        if found is not None:
            self.checkpoints.restore(found, self.model, self._stateful(), self._per_rank())
            if self.progress.best_step is not None:  # `best` may have named a newer one, which is gone
                self.checkpoints.mark_best(self.progress.best_step)
            log.info("continuing after step %d, from %s", self.progress.step, found)
        self.saved, self.saved_at = self.progress.step if found else -1, time.monotonic()
        # What the steps so far have frozen is no part of the state: the model is told again.
        if self.progress.step:
            self._tell(self.progress.step - 1)
        self.trained = self.parallel.wrap(self.model)
        self.model.train()

    def _stateful(self) -> dict[str, Stateful]:
        """What is the same on every rank."""
        parts: dict[str, Any] = {
            "progress": self.progress,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.parallel.scaler,
        }
        return parts | ({"ema": self.ema} if self.ema is not None else {})

    def _per_rank(self) -> dict[str, Stateful]:
        """What each rank has of its own, beside its random generators."""
        parts: dict[str, Any] = {"loader": self.loader, "window": self.window}
        return parts | ({"skips": self.skips} if self.skips is not None else {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.tracker.close()

    # The loop

    def run(self) -> dict[str, float]:
        """Train to the end, then score the test splits, export the model and write the report.

        Returns:
            The last scores.

        Raises:
            Stopped: a stop signal came; the state is saved.
            TrainingError: too many non-finite steps in a row.
        """
        if not self.trains:
            return self._finish()
        with StopSignals() as self.signals:
            self._train()
            return self._finish()

    def _train(self) -> None:
        candidates = self.config.batch_size_train * dist.world_size()
        if self.config.accum_mode == "cached":
            candidates *= self.config.accum_grad_iters
        self.tracker.begin(self.total_steps, self.progress.step, self.model.num_contrasted(candidates))
        steps = self.loader.steps()
        try:
            self._settle()
            while self.progress.step < self.total_steps:
                started = time.perf_counter()
                micro_batches: list[Any] = next(steps)
                waited = time.perf_counter() - started
                self.train_step(micro_batches)
                self._time(micro_batches, time.perf_counter() - started, waited)
                self._log_step()
                self._settle()
                self._judge_data()
            if self.intake.rows:
                log.info("%s", self.intake.text())
        finally:
            self.loader.close()

    def _time(self, micro_batches: list[dict[str, Any]], seconds: float, waited: float) -> None:
        busy, fetch_wait, fetched = self.loader.take_traffic()
        load = (busy / self.loader.num_workers, fetch_wait / self.loader.num_workers, fetched)
        self.window.time(sum(batch["batch_total"] for batch in micro_batches), seconds, waited)
        self.window.load(*load)
        self.intake.add(micro_batches, seconds, waited, load)

    def train_step(self, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One optimizer step. If any rank sees a non-finite gradient, no rank steps and the step is counted.

        Returns:
            Detached scalars of this rank: the losses over its micro-batches, `grad_norm`.
        """
        step = self.progress.step
        if self._tell(step):
            self.trained = self.parallel.wrap(self.model)
        batches = self.on_device(micro_batches)
        if self.config.accum_mode == "cached":
            seed = partial(self._seed, step)
            output = cached_step(
                self.model, batches, self.parallel.scaler.scale, self.parallel.autocast, seed
            )
            self.parallel.average_grads(self.model.parameters())
            outputs = [output]
        else:
            outputs = [self._micro_step(step, i, batch, len(batches)) for i, batch in enumerate(batches)]

        scaler = self.parallel.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = self.parallel.clip_grads(self.model.parameters(), self.config.max_grad_norm)
        finite = dist.all_true(torch.isfinite(grad_norm))
        figures = _means(outputs, batches) | {"grad_norm": grad_norm.detach().float()}
        if finite:
            scaler.step(self.optimizer)
            self.model.after_step(outputs)  # momentum twin, queues, temperature
            if self.ema is not None:
                self.ema.update()
            self.window.add(figures)
        overflow = scaler.is_enabled() and not finite and scaler.get_scale() > 1
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self._advance(finite, overflow, micro_batches)
        return figures

    def _tell(self, step: int) -> bool:
        """Tell the model which step is next; True if that froze a part, which the optimizer forgets."""
        if not self.model.on_step(step):
            return False
        for parameter in [p for p in self.optimizer.state if not p.requires_grad]:
            del self.optimizer.state[parameter]
        return True

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

    def on_device(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches on the device, with what the losses are divided by.

        Rows and tokens are counted over the whole step and all ranks, so that unequal micro-batches and
        ranks weigh by what they hold; each is the mean per micro-batch and rank, because those means are
        averaged afterwards.
        """
        keys = {"step": self.progress.step, "seed": self.config.seed}
        micro_batches = [self.model.prepare({**batch, **keys}) for batch in micro_batches]
        shares = dist.world_size() * (1 if self.config.accum_mode == "cached" else len(micro_batches))
        rows = sum(batch["batch_total"] for batch in micro_batches)
        targets = [self.model.count_targets(batch) for batch in micro_batches]
        device = self.parallel.device
        tokens = dist.sum_tensor(torch.tensor(float(sum(targets)), device=device))
        batches = []
        for i, batch in enumerate(micro_batches):
            moved = to_device(batch, device)
            moved.update(
                iters=self.progress.step % self.loader.steps_per_epoch,
                num_iters_per_epoch=self.loader.steps_per_epoch,
                loss_rows=rows / shares,
                loss_tokens=tokens / shares,
                num_targets=targets[i],
            )
            batches.append(moved)
        return batches

    def _advance(self, finite: bool, overflow: bool, micro_batches: list[dict[str, Any]]) -> None:
        progress = self.progress
        progress.step += 1
        progress.epoch = micro_batches[-1]["epoch"]
        progress.samples += sum(batch["batch_total"] for batch in micro_batches)
        if finite:
            progress.skipped_in_row = 0
            return
        progress.skipped += 1
        if overflow:  # of fp16, whose scale has just been halved: that is how it finds the right one
            return
        progress.skipped_in_row += 1
        names = dist.gather_lists(name for batch in micro_batches for name in batch.get("instance_id", []))
        log.warning("step %d: a gradient is not finite; the step is skipped", progress.step)
        self.tracker.event("nonfinite", step=progress.step, samples=names)
        if progress.skipped_in_row >= self.config.max_nonfinite:
            raise TrainingError(
                f"run.max_nonfinite: {progress.skipped_in_row} steps in a row had non-finite gradients, the"
                f" last with the samples {', '.join(names[:8])}; lower run.init_lr, set run.max_grad_norm or"
                " run.precision=fp32, or look at those samples"
            )

    def _log_step(self) -> None:
        progress = self.progress
        self.tracker.step(progress.step)
        if progress.step % self.config.log_freq and progress.step < self.total_steps:
            return
        line: dict[str, Any] = {"split": "train", "step": progress.step, "epoch": progress.epoch}
        means = self.window.means()
        line |= dict(sorted(means.items(), key=_losses_first)) | {"lr": self.schedule.last_lr}
        if progress.skipped:
            line["skipped"] = progress.skipped
        self.tracker.metrics(line | self.window.rates())
        self.window.clear()

    def _judge_data(self) -> None:
        """Stop where too much of the data cannot be read: where figures are logged, and at the end."""
        due = self.progress.step % self.config.log_freq == 0 or self.progress.step >= self.total_steps
        if due and self.skips is not None:
            self.skips.judge()

    # Between steps: evaluate, save, stop

    def _settle(self) -> None:
        """What is due at this step: first a checkpoint, then an evaluation, then a stop that was asked for.

        The checkpoint comes first, so that a run killed during an evaluation loses nothing: the continued
        run finds that this step has not been evaluated and does it.
        """
        progress = self.progress
        flags = [self.signals.received is not None, self._minutes_due()]
        stop, late = dist.any_flags(flags, self.parallel.device)
        evaluate = self._evaluation_due() and progress.evaluated != progress.step
        due = stop or late or evaluate or self._save_due() or progress.step >= self.total_steps
        if due and progress.step and self.saved != progress.step:
            self._save()
        if stop:
            self._stop()
        if evaluate:
            self._validate()

    def _stop(self) -> NoReturn:
        cause = self.signals.received or "a signal on another rank"
        raise Stopped(
            f"stopped by {cause} after step {self.progress.step}; continue with run.resume=auto"
            f" run.output_dir={self.tracker.folder}"
        )

    def _save(self) -> None:
        self.checkpoints.save(self.progress.step, self.model, self._stateful(), self._per_rank())
        self.saved, self.saved_at = self.progress.step, time.monotonic()

    def _save_due(self) -> bool:
        every = self.config.save_freq
        return every is not None and self.progress.step % every == 0

    def _minutes_due(self) -> bool:
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def _evaluation_due(self) -> bool:
        splits = self.config.valid_splits
        if not self.progress.step or not any(self.evaluations.get(split) for split in splits):
            return False
        every = self.config.eval_freq or self.config.val_freq * self.loader.steps_per_epoch
        return self.progress.step % every == 0 or self.progress.step >= self.total_steps

    def _validate(self) -> None:
        """Evaluate the valid splits; the first one's monitored metric decides the best checkpoint."""
        progress = self.progress
        for i, split in enumerate(self.config.valid_splits):
            metrics = self._evaluate(split, progress.step)
            if i == 0 and metrics:
                self._note_best(metrics)
        progress.evaluated = progress.step

    def _note_best(self, metrics: dict[str, float]) -> None:
        default = [key for key in metrics if key.split("/")[-1] == self.task.monitor]  # of the first dataset
        name = self.config.monitor or (default or [self.task.monitor])[0]
        if name not in metrics:
            raise TrainingError(f"run.monitor: the evaluation gives no {name!r}{hint(name, metrics)}")
        value, best = metrics[name], self.progress.best
        sign = 1 if self.config.monitor_mode == "max" else -1
        if best is None or sign * value > sign * best:
            self.progress.best, self.progress.best_step = value, self.progress.step
            self.checkpoints.mark_best(self.progress.step)

    # Evaluation

    def _evaluate(
        self, split: str, step: int, parts: dict[str, dict[str, float]] | None = None
    ) -> dict[str, float]:
        """Scores of one split, under the datasets' names where there are several; predictions come first.

        Args:
            parts: takes the scores of each DATASET/SPLIT.
        """
        found: dict[str, float] = {}
        datasets = self.evaluations.get(split, [])
        for data in datasets:
            evaluation = self.evaluate_on(data)
            predictions = dist.gather_lists(evaluation.predictions)
            name = f"{split}-{data.name}-step-{step:08d}"
            self.tracker.predictions(name, predictions)
            if (content := self.task.submission(data, predictions)) is not None:
                self.tracker.submission(name, content)
            prefix = f"{data.name}/" if len(datasets) > 1 else ""
            metrics = evaluation.metrics()
            found |= {prefix + key: value for key, value in metrics.items()}
            if parts is not None:
                parts[f"{data.name}/{split}"] = metrics
        if found:
            self.tracker.metrics({"split": split, "step": step, **found})
            shown = "  ".join(f"{k} {v:.2f}" for k, v in found.items())
            log.info("%s after step %d: %s", split, step, shown)
        return found

    def evaluate_on(self, data: Any) -> Any:
        """What the task finds on one dataset, in eval mode and with averaged weights where there are any."""
        context = EvalContext(self.parallel.device, self.config.batch_size_eval, self.parallel.autocast)
        self.model.eval()
        with self._averaged(), torch.no_grad():
            evaluation = self.task.evaluate(self.model, data, context)
        self.model.train(self.trains)
        return evaluation

    def _averaged(self) -> AbstractContextManager[None]:
        return self.ema.averaged() if self.ema is not None else nullcontext()

    def _finish(self) -> dict[str, float]:
        """Export the best weights, score the test splits with them, and write the report.

        The export comes first, so that a metric that fails in the end costs no more than itself.
        """
        step = self._take_best() if self.trains else self.progress.step
        scores: dict[str, float] = {}
        if self.trains:
            with self._averaged():
                on_main(lambda: self.model.save_pretrained(self.tracker.model_folder))
        parts: dict[str, dict[str, float]] = {}
        for split in self._final_splits():
            asked = self.trains and self.signals.received is not None
            if any(dist.any_flags([asked], self.parallel.device)):
                self._stop()
            scores = self._evaluate(split, step, parts) or scores
        self.tracker.published(as_values(self.comparison.against(parts)))
        on_main(lambda: write_report(self.tracker.folder))
        return scores

    def _final_splits(self) -> list[str]:
        if self.trains or any(self.evaluations.get(split) for split in self.config.test_splits):
            return self.config.test_splits
        return self.config.valid_splits

    def _take_best(self) -> int:
        """Put the best checkpoint's weights into the model; returns its step."""
        best = self.checkpoints.best
        if best is None or self.progress.best_step in (None, self.progress.step):
            return self.progress.step
        log.info("the best checkpoint is that of step %d", self.progress.best_step)
        on_all(lambda: load_model(best, self.model, exact=True))
        if self.ema is not None:
            self.ema.load_state_dict(read_part(best, "ema"))
        return int(self.progress.best_step or 0)


def _means(outputs: list[Output], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Figures of this rank, whose mean over the ranks is that over the step's rows.

    Losses are divided by the step's rows or tokens already; other figures are means over a micro-batch's own
    rows, which may be fewer in the last one of an epoch, or in cached mode over all micro-batches.
    """
    rows = [len(batch["rows"]) for batch in batches]
    counts = rows if len(outputs) == len(rows) else [sum(rows)]
    shares = [count / batches[0]["loss_rows"] for count in counts]
    scalars = [output.scalars() for output in outputs]
    return {
        name: torch.stack(
            [
                some[name].float() * (1 if name.startswith("loss") else share)
                for some, share in zip(scalars, shares, strict=True)
            ]
        ).mean()
        for name in scalars[0]
    }


def _losses_first(item: tuple[str, float]) -> int:
    return 0 if item[0] == "loss" else 1 if item[0].startswith("loss") else 2


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `max_epoch` or `max_iters`, whichever ends first."""
    limits = [config.max_iters, config.max_epoch and config.max_epoch * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)
