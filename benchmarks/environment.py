"""What numbers are measured on: process settings that are equal for all, and the description of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Freed memory stays with the process, so that no sample pays for pages that an earlier one had: for timing.
KEPT = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
# Freed tensors go back to the system, so that resident memory is what is alive: for peak memory.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_ARENAS = {"MALLOC_ARENA_MAX": "2"}
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "peft",
    "opacus",
    "backpack-for-pytorch",
    "nngeometry",
    "badam",
    "galore-torch",
    "apollo-torch",
    "lomo-optim",
)


def settings(threads: int, malloc: dict[str, str] = KEPT) -> dict[str, str]:
    """Return the environment variables of a measured process; what the caller's environment sets wins for timing."""
    return {**_WAITING, **_QUIET, **_ARENAS, **malloc, "OMP_NUM_THREADS": str(threads)}


def restart_with_settings(threads: int) -> None:
    """Start this command anew under the settings, which the C libraries read once, unless they hold already."""
    missing = {key: value for key, value in settings(threads).items() if key not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})


def child_environment(threads: int, malloc: dict[str, str] = KEPT) -> dict[str, str]:
    """Return the whole environment of a measured subprocess; it finds the benchmarks' modules."""
    return {**os.environ, **settings(threads, malloc)}


def environment(threads: int) -> dict[str, Any]:
    """Say what the numbers were measured on."""
    import torch

    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "settings": {key: os.environ.get(key, "") for key in settings(threads)},
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
