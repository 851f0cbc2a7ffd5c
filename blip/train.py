"""`python -m blip.train --cfg NAME [key=value ...]`: train what a configuration describes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blip.build import execute
from blip.cli import run_command
from blip.data.catalog.table import names


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; see `blip.cli.run_command`."""
    return run_command(
        lambda config, args: execute(config, args.dry_run),
        argv,
        "Train what a configuration describes, and evaluate it on the way.",
        prog="blip train",
        known_datasets=names,
    )


if __name__ == "__main__":
    sys.exit(main())
