"""`blip data`: lists the catalogue, prepares files, makes shards, checks data, makes the embedded dataset."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from blip.cli import guard, set_up_logging
from blip.config.schema import DatasetConfig
from blip.data.catalog import table as catalog
from blip.data.catalog.listing import as_data, details, table
from blip.data.catalog.table import CATALOG
from blip.data.check import Report, check_split, count_words
from blip.data.kinds import KINDS
from blip.data.locate import MissingData, available_splits, locate
from blip.data.official.fetch import AGENT, Web
from blip.data.official.pack import Packing, of_disk, of_web, on_disk, pack
from blip.data.official.prepare import MOST_BYTES, prepare, wanted
from blip.data.official.urls import is_list, read_urls
from blip.data.records import COLUMNS
from blip.data.scenes.make import make_scenes
from blip.data.streams.fetch import is_remote
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
    try:
        code = guard(lambda: command(args), debug=args.debug)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # what read our output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


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

    _add_list(command("list", run_list, "list the named datasets, and what of them is on disk"))
    _add_prepare(command("prepare", run_prepare, "bring the official files of named datasets into place"))
    text = "make webdataset shards of a list of addresses (--fetch), or of pictures on disk"
    _add_shards(command("shards", run_shards, text))
    _add_check(command("check", run_check, "read a whole dataset: counts, damaged files, samples, lengths"))
    _add_make(command("make", run_make, "make the embedded dataset"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="named datasets")
    text = "folder with the official files and archives, where they are not in place yet; subfolders count"
    parser.add_argument("--from", dest="downloads", type=Path, metavar="FOLDER", help=text)
    _add_fetch(
        parser, "download what the catalogue has an address of, and the pictures of lists of addresses"
    )


def _add_list(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="tell everything about these")
    add("--group", help="only datasets of this group, or part of its name")
    add("--json", action="store_true", help="everything about them, for programs")


def _add_fetch(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--fetch", action="store_true", help=text)
    text = "also open addresses of this machine and of private networks"
    parser.add_argument("--allow-private", action="store_true", help=text)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "what", nargs="+", metavar="NAME|PATH", help="a dataset; with --fetch lists of addresses and captions"
    )
    add("folder", type=Path, metavar="OUT", help="folder of the shards")
    _add_fetch(
        parser, "PATH is a list of addresses (json, jsonl, csv, tsv, txt, parquet): download the pictures"
    )
    add("--url-column", default="", metavar="NAME", help="column of the addresses; default: told by its name")
    add("--caption-column", default="", metavar="NAME", help="likewise of the captions")
    add(
        "--columns", default="", metavar="A,B", help="columns of a list without a header, such as caption,url"
    )
    _add_own(parser)
    default = Packing()
    for name, text in (
        ("image_size", "shorter side in pixels"),
        ("min_image_size", "pictures whose shorter side is smaller are left out"),
        ("per_shard", "rows of a shard"),
        ("quality", "of JPEG"),
        ("threads", "pictures on their way at a time"),
    ):
        value = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{text}; default {value}")
    modes = ("keep_ratio", "center_crop", "no")
    add("--resize", choices=modes, default=default.resize, help=f"default {default.resize}")
    text = "make smaller pictures larger, too"
    add("--enlarge", dest="only_if_bigger", action="store_false", help=text)
    add("--timeout", type=float, default=10, metavar="SECONDS", help="wait for a server; default 10")
    add("--retries", type=int, default=1, metavar="N", help="further tries of broken connections; default 1")
    add("--max-bytes", type=_positive, default=MOST_BYTES, metavar="N", help="of a picture; default 32 MiB")
    add("--user-agent", default=AGENT, metavar="TEXT", help=f"told to servers; default {AGENT!r}")


def _add_own(parser: argparse.ArgumentParser) -> None:
    """Options that describe a dataset of one's own."""
    add = parser.add_argument
    add("--split", help="only this one")
    add("--format", default="auto", choices=FORMATS, help="layout of PATH; default: told by name and content")
    add("--images", metavar="FOLDER", help="folder that the image paths of PATH start from")
    text = "what a record is; default: told by its columns"
    add("--kind", default="auto", choices=("auto", *KINDS), help=text)
    text = "our name of a column and the file's, as in caption=text; may be repeated"
    add("--column", action="append", default=[], metavar="OURS=THEIRS", help=text)


def _add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", metavar="NAME|PATH", help="a named dataset, or the path of one's own")
    _add_own(parser)
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
    """Print the catalogue, some of its rows, or everything about one."""
    root = catalog.data_root(args.data_root)
    names = args.names or [name for name, row in CATALOG.items() if not row.same_as]
    groups = {catalog.row(name).group for name in names}
    found = {group for group in groups if (args.group or "").lower() in group.lower()}
    if not found:
        raise UsageError(f"--group {args.group}: no dataset is of such a group{hint(args.group, groups)}")
    names = [name for name in names if catalog.row(name).group in found]
    missing = {name: wanted(name, root) for name in names}
    if args.json:
        print(json.dumps([as_data(name, root, missing[name]) for name in names], indent=1))
        return EXIT_OK
    if args.names:
        print("\n".join(line for name in names for line in details(name, root, missing[name])))
        return EXIT_OK
    print(f"data root: {root}")
    print("\n".join(table(names, missing)))
    others = [name for name, row in CATALOG.items() if row.same_as]
    print(f"other names of the same files, most of them LAVIS's: {', '.join(others)}")
    print(
        "'blip data list NAME' tells all about one; 'blip data prepare NAME' says what to bring;"
        " 'blip data make scenes' makes the embedded ones"
    )
    return EXIT_OK


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare datasets, and fail with a list of what is missing."""
    root = catalog.data_root(args.data_root)
    web = Web(timeout_s=60, private=args.allow_private) if args.fetch else None
    missing = []
    for name in args.names:
        outcome = prepare(name, root, args.downloads, web)
        for line in outcome.lines:
            print(f"{name} {line}")
        missing += [f"{name}: {line}" for line in outcome.missing]
    if missing:
        print("still wanted" + ("" if args.fetch else " (nothing is downloaded without --fetch)") + ":")
        for line in missing:
            print(f"  {line}")
        raise DataError(
            f"{' '.join(args.names)}: not complete, {len(missing)} entries above are wanted; bring them to"
            " those places and run this again, with --from FOLDER where the downloaded files or archives lie"
            " elsewhere, or with --fetch for those whose addresses 'blip data list NAME' shows"
        )
    print(f"complete; 'blip data check {args.names[0]}' reads it all")
    return EXIT_OK


def run_shards(args: argparse.Namespace) -> int:
    """Make shards of a list of addresses, or of pictures on disk."""
    packing = Packing(**{f.name: getattr(args, f.name) for f in fields(Packing)})
    root = catalog.data_root(args.data_root)
    columns = [name.strip() for name in args.columns.split(",") if name.strip()]
    paths = [path if path.exists() else root / path for path in map(Path, args.what)]
    if args.fetch:
        records = read_urls(paths, args.url_column, args.caption_column, columns)
        web = Web(args.timeout, args.allow_private, args.user_agent)
        items = of_web(records, web, args.max_bytes, args.retries)
        source = ", ".join(f"{path.name} of {path.stat().st_size} bytes" for path in paths if path.exists())
    else:
        if len(paths) > 1:
            raise UsageError(
                "several lists are lists of addresses, which need --fetch; else name one dataset"
            )
        (args.what,) = args.what
        if args.what not in CATALOG and paths[0].is_file() and is_list(paths[0], args.url_column, columns):
            raise UsageError(f"{paths[0]}: a list of addresses; add --fetch to download what it names")
        name, config = _section(args)
        split = args.split or available_splits(name, config, args.data_root)[0]
        items = of_disk(on_disk(name, locate(name, config, split, args.data_root)))
        source = f"{name} {split}"
    done = pack(items, args.folder, packing, source, print)
    print(f"{args.folder}: {done.line()}")
    if not done.causes["success"]:
        raise DataError(f"{args.folder}: none of {done.rows} rows gave a sample; the causes are above")
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
        meant = catalog.similar(args.what)
        meant = meant if "did you mean" in meant else "; 'blip data list' shows the names"
        raise DataError(
            f"{args.what}: neither a named dataset nor a file or folder, here or under {str(root)!r}{meant}"
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
