"""What travels between data, models and tasks: the batch, the output, and the way to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils import _pytree


class Batch(TypedDict, total=False):
    """One (micro-)batch; LAVIS's keys, all optional. B rows on this rank, N on all ranks together."""

    image: Tensor
    """(B, 3, H, W): uint8 as the loader makes it, or float, already normalised; of videos (B, F, 3, H, W)."""
    image0: Tensor
    """The same of the first of two pictures."""
    image1: Tensor
    """The same of the second."""
    image_norm: Tensor
    """float32 (B, 2, 3): mean and std in units of [0, 1], with uint8 images only."""
    image_embeds: Tensor
    """(B, P, D) states of the frozen vision tower, in place of `image`."""
    image0_embeds: Tensor
    """The same in place of `image0`."""
    image1_embeds: Tensor
    """The same in place of `image1`."""
    text_input: list[str]
    """B texts, cleaned by the text processor."""
    text_ids: Tensor
    """int64 (B, T): token ids of `text_input`, padded to the longest of the batch."""
    text_mask: Tensor
    """bool (B, T): True = real token."""
    answer: list[str]
    """A answers to the B questions in `text_input`, flat."""
    answer_ids: Tensor
    """int64 (A, T): token ids of `answer`."""
    answer_mask: Tensor
    """bool (A, T): True = real token."""
    weight: Tensor
    """float32 (A,): share of each answer in the loss of its question."""
    n_answers: Tensor
    """int64 (B,): answers of each question, which sum to A."""
    label: Tensor
    """int64 (B,): numbers of classes."""
    image_id: Tensor
    """int64 (B,): equal numbers mean the same picture."""
    instance_id: list[str]
    """B names of records, for reports and predictions."""
    rows: Tensor
    """int64 (B,): row of each sample in the global batch of the optimizer step."""
    batch_total: int
    """N, rows of this micro-batch on all ranks; they are split as `dist.slices` says."""
    index: Tensor
    """int64 (B,): places of the samples in the evaluated dataset (evaluation only)."""
    epoch: int
    step: int
    """Optimizer step that this micro-batch is for, from 0: the number of steps done before."""
    micro_batch: int
    """Its number within that step."""
    num_micro_batches: int
    """Micro-batches of that step."""
    source: str
    """Name of the dataset that it was drawn from."""
    position: dict[str, Any]
    """State of the loader behind this micro-batch."""
    iters: int
    """Number of optimizer steps done in this epoch before this one."""
    num_iters_per_epoch: int
    seed: int
    loss_rows: float
    """What sums over rows are divided by: rows of the whole step, per rank and averaged micro-batch."""
    loss_tokens: Tensor
    """The same of target tokens, a scalar."""
    num_targets: int | None
    """Target tokens of the local rows, where the host knows them."""


class Output(dict[str, Any]):
    """Result of a model's `forward`: a dictionary that also answers to attributes.

    `loss` is the scalar to differentiate; `loss_itc`, ... are its parts; `itc_acc`, ... detached figures.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"output has no {name!r}; it has {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def scalars(self) -> dict[str, Tensor]:
        """The scalar tensors, detached: what the log shows."""
        return {k: v.detach() for k, v in self.items() if isinstance(v, Tensor) and v.ndim == 0}


FEATURES = ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds")
"""What LAVIS's `extract_features` names."""


class FeatureOutput(Output):
    """Result of `extract_features`; what the mode does not give is None as an attribute, and no key."""

    def __getattr__(self, name: str) -> Any:
        return None if name in FEATURES and name not in self else super().__getattr__(name)


@dataclass
class EvalContext:
    """What an evaluation may use beside model and data."""

    device: torch.device
    batch_size: int
    autocast: Callable[[], AbstractContextManager[Any]]
    """Makes the context that forward passes run in."""


def _flatten(output: Output) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


def _unflatten(values: Iterable[Any], keys: list[str]) -> Output:
    return Output(zip(keys, values, strict=True))


# torch takes an unregistered dict subclass for a single leaf, and DDP would miss the tensors inside.
_pytree.register_pytree_node(Output, _flatten, _unflatten, serialized_type_name="blip.batch.Output")


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; uint8 images travel as bytes and are normalised there."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    pictures = {k: moved[k] for k in ("image", "image0", "image1") if k in moved}
    stored = {k: image for k, image in pictures.items() if image.dtype == torch.uint8}
    if stored:
        norm = moved.pop("image_norm")
        moved |= {k: normalize(image, norm) for k, image in stored.items()}
    return moved


def normalize(image: Tensor, image_norm: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) or (B, F, 3, H, W) to float32, by mean and std (B, 2, 3) in units of [0, 1]."""
    mean, std = image_norm[:, 0, :, None, None], image_norm[:, 1, :, None, None]
    if image.ndim == 5:
        mean, std = mean[:, None], std[:, None]
    return (image.to(torch.float32) / 255 - mean) / std
