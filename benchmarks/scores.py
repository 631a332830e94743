"""Scores of methods on tasks, by learning rate and seed: runs `childtuning train` for each and records every run.

A run that is recorded already is not run again, so a stopped table goes on where it was.

    python benchmarks/scores.py --data-dir DATA --tasks rte cola --methods full child-f child-d \
        --rates 2e-5 4e-5 1e-4 --seeds 0 --output benchmarks/results/scores.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Say what the numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Run what is missing from the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tasks", nargs="+", default=["rte", "cola"])
    parser.add_argument("--methods", nargs="+", default=["full", "child-f", "child-d"])
    parser.add_argument("--rates", nargs="+", default=["2e-5", "4e-5", "1e-4"])
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--density", default="0.3")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scores.json"))
    given = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(given.output.read_text()) if given.output.is_file() else []
    wanted = [
        (t, m, r, s) for t in given.tasks for s in given.seeds for r in given.rates for m in given.methods
    ]
    for task, method, rate, seed in wanted:
        key = [task, method, rate, seed]
        if any(run["key"] == key for run in runs):
            continue
        words = [
            "--task",
            task,
            "--data-dir",
            given.data_dir,
            "--method",
            method,
            "--lr",
            rate,
            "--seed",
            seed,
        ]
        words += [] if method == "full" else ["--density", given.density]
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                "-m",
                "childtuning",
                "train",
                "--json",
                *words,
                "--output",
                f"{scratch}/run",
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout) | {"output": ""}
        runs.append({"key": key, "result": result, "environment": environment()})
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(runs, indent=1) + "\n")
        print(*key, result["metrics"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
