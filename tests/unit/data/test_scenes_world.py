from __future__ import annotations

import colorsys
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip.data.scenes.claims import expected_r1
from blip.data.scenes.render import PALETTE, outline, render
from blip.data.scenes.world import (
    COLORS,
    GROUP,
    HELD_OUT,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    contents,
    related,
    scene,
    scenes,
)
from blip.errors import UsageError

TRAIN = scenes("train", 0, 1500)
TEST = scenes("test", 0, 500)


def test_a_scene_does_not_depend_on_the_range_it_is_made_in():
    assert scenes("train", 7, 12)[2] == scene("train", 9) == TRAIN[9]
    assert scenes("test", 13, 17)[3] == scene("test", 16) == TEST[16]
    assert scene("train", 9, seed=1) != TRAIN[9]
    assert scene("web", 9).things != TRAIN[9].things


def test_a_record_gives_the_scene_back():
    assert [Scene.from_record(one.record()) for one in TEST[:50]] == TEST[:50]


def test_an_unknown_split_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'train'"):
        scene("trian", 0)


def test_all_attributes_and_counts_occur_about_as_often():
    things = [thing for one in TRAIN for thing in one.things]
    for name, values in (("shape", SHAPES), ("color", COLORS), ("size", SIZES), ("texture", TEXTURES)):
        shares = np.array([sum(getattr(t, name) == value for t in things) for value in values]) / len(things)
        assert shares.min() > 0.6 / len(values)
    assert {len(one.things) for one in TRAIN} == {1, 2, 3, 4}
    assert {thing.place for thing in things} == {(row, column) for row in range(3) for column in range(3)}


def test_things_stay_in_the_picture_and_apart():
    for one in TRAIN + TEST:
        for thing in one.things:
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        for a, b in combinations(one.things, 2):
            assert math.dist((a.x, a.y), (b.x, b.y)) > 0.96 * (a.radius + b.radius)


def test_relations_and_sizes_are_clear_cut():
    """ "Left of" means by 15 pixels in 100 or more; "large" is half as wide again as "small"."""
    for one in TRAIN:
        for a, b in combinations(one.things, 2):
            assert related(a, "left", b) == (a.x < b.x - 0.15) == related(b, "right", a)
            assert related(a, "above", b) == (a.y < b.y - 0.15) == related(b, "below", a)
    radii = {size: [t.radius for one in TRAIN for t in one.things if t.size == size] for size in SIZES}
    assert min(radii["large"]) > 1.5 * max(radii["small"])


def test_held_out_pairs_are_in_val_and_test_only():
    def share(some: list[Scene]) -> float:
        return sum(any((t.shape, t.color) in HELD_OUT for t in one.things) for one in some) / len(some)

    assert share(TRAIN) == share(scenes("web", 0, 1500)) == 0
    assert 0.15 < share(TEST) < 0.3
    assert 0.15 < share(scenes("val", 0, 500)) < 0.3
    assert {s for s, _ in HELD_OUT} <= set(SHAPES)
    assert {c for _, c in HELD_OUT} <= set(COLORS)


@pytest.mark.parametrize("split", ["val", "test"])
def test_knowing_which_colors_and_shapes_occur_gives_less_than_25_percent(split: str):
    some = scenes(split, 0, 500)
    groups = [some[i : i + GROUP] for i in range(0, 500, GROUP)]
    assert all(len({contents(one) for one in group}) == 1 for group in groups)
    assert len({contents(one) for one in some}) == len(groups)
    assert expected_r1([contents(one) for one in some]) == pytest.approx(100 / GROUP)
    assert 100 / GROUP < 25
    # Within a group the pictures do differ, and not in binding alone.
    facts = [frozenset((t.shape, t.color, t.size, t.texture, t.place) for t in one.things) for one in some]
    assert expected_r1(facts) == 100
    assert expected_r1([tuple(sorted((t.shape, t.color) for t in one.things)) for one in some]) < 50


def test_expected_r1_splits_ties_evenly():
    assert expected_r1(["a", "a", "b", "c", "c", "c"]) == pytest.approx(100 * (2 * 1 / 2 + 1 + 3 * 1 / 3) / 6)


def test_a_picture_has_the_same_pixels_every_time_and_any_size():
    one = TRAIN[3]
    assert render(one, 64).tobytes() == render(Scene.from_record(one.record()), 64).tobytes()
    smooth = replace(one, background=replace(one.background, kind="plain"))
    for size in (32, 50, 224):
        assert render(smooth, size).size == (size, size)
    large = np.asarray(render(smooth, 256).resize((64, 64), Image.Resampling.BOX), float)
    assert np.abs(large - np.asarray(render(smooth, 64), float)).mean() < 2


def test_the_middle_of_a_plain_thing_has_its_color():
    for one in TRAIN[:300]:
        pixels = np.asarray(render(one, 64), float)
        for thing in one.things:
            if thing.texture == "plain" and thing.shape != "moon":  # the middle of a moon is empty
                middle = pixels[int(thing.y * 64), int(thing.x * 64)]
                nearest = min(PALETTE, key=lambda name: np.abs(middle - PALETTE[name]).sum())
                assert nearest == thing.color


def test_backgrounds_are_gray_beside_the_colors_of_things():
    for one in TRAIN[:200]:
        ground = replace(one, things=())
        mean = np.asarray(render(ground, 32), float).mean((0, 1))
        assert max(mean) - min(mean) < 30
    assert min(max(rgb) - min(rgb) for rgb in PALETTE.values()) > 100


def test_colors_differ_in_hue_or_lightness():
    for a, b in combinations(PALETTE, 2):
        (ha, la, _), (hb, lb, _) = (colorsys.rgb_to_hls(*(c / 255 for c in PALETTE[n])) for n in (a, b))
        hue = min(abs(ha - hb), 1 - abs(ha - hb))
        assert hue > 0.05 or abs(la - lb) > 0.2, (a, b)


def test_shapes_differ_in_outline():
    def mask(shape: str) -> np.ndarray:
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).polygon([tuple(p) for p in (outline(shape) * 28 + 32).tolist()], fill=1)
        return np.asarray(image, bool)

    masks = {shape: mask(shape) for shape in SHAPES}
    for a, b in combinations(SHAPES, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.85, (a, b, overlap)


@pytest.mark.parametrize("size", SIZES)
def test_textures_show_on_every_shape_and_color_at_64_pixels(size: str):
    base = next(t for one in TRAIN for t in one.things if t.size == size)
    ground = replace(TRAIN[0].background, kind="plain")
    for shape in SHAPES:
        for color in COLORS:
            pixels = []
            for texture in TEXTURES:
                thing = replace(base, shape=shape, color=color, texture=texture, x=0.5, y=0.5, grain=0.0)
                pixels.append(np.asarray(render(Scene("train", 0, (thing,), ground), 64), float))
            for a, b in combinations(pixels, 2):
                # At least a dozen pixels clearly differ between any two textures.
                assert (np.abs(a - b).max(-1) > 60).sum() >= 12, (shape, color)
