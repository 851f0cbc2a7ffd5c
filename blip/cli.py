"""What all commands share: `--cfg`, overrides, `--print-config`, the way from an error to an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from blip.config.files import dump
from blip.config.load import load_config
from blip.config.schema import Config
from blip.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE, BlipError, Stopped, UsageError

log = logging.getLogger("blip")

EXIT_INTERRUPTED = 130
"""Interrupted before there was anything to save; shells use 128 + SIGINT."""

Main = Callable[[Config, argparse.Namespace], int | None]


def run_command(
    main: Main,
    argv: Sequence[str] | None = None,
    description: str = "",
    *,
    prog: str | None = None,
    forced: Sequence[str] = (),
    known_datasets: Callable[[], Iterable[str]] | None = None,
) -> int:
    """Read the command line, load the configuration, call `main`, and turn what happens into an exit code.

    Args:
        main: gets the configuration and the parsed arguments (`dry_run`, `debug`); None means success.
        argv: arguments without the program's name; None: those of the process.
        description: first line of `--help`.
        prog: how `--help` calls the command, such as `blip train`.
        forced: overrides that the command itself implies, such as `run.evaluate=true`; they win.
        known_datasets: gives the names of the dataset catalogue; asked after `--import`.

    Returns:
        0 done, 2 wrong usage, configuration or data, 3 stopped after saving, 130 interrupted before that.
    """
    try:
        args = build_parser(description, prog).parse_intermixed_args(argv)
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or EXIT_OK)
    set_up_logging()
    return guard(lambda: _run(main, args, forced, known_datasets), debug=args.debug)


def guard(action: Callable[[], int | None], debug: bool = False) -> int:
    """The exit code of `action`; a user's mistake becomes one paragraph on stderr.

    Args:
        debug: print the traceback too.
    """
    try:
        return action() or EXIT_OK
    except BlipError as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        return EXIT_USAGE
    except Stopped as stop:
        log.warning("%s", str(stop) or "stopped after saving")
        return EXIT_STOPPED
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _say("interrupted before there was anything to save")
        return EXIT_INTERRUPTED


def build_parser(description: str = "", prog: str | None = None) -> argparse.ArgumentParser:
    """The arguments of every command that reads a configuration."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add, pair = parser.add_argument, "key=value"
    text = "recipe: a path, or a name in configs/"
    add("--cfg", "--cfg-path", dest="cfg", required=True, metavar="NAME", help=text)
    text = "dotted key and YAML value, as in run.max_iters=100"
    add("overrides", nargs="*", metavar=pair, help=text)
    text = "the same, as LAVIS spells it"
    add("--options", nargs="+", action="extend", default=[], metavar=pair, help=text)
    text = "print the configuration with the origin of each value, and exit"
    add("--print-config", action="store_true", help=text)
    text = "build everything, run one step and one evaluation batch, and exit"
    add("--dry-run", action="store_true", help=text)
    text = "import a module that registers models, tasks or processors; may be repeated"
    add("--import", dest="imports", action="append", default=[], metavar="MODULE", help=text)
    add("--debug", action="store_true", help="show tracebacks and debug messages")
    return parser


def import_modules(names: Iterable[str]) -> None:
    """Import a user's own modules, from the working directory too.

    Raises:
        UsageError: a module is missing, or fails while it is imported.
    """
    here = os.getcwd()
    for name in names:
        # `python -m` has the working directory on the path, the console script does not.
        if not {"", here} & set(sys.path):
            sys.path.insert(0, here)
        try:
            importlib.import_module(name)
        except BlipError:
            raise
        except Exception as error:  # a user's module may fail in any way
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"--import {name}: it fails with {reason}; --debug shows where") from error


def set_up_logging() -> None:
    """Messages of rank 0 from INFO on, of other ranks from WARNING on, with the rank in front."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{_prefix()}%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)


def _run(
    main: Main,
    args: argparse.Namespace,
    forced: Sequence[str],
    known_datasets: Callable[[], Iterable[str]] | None,
) -> int | None:
    if args.debug:
        log.setLevel(logging.DEBUG)
    import_modules(args.imports)
    names = known_datasets() if known_datasets else None
    config = load_config(args.cfg, [*args.options, *args.overrides, *forced], known_datasets=names)
    if args.print_config:
        if _rank() == 0:
            print("".join(f"# {note}\n" for note in config.notes) + dump(config, origins=True), end="")
        return EXIT_OK
    if _rank() == 0:
        for note in config.notes:
            log.warning("%s", note)
    return main(config, args)


def _rank() -> int:
    """The rank before the process group exists, and without importing torch."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _say(text: str) -> None:
    """A line on stderr, in one piece: print would write the line break apart, behind what other ranks say."""
    sys.stderr.write(f"{_prefix()}{text}\n")
    sys.stderr.flush()


def _prefix() -> str:
    return f"[rank {_rank()}] " if _rank() else ""
