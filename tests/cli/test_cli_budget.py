"""``--budget``: the child that fits what training may cost, what it is said to cost, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from tests.cli.killed import killed_at_batch

from childtuning.child import Child

BUDGET = ["--method", "child-d", "--granularity", "column", "--budget", "step=0.5"]


def test_a_run_within_a_budget_says_what_it_costs_and_is_repeated_from_its_config(
    childtuning, train_words, tmp_path
) -> None:
    done = childtuning(*train_words, *BUDGET, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert re.search(r"budget step=0.5: 0\..*; forward and backward measured: \d\.\d{3}\n", done.err)
    found = done.json["budget"]
    assert found["limit"] == "step=0.5" and found["step"] <= 0.5 and found["measured_passes"] > 0
    assert 0 < done.json["density"] < 1
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'budget = "step=0.5"' in config and "density" not in config
    again = childtuning(
        "train", "--config", tmp_path / "run" / "config.toml", "--output", tmp_path / "again", "--json"
    )
    assert again.code == 0, again.err
    first, second = (Child.load(tmp_path / name / "child.safetensors") for name in ("run", "again"))
    assert first.fingerprint() == second.fingerprint()
    assert again.json["metrics"] == done.json["metrics"]
    other = childtuning(
        *("train", "--config", tmp_path / "run" / "config.toml", "--density", 0.2),
        *("--output", tmp_path / "other", "--json"),
    )
    assert other.code == 0 and other.json["density"] == pytest.approx(0.2, abs=0.01)
    assert other.json["budget"] is None


@pytest.mark.slow
def test_a_resumed_run_remembers_what_it_chose(childtuning, train_words, tmp_path) -> None:
    words = [*train_words, *BUDGET, "--save-steps", 4, "--epochs", 3]
    run = tmp_path / "run"
    killed_at_batch(6, words, run)
    chosen = json.loads((run / "checkpoints" / "chosen.json").read_text())
    resumed = childtuning(*words, "--output", run, "--resume")
    assert resumed.code == 0, resumed.err
    assert chosen["budget"]["limit"] == "step=0.5" and chosen["fisher_seconds"] > 0
    assert {key: resumed.json[key] for key in chosen} == chosen
    assert not (run / "checkpoints").exists()


def test_a_prediction_that_does_not_hold_is_named(childtuning, train_words, tmp_path) -> None:
    words = [*BUDGET[:-1], "memory=0.7"]
    for name, more, is_told in (("kept", ["--keep-gradients"], True), ("released", [], False)):
        done = childtuning(*train_words, *words, *more, "--output", tmp_path / name)
        assert done.code == 0, done.err
        assert ("here they form whole ones" in done.err) == is_told
        assert "--granularity column trains more" not in done.err


def test_a_budget_of_time_for_single_entries_names_columns(childtuning, train_words, tmp_path) -> None:
    words = ["--method", "child-d", "--budget", "step=0.95", "--output", tmp_path / "run"]
    done = childtuning(*train_words, *words)
    assert done.code == 0, done.err
    assert "--granularity column trains more within this budget" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*BUDGET, "--density", "0.1"], "--budget takes the place of --density"),
        (["--budget", "step=0.01"], "no child fits the budget step=0.01: with none at all it is 0."),
        (["--budget", "half"], "budget must be step=0.5 or memory=0.5"),
        (["--budget", "step=2"], "a budget is a share in (0, 1], got step=2.0"),
        (
            ["--budget", "step=0.5", "--method", "full"],
            "nothing in 'full' chooses a child, got budget step=0.5",
        ),
        (["--budget", "step=0.5", "--method", "child-f"], "budget needs variant='task-driven'"),
        (["--budget", "step=0.5", "--method", "child-dynamic"], "child-dynamic chooses without costs"),
        (["--budget", "step=0.5", "--scope", "parameter"], "budget needs scope='global'"),
    ],
    ids=str,
)
def test_a_wrong_budget_is_one_line(childtuning, train_words, tmp_path, words, message) -> None:
    done = childtuning(*train_words, *words, "--output", tmp_path / "run")
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert message in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("childtuning:")]) == 1
