"""Whole runs: ``childtuning train`` with its Fisher pass against a loop that follows the official script.

Both are processes of their own that load the packaged model and the task, choose a child of density 0.3, train for the
same epochs on the same examples, and evaluate; what is compared is their wall time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

from environment import child_environment
from record import Record
from timing import tell
from workers import call

_DENSITY = 0.3


def run_scripts(record: Record, options: argparse.Namespace) -> None:
    """Measure the runs, task after task."""
    record.facts["runs"] = {}
    for task in options.tasks:
        found: dict[str, list[dict[str, Any]]] = {"childtuning train": [], "official script's loop": []}
        for number in range(options.repeats):
            tell(f"  {task}: round {number + 1} of {options.repeats}")
            order = list(found) if number % 2 == 0 else list(reversed(found))
            for who in order:
                one = _ours if who == "childtuning train" else _official
                result = record.attempt(
                    f"{task}: {who}",
                    lambda one=one, task=task: one(task, options),
                    ours=who == "childtuning train",
                )
                if result is not None:
                    found[who].append(result)
        for who, results in found.items():
            record.add_samples(f"{task}: {who}", [result["wall_seconds"] for result in results], "seconds")
        record.facts["runs"][task] = found
        record.ratio(
            f"{task}: childtuning train, child-d, with its Fisher pass ÷ official script's loop",
            f"{task}: childtuning train",
            f"{task}: official script's loop",
            at_most=0.4,
        )


def _ours(task: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--task", task, "--method", "child-d", "--density", str(_DENSITY), "--seed", "0"]
        words += ["--epochs", str(options.epochs), "--output", f"{folder}/run", "--json"]
        words += [] if options.data_dir is None else ["--data-dir", str(options.data_dir)]
        words += [] if options.train_limit is None else ["--train-limit", str(options.train_limit)]
        start = perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "childtuning", "train", *words],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(options.threads),
        )
        wall = perf_counter() - start
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["childtuning train failed"])[-1])
    result = json.loads(done.stdout)
    kept = ("metric", "density", "fisher_seconds", "train_seconds", "peak_memory_bytes", "train_examples")
    return {"wall_seconds": wall, **{key: result[key] for key in kept if key in result}}


def _official(task: str, options: argparse.Namespace) -> dict[str, Any]:
    start = perf_counter()
    result = call(
        "official-script",
        options.threads,
        task=task,
        data_dir=None if options.data_dir is None else str(options.data_dir),
        train_limit=options.train_limit,
        epochs=options.epochs,
        density=_DENSITY,
    )
    return {"wall_seconds": perf_counter() - start, **result}
