"""One file of weights, or the index of several."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from blip.errors import CheckpointError
from blip.stored.files import MOST_AXES, MOST_NAME, inside, read_json, shown, size_of
from blip.stored.safetensors_files import read_safetensors
from blip.stored.torch_files import read_torch

ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
_INDEX = "index of weight files"


def shards(index: Path) -> dict[str, Path]:
    """Name of a tensor -> the file that holds it, by an index.

    Raises:
        CheckpointError: it is none, or names what is no weight file beside it.
    """
    try:
        places = {str(name): str(file) for name, file in read_json(index, _INDEX)["weight_map"].items()}
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is no {_INDEX}: it has no weight_map") from error
    for file in sorted(set(places.values())):
        # The index may come from anywhere; it must not lead out of its folder.
        if Path(file).name != file or not file.endswith(ENDINGS) or not file.isprintable():
            raise CheckpointError(f"'{index}': shard '{shown(file)}' is no weight file beside the index")
        if not _is_file(index.parent / file):
            raise CheckpointError(
                f"'{index}': shard '{shown(file)}' is missing; fetch it, {len(places)} tensors are listed"
            )
        inside(index.parent / file)
    return {name: index.parent / file for name, file in places.items()}


def _is_file(path: Path) -> bool:
    """Whether a regular file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_file(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one file, and whether they are mapped into memory.

    Raises:
        CheckpointError: missing, empty, truncated, of no known format, or holding Python objects.
    """
    size = size_of(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}") from error
    if not size:
        raise CheckpointError(f"'{path}' is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{path}' is a git-lfs pointer, not the weights; run 'git lfs pull' in its repository"
        )
    mapped = path.suffix == ".safetensors" or head.startswith(b"PK")
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path, size)
    else:
        tensors = read_torch(path, size, archive=mapped)
    for name, tensor in tensors.items():
        if len(name) > MOST_NAME or not name.isprintable():
            raise CheckpointError(f"'{path}' has a tensor whose name is none: '{shown(name)}'; use another")
        if tensor.ndim > MOST_AXES:
            raise CheckpointError(f"'{path}': {name} has {tensor.ndim} dimensions; use another")
    return tensors, mapped
