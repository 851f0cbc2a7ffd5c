"""Facts about the Java programs of pycocoevalcap: told apart what is there, and a failure is an error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blip.metrics import java

FAKE = """#!{python}
import json, sys

if "-version" in sys.argv:
    sys.exit({version})
if "-silent" in sys.argv:
    asked = json.load(open(sys.argv[sys.argv.index("-silent") - 3]))
    scores = [len(a["refs"]) / 10 if a["test"] else None for a in asked]
    answer = [{{"image_id": a["image_id"], "scores": {{"All": {{"f": f}}}}}} for a, f in zip(asked, scores)]
    if {works}:
        json.dump(answer, open(sys.argv[sys.argv.index("-out") + 1], "w"))
    print("out of memory", file=sys.stderr)
elif "-stdio" in sys.argv:
    for line in sys.stdin:
        if not {works}:
            sys.exit(1)
        if line.startswith("EVAL"):
            parts = line.split(" ||| ")[1:]
            print("\\n".join(["0.5"] * len(parts) + [parts[-1].strip()]), flush=True)
        else:
            print(len(line.split(" ||| ")), flush=True)
elif {works}:
    print(open(sys.argv[-1]).read().lower(), end="")
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, works: bool = True, version: int = 0) -> Path:
    """A `java` that behaves, or does not, and a package folder with all jars."""
    program = folder / "bin" / "java"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable, works=works, version=version))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    package = folder / "package"
    for jar in (java.TOKENIZER_JAR, java.METEOR_JAR, java.SPICE_JAR, *java.SPICE_MODELS):
        (package / jar).parent.mkdir(parents=True, exist_ok=True)
        (package / jar).touch()
    monkeypatch.setattr(java, "package_folder", lambda: package)
    return package


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install(tmp_path, monkeypatch)
    jars = (java.SPICE_JAR, *java.SPICE_MODELS)
    assert java.problem(*jars) is None
    (package / java.SPICE_MODELS[1]).unlink()
    assert java.problem(java.METEOR_JAR) is None
    assert "no stanford-corenlp-3.6.0-models.jar" in str(java.problem(*jars))
    monkeypatch.setattr(java, "package_folder", lambda: None)
    assert "pip install 'blip[eval]'" in str(java.problem(*jars))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no java on the PATH" in str(java.problem(*jars))


def test_a_java_that_does_not_run_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /usr/bin/java of a Mac without Java."""
    install(tmp_path, monkeypatch, version=1)
    assert "does not run" in str(java.problem(java.METEOR_JAR))


def test_spice_is_the_mean_of_what_the_jar_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert java.spice(["a", "b"], [["x"], ["y", "z"]]) == pytest.approx(0.15)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "bin", tmp_path / "package"]


def test_a_caption_that_spice_gives_no_score_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    with pytest.raises(java.JavaError, match="SPICE gave no score for caption 1"):
        java.spice(["a", ""], [["x"], ["y"]])


def test_meteor_is_the_last_number_however_much_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds goes out before anything comes back."""
    install(tmp_path, monkeypatch)
    captions = ["a dog " * 20] * 3000
    assert java.meteor(captions, [["x", "y", "z"]] * 3000) == 5.0


def test_several_corpora_are_tokenised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert java.tokenize([["A B", ""], [], ["\u00c9"]]) == [["a b", ""], [], ["\u00e9"]]


def test_a_jar_that_fails_is_an_error_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, works=False)
    with pytest.raises(java.JavaError, match="out of memory"):
        java.spice(["a"], [["x"]])
    with pytest.raises(java.JavaError, match="METEOR stopped"):
        java.meteor(["a"] * 3000, [["x" * 100]] * 3000)
    with pytest.raises(java.JavaError, match="after 1 lines"):
        java.tokenize([["a", "b"]])
    (tmp_path / "bin" / "java").unlink()
    with pytest.raises(java.JavaError, match="does not start"):
        java.meteor(["a"], [["x"]])
