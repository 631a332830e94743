"""The demo, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from childtuning.cli import app, compare_progress, demo


@pytest.mark.slow
def test_demo_trains_reports_and_labels(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_OPTIONS", {**demo._OPTIONS, "train_limit": 48, "epochs": 1.0})
    monkeypatch.setattr(compare_progress, "_SECONDS", 0.02)
    monkeypatch.setattr(compare_progress, "_QUIET_SECONDS", 0.02)
    words = ["demo", "--model", str(tiny_bert), "--output", str(tmp_path / "demo"), "--seeds", "2"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"docstrings full .*: step \d, epoch 0\.\d, loss \d\.\d{3}\n", shown.stderr)
    page = tmp_path / "demo" / "demo.html"
    assert str(page) in shown.stdout and "<!doctype html>" in page.read_text()
    assert all(sentence in shown.stdout for sentence in demo.SENTENCES)
    again = CliRunner().invoke(app, [*words, "--text", "Open a socket.", "--json"])
    found = json.loads(again.stdout)
    full, child = found["methods"]
    assert (full["method"], child["method"], len(full["values"])) == ("full", "child-d", 2)
    assert full["mean"] == pytest.approx(sum(full["values"]) / 2)
    for name in ("trained_parameters", "state_bytes", "delta_bytes"):
        assert child[name] < full[name]
    assert child["step_seconds"] > 0 == full["choose_seconds"] // 1
    (one,) = found["predictions"]
    assert one["text"] == "Open a socket." and one["prediction"].isalpha() and 0 < one["confidence"] <= 1
    assert (Path(found["run"]) / "metrics.json").is_file()
    assert "[2/4]" not in again.stderr and "These runs were done before." in again.stderr
