"""Scores of methods on tasks over seeds: runs `childtuning train` for each and records every run.

A record that is there already is not run again, so a stopped table goes on where it was.

    python benchmarks/scores.py --data-dir DATA --tasks rte cola --methods full child-f child-d --seeds 2 \
        --rates 2e-5 4e-5 1e-4 --tune-limit 640 --output benchmarks/results/scores.json

The learning rate of each (task, method) is the best of ``--rates`` on seed 0 after tuning runs of ``--tune-limit``
training examples (one epoch), measured on a part of the training set that those runs do not see.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def command(arguments: list[str]) -> dict[str, Any]:
    """Run `childtuning train` and return the JSON object it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "childtuning", "train", "--json", *arguments], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def tuning_files(data_dir: Path, task: str, limit: int, folder: Path) -> tuple[Path, Path]:
    """Cut the training set in two: ``limit`` examples to tune on, and as many (at most 500) to measure on."""
    with gzip.open(data_dir / task / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.readlines()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(lines), generator=generator).tolist()
    paths = folder / f"{task}-tune.jsonl", folder / f"{task}-held-out.jsonl"
    for path, rows in zip(paths, (order[:limit], order[limit : limit + 500]), strict=True):
        path.write_text("".join(lines[row] for row in rows), encoding="utf-8")
    return paths


def environment() -> dict[str, Any]:
    """Say what the numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit,
    }


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["rte", "cola"])
    parser.add_argument("--methods", nargs="+", default=["full", "child-f", "child-d"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--rates", nargs="+", default=["2e-5", "4e-5", "1e-4"])
    parser.add_argument("--tune-limit", type=int, default=640)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for every run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scores.json"))
    given = parser.parse_args()
    records: dict[str, Any] = {"environment": environment(), "tuning": {}, "runs": {}}
    if given.output.is_file():
        records |= json.loads(given.output.read_text())

    def keep() -> None:
        given.output.write_text(json.dumps(records, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(given.seeds):
            for task in given.tasks:
                for method in given.methods:
                    density = [] if method == "full" else ["--density", str(given.density)]
                    shared = ["--method", method, *density, *given.options]
                    rates = records["tuning"].setdefault(f"{task} {method}", {})
                    for rate in given.rates:
                        if rate not in rates:
                            train, held_out = tuning_files(given.data_dir, task, given.tune_limit, Path(scratch))
                            files = ["--train", str(train), "--eval", str(held_out), "--epochs", "1"]
                            result = command([*files, *shared, "--lr", rate, "--output", f"{scratch}/run", "--overwrite"])
                            rates[rate] = result["metrics"]
                            keep()
                    best = max(rates, key=lambda rate: next(iter(rates[rate].values())))
                    key = f"{task} {method} {seed}"
                    if key not in records["runs"]:
                        data = ["--task", task, "--data-dir", str(given.data_dir), "--seed", str(seed)]
                        result = command([*data, *shared, "--lr", best, "--output", f"{scratch}/run", "--overwrite"])
                        records["runs"][key] = {**result, "learning_rate": best, "output": ""}
                        keep()


if __name__ == "__main__":
    main()
