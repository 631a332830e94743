"""The demo, on a tiny model."""

from __future__ import annotations

import pytest

from childtuning.cli.demo import demo_runs, label_sentence, summarize


@pytest.mark.slow
def test_demo_trains_summarizes_and_labels(tiny_bert, tmp_path) -> None:
    told: list[str] = []
    options = {"model": str(tiny_bert), "train_limit": 48, "epochs": 1.0, "num_seeds": 2}
    results = list(demo_runs(tmp_path / "demo", methods=("full", "child-d"), tell=told.append, **options))
    again = list(demo_runs(tmp_path / "demo", methods=("full",), **options))
    assert [r.metrics for r in again] == [r.metrics for r in results if r.method == "full"]
    assert len(told) == 4
    rows = summarize(results)
    assert [row["method"] for row in rows] == ["full", "child-d"]
    assert rows[0]["mean"] == pytest.approx(sum(rows[0]["values"]) / 2)
    assert rows[1]["trained_parameters"] < rows[0]["trained_parameters"]
    assert rows[1]["state_bytes"] < rows[0]["state_bytes"] and rows[1]["delta_bytes"] < rows[0]["delta_bytes"]
    label, confidence = label_sentence(results[0].output, "Open a socket.")
    assert label.isalpha() and 0 < confidence <= 1
