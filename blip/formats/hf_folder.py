"""Folders as transformers writes them: weights in shards, configuration, processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip.errors import CheckpointError, ConfigError
from blip.formats.hf_config import theirs_of
from blip.formats.hf_llm import image_row, one_epsilon
from blip.meta import on_meta
from blip.weights import save_shards, some


class Picture(NamedTuple):
    """What becomes of a picture before the tower sees it."""

    size: int
    mean: list[float]
    std: list[float]


class _ForThem(Mapping[str, Tensor]):
    """Weights as their class stores them: names that share a tensor once, a row for the image token.

    Args:
        theirs: their model, without memory.
        state: weights in its layout.

    Raises:
        CheckpointError: a name is missing or unexpected.
    """

    def __init__(self, theirs: Any, state: Mapping[str, Tensor]) -> None:
        self._theirs, self._state, self._wanted = theirs, state, theirs.state_dict()
        first: dict[int, str] = {}
        self.tied: dict[str, str] = {}
        for name, parameter in theirs.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(parameter), name)
            if other != name and name in state and other in state:
                self.tied[name] = other
        missing = [n for n in self._wanted if n not in state and first.get(id(self._wanted[n])) is None]
        missing = [n for n in missing if n not in self.tied]
        extra = [n for n in state if n not in self._wanted]
        if missing or extra:
            raise CheckpointError(
                f"{type(theirs).__name__}: {len(missing)} tensors are missing ({some(missing)}), {len(extra)}"
                f" have no place ({some(extra)})"
            )

    def __getitem__(self, name: str) -> Tensor:
        return image_row(self._theirs, self._wanted[name], self._state[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._state if name not in self.tied)

    def __len__(self) -> int:
        return len(self._state) - len(self.tied)


def write_folder(
    arch: str,
    model: Any,
    state: Mapping[str, Tensor],
    folder: Path,
    shard_bytes: int,
    release: Callable[[], None],
    picture: Picture,
) -> tuple[list[Path], list[str]]:
    """Write what `from_pretrained` of transformers reads.

    Args:
        arch: registry name of `model`.
        model: `BlipModel` of these weights; its own values are not looked at.
        state: weights in transformers' layout, each made when it is asked for.
        folder: must exist.
        shard_bytes, release: as of `save_shards`.
        picture: what becomes of pictures.

    Returns:
        The files of the weights, and what could not be written beside them.

    Raises:
        UsageError: transformers has no such model.
        CheckpointError: a tensor is missing or has no place there, or a file cannot be written.
    """
    with on_meta():
        theirs = theirs_of(arch, model)
    _untie(theirs, state)
    files = save_shards(_ForThem(theirs, state), folder, shard_bytes, release)
    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.dtype = torch.float32  # whatever the parts are stored in
    theirs.config.save_pretrained(folder)
    if theirs.can_generate():
        theirs.generation_config.save_pretrained(folder)
    lost = [note for note in [one_epsilon(model)] if note]
    return files, [*lost, *_write_processor(model, folder, picture)]


def _untie(theirs: Any, state: Mapping[str, Tensor]) -> None:
    """Take names apart that share a parameter there, but have values of their own here."""
    first: dict[int, str] = {}
    for name, parameter in list(theirs.named_parameters(remove_duplicate=False)):
        other = first.setdefault(id(parameter), name)
        if other == name or name not in state or other not in state:
            continue
        if not torch.equal(state[name], state[other]):
            owner, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(owner), leaf, nn.Parameter(torch.empty_like(parameter)))
            theirs.config.text_config.tie_word_embeddings = False


def _write_processor(model: Any, folder: Path, picture: Picture) -> list[str]:
    """What turns pictures and texts into their model's input; returns what could not be written, and why."""
    from transformers import Blip2Processor, BlipImageProcessor, BlipProcessor, InstructBlipProcessor

    side = {"height": picture.size, "width": picture.size}
    images = BlipImageProcessor(size=side, image_mean=picture.mean, image_std=picture.std)
    llm = getattr(model, "llm", None)
    try:
        pieces = None if llm is not None and not model.config.qformer_text_input else _pieces(model)
        if llm is None:
            made: Any = BlipProcessor(images, pieces)
        elif pieces is None:
            made = Blip2Processor(images, llm.tokenizer.as_theirs(), model.config.num_query_token)
        else:
            words = llm.tokenizer.as_theirs()
            made = InstructBlipProcessor(images, words, pieces, model.config.num_query_token)
        made.save_pretrained(folder)
    except ConfigError as error:
        images.save_pretrained(folder)
        return [f"no tokenizer was written: {error}"]
    return []


def _pieces(model: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=model.word_pieces.as_theirs(), **names)
