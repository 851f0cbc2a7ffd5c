"""Keyed randomness: a random value is a function of named integers, never of what was drawn before.

So augmentations, negatives, orders and dropout do not depend on the number of workers or ranks, nor on
where a run was interrupted.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def key(*parts: int | str) -> int:
    """A 64-bit key of `parts`; equal parts give equal keys on every machine."""
    text = "\x1f".join(f"{type(p).__name__[0]}{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator that is a function of `parts` alone."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of `range(size)`, int64, that is a function of `parts` alone."""
    return generator(*parts).permutation(size)


def seed_torch(*parts: int | str) -> None:
    """Seed torch's default generators (CPU and GPU) with `parts`; what dropout draws follows from it."""
    torch.manual_seed(key(*parts) >> 1)


def uniform(rows: Tensor, *parts: int | str) -> Tensor:
    """One number in [0, 1) per row, on the device of `rows`, a function of `parts` and the row alone.

    Args:
        rows: int64 (B,), for example rows of the global batch.

    Returns:
        float64 (B,), with 53 random bits each (splitmix64 finalizer).
    """
    # int64 arithmetic wraps like uint64; logical shifts need the sign bits masked off.
    z = rows * _signed(0x9E3779B97F4A7C15) + _signed(key(*parts))
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return _shift(z, 11).to(torch.float64) * 2.0**-53


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)
