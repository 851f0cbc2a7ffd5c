"""Parameter groups, learning-rate schedules per optimizer step, and a moving average of the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from blip.config.schema import RunConfig
from blip.errors import CheckpointError, ConfigError, TrainingError, hint

log = logging.getLogger(__name__)

NO_DECAY = frozenset(
    {"bias", "temp", "logit_scale", "query_tokens", "cls_token", "reg_token", "dist_token", "mask_token"}
    | {"pos_embed", "position", "position_embedding", "position_embeddings", "positional_embedding"}
    | {"class_embedding"}
)
"""Parts of a dotted parameter name that exempt it from weight decay."""


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter gets weight decay.

    Matrices and convolution kernels do. Exempt are scalars and vectors (temperature, biases, norms, layer
    scales) and whatever `NO_DECAY` names: learned queries, class tokens, position embeddings. LAVIS decays
    the scalar temperature and the queries too.
    """
    return parameter.ndim >= 2 and NO_DECAY.isdisjoint(name.split("."))


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that train now; those frozen from the start are left out.

    Groups differ in weight decay and in `lr_scale`, which `Schedule` multiplies every rate by; they and the
    parameters in them are ordered by name, so a checkpoint fits whatever order a model was built in. The
    scale of a parameter is `model.lr_scale(name, lr_layer_decay)` times its factor of `lr_scales`.

    Raises:
        TrainingError: the model has no trainable parameter.
        ConfigError: `lr_scales` names none that trains.
    """
    lr_scale: Callable[[str, float], float] | None = getattr(model, "lr_scale", None)
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    of_parts = _Scales(config.lr_scales)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            scale = of_parts(name)
            if lr_scale and config.lr_layer_decay != 1.0:
                scale *= lr_scale(name, config.lr_layer_decay)
            groups.setdefault((scale, decays(name, parameter)), []).append((name, parameter))
    if not groups:
        raise TrainingError(
            "the model has no trainable parameter; unfreeze a part of it, or set run.evaluate: true"
        )
    of_parts.check(sorted({name.split(".")[0] for members in groups.values() for name, _ in members}))
    kinds = {parameter.device.type for group in groups.values() for _, parameter in group}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": members,
                "lr": config.init_lr * scale,
                "lr_scale": scale,
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for (scale, decay), members in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=config.init_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        # One kernel for all tensors where torch has it, else a few per operation.
        **({"fused": True} if len(kinds) == 1 and kinds <= {"cuda", "cpu"} else {"foreach": True}),
    )
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


class _Scales:
    """Factors of `run.lr_scales`: that of the longest beginning of a name, in whole parts; `*` is any."""

    def __init__(self, factors: Mapping[str, float]) -> None:
        self.factors = dict(sorted(factors.items(), key=lambda item: -len(item[0])))
        self.unused = set(factors)

    def __call__(self, name: str) -> float:
        for part, factor in self.factors.items():
            if fnmatchcase(f"{name}.", f"{part}.*"):
                self.unused.discard(part)
                return factor
        return 1.0

    def check(self, parts: list[str]) -> None:
        """Raise ConfigError where a factor is of nothing."""
        for part in sorted(self.unused):
            raise ConfigError(
                f"run.lr_scales.{part}: no parameter that trains has a name that begins so{hint(part, parts)}"
            )


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The moments of a saved state with the settings of this run; torch would restore the old ones."""
    saved, current = state["param_groups"], optimizer.param_groups
    old, new = _names(saved), _names(current)
    if sorted(old) != sorted(new):
        only = sorted(set(old) ^ set(new))
        raise CheckpointError(
            f"the checkpoint's optimizer trained {len(old)} parameters, this run {len(new)} (first that"
            f" differs: {only[0]}); resume with the same model and freezing, or start from its weights with"
            " model.init_from"
        )
    # Groups may be cut differently, say by another layer decay: moments follow the names.
    numbers = dict(zip(old, (number for group in saved for number in group["params"]), strict=True))
    groups = []
    for group in current:
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append(settings | {"params": [numbers[name] for name in group["param_names"]]})
    return {"state": state["state"], "param_groups": groups}


def _names(groups: list[dict[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["param_names"]]


class Schedule:
    """The learning rate of every optimizer step: linear warm-up, then cosine, steps per epoch, or constant.

    Warm-up counts optimizer steps across epochs and reaches `init_lr` after `warmup_steps`; cosine ends at
    exactly `min_lr` in the last step. A group's rate is this one times its `lr_scale`.

    With `lr_per_epoch` the rates are LAVIS's: warm-up in the first epoch only and cut off at its end, then
    one rate per epoch, which for cosine never reaches `min_lr`.

    Args:
        optimizer: gets its rates set, at once and by `step`.
        config: `lr_sched`, `lr_per_epoch`, `init_lr`, `min_lr`, `warmup_lr`, `warmup_steps`, `lr_decay_rate`.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one epoch.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: RunConfig, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.optimizer = optimizer
        self.config = config
        self.total_steps = total_steps
        self.steps_per_epoch = max(steps_per_epoch, 1)
        self.num_steps = 0
        if 0 < total_steps <= config.warmup_steps and not config.lr_per_epoch:
            log.warning(
                "run.warmup_steps: the warm-up of %d steps is not over when the run ends after %d",
                config.warmup_steps,
                total_steps,
            )
        self._apply()

    @property
    def lr(self) -> float:
        """Rate of the coming step, before any group's `lr_scale`."""
        return self.at(self.num_steps)

    @property
    def last_lr(self) -> float:
        """Rate of the step that was taken last."""
        return self.at(max(self.num_steps - 1, 0))

    def at(self, step: int) -> float:
        """Rate of optimizer step `step`, counted from 0."""
        if self.config.lr_per_epoch:
            return self._staircase(step)
        ramp = self._ramp(step)
        if self.config.lr_sched == "linear_warmup_cosine_lr":
            return self._cosine(step) if step >= self.config.warmup_steps else ramp
        return min(ramp, self._by_epoch(step // self.steps_per_epoch))

    def step(self) -> None:
        """Go on to the next optimizer step."""
        self.num_steps += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken; everything else follows from the configuration."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.num_steps = int(state["num_steps"])
        self._apply()

    def _apply(self) -> None:
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def _ramp(self, step: int) -> float:
        config = self.config
        if not config.warmup_steps:
            return config.init_lr
        climbed = config.warmup_lr + (config.init_lr - config.warmup_lr) * step / config.warmup_steps
        return min(config.init_lr, climbed)

    def _cosine(self, step: int) -> float:
        config = self.config
        last = self.total_steps - 1
        progress = (step - config.warmup_steps) / max(last - config.warmup_steps, 1)
        return _cosine(config, min(progress, 1.0))

    def _by_epoch(self, epoch: int) -> float:
        config = self.config
        if config.lr_sched == "constant_lr":
            return config.init_lr
        return max(config.min_lr, config.init_lr * config.lr_decay_rate**epoch)

    def _staircase(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        if epoch == 0:
            return self._ramp(step)
        if self.config.lr_sched != "linear_warmup_cosine_lr":
            return self._by_epoch(epoch)
        epochs = self.config.max_epoch or math.ceil(self.total_steps / self.steps_per_epoch)
        return _cosine(self.config, epoch / epochs)


def _cosine(config: RunConfig, progress: float) -> float:
    return (config.init_lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)) + config.min_lr


class Ema:
    """An exponential moving average of the weights that train.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that a short run's average is not
    made of its random start. A parameter that is frozen on the way leaves the average: what trains after that
    sees its real value.

    Args:
        model: unwrapped; buffers are not averaged.
        decay: weight of the past in each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
        self._averages = {n: p.detach().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call after each step that changed them."""
        for name in [n for n in self._averages if not self._parameters[n].requires_grad]:
            del self._averages[name]
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        if self._averages:
            present = [self._parameters[n].detach() for n in self._averages]
            torch._foreach_lerp_(list(self._averages.values()), present, weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model has the averaged weights; the present ones return bit for bit."""
        present = {n: self._parameters[n].detach().clone() for n in self._averages}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(present)

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, and the number of updates."""
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the averages; parameters that `state` lacks had been frozen by then.

        Raises:
            CheckpointError: `state` averages a parameter that this model does not train.
        """
        saved: Mapping[str, Tensor] = state["averages"]
        shapes = {n: p.shape for n, p in self._parameters.items()}
        foreign = [n for n, t in saved.items() if shapes.get(n) != t.shape]
        if foreign:
            raise CheckpointError(
                f"the checkpoint's moving average has {len(foreign)} weights that this model has not in"
                f" that shape, or frozen (first: {foreign[0]}); resume with the same model and freezing"
            )
        self.num_updates = int(state["num_updates"])
        self._averages = {n: t.to(self._parameters[n], copy=True) for n, t in saved.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)
