"""childtuning compare, as a user types it."""

from __future__ import annotations

import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from childtuning.compare import Comparison, Store


@pytest.fixture
def compare_words(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> list[object]:
    files = ["--train", sentiment / "train.jsonl", "--eval", sentiment / "dev.jsonl", "--model", tiny_bert]
    return ["compare", *files, "--epochs", 1, "--threads", 1, "--store", tmp_path / "runs.db"]


def test_compare(childtuning: Any, compare_words: list[object], tmp_path: Path) -> None:
    words = [
        *compare_words,
        "--methods",
        "full,child-d",
        "--seeds",
        2,
        "--grid",
        "lr=1e-2,1e-3",
        "density=0.1",
    ]
    done = childtuning(*words, "--dry-run")
    assert done.code == 0 and "6 runs" in done.err and "0 done, 6 to do" in done.err
    assert "6 runs: 1 task × 2 methods, 2 seeds" in done.err
    assert (
        "2 seeds can never reach p < 0.05 on a single task: the smallest corrected p is 0.5. Take 6"
        in done.err
    )
    plan = childtuning(*words, "--dry-run", "--json").json["plan"]
    assert (plan["runs"], plan["comparisons"], plan["smallest_p"]) == (6, 1, 0.5)
    assert "Take 6 seeds or more." in plan["power_limit"]
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"
    done = childtuning(*words, "--json")
    assert done.code == 0, done.err
    assert "[6/6]" in done.err
    told = done.json
    assert told["runs"] == 6 and told["failed"] == [] and told["baseline"] == "full"
    assert [row["group"]["method"] for row in told["rows"]] == ["full", "child-d"]
    (setting,) = told["standings"]
    assert setting["task"].startswith("sentiment") and setting["clear"] == [] and setting["eval_examples"] > 0
    full, child = told["rows"]
    assert full["paired"] is None and child["paired"]["num"] == 2
    assert child["point"]["density"] == 0.1 and "density" not in full["point"]
    again = childtuning("compare", "--store", tmp_path / "runs.db")
    assert again.code == 0 and "6 done, 0 to do" in again.err and "[" not in again.err
    for word in (
        "full",
        "child-d",
        "runs",
        "2/2",
        "95 % interval",
        "lr of full",
        "lr of child-d",
        "Measured on ",
        "Next: childtuning report",
    ):
        assert word in again.out
    before = (tmp_path / "runs.db").read_bytes()
    dry = childtuning("compare", "--store", tmp_path / "runs.db", "--seeds", 3, "--dry-run")
    assert dry.code == 0 and "6 done, 2 to do; about" in dry.err
    assert (tmp_path / "runs.db").read_bytes() == before
    wider = childtuning("compare", "--store", tmp_path / "runs.db", "--seeds", 3, "--json")
    assert wider.json["runs"] == 8


def test_one_file_is_enough_and_is_read_before_the_first_run(
    childtuning: Any, tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    words = ["--model", tiny_bert, "--methods", "full,child-d", "--seeds", 1, "--epochs", 1, "--threads", 1]
    words = ["compare", *words, "--store", tmp_path / "runs.db"]
    done = childtuning(*words, "--train", tmp_path / "no.csv")
    assert done.code == 2 and "no.csv" in done.err and not (tmp_path / "runs.db").exists()
    done = childtuning(*words, "--train", sentiment / "train.jsonl", "--json")
    assert done.code == 0 and done.json["failed"] == []
    assert "no --eval, so 19 of the 96 examples are set aside for evaluation, drawn by class" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "fulll"], "Did you mean 'full'"),
        (["--methods", "full", "--executor", "slurm"], "--executor must be one of local, ray"),
        (
            ["--methods", "full", "--executor", "ray", "--jobs", "2"],
            "--jobs counts processes of this machine",
        ),
        (["--methods", "full", "--jobs", "0"], "greater than or equal to 1"),
        (["--methods", "full", "--density", "0.5"], "none of the methods chooses a child, got density"),
        (["--methods", "full,child-d", "--density", "2"], "density"),
        (["--methods", "full", "--task", "rte"], "exclude each other"),
        (["--methods", "full", "density"], "the grid takes NAME=VALUE"),
        (["--methods", "full", "--selection", "test"], "selection must be"),
    ],
)
def test_bad_input_is_one_line(
    childtuning: Any, compare_words: list[object], tmp_path: Path, words: list[str], message: str
) -> None:
    done = childtuning(*compare_words, *words)
    assert done.code == 2 and message in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert not (tmp_path / "runs.db").exists()


def test_how_far_a_run_is(tmp_path: Path) -> None:
    from childtuning.cli.compare_progress import _last_step

    assert _last_step(tmp_path / "gone") == "begun"
    line = '{"step": 10, "epoch": 0.5, "loss": %s}\n'
    for loss, told in (("0.25", "0.250"), ("null", "not finite")):
        (tmp_path / "log.jsonl").write_text(line % loss + '{"step": 20, "ep')
        assert _last_step(tmp_path) == f"step 10, epoch 0.5, loss {told}"


def test_a_size_that_failed_does_not_stop_the_others(
    childtuning: Any, tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    store = ("--store", tmp_path / "runs.db")
    words = ["compare", "--model", tiny_bert, "--methods", "full", "--epochs", 1, "--threads", 1, *store]
    words += ["--train", sentiment / "train.jsonl", "--eval", sentiment / "dev.jsonl"]
    assert childtuning(*words, "--seeds", 1, "--train-sizes", "20", "--json").code == 0
    with Store.open(tmp_path / "runs.db", create=True) as stored:
        comparison = stored.comparison()
        stored.set_comparison({**(comparison or {}), "train_sizes": [20, 1000]}, {})
        (run,) = stored.known().values()
        fails = replace(
            run, id="fails", group=replace(run.group, train_size=1000), result=None, state="planned"
        )
        stored.plan([run, fails], stored.comparison() or {})
    assert childtuning("compare", *store, "--json").code == 2  # told before the first run
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        ids = Comparison.from_dict({**(comparison or {}), "train_sizes": (20, 1000)}).first_runs
        connection.execute("UPDATE runs SET state = 'failed', id = ? WHERE id = 'fails'", (ids[1].id,))
    done = childtuning("compare", *store, "--seeds", 2, "--json")
    assert done.code == 0 and [failed["id"] for failed in done.json["failed"]] == [ids[1].id]


def test_a_missing_package_is_told_before_the_first_run(
    childtuning: Any, compare_words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for more in ([], ["--dry-run"]):
        done = childtuning(*compare_words, "--methods", "full,lora", *more)
        assert done.code == 2 and "method 'lora' needs peft. Install it: pip install peft." in done.err
        assert not (tmp_path / "runs.db").exists()


def test_nothing_to_compare(childtuning: Any, tmp_path: Path) -> None:
    done = childtuning("compare", "--store", tmp_path / "none.db")
    assert done.code == 2 and "there is nothing to compare" in done.err


def test_a_foreign_file_is_left_alone(childtuning: Any, compare_words: list[object], tmp_path: Path) -> None:
    (tmp_path / "runs.db").write_text("my notes\n" * 300)
    done = childtuning(*compare_words, "--methods", "full")
    assert done.code == 2 and "Pass another --store" in done.err
    assert (tmp_path / "runs.db").read_text() == "my notes\n" * 300


def test_one_seed_has_no_spread(childtuning: Any, compare_words: list[object]) -> None:
    done = childtuning(*compare_words, "--methods", "full", "--seeds", 1)
    assert done.code == 0 and "1 run: 1 task × 1 method, 1 seed\n" in done.err
    assert "±" not in done.out.replace("mean ± sd", "") and "never reach" not in done.err


def test_data_are_warned_of_and_what_auto_became_is_recorded(
    childtuning: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = [f"day {i},{'good' if i % 2 else 'bad'}" for i in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    words = ["compare", "--train", tmp_path / "a.csv", "--eval", tmp_path / "a.csv", "--model", tiny_bert]
    words += ["--methods", "full", "--seeds", 1, "--epochs", 1, "--store", tmp_path / "s.db"]
    done = childtuning(*words)
    assert done.code == 0, done.err
    assert "warning: all of the 20 evaluation examples are also in training" in done.err
    with Store.open(tmp_path / "s.db") as store:
        (run,) = store.records()
    assert run.config["learning_rate"] == (run.result or {})["learning_rate"] == 2.4e-3
    assert "0 to do" in childtuning(*words, "--dry-run").err  # the choice does not make it another run
