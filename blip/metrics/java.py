"""METEOR, SPICE and the Penn Treebank tokenizer, run by the jars that pycocoevalcap brings."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
SPICE_JAR = "spice/spice-1.0.jar"
SPICE_MODELS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
UTF8 = "-Dfile.encoding=UTF-8"  # before Java 18 the locale decides


class JavaError(Exception):
    """A jar that did not do its work."""


def problem(*jars: str) -> str | None:
    """Why `jars` of pycocoevalcap cannot be run here; None where they can.

    Nothing is downloaded: pycocoevalcap would fetch SPICE's models into the installed package.
    """
    java = shutil.which("java")
    if java is None:
        return "no java on the PATH; install a Java runtime"
    if not _runs(java):
        return f"'{java}' does not run; install a Java runtime"
    folder = package_folder()
    if folder is None:
        return "pycocoevalcap is not installed; pip install 'blip[eval]'"
    missing = [jar for jar in jars if not (folder / jar).is_file()]
    if missing:
        return f"no {Path(missing[0]).name} in pycocoevalcap's folder {Path(missing[0]).parent.as_posix()}"
    return None


def package_folder() -> Path | None:
    """Where pycocoevalcap is installed."""
    try:
        found = importlib.util.find_spec("pycocoevalcap")
    except (ImportError, ValueError):
        return None
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None


@cache
def _runs(java: str) -> bool:
    try:
        return (
            subprocess.run([java, "-version"], capture_output=True, timeout=60, check=False).returncode == 0
        )
    except (OSError, subprocess.SubprocessError):
        return False


def tokenize(corpora: Sequence[Sequence[str]]) -> list[list[str]]:
    """What Stanford's PTBTokenizer makes of texts, in lower case; several corpora at once, each by itself.

    Args:
        corpora: lists of texts without line breaks.

    Returns:
        For each text its tokens, punctuation included, with blanks between them.

    Raises:
        JavaError: it failed.
    """
    name = "edu.stanford.nlp.process.PTBTokenizer"
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i, texts in enumerate(corpora):
            path = Path(folder) / f"{i}.txt"
            path.write_text("\n".join(texts), encoding="utf-8", errors="replace", newline="\n")
            options = [UTF8, "-cp", _jar(TOKENIZER_JAR), name, "-preserveLines", "-lowerCase", str(path)]
            running.append(_start(options, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        outputs = [process.communicate()[0] for process in running]
    found = []
    for texts, output, process in zip(corpora, outputs, running, strict=True):
        lines = output.decode("utf-8").split("\n")
        if process.returncode or len(lines) < len(texts):
            raise JavaError(f"the tokenizer ended with {process.returncode} after {len(lines)} lines")
        found.append(lines[: len(texts)])
    return found


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of a corpus of tokenised captions, 0 to 1.

    Raises:
        JavaError: it failed.
    """
    options = [UTF8, "-Xmx2G", "-jar", _jar(METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    process = _start(options, stdin=pipe, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    lines = [
        " ||| ".join(("SCORE", *group, text.replace("|||", "").replace("  ", " ")))
        for text, group in zip(candidates, references, strict=True)
    ]
    # Asking and reading go on side by side, or the pipes fill up.
    asking = threading.Thread(target=_send, args=(process, lines), daemon=True)
    asking.start()
    try:
        statistics = [process.stdout.readline().decode("utf-8").strip() for _ in lines]
        asking.join()
        _send(process, [" ||| ".join(("EVAL", *statistics))])
        scores = [process.stdout.readline() for _ in range(len(lines) + 1)]  # the last is the corpus's
        return float(scores[-1])
    except (ValueError, OSError) as error:
        raise JavaError(f"METEOR stopped: {error}") from error
    finally:
        process.kill()
        process.communicate()


def _send(process: subprocess.Popen[bytes], lines: Sequence[str]) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # a process that has ended: the answers that are missing make the error
        for line in lines:
            process.stdin.write(line.encode("utf-8", errors="replace") + b"\n")
        process.stdin.flush()


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SPICE of a corpus of tokenised captions, 0 to 1: the mean F-score of the captions.

    Raises:
        JavaError: it failed.
    """
    asked = [
        {"image_id": i, "test": text, "refs": list(group)}
        for i, (text, group) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "in.json", Path(folder) / "out.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        # No -cache, which writes into the installed package; no -subset, which scores kinds of words, too.
        options = [UTF8, "-Xmx8G", "-jar", _jar(SPICE_JAR), str(question), "-out", str(answer), "-silent"]
        process = _start(options, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = process.communicate()[1]
        try:
            found = [item["scores"]["All"]["f"] for item in json.loads(answer.read_text("utf-8"))]
            if None in found:  # pycocoevalcap's mean would be NaN
                raise JavaError(f"SPICE gave no score for caption {found.index(None)}")
            scores = [float(score) for score in found]
        except (OSError, ValueError, KeyError, TypeError) as error:
            last = said.decode("utf-8", errors="replace").strip().splitlines()[-1:] or [str(error)]
            raise JavaError(f"SPICE ended with {process.returncode}: {last[0]}") from error
    if len(scores) != len(asked):
        raise JavaError(f"SPICE gave {len(scores)} scores for {len(asked)} captions")
    return sum(scores) / max(len(scores), 1)


def _jar(name: str) -> str:
    folder = package_folder()
    if folder is None:
        raise JavaError("pycocoevalcap is not installed")
    return str(folder / name)


def _start(options: list[str], stdin: int, stderr: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(["java", *options], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr)
    except OSError as error:
        raise JavaError(f"java does not start: {error}") from error
