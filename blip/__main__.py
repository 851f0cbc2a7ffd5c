"""The `blip` command: `blip train ...` is `python -m blip.train ...`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

import blip
from blip.errors import EXIT_OK, EXIT_USAGE, hint

COMMANDS = {
    "train": ("blip.train", "train what a configuration describes"),
    "evaluate": ("blip.evaluate", "evaluate a checkpoint on the configuration's evaluation sets"),
    "capfilt": ("blip.capfilt", "caption and filter noisy image-text data, to train on what is kept"),
    "predict": ("blip.predict", "caption, answer, match, or write features of pictures, or chat about one"),
    "convert": ("blip.convert", "convert weights between our, LAVIS's and Hugging Face's layout"),
    "cache_features": ("blip.cache_features", "write what a frozen tower sees once, to train without it"),
    "data": ("blip.data", "list, prepare, check or make datasets"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to a command's module, which sees the arguments behind the command's name.

    Returns:
        The exit code, where the command ends without raising `SystemExit`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if arguments else EXIT_USAGE
    if arguments[0] in ("--version", "-V"):
        print(f"blip {blip.__version__}")
        return EXIT_OK
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: blip {command}: no such command{hint(command, COMMANDS)}", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return EXIT_USAGE
    module, _ = COMMANDS[command]
    sys.argv = [f"blip {command}", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return EXIT_OK


def usage() -> str:
    """The commands with one line each."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: blip COMMAND ...", "", *lines, "", "blip COMMAND --help tells more."])


if __name__ == "__main__":
    raise SystemExit(main())
