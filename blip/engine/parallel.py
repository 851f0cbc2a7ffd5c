"""Device, precision and gradient averaging: one process, or DDP under torchrun."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blip import dist
from blip.config.schema import RunConfig
from blip.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Parallel:
    """Where a run computes, in which precision, and how ranks share gradients.

    Raises:
        ConfigError: `run.device: cuda` without a GPU, or fp16 on a CPU.
    """

    def __init__(self, config: RunConfig) -> None:
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.deterministic = config.deterministic or self.device.type == "cpu"
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        elif self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward passes run in."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def wrap(self, model: Any) -> nn.Module:
        """The model as training calls it: DDP where there are several ranks.

        Looking for unused parameters keeps DDP from re-sorting its buckets after the first step, which
        would change the order of additions between a run and its continuation.
        """
        if dist.world_size() == 1:
            return model
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise ConfigError(
                "model.llm.device: with several processes each has one GPU for all its model; leave it null,"
                " or train with one process"
            )
        # The search is meant, and newer versions of torch have another word for `broadcast_buffers`.
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=self.deterministic or model.idle_parameters(),
            )

    def sync_grads(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Average gradients over the ranks with the last micro-batch only."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def average_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients that were accumulated outside DDP, in one flat collective.

        A parameter that no rank has a gradient for keeps none, as in one process: with zeros it would decay.
        """
        if dist.world_size() == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        used = dist.any_flags([parameter.grad is not None for parameter in trained], self.device)
        grads = []
        for parameter, anywhere in zip(trained, used, strict=True):
            if anywhere:
                # Every rank must contribute the same tensors, also where a rank had no use for one.
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                grads.append(parameter.grad)
        flat = dist.sum_tensor(torch.cat([g.flatten() for g in grads])) / dist.world_size()
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def clip_grads(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Global gradient norm before clipping, a scalar tensor; clips where `max_norm` is given."""
        grads = [p for p in parameters if p.grad is not None]
        return nn.utils.clip_grad_norm_(grads, max_norm if max_norm is not None else float("inf"))


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` to a device; each rank takes the GPU of its local rank."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "run.device: 'cuda' was asked for, but torch sees no GPU; use run.device=auto or cpu"
        )
    count = torch.cuda.device_count()
    if dist.local_rank() >= count:
        raise ConfigError(
            f"run.device: local rank {dist.local_rank()} has no GPU of its own, this node has {count}; start"
            " torchrun with --nproc-per-node no larger than that"
        )
    device = torch.device("cuda", dist.local_rank())
    torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` to bf16 where the GPU has it, else fp16, and fp32 on a CPU."""
    if name == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("run.precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return name
