"""Files and pictures over http(s): resumable downloads that are checked, and bounded reads of foreign pages.

Nothing but http and https is ever opened, redirects included, and addresses of this machine or of a private
network only where that is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip.errors import ConfigError, DataError, brief

log = logging.getLogger(__name__)

AGENT = "Mozilla/5.0 (compatible; blip-data)"
PART = ".part"
"""Ending of files whose download goes on."""

_CHUNK = 1 << 18
_OPTED_OUT = {"noai", "noimageai", "noindex", "noimageindex"}


class WebError(Exception):
    """An address that gave nothing.

    Args:
        cause: one word for the count: bad_url, private_address, http_404, timeout, too_large, opted_out,
            truncated, no_connection.
        detail: for people.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass
class Web:
    """What opens addresses.

    Args:
        timeout_s: for connecting and for every wait, and six times of it for the whole of a picture.
        private: whether addresses of this machine and of private networks may be opened.
        agent: how the program calls itself.
    """

    timeout_s: float = 10.0
    private: bool = False
    agent: str = AGENT

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < 86_400:
            raise ConfigError(f"timeout: {self.timeout_s:g} is no time to wait in seconds; give one above 0")
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
            _Redirects(self),
            _Http(self.private),
            _Https(self.private),
        ):
            self._opener.add_handler(handler)

    def open(self, url: str, headers: dict[str, str] | None = None) -> Any:
        """The opened response.

        Raises:
            WebError: with the cause.
        """
        request = urllib.request.Request(_checked(url, self.private), headers={"User-Agent": self.agent})
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            return self._opener.open(request, timeout=self.timeout_s)
        except Exception as error:  # foreign servers answer whatever they like; all of it is counted
            raise _web_error(error) from error

    def get(self, url: str, most_bytes: int) -> bytes:
        """The content of an address, of at most so many bytes.

        Raises:
            WebError: with the cause.
        """
        deadline = time.monotonic() + 6 * self.timeout_s
        with self.open(url, {"Accept": "image/*,*/*;q=0.8"}) as response:
            if _opted_out(response.headers):
                raise WebError("opted_out", "its header X-Robots-Tag asks not to be taken")
            said = response.headers.get("Content-Length") or ""
            if said.isdecimal() and int(said) > most_bytes:
                raise WebError("too_large", f"{said} bytes")
            parts: list[bytes] = []
            size = 0
            try:
                # `read1` comes back with what there is: a server that drips must not outlast the deadline.
                while chunk := response.read1(_CHUNK):
                    size += len(chunk)
                    parts.append(chunk)
                    if size > most_bytes:
                        raise WebError("too_large", f"more than {most_bytes} bytes")
                    if time.monotonic() > deadline:
                        raise WebError("timeout", f"{size} bytes after {6 * self.timeout_s:.0f} s")
            except WebError:
                raise
            except Exception as error:
                raise _web_error(error) from error
        if said.isdecimal() and size < int(said):
            raise WebError("truncated", f"{size} of {said} bytes")
        return b"".join(parts)


def fetch(
    url: str,
    target: Path,
    web: Web | None = None,
    check: str = "",
    tries: int = 5,
    tell: Callable[[str], None] = log.info,
) -> None:
    """Download a file; what there is of it lies in `target` with the ending `.part`, and is gone on with.

    Args:
        url: http(s).
        target: written when it is complete; one that is there stays.
        web: what opens the address.
        check: `md5:...` or `sha256:...` that the file must have; empty: its size only.
        tries: how often a broken connection is taken up again.
        tell: takes a line for people now and then.

    Raises:
        DataError: it cannot be had; the message says what to do.
    """
    if target.exists():
        return
    web = web or Web(timeout_s=60.0)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    error = _persist(url, part, web, tries, tell)
    if not part.is_file() or not _complete(part):
        have = part.stat().st_size if part.is_file() else 0
        reason = brief(error or WebError("truncated"))
        raise DataError(
            f"{url}: cannot be fetched ({reason}); {have} bytes are kept in {part}, and the next"
            f" --fetch goes on from there; without a network, bring the file to {target.parent} yourself, or"
            " name its folder by --from"
        ) from error
    if check and _digest(part, check.partition(":")[0]) != check.partition(":")[2]:
        part.unlink()
        raise DataError(
            f"{url}: what was fetched is not the file that was published, {check} differs; it is deleted: run"
            f" this again, or bring the file to {target.parent} yourself"
        )
    os.replace(part, target)
    _note(part).unlink(missing_ok=True)


def _persist(url: str, part: Path, web: Web, tries: int, tell: Callable[[str], None]) -> WebError | None:
    """Fetch the rest of a file, in several tries; the error of the last one where none made it."""
    error = None
    for number in range(tries):
        if number:
            time.sleep(min(30.0, 0.2 * 4**number))
        try:
            _go_on(url, part, web, tell)
            return None
        except WebError as caught:
            error = caught
            if caught.cause.startswith("http_4") or caught.cause in ("bad_url", "private_address"):
                break
        except OSError as caught:
            raise DataError(f"{part}: cannot be written ({caught.strerror or caught})") from caught
    return error


def _go_on(url: str, part: Path, web: Web, tell: Callable[[str], None]) -> None:
    """Fetch the rest of a file, or all of it where the server has another one by now."""
    have = part.stat().st_size if part.is_file() else 0
    note = _read_note(part)
    if have and note.get("url") != url:
        have = 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.get("tag"):
            headers["If-Range"] = note["tag"]
    try:
        response = web.open(url, headers)
    except WebError as error:
        if error.cause != "http_416":
            raise
        if have and have == note.get("size"):
            return
        part.unlink(missing_ok=True)
        response = web.open(url, {"Accept-Encoding": "identity"})
        have = 0
    with response:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        if response.status != 206 or span is None or int(span[1]) != have:
            have = 0
        rest = response.headers.get("Content-Length") or ""
        size = have + int(rest) if rest.isdecimal() else None
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        tag = "" if tag.startswith("W/") else tag
        _note(part).write_text(json.dumps({"url": url, "size": size, "tag": tag}))
        if size is not None:
            tell(f"{url}: {have:,} of {size:,} bytes are here")
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            told = time.monotonic()
            try:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    if time.monotonic() - told > 30:
                        told = time.monotonic()
                        tell(f"{url}: {have:,} bytes")
            except Exception as error:
                raise _web_error(error) from error
            finally:
                file.truncate(have)
    if size is None:
        _note(part).write_text(json.dumps({"url": url, "size": have, "tag": tag}))
    elif have < size:
        raise WebError("truncated", f"{have} of {size} bytes")


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_note(part: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note(part).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _complete(part: Path) -> bool:
    return part.stat().st_size == _read_note(part).get("size")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _checked(url: str, private: bool) -> str:
    """An address that may be opened, with what is no ASCII escaped."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = parts.hostname or ""
        parts.port  # noqa: B018  (raises where it is none)
        ascii_host = host.encode("idna").decode() if not host.isascii() else host
    except (ValueError, UnicodeError) as error:
        raise WebError("bad_url", brief(error)) from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise WebError("bad_url", "only http and https, without a user's name")
    if not private and _is_private(host):
        raise WebError("private_address", host)
    place = parts.netloc.replace(host, ascii_host) if host in parts.netloc else parts.netloc
    quoted = (urllib.parse.quote(text, safe="/%:=&?~#+!$,;'@()*[]") for text in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, place, *quoted, ""))


def _is_private(host: str) -> bool:
    """Whether a name or number is of this machine or a private network, as far as it tells itself."""
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host.split("%")[0]).is_global
    with contextlib.suppress(OSError):  # 127.1, 0x7f000001: what resolvers take for numbers
        return not ipaddress.ip_address(socket.inet_aton(host)).is_global
    return host == "localhost" or host.endswith((".localhost", ".local", ".internal"))


class _Guard(http.client.HTTPConnection):
    """Looks at whom it is connected with before it says anything: names may stand for any address."""

    private = False

    def connect(self) -> None:
        super().connect()
        if not self.private and not _proxied(self.host):
            _refuse_private(self.sock)


class _GuardTls(http.client.HTTPSConnection):
    private = False

    def connect(self) -> None:
        super().connect()
        if not self.private and not _proxied(self.host):
            _refuse_private(self.sock)


def _proxied(host: str) -> bool:
    """Whether that is the user's own proxy, which is wherever it is."""
    proxies = urllib.request.getproxies().values()
    return any(host == urllib.parse.urlsplit(proxy).hostname for proxy in proxies)


def _refuse_private(sock: socket.socket) -> None:
    peer = sock.getpeername()[0]
    if _is_private(peer):
        sock.close()
        raise WebError("private_address", peer)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, private: bool) -> None:
        super().__init__()
        self._connection: Any = type("Guard", (_Guard,), {"private": private})

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, private: bool) -> None:
        super().__init__()
        self._connection: Any = type("GuardTls", (_GuardTls,), {"private": private})

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connection, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def __init__(self, web: Web) -> None:
        self._web = web

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request, of an address that may be opened."""
        return super().redirect_request(req, fp, code, msg, headers, _checked(newurl, self._web.private))


def _opted_out(headers: Any) -> bool:
    said = ",".join(headers.get_all("X-Robots-Tag") or [])
    words = {word.strip().lower() for word in said.replace(":", ",").split(",")}
    return bool(words & _OPTED_OUT)


def _web_error(error: Exception) -> WebError:
    reason = getattr(error, "reason", None)
    if isinstance(error, WebError):
        return error
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return WebError(f"http_{error.code}", str(error.reason))
    if isinstance(reason, WebError):
        return reason
    if isinstance(error, TimeoutError) or isinstance(reason, TimeoutError):
        return WebError("timeout")
    if isinstance(error, http.client.InvalidURL | UnicodeError):
        return WebError("bad_url", brief(error))
    if isinstance(error, http.client.IncompleteRead):
        return WebError("truncated", f"after {len(error.partial)} bytes")
    return WebError("no_connection", brief(error))
