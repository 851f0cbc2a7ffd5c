"""The store of frozen-vision features: what is written is found again, and only for what it was made of."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip.data.features import (
    FeatureStore,
    complete,
    cut,
    fingerprint,
    origin_of,
    part_name,
    read_part,
    view_of,
    write_part,
)
from blip.data.kinds import PairMaker
from blip.data.samples import BadRecord, SampleMaker
from blip.errors import ConfigError, DataError
from blip.processors.image import BlipImageEval
from blip.processors.text import BlipCaption

EYES = BlipImageEval(image_size=8)
STATES = torch.arange(3 * 2 * 4.0).view(3, 2, 4)
NAMES = ["train/a.png", "a.png", "b/train/a.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    origin = origin_of("tower", EYES)
    write_part(tmp_path / part_name(0), NAMES[:2], STATES[:2], origin)
    write_part(tmp_path / part_name(1), NAMES[2:], STATES[2:].to(torch.bfloat16), origin)
    complete(tmp_path, origin, 2)
    return tmp_path


def test_states_are_found_by_the_longest_end_of_a_path(folder: Path) -> None:
    store = FeatureStore(folder)
    assert len(store) == 3
    for path, row in (("/data/coco/train/a.png", 0), ("x/a.png", 1), ("b/train/a.png", 2), ("a.png", 1)):
        assert torch.equal(store.states(path, "r").float(), STATES[row])
    assert store.states("b/train/a.png", "r").dtype == torch.bfloat16
    assert torch.equal(pickle.loads(pickle.dumps(store)).states("a.png", "r"), STATES[1])


@pytest.mark.parametrize("picture", ["train/c.png", b"content"])
def test_a_picture_without_features_is_a_bad_record(folder: Path, picture: str | bytes) -> None:
    with pytest.raises(BadRecord) as caught:
        FeatureStore(folder).states(picture, "mine/3")
    assert (caught.value.cause, caught.value.name) == ("no_features", "mine/3")


def test_other_weights_and_other_views_are_refused(folder: Path) -> None:
    store = FeatureStore(folder, "datasets.mine.features")
    store.check("tower", view_of(EYES))
    with pytest.raises(ConfigError, match=r"^datasets\.mine\.features: .*a tower with other weights"):
        store.check("another", view_of(EYES))
    with pytest.raises(ConfigError, match=r"image processor \(image_size 8, now 16\); write them again"):
        store.check("tower", view_of(BlipImageEval(image_size=16)))


def test_an_unfinished_store_is_refused(folder: Path) -> None:
    (folder / part_name(1)).write_bytes(b"half")
    with pytest.raises(DataError, match=r"part-00001\.safetensors is missing or damaged"):
        FeatureStore(folder)
    assert read_part(folder / part_name(1)) is None
    (folder / "features.json").unlink()
    with pytest.raises(DataError, match=re.escape(f"no complete store of features in '{folder}'")):
        FeatureStore(folder)
    (folder / "features.json").write_text('{"format": "other", "tower": "", "view": {}, "parts": 0}')
    with pytest.raises(DataError, match="its format is 'other'"):
        FeatureStore(folder)


def test_a_store_that_was_being_written_again_is_refused(folder: Path) -> None:
    write_part(folder / part_name(1), NAMES[2:], STATES[2:], origin_of("another", EYES))
    with pytest.raises(DataError, match=r"part-00001\.safetensors is of another tower or image processor"):
        FeatureStore(folder)


def test_parts_are_bounded_in_pictures_and_bytes() -> None:
    assert [len(part) for part in cut(map(str, range(10000)), 1)] == [4096, 4096, 1808]
    assert [len(part) for part in cut(["a", "b", "c"], 1 << 29)] == [2, 1]
    assert cut([], 0) == []


def test_a_fingerprint_is_of_names_types_shapes_and_values() -> None:
    weights: dict[str, Tensor] = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    same = {"b": torch.zeros(3), "a": torch.ones(2, 2)}
    others = [
        {**weights, "b": torch.zeros(3, dtype=torch.bfloat16)},
        {**weights, "a": torch.ones(4)},
        {**weights, "b": torch.tensor([0.0, 0.0, 1e-30])},
        {"a": weights["a"], "c": weights["b"]},
    ]
    assert fingerprint(same) == fingerprint(weights)
    assert len({fingerprint(other) for other in [weights, *others]}) == 5


def test_samples_have_states_in_the_place_of_pixels(folder: Path) -> None:
    store = FeatureStore(folder)
    maker = SampleMaker(EYES, BlipCaption(), features=store)
    sample = maker({"caption": "A dog."}, "somewhere/a.png", "mine/0")
    assert sample.keys() == {"image_embeds", "instance_id", "text_input"}
    assert torch.equal(sample["image_embeds"], STATES[1])


def test_pairs_have_two_and_change_places(folder: Path) -> None:
    maker = PairMaker(EYES, BlipCaption(), features=FeatureStore(folder), swap=True)
    record = {"sentence": "left", "label": True}
    seen = set()
    for _ in range(50):
        sample = maker(record, ["train/a.png", "b/train/a.png"], "mine/0")
        assert sample.keys() == {"image0_embeds", "image1_embeds", "instance_id", "text_input", "label"}
        states = (float(sample["image0_embeds"][0, 0]), float(sample["image1_embeds"][0, 0]))
        seen.add((*states, sample["text_input"]))
    assert seen == {(0.0, 16.0, "left"), (16.0, 0.0, "right")}
    with pytest.raises(BadRecord, match="no_features"):
        maker(record, "both.png", "mine/0")
