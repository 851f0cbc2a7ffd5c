"""The papers' claims as experiments on the embedded data: arms that differ in one thing, over seeds.

    bash run_scripts/claims/all.sh              all of them; what has been done is not done again
    bash run_scripts/claims/run.sh NAME ...     some: capfilt, nucleus, longer, sharing, contrast, itg,
                                                stage1, instruct
    ... --list                                  what there is, and how many runs each needs
    ... --seeds 1 2 3 4 5 --output FOLDER --data FOLDER --jobs N key=value ...

OUTPUT/claims.html has them all on one page; OUTPUT/NAME.md, .svg and .json are of one. key=value goes to all
trainings, for trying things out.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from run_scripts.claims import blip1, blip2, page
from run_scripts.claims.claims import Claim, Result, result_of
from run_scripts.claims.jobs import Runner, with_needs
from run_scripts.claims.settings import Lab

CLAIMS: dict[str, Claim] = {claim.name: claim for claim in (*blip1.CLAIMS, *blip2.CLAIMS)}


def main(arguments: list[str]) -> int:
    """Run the claims that are named; 1 if any run failed."""
    args = _parse(arguments)
    claims = (
        list(CLAIMS.values())
        if "all" in args.claims or not args.claims
        else [CLAIMS[name] for name in args.claims]
    )
    scenes = tuple(os.environ.get("BLIP_SCENES", "").split())
    reader = tuple(os.environ.get("BLIP_READER", "").split())
    lab = Lab(args.output.absolute(), args.data.absolute(), tuple(args.options), scenes, reader)
    jobs = with_needs(job for claim in claims for job in claim.jobs(lab, args.seeds))
    if args.list:
        for claim in claims:
            own = with_needs(claim.jobs(lab, args.seeds))
            print(f"{claim.name:<10}{claim.source}: {claim.title} ({len(own)} runs)")
        print(f"{len(jobs)} runs in all")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _locked(lab.output) as lock:
            Runner(args.jobs, lock=lock).run(jobs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same line goes on", file=sys.stderr)
        return 3
    results, lost = _outcomes(claims, lab, args.seeds)
    for result in results:
        page.write_claim(result, lab.output)
        print(f"\n{result.claim.title} ({result.claim.source}): {result.verdict()}")
        print(_plain(page.table(result)))
        print(_plain(page.findings(result)))
    for claim, why in lost:
        print(f"\n{claim.name}: no outcome: {why}")
    # What former calls have finished stays on the page.
    others, _ = _outcomes([one for one in CLAIMS.values() if one not in claims], lab, args.seeds)
    order = list(CLAIMS)
    shown = sorted([*results, *others], key=lambda result: order.index(result.claim.name))
    print(f"\nAll on one page: {page.write_page(shown, lost, lab.output)}")
    return 1 if lost else 0


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """A lock on the runs' folder, which whatever was started there holds to its end.

    Raises:
        ValueError: somebody has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{output}: another call, or a run that it has left, is at work there"
            ) from error
        yield file.fileno()


def _outcomes(
    claims: list[Claim], lab: Lab, seeds: list[int]
) -> tuple[list[Result], list[tuple[Claim, str]]]:
    """What finished runs say about claims; and the claims that have no outcome, each with the reason."""
    results: list[Result] = []
    lost: list[tuple[Claim, str]] = []
    for claim in claims:
        own = with_needs(claim.jobs(lab, seeds))
        try:
            if all(job.finished() for job in own):
                results.append(result_of(claim, lab, seeds, sum(job.minutes() for job in own)))
            else:
                lost.append((claim, "runs failed"))
        except (ValueError, KeyError, OSError) as error:
            lost.append((claim, f"{type(error).__name__}: {error}"))
    return results, lost


def _plain(rows: list[list[str]]) -> str:
    """A table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(f"  {line}" for line in lines)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; names of claims and key=value come before it")
    return int(text)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_scripts/claims/run.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME | key=value", help=f"all, {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", nargs="+", type=_seed, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--output", type=Path, default=Path("output/claims"), help="the runs' folder")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("BLIP_DATA", "data")), help="data root"
    )
    parser.add_argument("--jobs", type=int, default=max(len(os.sched_getaffinity(0)), 1), help="runs at once")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    args = parser.parse_intermixed_args(arguments)
    args.options = [one for one in args.names if "=" in one]
    args.claims = [one for one in args.names if "=" not in one]
    for name in args.claims:
        if name != "all" and name not in CLAIMS:
            parser.error(f"{name}: no claim; choose all, {', '.join(CLAIMS)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds: each once")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
