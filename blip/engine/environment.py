"""What a run ran on: versions, git state, hardware and command line, without secrets."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import blip
from blip import dist

PACKAGES: tuple[str, ...] = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "timm",
    "omegaconf",
    "webdataset",
)
PACKAGES += ("safetensors", "numpy", "pillow", "fairscale", "pycocoevalcap", "peft")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
"""The only environment variables that are recorded."""

# `tokenizer` is no secret, `hub_token` is.
_SECRET = re.compile(r"(?i)token(?!iz)|secret|passw|api_?-?key|credential")


def describe() -> dict[str, Any]:
    """Versions, git state, hardware, command line and start time, as JSON can hold them."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": command_line(sys.argv),
        "working_folder": os.getcwd(),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command line, with the values of tokens, passwords and keys left out."""
    shown: list[str] = []
    hidden = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = _SECRET.search(name) is not None
        shown.append("***" if hidden else f"{name}=***" if secret and equals else argument)
        hidden = secret and not equals and argument.startswith("-")
    return shlex.join(shown).replace("'***'", "***")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of those it uses, where they are installed."""
    found = {"python": platform.python_version(), "blip": blip.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # tells the CUDA it was built for, too
    return found


def git_state() -> dict[str, Any] | None:
    """Commit, branch and whether files were changed: of this checkout, else of the working folder."""
    package = Path(blip.__file__)
    if _git(package.parent, "ls-files", "--error-unmatch", package.name):
        folder = package.parent
    else:
        folder = Path.cwd()  # installed: the recipes may still be under version control
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed": bool(changed),
    }


def hardware() -> dict[str, Any]:
    """System, processors, memory and GPUs of this rank's node, and the number of processes."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": dist.world_size(),
    }
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = [f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties]
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
