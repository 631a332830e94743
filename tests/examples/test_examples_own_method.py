"""The method from outside the package: its equation, its training and its declaration as an entry point."""

from __future__ import annotations

import importlib
import json
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from childtuning.errors import ConfigError
from childtuning.methods import ENTRY_POINTS, Combination, find_method, registry
from childtuning.training import LossStep

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def without_new_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry as it is without the example, before and after."""
    registry.find_method("full")
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    yield
    monkeypatch.undo()
    registry._load_declared.cache_clear()


@pytest.fixture
def own_method(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("own_method")
    sys.modules.pop("own_method", None)


def run_example(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["own_method.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "own_method.py"), run_name="__main__")
    assert stopped.value.code == 0


def test_the_term_is_the_entropy(own_method: ModuleType) -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    entropy = (math.log(2.0) - (0.75 * math.log(0.75) + 0.25 * math.log(0.25))) / 2
    step = LossStep(nn.Identity(), {}, logits, torch.tensor(1.0), lambda *_: (torch.tensor(0.0), None), 0.5)
    loss = own_method.ConfidencePenalty(0.2).loss(step.task_loss, step)
    assert float(loss) == pytest.approx(1 - 0.2 * 0.5 * entropy, abs=1e-6)
    with pytest.raises(ConfigError, match="weight of 'confidence' must be above 0, got 0"):
        own_method.ConfidencePenalty(0)


def test_the_example_trains_and_predicts(
    tiny_bert: Path,
    sentiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ("--train", sentiment / "train.jsonl", "--eval", sentiment / "dev.jsonl", "--model", tiny_bert)
    run, method = tmp_path / "run", "head+confidence:5"
    run_example(monkeypatch, "train", *files, "--method", method, "--epochs", 2, "--output", run, "--json")
    assert json.loads(capsys.readouterr().out)["method"] == method
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    logged = next(entry["loss"] for entry in entries if "loss" in entry)
    # The predictions of an untrained head are near a half each: cross entropy and entropy are both near log 2.
    assert logged == pytest.approx((1 - 5) * math.log(2), abs=0.1)
    run_example(monkeypatch, "predict", run, "--text", "great", "--json")
    assert json.loads(capsys.readouterr().out)["predictions"][0]["prediction"] in ("good", "bad")


def test_a_declared_method_is_found_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no method 'confidence'"):
        find_method("confidence")
    installed = tmp_path / "own_method-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own-method\nVersion: 0.1\n")
    (installed / "entry_points.txt").write_text(
        f"[{ENTRY_POINTS}]\nconfidence = own_method:ConfidencePenalty\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    registry._load_declared.cache_clear()
    try:
        penalty = Combination.parse("child-d+confidence:0.3").methods[-1]
        assert (type(penalty).__module__, penalty) == ("own_method", find_method("confidence")(0.3))
    finally:
        sys.modules.pop("own_method", None)
