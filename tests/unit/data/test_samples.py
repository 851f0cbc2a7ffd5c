from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from blip import keyed
from blip.data.samples import MALFORMED, BadRecord, SampleMaker, read_image
from blip.processors.image import Blip2ImageTrain, BlipImageEval, to_rgb
from blip.processors.text import BlipCaption
from tests.torture import encoded, png_header

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture
def maker() -> SampleMaker:
    return SampleMaker(BlipImageEval(image_size=16), BlipCaption())


def test_a_sample_has_bytes_norm_text_and_name(maker: SampleMaker) -> None:
    maker.prompt = "a photo of "
    sample = maker({"caption": "A Dog."}, encoded(PHOTO, "PNG"), "mine/3")
    assert sorted(sample) == ["image", "image_norm", "instance_id", "text_input"]
    assert torch.equal(sample["image"], BlipImageEval(image_size=16).pixels(PHOTO))
    assert torch.equal(sample["image_norm"], BlipImageEval().norm())
    assert (sample["text_input"], sample["instance_id"]) == ("a photo of a dog", "mine/3")


def test_a_path_and_its_content_give_the_same_picture(maker: SampleMaker, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(PHOTO))
    pictures = [
        maker.picture(place, "x")["image"]
        for place in (encoded(PHOTO), tmp_path / "x.jpg", f"{tmp_path}/x.jpg")
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_of_several_captions_the_generator_draws_one(maker: SampleMaker) -> None:
    record = {"caption": ["one", "two", "three"]}
    content = encoded(PHOTO)
    texts = [maker(record, content, "x", keyed.generator(i))["text_input"] for i in range(40)]
    assert set(texts) == {"one", "two", "three"}
    assert texts == [maker(record, content, "x", keyed.generator(i))["text_input"] for i in range(40)]


def test_columns_name_the_caption_of_shards(maker: SampleMaker) -> None:
    maker.columns = {"caption": "TEXT"}
    assert maker({"TEXT": "yes", "caption": "no"}, encoded(PHOTO), "x")["text_input"] == "yes"


def test_a_maker_goes_to_workers() -> None:
    maker = SampleMaker(Blip2ImageTrain(image_size=8), BlipCaption(max_words=3), "x ")
    assert pickle.loads(pickle.dumps(maker)) == maker


TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "no caption": ({}, "no_caption"),
    "null": ({"caption": None}, "no_caption"),
    "no captions": ({"caption": []}, "no_caption"),
    "empty": ({"caption": ""}, "no_caption"),
    "blank": ({"caption": " \n\t "}, "no_caption"),
    "punctuation": ({"caption": "...!!"}, "no_caption"),
    "one empty of one": ({"caption": [""]}, "no_caption"),
    "number": ({"caption": 5}, "bad_text"),
    "object": ({"caption": {"en": "dog"}}, "bad_text"),
    "list of lists": ({"caption": [["dog"]]}, "bad_text"),
    "not utf-8": ({"caption": b"caf\xe9".decode(errors="surrogateescape")}, "bad_text"),
    "malformed": ({MALFORMED: "line 7: not valid JSON"}, "malformed_record"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_none_has_its_cause(maker: SampleMaker, case: str) -> None:
    record, cause = TEXTS[case]
    for prompt in ("", "a photo of "):
        maker.prompt = prompt
        maker.text_processor = BlipCaption(prompt=prompt)
        with pytest.raises(BadRecord) as error:
            maker(record, encoded(PHOTO), "mine/9")
        assert (error.value.cause, error.value.name) == (cause, "mine/9")


JPEG = encoded(PHOTO)
PNG = encoded(PHOTO, "PNG")
TORTURE: dict[str, tuple[bytes, str | None]] = {
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated_image"),
    "jpeg of a header": (JPEG[:300], "truncated_image"),
    "truncated png": (PNG[: len(PNG) // 2], "truncated_image"),
    "truncated webp": (encoded(PHOTO, "WEBP")[:200], "unreadable_image"),
    "truncated gif": (encoded(PHOTO, "GIF")[:900], "truncated_image"),
    "0 bytes": (b"", "empty_image"),
    "html page": (b"<!doctype html><html>404</html>" * 20, "unreadable_image"),
    "noise": (bytes(range(256)) * 8, "unreadable_image"),
    "jpeg start, noise after": (JPEG[:20] + bytes(range(256)) * 8, "unreadable_image"),
    "png with a broken checksum": (PNG[:40] + b"\0\0\0\0" + PNG[44:], "unreadable_image"),
    "enormous png": (png_header(60000, 60000), "too_large"),
    "large png": (png_header(9000, 10000), "too_large"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) show\n", "unreadable_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable_image"),
    "cmyk jpeg": (encoded(PHOTO.convert("CMYK")), None),
    "grey jpeg": (encoded(PHOTO.convert("L")), None),
    "progressive jpeg": (encoded(PHOTO, progressive=True), None),
    "jpeg with junk behind": (JPEG + b"junk" * 50, None),
    "16-bit png": (encoded(Image.fromarray(np.asarray(PHOTO.convert("L"), np.uint16) * 257), "PNG"), None),
    "alpha png": (encoded(PHOTO.convert("RGBA"), "PNG"), None),
    "palette png": (encoded(PHOTO.quantize(32), "PNG", transparency=3), None),
    "bilevel png": (encoded(PHOTO.convert("1"), "PNG"), None),
    "animated gif": (
        encoded(PHOTO, "GIF", save_all=True, append_images=[Image.new("RGB", PHOTO.size)] * 3),
        None,
    ),
    "animated webp": (
        encoded(PHOTO, "WEBP", save_all=True, append_images=[Image.new("RGB", PHOTO.size)]),
        None,
    ),
    "float tiff": (encoded(Image.fromarray(np.asarray(PHOTO.convert("L"), np.float32) / 255), "TIFF"), None),
    "bmp": (encoded(PHOTO, "BMP"), None),
}


@pytest.mark.parametrize("case", TORTURE)
@pytest.mark.parametrize("stored", ["bytes", "file"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_torture(maker: SampleMaker, tmp_path: Path, case: str, stored: str) -> None:
    content, cause = TORTURE[case]
    place: bytes | Path = content
    if stored == "file":
        place = tmp_path / "picture.jpg"
        place.write_bytes(content)
    if cause is None:
        sample = maker.picture(place, "x")
        assert (sample["image"].shape, sample["image"].dtype) == ((3, 16, 16), torch.uint8)
        assert sample["image"].float().std() > 5  # neither black nor white
        return
    with pytest.raises(BadRecord) as error:
        maker.picture(place, "mine/5")
    assert (error.value.cause, error.value.name) == (cause, "mine/5")
    assert stored == "bytes" or "picture.jpg" in error.value.detail
    assert " object at 0x" not in error.value.detail  # it is the same in every run


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(to_rgb(read_image(content, "x")))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("place", "cause"),
    [("none.jpg", "missing_image"), ("file.txt/none.jpg", "missing_image"), ("folder", "unreadable_image")],
)
def test_a_place_without_a_file_has_its_cause(tmp_path: Path, place: str, cause: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(BadRecord) as error:
        read_image(tmp_path / place, "x")
    assert error.value.cause == cause


def test_truncated_pictures_are_never_filled_up(maker: SampleMaker) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    maker.picture(JPEG, "x")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_bad_record_travels_between_processes() -> None:
    error = BadRecord("no_caption", "mine/3", "nothing is left of '!'")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.cause, copy.name, copy.detail, str(copy)) == (
        error.cause,
        error.name,
        error.detail,
        str(error),
    )
    assert str(error) == "mine/3: no_caption (nothing is left of '!')"


def test_files_are_closed(maker: SampleMaker, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs Linux's list of open files")
    (tmp_path / "x.gif").write_bytes(TORTURE["animated gif"][0])
    (tmp_path / "bad.jpg").write_bytes(TORTURE["truncated jpeg"][0])
    image = read_image(tmp_path / "x.gif", "x")
    with pytest.raises(BadRecord):
        read_image(tmp_path / "bad.jpg", "x")
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert not [path for path in opened if path.parent == tmp_path]
    assert image.size == PHOTO.size
