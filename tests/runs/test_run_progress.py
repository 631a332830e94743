"""Lines of progress where there is no terminal, by a clock that the test sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from childtuning.runs import RunConfig, log, train_run
from childtuning.runs.log import ProgressLines, duration


def test_a_line_every_ten_seconds() -> None:
    told: list[str] = []
    now = 100.0
    lines = ProgressLines(told.append, lambda: now)
    state: Any = SimpleNamespace(global_step=40, max_steps=100)
    lines.on_train_begin(None, state, None)  # resumed after 40 steps
    for step in range(41, 101):
        state.global_step = step
        now += 1.0
        if step == 45:
            lines.on_log(None, state, None, {"loss": 0.4123})
        if step == 55:
            lines.on_log(None, state, None, {"epoch": 1})  # a line without a loss changes nothing
        lines.on_step_end(None, state, None)
    assert told[:2] == ["step 50/100, loss 0.412, 50 s left", "step 60/100, loss 0.412, 40 s left"]
    assert len(told) == 5, "the last step needs no line"


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.6, "1 min 0 s"), (3.2, "3 s"), (80, "1 min 20 s"), (7500, "2 h 5 min")]
)
def test_time_left_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("bars", [False, True])
def test_a_run_tells_its_progress_without_bars(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bars: bool
) -> None:
    monkeypatch.setattr(log, "_SECONDS", 0.0)
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    told: list[str] = []
    config = RunConfig(**files, model=str(tiny_bert), method="head", epochs=1.0)
    train_run(config, tmp_path / "run", progress=bars, tell=told.append)
    assert any(line.startswith("step 3/6, loss ") for line in told) is not bars
