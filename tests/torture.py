"""A dataset with everything in it that goes wrong: what each picture and record has to be counted as.

The good pictures are photographs; what is wrong is made of them. The same set is written as an annotation
file and as shards.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOGRAPHS = Path(__file__).with_name("photographs")
SOF, DHT, SOS, DQT = 0xC0, 0xC4, 0xDA, 0xDB
"""Markers of a JPEG's segments: frame, Huffman tables, scan, quantisation tables."""

Members = list[tuple[str, bytes]]


def photographs() -> list[dict[str, Any]]:
    """The records of twelve photographs of COCO: `image`, `caption`, `image_id`."""
    return json.loads((PHOTOGRAPHS / "captions.json").read_text())


def segment(jpeg: bytes, marker: int) -> tuple[int, int]:
    """Where the first segment of a kind starts and ends."""
    at = 2
    while jpeg[at + 1] != marker:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return at, at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def without(jpeg: bytes, marker: int) -> bytes:
    start, end = segment(jpeg, marker)
    return jpeg[:start] + jpeg[end:]


def resized(jpeg: bytes, height: int, width: int) -> bytes:
    """A JPEG that claims another size."""
    start, _ = segment(jpeg, SOF)
    return jpeg[: start + 5] + struct.pack(">HH", height, width) + jpeg[start + 9 :]


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with a few bytes of content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Name -> content, and the cause that it is counted by. Sixteen of them are corrupt JPEGs."""
    jpeg = (PHOTOGRAPHS / "images" / photographs()[0]["image"]).read_bytes()
    image = Image.open(io.BytesIO(jpeg))
    progressive, png = encoded(image, progressive=True), encoded(image.reduce(4), "PNG")
    hole = jpeg[: len(jpeg) // 2] + bytes(len(jpeg) - len(jpeg) // 2)
    return {
        "half": (jpeg[: len(jpeg) // 2], "truncated_image"),
        "only its header": (jpeg[:300], "truncated_image"),
        "without its last two bytes": (jpeg[:-2], "truncated_image"),
        "zeros for its second half": (hole, "truncated_image"),
        "progressive, half": (progressive[: len(progressive) // 2], "truncated_image"),
        "ends in a table": (jpeg[: segment(jpeg, DQT)[0] + 10], "truncated_image"),
        "without its first two bytes": (jpeg[2:], "unreadable_image"),
        "started twice": (jpeg[:2] + jpeg, "unreadable_image"),
        "without quantisation": (without(jpeg, DQT), "unreadable_image"),
        "without a frame": (without(jpeg, SOF), "unreadable_image"),
        "no pixel high": (resized(jpeg, 0, 640), "unreadable_image"),
        "of 4 gigapixels": (resized(jpeg, 65000, 65000), "too_large"),
        "as text": (jpeg.decode(errors="replace").encode(), "unreadable_image"),
        "in base 64": (base64.b64encode(jpeg), "unreadable_image"),
        "packed": (gzip.compress(jpeg), "unreadable_image"),
        "all zeros": (bytes(len(jpeg)), "unreadable_image"),
        "0 bytes": (b"", "empty_image"),
        "a web page": (b"<!doctype html><html>404</html>" * 20, "unreadable_image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) show\n", "unreadable_image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable_image"),
        "half a PNG": (png[: len(png) // 2], "truncated_image"),
        "a PNG of 3.6 gigapixels": (png_header(60000, 60000), "too_large"),
        "a PNG of 90 megapixels": (png_header(9000, 10000), "too_large"),
    }


def odd_pictures() -> dict[str, bytes]:
    """Name -> content of pictures that are unusual and good."""
    jpeg = (PHOTOGRAPHS / "images" / photographs()[1]["image"]).read_bytes()
    image = Image.open(io.BytesIO(jpeg)).reduce(4)
    grey = np.asarray(image.convert("L"), np.uint16)
    others = [image.rotate(90 * turn) for turn in (1, 2)]
    return {
        "CMYK": encoded(image.convert("CMYK")),
        "grey": encoded(image.convert("L")),
        "progressive": encoded(image, progressive=True),
        "junk behind it": jpeg + b"junk" * 50,
        "zeros behind it": jpeg + bytes(4096),
        "16 bits": encoded(Image.fromarray(grey * 257), "PNG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "palette": encoded(image.quantize(32), "PNG", transparency=3),
        "black and white": encoded(image.convert("1"), "PNG"),
        "animated GIF": encoded(image, "GIF", save_all=True, append_images=others),
        "animated WebP": encoded(image, "WEBP", save_all=True, append_images=others),
        "floats": encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "one pixel wide": encoded(image.crop((0, 0, 1, image.height)), "PNG"),
        "one pixel": encoded(image.crop((0, 0, 1, 1)), "PNG"),
        "40 megapixels": encoded(Image.new("L", (8000, 5000), 200), "PNG"),
    }


BAD_CAPTIONS: dict[str, tuple[Any, str]] = {
    "bad UTF-8": (b"caf\xe9 au lait".decode(errors="surrogateescape"), "bad_text"),
    "UTF-16": ("a dog".encode("utf-16").decode(errors="surrogateescape"), "bad_text"),
    "half a pair": ("a dog \ud83d", "bad_text"),
    "number": (5, "bad_text"),
    "object": ({"en": "a dog"}, "bad_text"),
    "null": (None, "no_caption"),
    "empty": ("", "no_caption"),
    "blank": (" \n\t ", "no_caption"),
    "punctuation": ("...!!", "no_caption"),
}
"""Name -> what stands for a caption, and the cause that it is counted by."""


def write_files(folder: Path) -> tuple[Path, dict[str, str]]:
    """The set as `torture.json` in `folder`, with pictures in `images`.

    Returns:
        The file, and record name -> cause of every bad record; all others are good.
    """
    (folder / "images").mkdir()
    records: list[Any] = []
    causes: dict[str, str] = {}

    def add(record: Any, cause: str | None = None) -> None:
        if cause:
            causes[f"torture/{len(records)}"] = cause
        records.append(record)

    def picture(content: bytes) -> str:
        place = folder / "images" / f"{len(records):03d}.jpg"
        place.write_bytes(content)
        return place.name

    for record in photographs():
        content = (PHOTOGRAPHS / "images" / record["image"]).read_bytes()
        name = picture(content)
        for caption in record["caption"]:
            add({"image": name, "caption": caption})
    for name, content in odd_pictures().items():
        add({"image": picture(content), "caption": f"a picture: {name}"})
    for name, (content, cause) in bad_pictures().items():
        add({"image": picture(content), "caption": f"a picture: {name}"}, cause)
    for caption, cause in BAD_CAPTIONS.values():
        add({"image": "000.jpg", "caption": caption}, cause)
    add({"image": "none.jpg", "caption": "a dog"}, "missing_image")
    add({"caption": "a dog"}, "missing_image")
    add({"image": ".", "caption": "a folder"}, "unreadable_image")
    add({"image": "\0", "caption": "no name"}, "unreadable_image")
    add({"image": "x" * 5000, "caption": "a long name"}, "unreadable_image")
    add("a text", "malformed_record")
    add(None, "malformed_record")
    path = folder / "torture.json"
    text = "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"
    path.write_bytes(text.encode(errors="surrogateescape" if "\ud83d" not in text else "surrogatepass"))
    return path, causes


def write_shard(folder: Path) -> tuple[list[Path], list[str], dict[str, str]]:
    """The set as three shards.

    Returns:
        The shards, the names of all good samples (as often as they are there), and sample name -> cause of
        every bad one.
    """
    members: Members = []
    good: list[str] = []
    causes: dict[str, str] = {}

    def add(key: str, content: bytes | None, text: Any, cause: str | None = None) -> None:
        if content is not None:
            members.append((f"{key}.jpg", content))
        if text is not None:
            kind = "txt" if isinstance(text, bytes) else "json"
            members.append((f"{key}.{kind}", text if kind == "txt" else json.dumps(text).encode()))
        if cause:
            causes[f"torture-0.tar/{key}"] = cause
        else:
            good.append(f"torture-0.tar/{key}")

    contents = [(PHOTOGRAPHS / "images" / record["image"]).read_bytes() for record in photographs()]
    for number, content in enumerate(contents):
        add(f"good/{number:03d}", content, {"caption": photographs()[number]["caption"][0]})
    for number, (name, content) in enumerate(odd_pictures().items()):
        add(f"odd/{number:03d}", content, {"caption": f"a picture: {name}"})
    for number, (name, (content, cause)) in enumerate(bad_pictures().items()):
        add(f"bad/{number:03d}", content, {"caption": f"a picture: {name}"}, cause)
    small = encoded(Image.open(io.BytesIO(contents[0])).reduce(8))
    for number, (caption, cause) in enumerate(BAD_CAPTIONS.values()):
        add(f"texts/{number:03d}", small, {"caption": caption}, cause)
    add("bytes", small, b"caf\xe9 au lait", "bad_text")
    add("broken", small, None, "malformed_record")
    members.append(("broken.json", b'{"caption": "a dog'))
    add("alone", small, None, "no_caption")
    add("words", None, {"caption": "a dog"}, "missing_image")
    for outside in ("../outside", "../../../outside", "a/../../outside"):
        add(outside, small, {"caption": f"a picture called {outside}"})
    add("twice", small, {"caption": "a dog"})
    add("twice", small, {"caption": "the same dog again"})
    add("between", small, {"caption": "a cat"})
    add("twice", small, {"caption": "a third dog"})
    pickled = b"cos\nsystem\n(S'touch outside'\ntR."
    members.extend([("code.pyd", pickled), ("code.pickle", pickled), ("code.pth", pickled)])

    first = folder / "torture-0.tar"
    with tarfile.open(first, "w") as tar:
        for name, content in members:
            _add(tar, name, content)
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    whole = folder / "torture-1.tar"
    with tarfile.open(whole, "w") as tar:
        for number in range(4):
            _add(tar, f"{number}.jpg", small)
            _add(tar, f"{number}.json", b'{"caption": "a dog"}')
    # The third sample ends within its picture; the first two are whole.
    whole.write_bytes(whole.read_bytes()[: 2 * (1024 + _blocks(small) + 512) + 512 + len(small) // 2])
    good += ["torture-1.tar/0", "torture-1.tar/1"]
    causes["torture-1.tar"] = "truncated_shard"
    (folder / "torture-2.tar").write_bytes(b"not found\n" * 1000)
    causes["torture-2.tar"] = "unreadable_shard"
    return [folder / f"torture-{number}.tar" for number in range(3)], good, causes


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _blocks(content: bytes) -> int:
    """Bytes that a member's content takes in a tar file."""
    return -(-len(content) // 512) * 512
