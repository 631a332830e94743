"""README's tables are those of the recorded results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_readme_shows_the_recorded_results() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "report.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
