"""Conversions need memory for one shard, whatever the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARD, SIZE = 25, 110
"""Megabytes."""
ROOM = 5_000_000
"""What the interpreter may take besides, in bytes."""

# One process for all of them, which has converted something before; a target is the next one's source.
CONVERSIONS = """
import json, shutil, sys
from pathlib import Path
from run_scripts.bench.convert import MB, by_parts, largest, make, needed, options

folder, size, shard = Path(sys.argv[1]), float(sys.argv[2]), round(float(sys.argv[3]) * MB)
steps = (("blip", "lavis"), ("lavis.pth", "blip"), ("blip", "hf"), ("hf", "lavis"))
for place, megabytes in ((folder / "tiny", 0), (folder / "given", size)):
    make(place / "blip", megabytes, shard)
    found = {}
    for source, to in steps:
        out = place / ("next.pth" if to == "lavis" else "next")
        begin = place / source
        def action():
            by_parts(begin, out, to, shard, **options(begin, megabytes))
        used = needed(action)[0]
        found[f"{source} -> {to}"] = used, largest([begin, out])
        shutil.rmtree(begin) if begin.is_dir() else begin.unlink()
        out.rename(place / (to + out.suffix))
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells a new peak")
def test_memory_is_that_of_one_shard(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONVERSIONS, str(tmp_path), str(SIZE), str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"blip -> lavis", "lavis.pth -> blip", "blip -> hf", "hf -> lavis"}
    for way, (used, largest) in found.items():
        assert 10_000_000 < largest < SHARD * 1_000_000 + 100_000, way
        assert used < 1.3 * largest + ROOM, way
        assert used > 0.2 * largest, f"{way}: nothing was measured"
