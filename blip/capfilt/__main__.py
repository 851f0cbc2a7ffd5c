"""`python -m blip.capfilt --cfg NAME [key=value ...]`: caption and filter noisy image-text data.

A captioner writes texts about the pictures, a filter removes texts that do not match, of the web and written
ones, and what stays is a dataset of the same format, to be trained on (BLIP, section 3.3).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blip.capfilt.rounds import execute
from blip.cli import run_command
from blip.data.catalog.table import names


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; see `blip.cli.run_command`."""
    return run_command(
        lambda config, args: execute(config, args.dry_run),
        argv,
        "Caption and filter noisy image-text data, and write what is kept as a dataset to train on.",
        prog="blip capfilt",
        known_datasets=names,
    )


if __name__ == "__main__":
    sys.exit(main())
