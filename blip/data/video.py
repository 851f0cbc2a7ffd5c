"""Videos on disk: the pictures of their frames, or files that are decoded where a reader is installed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"),
    *(".jfif", ".jpe", ".heic", ".heif", ".pgm", ".pbm", ".pnm", ".j2k"),
)
"""Of files that hold a picture. One that cannot be read here is counted, not passed over."""
VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
HOW_TO_READ = (
    "install a reader ('pip install av', or torchcodec), or extract the frames into a folder of the video's"
    " name without its ending beside it, as in 'ffmpeg -i NAME.mp4 NAME/%05d.jpg'"
)

Choose = Callable[[int], list[int]]
"""Number of frames of a video -> numbers of those that are wanted, in order."""

_NUMBER = re.compile(r"(\d+)")


def find_frames(places: Sequence[str]) -> list[str] | str:
    """Paths of a video's frames in order, or the path of the video file that they have to be decoded from.

    Several places are the frames themselves. A single one is a folder of them; else the name of a video file,
    for which a folder of that name without its ending stands where there is one; else a video file, with or
    without its ending; else a picture, which is a video of one frame. The names in a folder are sorted, the
    numbers in them by value.

    Raises:
        FileNotFoundError: there is none of these.
    """
    if len(places) > 1:
        return list(places)
    place = places[0]
    stem, ending = os.path.splitext(place)
    if os.path.isdir(place):
        return _sorted_pictures(place)
    is_video = ending.lower() in VIDEO_SUFFIXES
    if is_video and os.path.isdir(stem):
        return _sorted_pictures(stem)
    if os.path.isfile(place):
        return [place] if ending.lower() in IMAGE_SUFFIXES else place
    for other in () if is_video else VIDEO_SUFFIXES:
        if os.path.isfile(place + other):
            return place + other
    raise FileNotFoundError(f"{place}: no such folder of frames or video file")


def a_few(total: int) -> list[int]:
    """Numbers of up to eight frames spread over a video, to look at."""
    return [i * total // min(total, 8) for i in range(min(total, 8))]


def _sorted_pictures(folder: str) -> list[str]:
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    return [os.path.join(folder, name) for name in sorted(names, key=_name_key)]


def _name_key(name: str) -> tuple[list[Any], str]:
    """`frame_2` before `frame_10`; texts and numbers alternate, so that keys can be compared."""
    parts = _NUMBER.split(name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def decode(path: str | Path, choose: Choose) -> list[Image.Image]:
    """The wanted frames of a video file, RGB.

    Raises:
        ImportError: no reader is installed.
        Exception: whatever decoders raise at damaged files.
    """
    reader = installed_reader()
    if reader is None:
        raise ImportError(HOW_TO_READ)
    return _by_torchcodec(str(path), choose) if reader == "torchcodec" else _by_av(str(path), choose)


@functools.cache
def installed_reader() -> str | None:
    """`torchcodec` or `av`, whichever is installed and works; None: neither."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError):  # it raises the last two where FFmpeg is missing
        pass
    else:
        return "torchcodec" if torchcodec.decoders else None
    try:
        import av
    except (ImportError, OSError):
        return None
    return "av" if av else None


def _by_torchcodec(path: str, choose: Choose) -> list[Image.Image]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames = decoder.get_frames_at(indices=choose(len(decoder))).data  # uint8 (F, H, W, 3), RGB
    return [Image.fromarray(frame.numpy()) for frame in frames]


def _by_av(path: str, choose: Choose) -> list[Image.Image]:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    while total:
        wanted = choose(total)
        found: dict[int, Image.Image] = {}
        seen = 0
        with av.open(path) as container:
            for frame in container.decode(video=0):
                if seen in wanted:
                    found[seen] = frame.to_image()
                seen += 1
                if seen > wanted[-1]:
                    return [found[number] for number in wanted]
        total = seen  # a container may announce more frames than it has
    raise ValueError("there is no frame in it")
