"""`blip data`: lists the catalogue, prepares official files, checks a dataset, makes the embedded one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from blip.cli import guard, set_up_logging
from blip.config.schema import DatasetConfig
from blip.data.catalog import table as catalog
from blip.data.catalog.instruct import ALIASES, MEMBERS
from blip.data.catalog.table import CATALOG
from blip.data.check import Report, check_split, count_words
from blip.data.fetch import is_remote
from blip.data.kinds import KINDS
from blip.data.locate import MissingData, available_splits, locate
from blip.data.official.prepare import prepare, wanted
from blip.data.records import COLUMNS
from blip.data.scenes.make import make_scenes
from blip.errors import EXIT_OK, DataError, UsageError, hint
from blip.models.tokenizer import WordPieces

FORMATS = ("auto", "json", "jsonl", "csv", "tsv", "folder", "shards", "hf")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one command: 0 done, 2 wrong usage, missing or damaged data."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or EXIT_OK)
    set_up_logging()
    command: Callable[[argparse.Namespace], int] = args.command
    return guard(lambda: command(args), debug=args.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip data", description=__doc__.split(": ", 1)[1], allow_abbrev=False
    )
    common = argparse.ArgumentParser(add_help=False)
    text = "where datasets lie; default: the environment variable BLIP_DATA, else data"
    common.add_argument("--data-root", "--out", metavar="FOLDER", help=text)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        added.set_defaults(command=run)
        return added

    command("list", run_list, "list the named datasets, and what of them is on disk")
    _add_prepare(command("prepare", run_prepare, "bring the official files of named datasets into place"))
    _add_check(command("check", run_check, "read a whole dataset: counts, damaged files, samples, lengths"))
    _add_make(command("make", run_make, "make the embedded dataset"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="named datasets")
    text = "folder with the official annotation files, where they are not in place yet"
    parser.add_argument("--from", dest="downloads", type=Path, metavar="FOLDER", help=text)


def _add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", metavar="NAME|PATH", help="a named dataset, or the path of one's own")
    add("--split", help="only this one")
    add("--format", default="auto", choices=FORMATS, help="layout of PATH; default: told by name and content")
    add("--images", metavar="FOLDER", help="folder that the image paths of PATH start from")
    text = "what a record is; default: told by its columns"
    add("--kind", default="auto", choices=("auto", *KINDS), help=text)
    text = "our name of a column and the file's, as in caption=text; may be repeated"
    add("--column", action="append", default=[], metavar="OURS=THEIRS", help=text)
    add("--remote", action="store_true", help="PATH is a url of shards, which are fetched")
    add("--limit", type=_positive, metavar="N", help="read N pictures spread over the set; default: all")
    text = "tokenizer that measures texts: scenes, a vocab.txt, or a name; default: words are counted"
    add("--tokenizer", metavar="NAME", help=text)
    add("--max-bad-ratio", type=float, default=0.05, help="exit with 2 above this share of unusable records")
    add("--report", type=Path, metavar="FILE", help="write every unusable record to FILE, as JSON lines")
    add("--workers", type=_positive, help="decoders at work; default: one per core, at most 8")


def _add_make(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=("scenes",), help="the embedded dataset")
    add("--size", type=_positive, default=64, help="side of the images in pixels; default 64")
    for split, count in (("train", 10000), ("val", 500), ("test", 500), ("web", 5000)):
        add(f"--{split}", type=int, default=count, metavar="N", help=f"images; default {count}")
    add("--seed", type=int, default=0, help="key of all randomness; default 0")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; default one per core")
    add("--overwrite", action="store_true", help="replace scenes that were made with other settings")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def run_list(args: argparse.Namespace) -> int:
    """Print the catalogue."""
    root = catalog.data_root(args.data_root)
    print(f"data root: {root}")
    for name, row in CATALOG.items():
        if row.same_as:
            continue
        missing = wanted(name, root)
        here = [split for split in row.splits if not set(row.of(split)) & set(missing)]
        places = len(row.files) + len(row.others) + bool(row.images)
        state = f"missing {len(missing)} of {places} places" if missing else "ready"
        member = MEMBERS.get(name)
        role = f" [InstructBLIP: {member.group}, held {'in' if member.held_in else 'out'}]" if member else ""
        print(f"{name:<28}{row.kind:<16}{state:<25}{row.about}{role}")
        if missing and here:
            print(f"{'':<44}has {', '.join(here)}; misses {', '.join(missing)}")
    print(f"LAVIS's names for reading the same files as instructions: {', '.join(ALIASES)}")
    print("'blip data prepare NAME' says what to bring; 'blip data make scenes' makes the embedded ones")
    return EXIT_OK


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare datasets, and fail with a list of what is missing."""
    root = catalog.data_root(args.data_root)
    missing = []
    for name in args.names:
        outcome = prepare(name, root, args.downloads)
        for line in outcome.lines:
            print(f"{name} {line}")
        missing += [f"{name}: {line}" for line in outcome.missing]
    if missing:
        print("still wanted (nothing is downloaded or unpacked here):")
        for line in missing:
            print(f"  {line}")
        raise DataError(
            f"{' '.join(args.names)}: not complete, {len(missing)} entries above are wanted; bring them to"
            " those places and run this again, with --from FOLDER where annotation files lie elsewhere"
        )
    print(f"complete; 'blip data check {args.names[0]}' reads it all")
    return EXIT_OK


def run_check(args: argparse.Namespace) -> int:
    """Check all splits of a dataset that are on disk."""
    name, config = _section(args)
    splits = available_splits(name, config, args.data_root)
    if args.split and args.split not in splits:
        raise UsageError(f"--split {args.split}: {name} has no such split{hint(args.split, splits)}")
    count_tokens = _counter(args.tokenizer)
    reports: list[Report] = []
    missing: list[MissingData] = []
    for split in [args.split] if args.split else splits:
        try:
            source = locate(name, config, split, args.data_root)
        except MissingData as error:
            missing.append(error)
            continue
        options = (count_tokens, args.limit, args.workers)
        report = check_split(name, split, source, config, args.data_root, *options)
        print("\n".join(report.lines()), flush=True)
        reports.append(report)
    if missing and not reports:
        raise missing[0]
    for absent in missing:
        print(f"not checked: {absent.problem}")
    if args.report:
        _write_report(args.report, reports)
    over = [f"{r.name} {r.split}: {r.bad_ratio:.1%}" for r in reports if r.bad_ratio > args.max_bad_ratio]
    if over:
        raise DataError(
            f"more than {args.max_bad_ratio:.1%} of the records are unusable ({'; '.join(over)}); the causes"
            " are above, and --report FILE lists every record"
        )
    return EXIT_OK


def _section(args: argparse.Namespace) -> tuple[str, DatasetConfig]:
    """Name and section of what is to be checked."""
    columns = {}
    for pair in args.column:
        ours, equals, theirs = pair.partition("=")
        if not equals or ours not in COLUMNS:
            raise UsageError(f"--column {pair}: write OURS=THEIRS{hint(ours, COLUMNS)}")
        columns[ours] = theirs
    values = {"format": args.format, "kind": args.kind, "images": args.images, "columns": columns}
    if args.what in CATALOG:
        return args.what, DatasetConfig(**values)
    if is_remote(args.what):
        if not args.remote:
            raise UsageError(f"{args.what}: is not on this machine; to fetch its shards, add --remote")
        return "remote", DatasetConfig(path=args.what, remote=True, **values)
    root = catalog.data_root(args.data_root)
    pattern = any(sign in args.what for sign in "{*")
    if not pattern and not (root / args.what).exists() and not Path(args.what).exists():
        raise DataError(
            f"{args.what}: neither a named dataset nor a file or folder, here or under {str(root)!r}"
            f"{hint(args.what, CATALOG)}"
        )
    return Path(args.what).stem or "data", DatasetConfig(path=args.what, **values)


def _counter(tokenizer: str | None) -> Callable[[list[str]], list[int]]:
    if tokenizer is None:
        return count_words
    pieces = WordPieces(tokenizer)
    return lambda texts: pieces(texts)["text_mask"].sum(dim=1).tolist()


def _write_report(path: Path, reports: list[Report]) -> None:
    lines = [
        {"dataset": r.name, "split": r.split, "record": e.name, "cause": e.cause, "detail": e.detail}
        for r in reports
        for e in r.bad
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UsageError(f"--report {path}: cannot be written ({error.strerror})") from error


def run_make(args: argparse.Namespace) -> int:
    """Make `scenes`."""
    counts = {"train": args.train, "val": args.val, "test": args.test, "web": args.web}
    root = catalog.data_root(args.data_root)
    place = make_scenes(
        root, args.size, **counts, seed=args.seed, workers=args.workers, overwrite=args.overwrite
    )
    made = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{place}: {made} images of {args.size} px")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
