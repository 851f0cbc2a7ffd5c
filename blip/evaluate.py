"""`python -m blip.evaluate --cfg NAME [key=value ...]`: score weights on the evaluation sets.

The weights are those of `run.resume` (a checkpoint, or `auto`: the best of `run.output_dir`), else those that
`model.init_from` names. A run folder's own `config.yaml` is a configuration, too.
"""

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
        "Score weights (run.resume or model.init_from) on the configuration's evaluation sets.",
        prog="blip evaluate",
        forced=["run.evaluate=true"],
        known_datasets=names,
    )


if __name__ == "__main__":
    sys.exit(main())
