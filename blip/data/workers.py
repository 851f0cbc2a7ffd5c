"""What loader processes make, in order; or the same, made in this process."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from blip.errors import BlipError


class Failure(NamedTuple):
    """An error on its way to the main process, without the traceback that torch would add to its message."""

    kind: type[BlipError]
    message: str


class PartStream:
    """An iterator over what `parts` gives, read by processes that live as long as it does.

    Global random generators of this process are neither read nor advanced.

    Args:
        parts: an IterableDataset, which every worker iterates for itself, worker 0 first in each round; or a
            Dataset, of which `keys` are read.
        num_workers: processes; 0 reads in this one.
        keys: what `parts[key]` is asked for.
        prefetch: items that each worker is ahead.
    """

    def __init__(
        self, parts: Dataset, num_workers: int, keys: Sequence[Any] | None = None, prefetch: int = 2
    ) -> None:
        self._stream: Iterator[Any] | None
        if num_workers:
            self._stream = _start(parts, num_workers, keys, prefetch)
        elif isinstance(parts, IterableDataset):
            self._stream = iter(parts)
        else:
            self._stream = map(parts.__getitem__, keys or [])
        _LIVE.add(self)

    def __iter__(self) -> PartStream:
        return self

    def __next__(self) -> Any:
        if self._stream is None:
            raise StopIteration
        value = next(self._stream)
        if isinstance(value, Failure):
            self.close()
            raise value.kind(value.message)
        return value

    def close(self) -> None:
        """Stop the workers."""
        # The last reference to torch's iterator: its deletion stops them.
        self._stream = None


_LIVE: weakref.WeakSet[PartStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # multiprocessing ends its children at exit by SIGTERM, which ours ignore; so they are told before.
    for stream in list(_LIVE):
        stream.close()


def _start(parts: Dataset, num_workers: int, keys: Sequence[Any] | None, prefetch: int) -> Iterator[Any]:
    with _one_tokenizer_thread():
        return iter(
            DataLoader(
                parts,
                batch_size=None,
                sampler=keys,
                num_workers=num_workers,
                prefetch_factor=prefetch,
                collate_fn=_as_is,
                worker_init_fn=_quiet,
                generator=torch.Generator().manual_seed(0),
                # Children share the memory of the annotations, and `parts` need not be picklable.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
            )
        )


@contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    """Processes forked here do not use threads in the Rust tokenizer, and do not warn that they cannot."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _as_is(value: Any) -> Any:
    return value


def _quiet(worker: int) -> None:
    # Schedulers and Ctrl-C signal the whole process group; the training process decides when to stop.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
