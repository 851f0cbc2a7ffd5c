"""Downloads go on where they were, are checked, and only open what may be opened."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from blip.data.__main__ import main
from blip.data.catalog.table import CATALOG
from blip.data.official import fetch as module
from blip.data.official.fetch import Web, WebError, fetch
from blip.errors import DataError
from tests.servers import Site, serve

BODY = np.random.default_rng(0).bytes(700_000)


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", clock)


@pytest.fixture
def web() -> Web:
    return Web(timeout_s=2, private=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(site: Site, web: Web, tmp_path: Path) -> None:
    url = site.put("/a.json", BODY)
    check = f"sha256:{hashlib.sha256(BODY).hexdigest()}"
    fetch(url, tmp_path / "sub/a.json", web, check)
    fetch(url, tmp_path / "sub/a.json", web, check)
    assert (tmp_path / "sub/a.json").read_bytes() == BODY
    assert names(tmp_path / "sub") == ["a.json"]
    assert site.ranges("/a.json") == [None]


def test_a_broken_connection_is_gone_on_with_where_it_broke(site: Site, web: Web, tmp_path: Path) -> None:
    url = site.put("/a.zip", BODY, breaks_after=[300_000, 100_000], headers={"ETag": '"1"'})
    fetch(url, tmp_path / "a.zip", web, f"md5:{hashlib.md5(BODY).hexdigest()}")
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert site.ranges("/a.zip") == [None, "bytes=300000-", "bytes=400000-"]


def test_what_is_left_of_an_earlier_command_is_gone_on_with(site: Site, web: Web, tmp_path: Path) -> None:
    url = site.put("/a.zip", BODY, breaks_after=[200_000], headers={"ETag": '"1"'})
    with pytest.raises(
        DataError, match=r"truncated: 200000 of 700000 bytes\); 200000 bytes are kept in .*a\.zip\.part"
    ):
        fetch(url, tmp_path / "a.zip", web, tries=1)
    assert names(tmp_path) == ["a.zip.part", "a.zip.part.json"]
    fetch(url, tmp_path / "a.zip", web, tries=1)
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert site.ranges("/a.zip") == [None, "bytes=200000-"]
    assert names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("change", ["another file", "no ranges", "another address", "a longer part"])
def test_a_part_of_something_else_is_begun_anew(change: str, site: Site, web: Web, tmp_path: Path) -> None:
    url = site.put("/a.zip", BODY[::-1], breaks_after=[200_000], headers={"ETag": '"1"'})
    with pytest.raises(DataError):
        fetch(url, tmp_path / "a.zip", web, tries=1)
    etag = {"ETag": '"2"'} if change == "another file" else {"ETag": '"1"'}
    url = site.put(
        "/b.zip" if change == "another address" else "/a.zip",
        BODY,
        headers=etag,
        ranges=change != "no ranges",
    )
    if change == "a longer part":
        (tmp_path / "a.zip.part").write_bytes(BODY * 2)
    fetch(url, tmp_path / "a.zip", web, tries=1)
    assert (tmp_path / "a.zip").read_bytes() == BODY


def test_a_file_that_is_not_the_published_one_is_deleted(site: Site, web: Web, tmp_path: Path) -> None:
    url = site.put("/a.zip", BODY)
    with pytest.raises(DataError, match=r"is not the file that was published, md5:00 differs; it is deleted"):
        fetch(url, tmp_path / "a.zip", web, "md5:00")
    assert not (tmp_path / "a.zip").exists()
    assert not (tmp_path / "a.zip.part").exists()


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, web: Web) -> None:
    with pytest.raises(DataError, match=r"cannot be fetched \(no_connection.*bring the file to .* --from"):
        fetch("http://127.0.0.1:9/a.json", tmp_path / "a.json", web, tries=2)


def test_a_page_that_is_not_there_is_asked_for_once(site: Site, web: Web, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="http_404: Not Found"):
        fetch(f"{site.address}/none", tmp_path / "a", web)
    assert len(site.asked) == 1


REFUSED = {
    "file:///etc/passwd": "bad_url",
    "ftp://example.org/a.jpg": "bad_url",
    "data:image/png;base64,AAAA": "bad_url",
    "gopher://example.org": "bad_url",
    "javascript:alert(1)": "bad_url",
    "http://": "bad_url",
    "http://[::1": "bad_url",
    "http://example.org:99999/": "bad_url",
    "http://me:secret@example.org/": "bad_url",
    "no address": "bad_url",
    "": "bad_url",
    "http://127.0.0.1/a.jpg": "private_address",
    "http://127.1/a.jpg": "private_address",
    "http://2130706433/a.jpg": "private_address",
    "http://localhost:80/a.jpg": "private_address",
    "http://10.0.0.8/a.jpg": "private_address",
    "http://192.168.1.1/a.jpg": "private_address",
    "http://169.254.169.254/latest/meta-data": "private_address",
    "http://[::1]/a.jpg": "private_address",
    "http://[::ffff:127.0.0.1]/a.jpg": "private_address",
    "http://0.0.0.0/a.jpg": "private_address",
    "http://printer.local/a.jpg": "private_address",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_may_not_be_opened_is_refused(url: str) -> None:
    with pytest.raises(WebError) as caught:
        Web(timeout_s=2).get(url, 1000)
    assert caught.value.cause == REFUSED[url]


def test_a_name_that_stands_for_this_machine_is_refused_before_it_is_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The resolver of the test stands for a foreign one that answers with an address of this network.
    resolve = module.socket.getaddrinfo
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.0.1", *a, **k))
    monkeypatch.setenv("no_proxy", "*")
    port = site.address.rpartition(":")[2]
    with pytest.raises(WebError) as caught:
        Web(timeout_s=2).get(f"http://pictures.example.org:{port}/a.jpg", 1000)
    assert caught.value.cause == "private_address"
    assert site.asked == []


@pytest.mark.parametrize(
    ("target", "cause"),
    [("file:///etc/passwd", "http_302"), ("ftp://example.org/x", "bad_url"), ("/again", "http_302")],
)
def test_redirects_lead_nowhere_else_and_not_in_circles(
    site: Site, web: Web, target: str, cause: str
) -> None:
    site.put("/again", status=302, headers={"Location": target})
    with pytest.raises(WebError) as caught:
        web.get(f"{site.address}/again", 1000)
    assert caught.value.cause == cause


def test_a_redirect_is_followed(site: Site, web: Web) -> None:
    site.put("/a b", b"here")
    site.put("/old", status=301, headers={"Location": "/a%20b"})
    site.pages["/a%20b"] = site.pages["/a b"]
    assert web.get(f"{site.address}/old", 1000) == b"here"
    assert web.get(f"{site.address}/a b", 1000) == b"here"
    assert {headers["User-Agent"] for _, headers in site.asked} == {module.AGENT}


def test_pages_are_bounded_in_bytes_and_time(site: Site) -> None:
    quick = Web(timeout_s=0.2, private=True)
    site.put("/told", bytes(2000))
    site.put("/untold", bytes(2000), sized=False)
    site.put("/cut", bytes(2000), breaks_after=[1000])
    site.put("/drips", bytes(500), drips=True, wait_s=0.05)
    site.put("/robots", b"x", headers={"X-Robots-Tag": "otherbot: noindex, noai"})
    table = {"told": 1000, "untold": 1000, "cut": 3000, "drips": 3000, "robots": 3000}
    causes = {}
    began = time.monotonic()
    for name, most in table.items():
        with pytest.raises(WebError) as caught:
            quick.get(f"{site.address}/{name}", most)
        causes[name] = caught.value.cause
    assert causes == {
        "told": "too_large",
        "untold": "too_large",
        "cut": "truncated",
        "drips": "timeout",
        "robots": "opted_out",
    }
    assert time.monotonic() - began < 5


def test_prepare_fetches_only_when_asked_and_only_what_is_missing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "root"))
    row = CATALOG["vg_caption"]
    note = json.dumps([{"image": "/export/vg/VG_100K/1.jpg", "caption": "a dog"}]).encode()
    remote = {"vg_caption.json": site.put("/x/vg_caption.json", note)}
    monkeypatch.setitem(CATALOG, "vg_caption", replace(row, remote=remote, archives=()))
    (tmp_path / "root/vg/images/VG_100K").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(tmp_path / "root/vg/images/VG_100K/1.jpg")
    assert main(["prepare", "vg_caption"]) == 2
    assert site.asked == []
    assert "nothing is downloaded without --fetch" in capsys.readouterr().out
    assert main(["prepare", "vg_caption", "--fetch"]) == 2  # addresses of this machine have to be allowed
    assert "private_address" in capsys.readouterr().err
    assert main(["prepare", "vg_caption", "--fetch", "--allow-private"]) == 0
    assert json.loads((tmp_path / "root/vg/annotations/vg_caption.json").read_text()) == [
        {"image": "VG_100K/1.jpg", "caption": "a dog"}
    ]
    assert main(["prepare", "vg_caption", "--fetch", "--allow-private"]) == 0
    assert len(site.asked) == 1
