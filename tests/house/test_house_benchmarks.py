"""The benchmarks that need no packages of their own run, and say what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["floors", "step"])
def test_a_quick_run_prints_one_json_object(root: Path, name: str) -> None:
    script = str(root / "benchmarks" / "run.py")
    done = subprocess.run(
        [sys.executable, script, name, "--quick", "--json", "--repeats", "1", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["benchmark"] == name
    assert record["failed"] == []
    assert record["samples"]
    assert all(sample > 0 for case in record["samples"].values() for sample in case["values"])


def test_without_a_name_it_lists_the_benchmarks(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "run.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    written = {path.stem.removeprefix("bench_") for path in (root / "benchmarks").glob("bench_*.py")}
    assert sorted(listed) == sorted(written - {"script"})  # which is train --script
