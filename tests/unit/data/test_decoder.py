"""Pictures decoded by torchcodec are Pillow's, to the bit, and so is what is said of those that cannot be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip.config.schema import DatasetConfig
from blip.data import samples
from blip.data.kinds import PairMaker
from blip.data.makers import Defaults, make_maker
from blip.data.samples import BadRecord, has_torchcodec, read_image
from blip.errors import ConfigError
from tests.torture import PHOTOGRAPHS, bad_pictures, encoded, odd_pictures, photographs

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
PLACES = [PHOTOGRAPHS / "images" / record["image"] for record in photographs()]


class StandIn:
    """Decodes as torchcodec does, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __call__(self, image: Any) -> Tensor:
        self.given.append(image)
        try:
            decoded = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB")
        except Exception as error:
            raise RuntimeError("decode_rows") from error
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)


@pytest.fixture(params=["stand-in", "torchcodec"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn | None:
    if request.param == "torchcodec":
        if not has_torchcodec():
            pytest.skip("torchcodec is not installed")
        return None
    stand_in = StandIn()
    monkeypatch.setattr(samples, "_decode_jpeg", lambda: stand_in)
    return stand_in


def outcome(image: Any, decoder: Any) -> Any:
    try:
        found = read_image(image, "x", decoder)
    except BadRecord as error:
        return error.cause, error.detail
    return found.mode, np.asarray(found).tobytes()


def turned() -> bytes:
    """A photograph that a camera took on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.open(PLACES[0]).reduce(4), exif=exif)


def test_all_pictures_are_those_of_pillow(decoder: StandIn | None) -> None:
    others = [*odd_pictures().values(), *(content for content, _ in bad_pictures().values()), turned()]
    for image in [*PLACES, *(place.read_bytes() for place in PLACES[:2]), *others]:
        assert outcome(image, "torchcodec") == outcome(image, "pil")
    if decoder is not None:  # one of the photographs is grey
        assert set(PLACES) & set(map(Path, filter(lambda one: isinstance(one, Path), decoder.given)))
        color = [place for place in PLACES if Image.open(place).mode == "RGB"]
        assert [one for one in decoder.given if isinstance(one, Path)] == color
        assert turned() not in decoder.given


def test_a_section_chooses_what_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(samples, "_decode_jpeg", lambda: stand_in)
    pictures = []
    for name in ("pil", "torchcodec"):
        config = DatasetConfig(decoder=name)
        maker = make_maker("mine", config, "eval", Defaults(32))
        pictures.append(maker.picture(PLACES[0], "x")["image"])
        assert len(stand_in.given) == (name == "torchcodec")
        both = make_maker("mine", config, "eval", Defaults(32), "nlvr", ("no", "yes"))
        assert isinstance(both, PairMaker)
        both({"sentence": "two", "label": "no"}, [PLACES[0], PLACES[1]], "x")
    assert torch.equal(*pictures)
    assert stand_in.given == [PLACES[0], PLACES[0], PLACES[1]]


def test_a_decoder_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DatasetConfig(decoder="torchcodec")
    monkeypatch.setattr(samples, "_decode_jpeg", lambda: None)
    with pytest.raises(ConfigError, match=r"^datasets\.mine\.decoder: torchcodec is not installed"):
        make_maker("mine", config, "train", Defaults(32))
    monkeypatch.setattr(samples, "_decode_jpeg", lambda: StandIn())
    with pytest.raises(ConfigError, match=r"^datasets\.mine\.decoder: it is for pictures"):
        make_maker("mine", config, "train", Defaults(32), video=True)
