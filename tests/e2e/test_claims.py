"""The experiments of run_scripts/claims: their commands, their runs, and how outcomes are told."""

from __future__ import annotations

import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blip.atomic import write_text
from blip.config.load import load_config
from blip.tasks.capfilt import CapFiltRun
from run_scripts.claims import claims as told
from run_scripts.claims import page
from run_scripts.claims.__main__ import CLAIMS
from run_scripts.claims.claims import Bound, Claim, Expected, Measure, result_of
from run_scripts.claims.jobs import Job, Runner, with_needs
from run_scripts.claims.settings import Lab
from tests.e2e.runs import ROOT

# What they start


def every_job(lab: Lab, *seeds: int) -> list[Job]:
    return with_needs(job for claim in CLAIMS.values() for job in claim.jobs(lab, seeds))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    return Lab(folder / "out", folder / "data")


def test_every_command_s_configuration_is_one_that_there_is(lab: Lab) -> None:
    commands = [command for job in every_job(lab, 1) for command in job.commands]
    read = 0
    for command in commands:
        if "--cfg" not in command or command[3].endswith("train.yaml"):
            continue  # no configuration, or one that CapFilt writes
        config = load_config(command[3], list(command[4:]))
        read += 1
        if isinstance(config.run, CapFiltRun):
            for part in (config.run.captioner, config.run.filter, config.run.pretrain):
                assert part.recipe
                load_config(part.recipe, part.options)
    assert read == 30


def test_arms_differ_in_nothing_but_what_they_are_about(lab: Lab) -> None:
    def options(job: Job) -> set[str]:
        own = ("run.output_dir=", str(lab.output))  # where it lies, and the recipe that it was left
        return {one for one in job.commands[0] if not one.startswith(own)}

    def apart(claim: str, arm: str, base: str) -> set[str]:
        arms = CLAIMS[claim].arms
        return options(arms[arm](lab, 2)) ^ options(arms[base](lab, 2))

    assert apart("contrast", "no soft targets", "all three") == {"model.alpha=0"}
    assert apart("contrast", "random negatives", "all three") == {"model.hard_negatives=false"}
    assert apart("contrast", "no queue", "all three") == {"model.queue_size=0"}
    for name in ("all", "all_but_ca", "none"):
        arm = {"all_but_ca": "all but cross-attention"}.get(name, name)
        assert apart("sharing", arm, "all but self-attention") == {f"model.share={name}"}
    for arm in ("none", "captions and filter"):
        assert apart("longer", f"{arm}, longer", arm) == {"run.max_iters=800"}
    assert apart("itg", "fine-tuned with ITG", "fine-tuned without") == {"model.objectives=[itc, itm]"}
    old = lab.folder("none/2")
    again = {f"model.init_from={old}", "model.vit_init_from=null"}
    assert apart("longer", "old model continued", "captions and filter") == again
    made = {arm: options(make(lab, 2).needs[0]) for arm, make in CLAIMS["capfilt"].arms.items()}
    made["beam"] = options(CLAIMS["nucleus"].arms["beam"](lab, 2).needs[0])
    place = f"{lab.folder('capfilt/2')}/round-1"
    experts = {f"run.{part}.checkpoint={place}/{part}" for part in ("captioner", "filter")}
    both = made["captions and filter"]
    assert made["filter"] ^ both == {*experts, "run.captions.num=0"}
    assert made["captions"] ^ both == {*experts, "run.keep.itm=null"}
    beams = {"run.captions.use_nucleus_sampling=false", "run.captions.num_beams=3"}
    assert made["beam"] ^ both == {*experts, *beams}
    assert apart("itg", "stage 1 with ITG", "stage 1 without") == {"model.objectives=[itc, itm]"}
    start = f"model.init_from={lab.folder('stage1/2')}"
    assert apart("stage1", "from stage 1", "without") == {start}
    assert apart("instruct", "does not read", "as a whole") == {"model.qformer_text_input=false"}
    assert apart("instruct", "drawn equally", "as a whole") == {"run.sampling=uniform"}


def test_runs_are_shared_by_claims_and_seeds_have_their_own(lab: Lab) -> None:
    jobs = every_job(lab, 1, 2, 3)
    folders = [job.folder for job in jobs]
    assert len(set(folders)) == len(folders)
    assert sum(len(with_needs(claim.jobs(lab, (1, 2, 3)))) for claim in CLAIMS.values()) > 1.5 * len(jobs)
    done: set[Job] = set()
    for job in jobs:
        assert done.issuperset(job.needs)
        done.add(job)
    for job in jobs:
        if job.name.split("/")[1] in "123":
            seeds = {one for command in job.commands for one in command if one.startswith("run.seed=")}
            assert seeds <= {f"run.seed={job.folder.name}"}


def test_key_value_goes_to_every_training(lab: Lab) -> None:
    tried = Lab(lab.output, lab.data, ("run.max_iters=7",))
    for job in every_job(tried, 1):
        for command in job.commands:
            if "blip.train" in command or "blip.capfilt" in command:
                assert any("run.max_iters=7" in one for one in command), job.name


# How they are run


def writes(folder: Path, *needs: Job, after: str = "") -> Job:
    """A job that adds a letter to a file in its folder."""
    code = f"from pathlib import Path\nf = Path({str(folder)!r})\nf.mkdir(exist_ok=True)\n"
    code += f"(f / 'x').open('a').write('x')\n{after}"
    return Job(folder, (("-c", code),), needs)


def test_what_is_finished_is_left_alone_and_what_failed_is_done_again(tmp_path: Path) -> None:
    lines: list[str] = []
    first = writes(tmp_path / "kind" / "1")
    broken = writes(tmp_path / "kind" / "2", first, after=f"import sys; sys.exit(not {str(tmp_path)!r}[:0])")
    behind, beside = writes(tmp_path / "kind" / "3", broken), writes(tmp_path / "kind" / "4", first)
    jobs = with_needs([behind, beside])
    assert Runner(2, lines.append).run(jobs) == [broken, behind]
    assert not behind.folder.exists()
    assert any("kind/2: FAILED" in line and str(broken.log) in line for line in lines)
    assert Runner(2, lines.append).run(jobs) == [broken, behind]
    counts = {job.folder.name: len((job.folder / "x").read_text()) for job in jobs if job.folder.exists()}
    assert counts == {"1": 1, "2": 2, "4": 1}
    assert "2 of 4 runs are finished" in lines
    other = Job(first.folder, (("-c", "1"),))
    with pytest.raises(ValueError, match="other commands; choose another --output"):
        Runner(1, lines.append).run([other])


def test_what_most_wait_for_is_done_first_else_in_the_order_given(tmp_path: Path) -> None:
    place = tmp_path / "kind"
    alone = [writes(place / str(i)) for i in range(4)]
    first = writes(place / "first")
    behind = [writes(place / f"behind-{i}", first) for i in range(2)]
    lines: list[str] = []
    assert Runner(1, lines.append).run(with_needs([*alone, *behind])) == []
    names = [line.split("kind/")[1].split(":")[0] for line in lines]
    assert names == ["first", "0", "1", "2", "3", "behind-0", "behind-1"]


def test_as_many_at_once_as_there_are_workers(tmp_path: Path) -> None:
    at_once = []
    jobs = [Job(tmp_path / "kind" / str(i), (("-c", "import time; time.sleep(0.4)"),)) for i in range(6)]
    runner = Runner(3, lambda line: None)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            at_once.append(len(runner._children))

    thread = threading.Thread(target=watch)
    thread.start()
    assert runner.run(jobs) == []
    stop.set()
    thread.join()
    assert 2 <= max(at_once) <= 3


def test_stopped_it_takes_its_runs_along(tmp_path: Path) -> None:
    python = tmp_path / "python"
    script = "trap 'touch $STOPPED; exit 3' TERM; touch $STOPPED.not-yet; while :; do sleep 0.05; done"
    python.write_text(f"#!/usr/bin/env bash\n{script}\n")
    python.chmod(0o755)
    stopped = tmp_path / "stopped"
    claims = [sys.executable, ROOT / "run_scripts" / "claims", "stage1"]
    command = [*claims, "--output", tmp_path / "o", "--jobs", "1"]
    environment = os.environ | {"BLIP_PYTHON": str(python), "STOPPED": str(stopped)}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "stopped.not-yet").exists():
            break
        time.sleep(0.05)
    child.terminate()
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 3, errors
    assert "stopped; the same line goes on" in errors
    assert stopped.exists()
    assert [float(path.read_text()) > 0 for path in (tmp_path / "o").rglob("*.seconds")] == [True]


def test_a_stop_notes_once_how_long_a_run_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopsAtAChild(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            if runner._children:
                raise KeyboardInterrupt
            return super().wait(0.02)

    noted: list[str] = []

    def note(path: Path, text: str) -> None:
        noted.append(threading.current_thread().name)
        write_text(path, text)

    monkeypatch.setattr("run_scripts.claims.jobs.write_text", note)
    before = set(threading.enumerate())
    runner = Runner(1, lambda line: None)
    runner._lock = StopsAtAChild()
    job = Job(tmp_path / "kind" / "1", (("-c", "import time; time.sleep(60)"),))
    with pytest.raises(KeyboardInterrupt):
        runner.run([job])
    for worker in set(threading.enumerate()) - before:
        worker.join(10)
    # Two at once would write to the same draft, and the one that the end of the process cuts off leaves it.
    assert noted == [threading.current_thread().name]
    assert job.spent() > 0


# What they came to


def claim_of(values: dict[str, list[float]], *expected: Expected) -> tuple[Claim, Lab]:
    """A claim with given figures."""
    arms = {arm: (lambda lab, seed, arm=arm: Job(lab.output / arm / str(seed), ())) for arm in values}
    measure = Measure("points", lambda folder: values[folder.parent.name][int(folder.name) - 1])
    return Claim("x", "X", "paper", "about", arms, (measure,), expected), Lab(Path("o"), Path("d"))


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([10, 11, 12], [5, 6, 7], "yes"),
        ([5, 6, 7], [10, 11, 12], "the opposite"),
        ([10, 12, 14], [9, 11, 13], "within the spread"),
        ([9, 11, 13], [10, 12, 14], "not seen"),
        ([10, 10, 10], [10, 10, 10], "not seen"),
        ([10], [5], "one seed: no spread"),
    ],
)
def test_a_difference_counts_beyond_the_spread_of_seeds(
    better: list[float], worse: list[float], verdict: str
) -> None:
    claim, lab = claim_of({"a": better, "b": worse}, Expected("a", "b", ("points",)))
    result = result_of(claim, lab, range(1, len(better) + 1), 1.0)
    [one] = result.compared()
    assert one.gain == pytest.approx(statistics.mean(better) - statistics.mean(worse))
    if len(better) > 1:
        variance = statistics.variance(better) + statistics.variance(worse)
        assert one.spread**2 == pytest.approx(variance)
    assert one.verdict == verdict


def test_where_the_paper_finds_no_difference_there_must_be_none() -> None:
    values: dict[str, list[float]] = {"a": [10, 11, 12], "b": [5, 6, 7], "c": [9, 11, 13], "d": [11, 12, 13]}

    def verdict(better: str, worse: str) -> str:
        claim, lab = claim_of(values, Expected(better, worse, ("points",), told.EQUAL))
        result = result_of(claim, lab, (1, 2, 3), 1.0)
        assert page.findings(result)[1][:3] == [better, "no better or worse than", worse]
        return result.compared()[0].verdict

    assert verdict("a", "c") == verdict("c", "d") == "no difference seen"
    assert verdict("a", "b") == verdict("b", "a") == "a difference"


def test_the_outcome_of_a_claim_is_that_of_all_its_comparisons() -> None:
    values: dict[str, list[float]] = {"a": [10, 11, 12], "b": [5, 6, 7], "c": [9, 11, 13]}

    def outcome(*pairs: str) -> str:
        claim, lab = claim_of(values, *(Expected(*pair, ("points",)) for pair in pairs))
        return result_of(claim, lab, (1, 2, 3), 1.0).verdict()

    assert outcome("ab", "cb") == "reproduces: 2 yes"
    assert outcome("ba") == "does not reproduce: 1 the opposite"
    assert outcome("ca", "ba") == "does not reproduce: 1 not seen, 1 the opposite"
    assert outcome("ab", "ac", "ca", "ba") == "in part: 1 yes, 2 not seen, 1 the opposite"
    assert outcome("ac", "ca") == "undecided: 2 not seen"
    claim, lab = claim_of(values, Expected("a", "b", ("points",)))
    assert result_of(claim, lab, (2,), 1.0).verdict() == "undecided: one seed has no spread"
    for least, more in ((11, ""), (11.5, "; below what is asked: points")):
        asked = replace(claim, bounds=(Bound("a", "points", least),))
        assert result_of(asked, lab, (1, 2, 3), 1.0).verdict() == f"reproduces: 1 yes{more}"


def test_a_figure_that_only_some_seeds_have_is_an_error() -> None:
    claim, lab = claim_of({"a": [1, 2], "b": [1, 2]}, Expected("a", "b", ("points",)))
    half = Measure("points", lambda folder: None if folder.name == "2" else 1.0)
    with pytest.raises(ValueError, match="some seeds have no points"):
        result_of(Claim("x", "X", "p", "", claim.arms, (half,), ()), lab, (1, 2), 1.0)
    none = Measure("points", lambda folder: None)
    with pytest.raises(ValueError, match="'a' has no points"):
        result_of(Claim("x", "X", "p", "", claim.arms, (none,), claim.expected), lab, (1, 2), 1.0)


STAND_IN = """
import json, os, pathlib, sys
options = dict(one.split("=", 1) for one in sys.argv if "=" in one)
if "run.output_dir" in options:
    folder = pathlib.Path(options["run.output_dir"])
    if os.environ.get("FAILS") and os.environ["FAILS"] in str(folder):
        sys.exit(1)
    folder.mkdir(parents=True, exist_ok=True)
    seed = float(options.get("run.seed", 1))
    keys = "txt_r1 img_r1 itc_txt_r1 itc_img_r1 CIDEr Bleu_4 attr_acc held_out_kinds/acc held_out_data/acc"
    keys += " locate/acc refer/acc compare/acc"
    keys += "".join(f" held_out_kinds/type_{kind}" for kind in ("choice", "verify", "count"))
    run = folder.parent if folder.name == "captions" else folder
    value = 20.0 + len(run.parent.name) + (seed if run is folder else float(run.name))
    (folder / "metrics.jsonl").write_text(json.dumps({"split": "test"} | dict.fromkeys(keys.split(), value)))
    asked = {"question": "look at the image and answer: what?", "accuracy": 0.25}
    seen = {"question": "what?", "accuracy": 1.0}
    (folder / "predictions").mkdir(exist_ok=True)
    (folder / "predictions" / "test-held_out_data-step-00001000.json").write_text(json.dumps([asked, seen]))
    (folder / "model").mkdir(exist_ok=True)
    header = json.dumps({"w": {"shape": [30, 100]}, "twin.w": {"shape": [5]}}).encode()
    (folder / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    found = {"truth": {"AUROC by itm": 0.93, "corrupted texts removed": 0.85, "clean texts kept": 0.7}}
    found["truth"]["kept texts that are clean"] = 0.9
    found["truth"]["synthetic texts that are right"] = 0.2
    found["truth"]["synthetic texts that are right, kept ones"] = 0.3
    found["removed"] = {"web": 0.4, "synthetic": 0.25}
    (folder / "round-1").mkdir(exist_ok=True)
    (folder / "round-1" / "summary.json").write_text(json.dumps({"datasets": {"scenes_web": found}}))
"""


def run(tmp_path: Path, *more: str, code: int = 0, **environment: str) -> str:
    """What the command prints, with a stand-in for those that train."""
    python = tmp_path / "python"
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {tmp_path}/stand_in.py "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, str(ROOT / "run_scripts" / "claims"), *more]
    places = ["--output", "out", "--data", "data"]
    done = subprocess.run(
        [*command, *places],
        cwd=tmp_path,
        env=os.environ | {"BLIP_PYTHON": str(python)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_all_claims_are_told_on_one_page(tmp_path: Path) -> None:
    printed = run(tmp_path, "all", "--seeds", "1", "2")
    text = (tmp_path / "out" / "claims.html").read_text()
    for name, claim in CLAIMS.items():
        assert claim.source in printed
        assert page.escape(claim.title) in text
        values = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert values["seeds"] == [1, 2]
        assert values["values"].keys() == claim.arms.keys()
        picture = (tmp_path / "out" / f"{name}.svg").read_text()
        dots = 2 * len(claim.arms) * picture.count("font-weight")  # arms without a measure have none
        assert picture.count("<circle") == dots - 2 * (name == "nucleus")
        assert (tmp_path / "out" / f"{name}.md").read_text().startswith(f"# {claim.title}")
    assert text.count("<svg") == len(CLAIMS)
    capfilt = json.loads((tmp_path / "out" / "capfilt.json").read_text())
    # Four letters, seeds 1 and 2, a hundredfold.
    assert capfilt["values"]["none"]["CIDEr"] == [2500.0, 2600.0]
    assert "AUROC of the filter, clean against corrupted" not in capfilt["values"]["none"]
    reached = {one["measure"]: one["value"] >= one["least"] for one in capfilt["bounds"]}
    assert list(reached.values()) == [True, True, False]
    sharing = json.loads((tmp_path / "out" / "sharing.json").read_text())
    assert sharing["values"]["all"]["thousand weights"] == [3.0, 3.0]
    instruct = json.loads((tmp_path / "out" / "instruct.json").read_text())
    assert instruct["values"]["as a whole"]["held-out wordings of questions, %"] == [25.0, 25.0]
    assert instruct["values"]["as a whole"]["held in, mean, %"] == [(100 + 3 * 29) / 4, (100 + 3 * 30) / 4]
    assert not list((tmp_path / "out").rglob("*partial*"))
    again = run(tmp_path, "capfilt", "--seeds", "1", "2")
    [(done, total)] = re.findall(r"^(\d+) of (\d+) runs are finished$", again, re.M)
    assert done == total == str(len(with_needs(CLAIMS["capfilt"].jobs(Lab(tmp_path, tmp_path), (1, 2)))))
    assert (tmp_path / "out" / "claims.html").read_text() == text  # the others stay on it


def test_runs_that_fail_cost_their_own_claims_only(tmp_path: Path) -> None:
    printed = run(tmp_path, "itg", "stage1", "contrast", "--seeds", "1", code=1, FAILS="stage2")
    assert "stage1: no outcome: runs failed" in printed
    assert (tmp_path / "out" / "itg.json").exists()
    assert not (tmp_path / "out" / "stage1.json").exists()
    assert "no outcome: runs failed" in (tmp_path / "out" / "claims.html").read_text()


def test_mistakes_are_told(tmp_path: Path) -> None:
    assert "nucleos: no claim; choose all, capfilt, nucleus" in run(tmp_path, "nucleos", code=2)
    assert "--seeds: each once" in run(tmp_path, "itg", "--seeds", "1", "1", code=2)
    run(tmp_path, "itg", "--seeds", "1")
    assert "choose another --output" in run(tmp_path, "itg", "run.max_iters=3", "--seeds", "1", code=2)
    listed = run(tmp_path, "--list")
    assert all(re.search(rf"^{name} ", listed, re.M) for name in CLAIMS)
    assert "'itg' is no seed; names of claims and key=value" in run(tmp_path, "--seeds", "1", "itg", code=2)


def test_a_run_that_cannot_be_started_is_one_that_fails(tmp_path: Path) -> None:
    job = writes(tmp_path / "x" / "1")
    behind = writes(tmp_path / "y" / "1", job)
    said: list[str] = []
    runner = Runner(2, said.append)
    runner.python = str(tmp_path / "no-python")
    assert runner.run([job, behind]) == [job, behind]
    assert len(said) == 1
    assert "x/1: FAILED" in said[0]
    assert "no-python" in said[0]


def test_a_folder_is_used_by_one_call_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is at work there" in run(tmp_path, "itg", "--seeds", "1", code=2)
    run(tmp_path, "itg", "--seeds", "1")


def test_a_missing_figure_costs_its_own_claim_only(tmp_path: Path) -> None:
    run(tmp_path, "itg", "stage1", "--seeds", "1")
    (tmp_path / "out" / "runs" / "stage2" / "1" / "metrics.jsonl").unlink()
    printed = run(tmp_path, "itg", "stage1", "--seeds", "1", code=1)
    assert "stage1: no outcome: FileNotFoundError" in printed
    assert "Image-grounded text generation" in (tmp_path / "out" / "claims.html").read_text()


def test_minutes_are_those_of_all_attempts(tmp_path: Path) -> None:
    job = writes(tmp_path / "x" / "1", after="import sys; sys.exit(1)")
    assert Runner(1, print).run([job]) == [job]
    assert job.spent() > 0
    job.unfinished.write_text("600.0")
    good = Job(job.folder, (("-c", ""),))
    assert Runner(1, print).run([good]) == []
    assert 10 <= good.minutes() < 11


def test_scores_are_the_last_of_the_test_split(tmp_path: Path) -> None:
    some = [
        {"split": "test", "a": 1.0, "b": 3.0},
        {"split": "val", "a": 5.0},
        {"split": "test", "a": 2.0, "b": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, some)))
    assert told.score("x", "a", scale=10).read(tmp_path) == 20.0
    assert told.score("x", "c").read(tmp_path) is None
    assert told.mean_score("x", "a", "b").read(tmp_path) == 2.5
    assert told.mean_score("x", "a", "c").read(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps(some[1]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: nothing of the test split"):
        told.score("x", "a").read(tmp_path)


@pytest.mark.slow
def test_a_claim_is_tried_from_nothing(tmp_path: Path) -> None:
    """The real commands, a few steps each: every file and every figure is found."""
    small = "--train 48 --val 0 --test 16 --web 48"
    command = ["bash", str(ROOT / "run_scripts" / "claims" / "run.sh"), "capfilt", "nucleus", "longer"]
    done = subprocess.run(
        [*command, "--seeds", "1", "2", "--output", "out", "--data", "data", "run.max_iters=2"],
        cwd=tmp_path,
        env=os.environ | {"BLIP_PYTHON": sys.executable, "BLIP_SCENES": small},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    capfilt = json.loads((tmp_path / "out" / "capfilt.json").read_text())
    assert all(len(values) == 2 for arm in capfilt["values"].values() for values in arm.values())
    assert {"CIDEr", "picture to text, R@1"} <= capfilt["values"]["none"].keys()
    assert "clean web texts kept, %" in capfilt["values"]["filter"]
    nucleus = json.loads((tmp_path / "out" / "nucleus.json").read_text())
    assert "written texts removed, %" in nucleus["values"]["beam"]
    assert (tmp_path / "out" / "claims.html").stat().st_size > 10_000
