"""Record and picture -> sample, or the cause why not. The same for files, shards and evaluation."""

from __future__ import annotations

import errno
import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypedDict

import numpy as np
from numpy.random import Generator
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from blip.data.video import Choose, decode, find_frames
from blip.errors import DataError

MALFORMED = "__malformed__"
"""Key of a record that could not be parsed; its value says why."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485
"""Pictures with more are refused: Pillow's own bound, a quarter of a gigabyte in RGB."""
_HOLE = 16
"""Zeros at the end of a file that look like a hole."""

_ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""

Decoder = Literal["pil", "torchcodec"]
Picture = bytes | str | Path
"""Content or path of a picture."""


@dataclass(frozen=True)
class Clip:
    """A video."""

    places: tuple[str | bytes, ...]
    """See `blip.data.video.find_frames`; or the contents of its frames."""

    def files(self) -> list[str | bytes] | str:
        """Its frames, or the video file that they have to be decoded from.

        Raises:
            FileNotFoundError: there is neither.
        """
        paths = [place for place in self.places if isinstance(place, str)]
        if len(paths) < len(self.places):
            return list(self.places)
        found = find_frames(paths)
        return found if isinstance(found, str) else [*found]


class Sample(TypedDict, total=False):
    """One row of a batch, before collation."""

    image: Tensor
    """uint8 (3, H, W); of a video (F, 3, H, W)."""
    image0: Tensor
    """uint8 (3, H, W): the first of two pictures."""
    image1: Tensor
    """uint8 (3, H, W): the second."""
    image_embeds: Tensor
    """(P, D): states of a frozen tower, in place of `image`."""
    image0_embeds: Tensor
    """The same of the first of two pictures."""
    image1_embeds: Tensor
    """The same of the second."""
    image_norm: Tensor
    """float32 (2, 3): mean and std in units of [0, 1]; of both pictures where there are two."""
    text_input: str
    """Prompt and cleaned text."""
    text_output: str
    """What is to be written, where `text_input` is an instruction."""
    answer: list[str]
    """Different answers to a question, as they stand."""
    weight: list[float]
    """One of each answer."""
    n_answers: int
    """Their number."""
    label: int
    """Number of the class."""
    image_id: int
    """Number of the picture within its dataset, from 0."""
    instance_id: str
    """Name of the record, for reports and predictions."""
    damaged: list[BadRecord]
    """Frames of a video that cannot be read, where others stand in for them; it never gets into a batch."""


class BadRecord(DataError):
    """A record that gives no sample: it is skipped, counted by `cause` and listed by `name`.

    Causes: missing_image, empty_image, truncated_image, unreadable_image, too_large, malformed_record,
    missing_video, empty_video, unreadable_video, no_video_reader, no_caption, bad_text, no_question,
    no_answer, no_sentence, no_label, bad_label, no_features, no_instruction, no_output, or no_X for another
    place X of a template; shards add their own. A damaged_frame is counted, but its video is used.

    Args:
        cause: one word for the count.
        name: of the record, as in `instance_id`.
        detail: file and reason, for a person.
    """

    def __init__(self, cause: str, name: str, detail: str = "") -> None:
        super().__init__(f"{name}: {cause}" + (f" ({detail})" if detail else ""))
        self.cause, self.name, self.detail = cause, name, detail

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions pickle their message only, workers send these
        return type(self), (self.cause, self.name, self.detail)


class VisProcessor(Protocol):
    """What a sample needs of an image processor."""

    def pixels(self, image: Image.Image, rng: Generator | None = None) -> Tensor: ...

    def norm(self) -> Tensor: ...


class FeatureSource(Protocol):
    """Where states of pictures come from (`blip.data.features`)."""

    def states(self, picture: Any, name: str) -> Tensor: ...

    def check(self, tower: str, view: Mapping[str, Any]) -> None: ...


class VideoProcessor(VisProcessor, Protocol):
    """What it needs of a processor of videos."""

    def frames(self, total: int, rng: Generator | None = None) -> list[int]: ...

    def clip(self, frames: Sequence[Image.Image], rng: Generator | None = None) -> Tensor: ...


@dataclass
class SampleMaker:
    """Makes samples of one dataset and stage, of pictures or videos with captions; picklable.

    Other kinds of records have makers of their own, see `blip.data.kinds`.

    Args:
        vis_processor: picture -> uint8 (3, H, W); one with `frames` and `clip` reads videos in their place.
        text_processor: text -> cleaned text.
        prompt: put in front of every cleaned text.
        columns: our name -> the record's name, where they differ.
        features: where a frozen tower's states of the pictures come from, in place of pixels.
        decoder: what decodes pictures, see `read_image`.
    """

    vis_processor: VisProcessor
    text_processor: Callable[[str], str]
    prompt: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    features: FeatureSource | None = None
    decoder: Decoder = "pil"
    what: ClassVar[str] = "caption"
    """What the text of a record is called."""

    @property
    def of_videos(self) -> bool:
        """Whether records have `video`, not `image`."""
        return hasattr(self.vis_processor, "clip")

    @property
    def per_caption(self) -> bool:
        """Whether a record with several captions counts once for each."""
        return self.what == "caption"

    def __call__(
        self,
        record: Mapping[str, Any],
        image: Picture | Clip | Sequence[Picture],
        name: str,
        rng: Generator | None = None,
    ) -> Sample:
        """The sample of a record.

        Args:
            record: with a caption; of a list of captions `rng` draws one.
            image: content or path of the picture, the list of several, or a video.
            name: becomes `instance_id`.
            rng: source of all randomness; None takes a fresh, unseeded one.

        Raises:
            BadRecord: no usable text or picture.
        """
        rng = np.random.default_rng() if rng is None else rng
        content = self.content(record, name, rng)
        return {**self.picture(image, name, rng), **content}  # type: ignore[arg-type]

    def content(self, record: Mapping[str, Any], name: str, rng: Generator | None = None) -> Sample:
        """All of a sample but its picture.

        Raises:
            BadRecord: no usable text.
        """
        return {"text_input": self.text(self.captions(record, name), name, rng)}

    def single(self, record: dict[str, Any], which: int, name: str) -> dict[str, Any]:
        """The record with only one of several captions."""
        captions = self.captions(record, name)
        return {**record, "caption": captions[which]} if isinstance(captions, list) and captions else record

    def places(self, record: Mapping[str, Any], name: str) -> list[Any]:
        """What the record has as picture, one entry; or as pictures, or as frames."""
        if self.of_videos:
            video = record.get("video")
            if video is None or video == []:
                raise BadRecord("missing_video", name, "the record has no 'video'")
            return video if isinstance(video, list) else [video]
        if record.get("image") is None:
            raise BadRecord("missing_image", name, "the record has no 'image'")
        return [record["image"]]

    def captions(self, record: Mapping[str, Any], name: str) -> Any:
        """What the record has as caption: normally a string or a list of strings."""
        sound(record, name)
        return record.get(self.columns.get("caption", "caption"))

    def text(self, caption: Any, name: str, rng: Generator | None = None) -> str:
        """Prompt and cleaned caption.

        Raises:
            BadRecord: as `cleaned`.
        """
        return self.prompt + self.cleaned(caption, name, rng)

    def cleaned(self, caption: Any, name: str, rng: Generator | None = None, what: str = "") -> str:
        """A caption or another text, cleaned; of a list `rng` draws one.

        Args:
            caption: a text or a list of texts.
            name: of the record.
            rng: source of the draw.
            what: how causes call it; empty: as the class does.

        Raises:
            BadRecord: no_caption where nothing is left after cleaning; bad_text where it is no text.
        """
        what = what or self.what
        if isinstance(caption, list) and caption:
            rng = np.random.default_rng() if rng is None else rng
            caption = caption[int(rng.integers(len(caption)))]
        if caption is None or caption == []:
            raise BadRecord(f"no_{what}", name)
        if not isinstance(caption, str):
            raise BadRecord("bad_text", name, f"the {what} is {type(caption).__name__}, not text")
        if not caption.isascii():
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise BadRecord("bad_text", name, f"the {what} is not valid UTF-8") from error
        clean = getattr(self.text_processor, "clean", self.text_processor)
        text = clean(caption)
        # Text processors may add a prompt of their own, so "nothing" is what they make of no text.
        if text.strip() == clean("").strip():
            raise BadRecord(f"no_{what}", name, f"nothing is left of {caption[:40]!r} after cleaning")
        return text

    def picture(self, image: Picture | Clip, name: str, rng: Generator | None = None) -> Sample:
        """`image`, `image_norm` and `instance_id` of a picture or video, and what is `damaged` of this.

        With `features`, `image_embeds` stands for the first two.

        Raises:
            BadRecord: the picture is missing or cannot be decoded, or there is no such frame of the video.
        """
        if isinstance(image, Clip):
            rng = np.random.default_rng() if rng is None else rng
            frames, damaged = self.read(image, name, rng)
            processor: Any = self.vis_processor
            sample: Sample = {
                "image": processor.clip(frames, rng),
                "image_norm": processor.norm(),
                "instance_id": name,
            }
            return {**sample, "damaged": damaged} if damaged else sample
        if self.features is not None:
            return {"image_embeds": self.features.states(image, name), "instance_id": name}
        pixels = self.vis_processor.pixels(read_image(image, name, self.decoder), rng)
        return {"image": pixels, "image_norm": self.vis_processor.norm(), "instance_id": name}

    def read(
        self, clip: Clip, name: str, rng: Generator | None = None
    ) -> tuple[list[Image.Image], list[BadRecord]]:
        """The frames that the processor asks for, see `read_clip`."""
        processor: Any = self.vis_processor
        return read_clip(clip, name, lambda total: processor.frames(total, rng))


def sound(record: Mapping[str, Any], name: str) -> None:
    """Raise BadRecord where a record could not be parsed."""
    if MALFORMED in record:
        raise BadRecord("malformed_record", name, str(record[MALFORMED]))


def read_image(image: Picture, name: str, decoder: Decoder = "pil") -> Image.Image:
    """The decoded picture, first frame, in whatever mode it is stored.

    A picture that ends early, or in the zeros of an interrupted copy, is never filled up with grey, and one
    of more than `MAX_PIXELS` pixels is refused before it is decoded. Vector and script formats are not read:
    decoding those may run programs.

    Args:
        image: content or path.
        name: of the record.
        decoder: `torchcodec` decodes upright color JPEGs, with the same pixels; all else is Pillow's.

    Raises:
        BadRecord: with the cause.
    """
    where = "" if isinstance(image, bytes) else str(image)
    try:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats())
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                size = f"{opened.width} x {opened.height}"
                raise BadRecord("too_large", name, f"{where} has {size} pixels".strip())
            fast = _by_torchcodec(opened, image) if decoder == "torchcodec" else None
            opened.load() if fast is None else None
            if opened.format == "JPEG" and _ends_in_a_hole(image):
                raise BadRecord(
                    "truncated_image", name, f"{where}: zeros where its end should be".strip(": ")
                )
            # `with` closes the file, not the pixels; a copy-free way to keep them is the object itself.
            return fast or opened
    except BadRecord:
        raise
    except Exception as error:  # decoders of hostile files raise whatever they like; all of it is counted
        # Pillow tells the address in memory of what it cannot identify.
        reason = "no known kind of picture" if isinstance(error, UnidentifiedImageError) else error
        raise BadRecord(_cause(error, image), name, f"{where}: {reason}".removeprefix(": ")) from error


def read_clip(clip: Clip, name: str, choose: Choose) -> tuple[list[Image.Image], list[BadRecord]]:
    """The wanted frames of a video, as they are stored.

    The nearest frame that can be read stands in for one that cannot, the earlier one of two.

    Args:
        clip: where they are.
        name: of the record.
        choose: number of frames -> numbers of the wanted ones.

    Returns:
        frames: as many as are wanted.
        damaged: what is wrong with those that others stand in for.

    Raises:
        BadRecord: missing_video, empty_video; unreadable_video where no frame can be read; no_video_reader.
    """
    try:
        found = clip.files()
    except OSError as error:
        raise BadRecord("missing_video", name, str(error)) from error
    if isinstance(found, str):
        return _decoded(found, name, choose), []
    if not found:
        raise BadRecord("empty_video", name, f"{clip.places[0]!r}: a folder without pictures")
    wanted = choose(len(found))
    frames: list[Image.Image] = []
    read: dict[int, Image.Image | BadRecord] = {}
    for number in wanted:
        # The frame itself comes first, then those at distance 1, 2, ...
        for other in sorted(range(len(found)), key=lambda i: (abs(i - number), i)):
            if other not in read:
                read[other] = _read_frame(found[other], name)
            if not isinstance(frame := read[other], BadRecord):
                frames.append(frame)
                break
        else:
            raise BadRecord("unreadable_video", name, f"none of {len(found)} frames; {read[wanted[0]]}")
    unread = [frame for number in dict.fromkeys(wanted) if isinstance(frame := read[number], BadRecord)]
    return frames, [BadRecord("damaged_frame", name, f"{bad.cause}, {bad.detail}") for bad in unread]


def _read_frame(path: Picture, name: str) -> Image.Image | BadRecord:
    try:
        return read_image(path, name)
    except BadRecord as error:
        return error


def _decoded(path: str, name: str, choose: Choose) -> list[Image.Image]:
    try:
        return decode(path, choose)
    except ImportError as error:
        raise BadRecord("no_video_reader", name, f"{path}: {error}") from error
    except Exception as error:  # as with pictures
        raise BadRecord("unreadable_video", name, f"{path}: {error}") from error


def _cause(error: Exception, image: Picture) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "missing_image"
    bomb = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)
    if isinstance(error, bomb):
        return "too_large"
    if isinstance(error, UnidentifiedImageError) and _is_empty(image):
        return "empty_image"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated_image"
    return "unreadable_image"


def has_torchcodec() -> bool:
    """Whether torchcodec is installed, and works, and reads pictures."""
    return _decode_jpeg() is not None


@functools.cache
def _decode_jpeg() -> Callable[..., Tensor] | None:
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError, OSError):  # as with videos
        return None
    return decode_jpeg


def _by_torchcodec(opened: Image.Image, image: Picture) -> Image.Image | None:
    """The pixels of a JPEG; None where Pillow decides: it turns none upright, and names what is wrong."""
    decode_jpeg = _decode_jpeg()
    upright = opened.getexif().get(_ORIENTATION, 1) == 1
    if decode_jpeg is None or opened.format != "JPEG" or opened.mode != "RGB" or not upright:
        return None
    try:
        pixels = decode_jpeg(image)  # uint8 (3, H, W)
    except (RuntimeError, ValueError, OSError):
        return None
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _ends_in_a_hole(image: Picture) -> bool:
    """Whether a JPEG ends in zeros without its last marker; decoders may take those for pixels."""
    tail = image[-_HOLE:] if isinstance(image, bytes) else _tail(image)
    if len(tail) < _HOLE or any(tail):
        return False
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    # Neither marker can stand among a scan's pixels, but both in a preview before it.
    return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")


def _tail(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-min(_HOLE, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read()


def _is_empty(image: Picture) -> bool:
    return (len(image) if isinstance(image, bytes) else os.path.getsize(image)) == 0


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of `_FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
