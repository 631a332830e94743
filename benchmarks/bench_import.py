"""``import childtuning`` against ``import torch``: cumulative import time of fresh interpreters."""

from __future__ import annotations

import argparse
import subprocess
import sys

from environment import child_environment
from record import Record
from timing import tell

_OURS, _TORCH = "import childtuning", "import torch"
_HEAVY = ("transformers", "datasets", "peft", "accelerate", "pandas", "sklearn")


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure the imports in turn; the first of each, which fills the disk cache, is not counted."""
    for number in range(options.repeats + 1):
        tell(f"  round {number} of {options.repeats}")
        for name, module in ((_TORCH, "torch"), (_OURS, "childtuning")):
            seconds = record.attempt(
                name, lambda module=module: _import_seconds(module, options.threads), ours=name == _OURS
            )
            if seconds is not None and number:
                record.add_samples(name, [seconds], "seconds")
    loaded = _run(
        f"import sys, childtuning; print(*[n for n in {_HEAVY!r} if n in sys.modules])", options.threads
    ).stdout.split()
    record.facts["heavy_modules_imported"] = loaded
    record.ratio("import childtuning ÷ import torch", _OURS, _TORCH)
    record.value("imports of transformers and its like", float(len(loaded)), at_most=0)


def _import_seconds(module: str, threads: int) -> float:
    """Return the cumulative time that ``-X importtime`` gives for a module."""
    lines = _run(f"import {module}", threads, "-X", "importtime").stderr.splitlines()
    for line in reversed(lines):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 3 and parts[2] == module:
            return int(parts[1]) / 1e6
    raise RuntimeError(f"the interpreter gave no import time for {module}")


def _run(code: str, threads: int, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *words, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(threads),
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the interpreter failed"])[-1])
    return done
