from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from blip import keyed
from blip.data.scenes.claims import (
    CaptionScore,
    Claims,
    Mention,
    expected_r1,
    matches,
    normal,
    parse,
    score_caption,
)
from blip.data.scenes.text import caption, captions, noun_phrase, place_name, refer, vocabulary
from blip.data.scenes.world import HELD_OUT, Scene, Thing, contents, scene, scenes

TRAIN = scenes("train", 0, 600)
TEST = scenes("test", 0, 500)
TEST_CAPTIONS = captions(TEST)


def rng(*parts: int | str) -> np.random.Generator:
    return keyed.generator("test", *parts)


def thing(shape: str, color: str, size: str, texture: str, row: int, column: int) -> Thing:
    return Thing(shape, color, size, texture, row, column, 0.5, 0.5, 0.1, 0.0, 0.0)


def picture(*things: Thing) -> Scene:
    return Scene("test", 0, things, scene("test", 0).background)


STAR = thing("star", "red", "small", "striped", 0, 0)
RING = thing("circle", "blue", "large", "plain", 2, 2)


@pytest.mark.parametrize(
    ("text", "things", "relations"),
    [
        ("a small red star", [Mention("star", "red", "small")], []),
        (
            "There is a TINY, spotted red star in the upper left corner.",
            [Mention("star", "red", "small", "dotted", (0, 0))],
            [],
        ),
        ("at the top there is a star with stripes", [Mention("star", None, None, "striped", (0, 1))], []),
        (
            "a red star to the left of a big blue circle",
            [Mention("star", "red"), Mention("circle", "blue", "large")],
            [(0, "left", 1)],
        ),
        (
            "a star on the left is over a circle on the right side",
            [Mention("star", place=(1, 0)), Mention("circle", place=(1, 2))],
            [(0, "above", 1)],
        ),
        (
            "a star with a circle beneath it and a moon in the middle",
            [Mention("star"), Mention("circle"), Mention("moon", place=(1, 1))],
            [(1, "below", 0)],
        ),
        (
            "a star is above a circle and right of a moon",
            [Mention("star"), Mention("circle"), Mention("moon")],
            [(0, "above", 1), (0, "right", 2)],
        ),
        (
            "star under circle and moon right of heart",
            [Mention("star"), Mention("circle"), Mention("moon"), Mention("heart")],
            [(0, "below", 1), (2, "right", 3)],
        ),
        ("one cross is on the right of the picture", [Mention("cross", place=(1, 2))], []),
        ("image 640 jpg", [], []),
    ],
)
def test_parse_reads(text: str, things: list[Mention], relations: list[tuple[int, str, int]]):
    assert parse(text) == Claims(things, relations)


@pytest.mark.parametrize(
    ("text", "whole", "partial"),
    [
        ("a small striped red star at the top left and a blue circle in the bottom right", True, True),
        ("a red star above a blue circle", True, True),
        ("a blue circle below and right of a red star", True, True),
        ("a red star", False, True),
        ("a blue star and a red circle", False, False),
        ("a red star below a blue circle", False, False),
        ("a large red star and a blue circle", False, False),
        ("a dotted red star and a blue circle", False, False),
        ("a red star at the top and a blue circle", False, False),
        ("a red star, a blue circle and a moon", False, False),
        ("a red star and a red star", False, False),
        ("stock photo", False, False),
    ],
)
def test_matches_tells_true_from_false(text: str, whole: bool, partial: bool):
    scene_ = picture(STAR, RING)
    assert matches(parse(text), scene_) is whole
    assert matches(parse(text), scene_, whole=False) is partial


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("a small red star above a blue circle", CaptionScore(6, 6, True)),
        ("a large red star above a blue circle", CaptionScore(5, 6, False)),
        ("a blue star above a red circle", CaptionScore(3, 5, False)),
        ("a red star", CaptionScore(2, 2, False)),
        ("a red star, a blue circle and a green moon", CaptionScore(4, 6, False)),
        ("hello", CaptionScore(0, 1, False)),
        ("star " * 40, CaptionScore(1, 40, False)),
    ],
)
def test_score_caption_counts_right_attributes(text: str, score: CaptionScore):
    assert score_caption(text, picture(STAR, RING)) == score


def test_every_caption_is_true_also_after_clean_up():
    for one in TRAIN + TEST:
        text = caption(one, rng(one.index))
        assert matches(parse(text), one), text
        assert parse(normal(text)) == parse(text)
        assert score_caption(text, one).whole


def test_every_caption_says_what_is_not_the_default():
    for one in TRAIN:
        said = parse(caption(one, rng(one.index))).things
        key = lambda m: (m.shape, m.color, m.size or "large", m.texture or "plain")  # noqa: E731
        assert Counter(map(key, said)) == Counter(map(key, one.things))


def test_captions_have_the_length_of_coco_captions():
    lengths = np.array([len(caption(one, rng(one.index)).split()) for one in TRAIN])
    assert lengths.min() >= 5
    assert lengths.max() <= 23
    assert np.mean((lengths >= 8) & (lengths <= 20)) > 0.95


def test_no_two_test_captions_are_equal_after_lavis_clean_up():
    def lavis(text: str) -> str:
        text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
        return re.sub(r"\s{2,}", " ", text).strip()

    for texts in (TEST_CAPTIONS, captions(scenes("val", 0, 500))):
        assert len(set(map(lavis, texts))) == len(set(map(normal, texts))) == 500


def test_a_test_caption_is_true_of_its_own_picture_only():
    for text, own in zip(TEST_CAPTIONS, TEST, strict=True):
        claims = parse(text)
        assert [one.index for one in TEST if matches(claims, one)] == [own.index], text


def test_the_words_of_colors_and_shapes_in_test_captions_give_less_than_25_percent():
    """The oracle from the side of the texts: it reads colors and shapes, not what belongs together."""
    keys = []
    for text, one in zip(TEST_CAPTIONS, TEST, strict=True):
        said = parse(text).things
        keys.append((tuple(sorted(m.color or "" for m in said)), tuple(sorted(m.shape for m in said))))
        assert keys[-1] == contents(one)
    assert expected_r1(keys) < 25


def test_wording_varies():
    texts = [caption(TRAIN[0], rng(i)) for i in range(200)]
    assert len(set(texts)) > 100
    every = " ".join(caption(one, rng(one.index)) for one in TRAIN)
    for word in ("small", "little", "tiny", "spotted", "dotted", "upper", "top", "beneath", "under", "below"):
        assert f" {word} " in every


def test_training_captions_name_no_held_out_pair():
    for one in TRAIN:
        assert not {(m.shape, m.color) for m in parse(caption(one, rng(one.index))).things} & HELD_OUT


def test_a_reference_fits_one_thing_only_and_hides_what_is_asked():
    for one in TEST:
        for hidden in ("color", "shape", "size", "texture"):
            for target in one.things:
                phrase = refer(target, one, rng(one.index, hidden), (hidden, "place"))
                if phrase is not None:
                    words = phrase.split()
                    assert str(getattr(target, hidden)) not in words
                    fits = [t for t in one.things if agrees(words, t)]
                    assert fits == [target], phrase


def agrees(words: list[str], one: Thing) -> bool:
    said = parse(" ".join(words).replace("object", "star")).things[0]
    if words[-1] == "object":
        said.shape = one.shape
    return said.agrees(one)


def test_every_word_of_phrases_is_in_the_vocabulary():
    known = vocabulary()
    for one in TEST:
        text = f"{caption(one, rng(one.index))} {noun_phrase(one.things[0], rng(one.index, 1))}"
        assert set(normal(text).split()) <= known


def test_place_names_are_distinct():
    names = [place_name((row, column)) for row in range(3) for column in range(3)]
    assert names == [
        "top left",
        "top",
        "top right",
        "left",
        "center",
        "right",
        "bottom left",
        "bottom",
        "bottom right",
    ]
