"""A few tiny videos in LAVIS's layout of MSRVTT: folders of frames, some of which lack a thing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from blip.data.scenes.render import render
from blip.data.scenes.text import captions
from blip.data.scenes.world import Scene, scenes

FRAMES = 6


def make_videos(root: Path, size: int = 32, **counts: int) -> None:
    """`msrvtt/videos/<split>0.mp4`'s frames, one caption and one question each, and the list of answers.

    Args:
        root: the data root.
        size: side of the frames.
        counts: split -> number of videos.
    """
    folder = root / "msrvtt" / "annotations"
    folder.mkdir(parents=True)
    answers: dict[str, int] = {}
    for split, count in counts.items():
        shown = scenes(split, 0, count)
        asked: list[dict[str, Any]] = []
        told: list[dict[str, Any]] = []
        for number, (scene, caption) in enumerate(zip(shown, captions(shown), strict=True)):
            video = f"{split}{number}"
            write_frames(root / "msrvtt" / "videos" / video, frames_of(scene, size))
            thing = scene.things[-1]
            question = {"question": f"what color is the {thing.shape}?", "question_id": number}
            asked.append({"video": f"{video}.mp4", "answer": thing.color, **question})
            told.append({"video": f"{video}.mp4", "caption": caption})
            answers.setdefault(thing.color, len(answers))
        (folder / f"qa_{split}.json").write_text(json.dumps(asked))
        (folder / f"retrieval_{split}.json").write_text(json.dumps(told))
    (folder / "qa_ans2label.json").write_text(json.dumps(answers))


def frames_of(scene: Scene, size: int = 32, count: int = FRAMES) -> list[Image.Image]:
    """The scene without its last thing in the first third of the frames, and as it is in the others."""
    before = replace(scene, things=scene.things[:-1])
    return [render(before if 3 * number < count else scene, size) for number in range(count)]


def write_frames(folder: Path, frames: list[Image.Image]) -> None:
    """`frame_1.png`, ..., numbered as FFmpeg does, without zeros in front."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, start=1):
        frame.save(folder / f"frame_{number}.png")
