"""Bytes of a url, or of what a command prints: one attempt, and how often to try.

`http` and `https` take the standard library; other file systems are fsspec's, with the package that each of
them needs. Commands (`pipe:...`) run only where the environment variable `BLIP_PIPES` is 1, which no
configuration file can set.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, TypeVar

from blip.errors import ConfigError, DataError

log = logging.getLogger(__name__)

PIPES_VARIABLE = "BLIP_PIPES"
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "oss": "ossfs",
    "hf": "huggingface_hub",
}
"""Scheme -> what fsspec needs for it."""
SCHEMES = ("http", "https", *PACKAGES, "ftp", "sftp", "hdfs", "memory")
TIMEOUT_S = 60.0
DELAYS_S = (1.0, 4.0, 16.0)
"""Pauses before another attempt."""

_CHUNK = 1 << 20
_PLAIN = "/%:=&?~#+!$,;'@()*[]"
"""Signs of a url that stay as they are; spaces and what is no ASCII are escaped."""
_TEMPORARY = (408, 425, 429)
"""HTTP's refusals that another attempt may end; so may all from 500 on."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")


class FetchError(OSError):
    """A url that gives nothing; `final` where another attempt would not help."""

    def __init__(self, problem: str, final: bool = False) -> None:
        super().__init__(problem)
        self.final = final


def is_remote(text: str) -> bool:
    """Whether a path is a url or a command."""
    return bool(re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+:", text)) and not os.path.exists(text)


def scheme_of(url: str) -> str:
    """What stands before the first colon, in small letters."""
    return url.partition(":")[0].lower()


def shown(url: str) -> str:
    """A url for messages: without passwords, and without the signature that may stand behind `?`."""
    return url if url.startswith("pipe:") else re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def check_url(url: str, key: str) -> None:
    """Raise ConfigError where nothing can read such a url, or it is a command and these are not allowed.

    Args:
        url: url or command.
        key: of the configuration, for the message.
    """
    scheme = scheme_of(url)
    if scheme == "pipe":
        if os.environ.get(PIPES_VARIABLE) != "1":
            raise ConfigError(
                f"{key}: {url!r} is a command, and no configuration file runs one; if you trust it, start"
                f" with the environment variable {PIPES_VARIABLE}=1"
            )
        _words(url, key)
        return
    if scheme not in SCHEMES or "://" not in url or "::" in url:
        raise ConfigError(
            f"{key}: {shown(url)!r} is no url of {', '.join(SCHEMES)}; name a file or such a url"
        )
    if scheme not in ("http", "https"):
        _file_system(url)


def listed(pattern: str, key: str) -> list[str]:
    """The urls that `*` in a pattern stands for, sorted.

    Raises:
        ConfigError: of a web server, which lists no files.
        DataError: the file system does not answer.
    """
    if scheme_of(pattern) in ("http", "https"):
        raise ConfigError(
            f"{key}: {shown(pattern)!r}: a web server lists no files; write their numbers, as in"
            " {00000..00012}.tar"
        )
    system, path = _file_system(pattern)
    try:
        found = tried(lambda: system.glob(path))
    except Exception as error:  # file systems raise whatever their libraries do
        raise DataError(f"{key}: {shown(pattern)!r} cannot be listed ({_reason(error)})") from error
    return sorted(str(system.unstrip_protocol(name)) for name in found)


@contextmanager
def opened(url: str, start: int | None = None) -> Iterator[tuple[IO[bytes], int | None]]:
    """A stream of what is at `url`, and its size in bytes where that is known.

    Args:
        start: number of bytes that are enough, counted from the beginning; there may be more.

    Raises:
        FetchError: it cannot be read.
    """
    scheme = scheme_of(url)
    try:
        if scheme == "pipe":
            with _command(url) as stream:
                yield stream, None
        elif scheme in ("http", "https"):
            headers = {"User-Agent": "blip"} | ({"Range": f"bytes=0-{start - 1}"} if start else {})
            request = urllib.request.Request(urllib.parse.quote(url, safe=_PLAIN), headers=headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                length = answer.headers.get("Content-Length")
                yield answer, int(length) if length is not None and length.isdigit() else None
        else:
            system, path = _file_system(url)
            with system.open(path, "rb", block_size=1 << (22 if start is None else 16)) as stream:
                yield stream, getattr(stream, "size", None) or system.info(path).get("size")
    except (FetchError, DataError):
        raise
    except urllib.error.HTTPError as error:
        final = error.code < 500 and error.code not in _TEMPORARY
        raise FetchError(f"{shown(url)}: HTTP {error.code} {error.reason}", final) from error
    except Exception as error:  # as above
        hopeless = (FileNotFoundError, PermissionError, IsADirectoryError, http.client.InvalidURL)
        final = isinstance(error, hopeless)
        raise FetchError(f"{shown(url)}: {_reason(error)}", final) from error


def copy(url: str, out: IO[bytes], expect: Callable[[int], None], count: Callable[[int], None]) -> int | None:
    """One attempt to write what is at `url` to an empty file.

    Args:
        expect: told the size before the first byte, where it is known.
        count: told of every piece.

    Returns:
        The size, where it is known.

    Raises:
        FetchError: it cannot be read, or ends early.
        DataError: the disk is full.
    """
    total = 0
    with opened(url) as (stream, size):
        if size is not None:
            expect(size)
        while piece := stream.read(_CHUNK):
            try:
                out.write(piece)
                out.flush()
            except OSError as error:
                raise DataError(
                    f"'{getattr(out, 'name', '')}': {error.strerror}, while {shown(url)} is fetched"
                    + ("; free some, or lower the dataset's cache_gb" if error.errno in _DISK_FULL else "")
                ) from error
            total += len(piece)
            count(len(piece))
    if size is not None and total != size:
        raise FetchError(f"{shown(url)}: it ends after {total} of {size} bytes")
    return size


def tried(action: Callable[[], T]) -> T:
    """What `action` gives, at one of several attempts; all but final failures are tried again.

    Raises:
        FetchError: the last failure.
    """
    for delay in DELAYS_S:
        try:
            return action()
        except FetchError as error:
            if error.final:
                raise
            log.debug("%s; once more in %g s", error, delay)
            time.sleep(delay)
    return action()


def content(url: str, limit: int = 1 << 26) -> bytes | None:
    """What is at `url`, if it is a small file; None where there is none.

    Raises:
        FetchError: it cannot be read.
    """
    try:
        data = tried(partial(_content, url, limit))
    except FetchError as error:
        if error.final:
            return None
        raise
    if len(data) > limit:
        raise FetchError(f"{shown(url)}: larger than {limit} bytes", final=True)
    return data


def _content(url: str, limit: int) -> bytes:
    with opened(url) as (stream, _):
        return stream.read(limit + 1)


def _words(command: str, key: str = "path") -> list[str]:
    """Program and arguments of a `pipe:` command; no shell reads it, so none of its signs is special.

    Raises:
        ConfigError: it is made for a shell, or empty.
    """
    lexer = shlex.shlex(command.removeprefix("pipe:"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{key}: {command!r}: {error}") from error
    if not words or any(set(word) <= set("();<>|&") or "`" in word or "$" in word for word in words):
        raise ConfigError(
            f"{key}: {command!r}: commands are run without a shell, as one program with arguments; put"
            " what needs a shell into a script"
        )
    return words


@contextmanager
def _command(command: str) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(_words(command), stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            yield process.stdout
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
        if code:
            errors.seek(0)
            said = errors.read()[-300:].decode(errors="replace").strip()
            raise FetchError(f"{command}: it ends with code {code}" + (f" ({said})" if said else ""))


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a url, and the path in it.

    Raises:
        ConfigError: the package that it needs is not installed.
    """
    import fsspec  # torch brings it; few runs need it

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(scheme_of(url))
        advice = f"pip install {package}" if package else "install what it names, or take another place"
        raise ConfigError(f"{shown(url)!r}: fsspec cannot read it ({_reason(error)}); {advice}") from error
    return system, path


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error.reason, str):
        return _reason(error.reason) if isinstance(error.reason, Exception) else str(error.reason)
    if isinstance(error, http.client.HTTPException):
        return f"{type(error).__name__} {error}".strip()
    return str(error) or type(error).__name__
