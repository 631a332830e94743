"""Run the command line in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from childtuning.cli import main


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


Command = Callable[..., Done]


@pytest.fixture
def childtuning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs `childtuning` with the given words."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["childtuning", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        code = stopped.value.code
        return Done(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run


@pytest.fixture
def train_words(tiny_bert: Path, sentiment: Path) -> list[object]:
    """The options of a tiny run."""
    files = ["--train", sentiment / "train.jsonl", "--eval", sentiment / "dev.jsonl"]
    return ["train", *files, "--model", tiny_bert, "--batch-size", 8, "--epochs", 1, "--lr", 1e-2, "--json"]
