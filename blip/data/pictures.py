"""Which records show the same picture."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from blip.data.readers import Record


def number_pictures(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """Consecutive numbers for equal keys, in order of appearance.

    Args:
        keys: uint64 (n,).

    Returns:
        int64 (n,), and how many different keys there are.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse], len(first)


def picture_key(record: Record, number: int, root: str) -> int:
    """Equal for records of the same picture: by `image_id`, else by path; without either it is alone."""
    if (image_id := record.get("image_id")) not in (None, ""):  # a table has empty fields
        return hashed(f"id {image_id}")
    image, images, video = record.get("image"), record.get("images"), record.get("video")
    if image is None and isinstance(video, list | str):
        return hashed(f"video {root} {video}")
    if isinstance(images, list):
        return hashed(f"images {root} {images}")
    if not isinstance(image, str):
        return hashed(f"record {number}")
    return hashed(f"image {image}" if image.startswith(os.sep) else f"image {root}{os.sep}{image}")


def hashed(text: str) -> int:
    """A 64-bit key of a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
