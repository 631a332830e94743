"""README's tables are those of the recorded results."""

from __future__ import annotations

import json
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


def test_no_recorded_result_holds_examples_of_a_data_set() -> None:
    for path in (Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        artifacts = content.get("artifacts", {}) if isinstance(content, dict) else {}
        assert not [name for name in artifacts if name.startswith("examples")], path.name
