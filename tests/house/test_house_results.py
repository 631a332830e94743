"""README's tables are those of the recorded results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from childtuning.compare.store import Store


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


def test_an_exported_comparison_becomes_a_store_again(tmp_path: Path) -> None:
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    export, store = benchmarks / "results" / "rates-100.json", tmp_path / "rates.db"
    words = [sys.executable, str(benchmarks / "restored.py"), str(export), str(store)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = json.loads(export.read_text(encoding="utf-8"))
    with Store.open(store) as restored:
        found = json.loads(json.dumps(restored.read().to_dict()))
    assert all(found[name] == wanted[name] for name in found)
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists. Name a new file." in again.stderr
