"""A dataset section -> what makes its samples: the processors that it names, or those that suit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from blip.config.schema import DatasetConfig
from blip.data.instruct import InstructMaker
from blip.data.kinds import KINDS, LabelMaker, PairMaker, QuestionMaker
from blip.data.samples import SampleMaker, has_torchcodec
from blip.errors import ConfigError, hint
from blip.registry import PROCESSORS


@dataclass(frozen=True)
class Defaults:
    """What samples are like where a section names no processor; a model tells what suits it."""

    image_size: int | None = None
    """Side of the pictures; None: image processors have to be named."""
    train: str = "blip2_image_train"
    """Image processor of training."""
    eval: str = "blip_image_eval"
    """Image processor of evaluation."""
    prompt: str = ""
    """What captions to train on begin with."""


NAMED = Defaults()
"""Image processors have to be named."""


def make_maker(
    name: str,
    config: DatasetConfig,
    stage: str,
    defaults: Defaults = NAMED,
    kind: str = "caption",
    classes: Sequence[str] = (),
    video: bool = False,
) -> SampleMaker:
    """What makes the samples of a section, with its processors for `train` or `eval`.

    A missing `eval` image processor follows from that of training: the same size and normalisation, nothing
    random. Text processors are not random, so either stands in for the other, and that of the kind for both;
    captions to train on then begin with the default prompt.

    Args:
        name: of the section.
        config: the section.
        stage: `train` or `eval`.
        defaults: what holds where the section names no processor.
        kind: of the records, a key of `kinds.KINDS`.
        classes: names of the classes, of kinds with labels.
        video: whether records show videos, where no processor tells.

    Raises:
        ConfigError: unknown processor or option, or no image processor for training.
    """
    vis = _image_processor(f"datasets.{name}.vis_processor", config.vis_processor, stage, defaults, video)
    texts, train = config.text_processor, stage == "train"
    own = {"name": KINDS[kind].text_processor}
    if kind == "caption" and train and not config.prompt:
        own |= {"prompt": defaults.prompt} if defaults.prompt else {}
    entry = texts.get(stage) or next(iter(texts.values()), own)
    text = make_processor(entry, f"datasets.{name}.text_processor.{stage}", images=False)
    if config.decoder == "torchcodec" and not has_torchcodec():
        raise ConfigError(
            f"datasets.{name}.decoder: torchcodec is not installed, or too old for pictures; 'pip install"
            " torchcodec', or use pil"
        )
    maker = _maker_of(kind, config, vis, text, classes, train)
    if config.decoder == "torchcodec" and maker.of_videos:
        raise ConfigError(f"datasets.{name}.decoder: it is for pictures; leave it out for videos")
    maker.decoder = config.decoder
    return maker


def _maker_of(
    kind: str, config: DatasetConfig, vis: Any, text: Any, classes: Sequence[str], train: bool
) -> SampleMaker:
    if kind == "instruct":
        return InstructMaker(vis, text, config.prompt, answered=train)
    if kind == "vqa":
        return QuestionMaker(vis, text, config.prompt, answer_weight=config.answer_weight, answered=train)
    if kind == "nlvr":
        return PairMaker(vis, text, config.prompt, classes=classes, swap=train, cut=config.cut)
    if kind == "classification":
        return LabelMaker(vis, text, config.prompt, classes=classes)
    return SampleMaker(vis, text, config.prompt)


def _image_processor(
    where: str,
    given: Mapping[str, Mapping[str, Any]],
    stage: str,
    defaults: Defaults,
    video: bool,
) -> Any:
    if stage in given:
        return make_processor(given[stage], f"{where}.{stage}", images=True)
    if stage == "eval" and "train" in given:
        other = make_processor(given["train"], f"{where}.train", images=True)
        shared = ("image_size", "mean", "std", "n_frms")
        same = {key: getattr(other, key) for key in shared if hasattr(other, key)}
        name = "clip_image_eval" if "clip" in given["train"]["name"] else "blip_image_eval"
        name = "alpro_video_eval" if hasattr(other, "clip") else name
        return PROCESSORS.get(name)(**same)
    if defaults.image_size is not None and not given:
        name = f"alpro_video_{stage}" if video else defaults.train if stage == "train" else defaults.eval
        return PROCESSORS.get(name)(image_size=defaults.image_size)
    known = "alpro_video" if video else "blip_image"
    raise ConfigError(f"{where}.{stage}: not given; name one, such as {{name: {known}_{stage}}}")


def make_processor(entry: Mapping[str, Any], where: str, images: bool) -> Any:
    """The processor that `{name: ..., option: value}` describes.

    Args:
        entry: name and options.
        where: key path of the entry, for messages.
        images: whether it must be one for pictures, or one for texts.

    Raises:
        ConfigError: unknown name or option, or one of the other kind.
    """
    options = dict(entry)
    name = options.pop("name", None)
    try:
        cls = PROCESSORS.get(str(name))
    except ConfigError as error:
        raise ConfigError(f"{where}.name: {error}") from error
    if hasattr(cls, "pixels") != images:
        fitting = [n for n in PROCESSORS.names() if hasattr(PROCESSORS.get(n), "pixels") == images]
        kinds = ("texts", "pictures") if images else ("pictures", "texts")
        raise ConfigError(
            f"{where}.name: {name} is for {kinds[0]}, not {kinds[1]}; choose from {', '.join(fitting)}"
        )
    known = [f.name for f in fields(cls)]
    for option in options:
        if option not in known:
            raise ConfigError(f"{where}.{option}: no option of {name}{hint(option, known)}")
    try:
        return cls(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    except TypeError as error:
        raise ConfigError(f"{where}: {name} cannot use {options} ({error})") from error
