"""What a run says of its examples before it starts, and what it chooses for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from childtuning.cli import app
from childtuning.errors import ConfigError
from childtuning.runs import FinishedRun, RunConfig, train_run, understand_run
from childtuning.runs.folder import RunFolder
from childtuning.runs.understood import Understood
from childtuning.training import ChildTrainer


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def understand(model: Path, folder: Path, train: list[Any], dev: list[Any], **options: Any) -> Understood:
    files = {"train": write(folder, "train.jsonl", train), "eval": write(folder, "dev.jsonl", dev)}
    return understand_run(RunConfig(model=str(model), **files, **options))


def rows(texts: list[str], labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


GOOD = rows(
    [f"a fine day {i}" for i in range(8)] + [f"a bad day {i}" for i in range(6)], ["+"] * 8 + ["-"] * 6
)
OTHERS = rows(["what a day", "so bad a film"], ["+", "-"])


def test_what_is_understood(tiny_bert: Path, tmp_path: Path) -> None:
    found = understand(tiny_bert, tmp_path, GOOD, OTHERS, batch_size=4)
    assert (found.kind, found.columns["text"], found.columns["label"]) == ("classification", "text", "label")
    assert (found.train_examples, found.eval_examples, found.classes) == (14, 2, {"+": [8, 1], "-": [6, 1]})
    assert found.examples == [["a fine day 0", "+"], ["a bad day 0", "-"]]
    assert (found.epochs, found.steps, found.warnings, found.duplicates) == (20, 80, [], 0)
    assert set(found.reasons) == {"learning_rate", "epochs"} and found.seconds > 0  # type: ignore[operator]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("train", "dev", "words"),
    [
        (GOOD, [GOOD[0], GOOD[-1]], "all of the 2 evaluation examples are also in training"),
        (GOOD, [GOOD[0], *OTHERS], "1 of the 3 evaluation examples is also in training"),
        (rows(["the same"] * 10, ["+", "-"] * 5), OTHERS, "every training example has the same 'text'"),
        (
            rows([f"day {i}" for i in range(30)], [f"id{i}" for i in range(30)]),
            rows(["a day"], ["id3"]),
            "the label has 30 classes in 30 examples: perhaps it is an id",
        ),
        (
            [*GOOD, *rows(["a fine day 0"] * 2, ["-", "-"])],
            OTHERS,
            "3 of the 16 training examples are there more than once, with different labels",
        ),
        (
            rows([f"a good day {i}" for i in range(15)], ["Good", "goo d", "good "] * 5),
            rows(["a day"], ["good"]),
            "the labels 'Good' and 'goo d' and 'good' look alike",
        ),
        (GOOD + rows(["rare"], ["?"]), OTHERS, "fewer than 5 training examples have the label ?"),
        (
            rows(["a", "b", "c"], [1.5, 1.5, 1.5]),
            rows(["d", "e"], [1.0, 2.5]),
            "every training target is 1.5",
        ),
    ],
)
def test_what_looks_wrong_is_said(
    tiny_bert: Path, tmp_path: Path, train: list[Any], dev: list[Any], words: str
) -> None:
    found = understand(tiny_bert, tmp_path, train, dev)
    assert [words in warning for warning in found.warnings].count(True) == 1
    assert any(words in line for line in found.lines())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "recadam",
            ["recadam holds the network back until step 250 of 80. Pass t0=26, a third of the steps."],
        ),
        ("recadam:t0=40", []),
        ("child-dynamic", ["again after 100 steps, and the run has 80: it is child-d. Pass interval=16."]),
        ("child-dynamic:79", []),
    ],
)
def test_a_run_too_short_for_its_method_is_told(
    tiny_bert: Path, tmp_path: Path, method: str, words: list[str]
) -> None:
    found = understand(tiny_bert, tmp_path, GOOD, OTHERS, batch_size=4, method=method)
    assert found.steps == 80 and len(found.warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, found.warnings, strict=True))


def test_a_step_of_warm_up_alone_is_told(tiny_bert: Path, tmp_path: Path) -> None:
    options = {"batch_size": 64, "gradient_accumulation": 8, "epochs": 1.0, "learning_rate": 1e-3}
    (warning,) = understand(tiny_bert, tmp_path, GOOD, OTHERS, **options).warnings
    assert "the only step is one of warm-up" in warning
    assert not understand(tiny_bert, tmp_path, GOOD, OTHERS, warmup_ratio=0.0, **options).warnings


def test_pairs_and_the_child_are_shown(tiny_bert: Path, tmp_path: Path) -> None:
    pairs = [
        {"text": row["text"], "text_pair": f"and {i}", "label": row["label"]} for i, row in enumerate(GOOD)
    ]
    of_child = {"density": 0.1, "granularity": "column"}
    found = understand(tiny_bert, tmp_path, pairs, pairs[3:9], text="text", text_pair="text_pair", **of_child)
    assert found.examples == [["a fine day 0", "and 0", "+"], ["a bad day 0", "and 8", "-"]]
    assert found.child == of_child and found.contradictions == 0
    shown = list(found.lines())
    assert "example     'a fine day 0' + 'and 0' → +" in shown
    assert any("child-d: density 0.1, granularity column; learning rate" in line for line in shown)
    within = understand(tiny_bert, tmp_path, GOOD, OTHERS, budget="step=0.9", granularity="column")
    assert any(
        "child-d: budget step=0.9, granularity column; learning rate" in line for line in within.lines()
    )
    assert understand(tiny_bert, tmp_path, GOOD, OTHERS, method="full").child == {}


def test_a_rate_that_is_named_is_kept(tiny_bert: Path, tmp_path: Path) -> None:
    found = understand(tiny_bert, tmp_path, GOOD, OTHERS, learning_rate=3e-3, epochs=0.5)
    assert (found.learning_rate, found.epochs, found.reasons) == (3e-3, 0.5, {})


def test_the_folder_holds_what_was_chosen_and_a_resume_keeps_it(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), train_limit=20, batch_size=10)
    result = train_run(config, tmp_path / "run")
    kept = RunFolder(tmp_path / "run").config
    assert (kept.epochs, kept.learning_rate) == (result.epochs, result.learning_rate) == (20, 2.4e-3)
    monkeypatch.setattr("childtuning.training.rates.RATE", 1.0)
    again = train_run(config, tmp_path / "run", resume=True)
    assert again.learning_rate == 2.4e-3
    with pytest.raises(ConfigError, match="was started with epochs=20.0"):
        train_run(replace(config, epochs=3.0), tmp_path / "run", resume=True)


@pytest.mark.parametrize("left", ["checkpoints/", "config.toml.7-8.partial"])
def test_a_run_that_was_killed_before_it_had_a_child_starts_again(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, left: str
) -> None:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), train_limit=20, epochs=1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).mkdir() if left.endswith("/") else (tmp_path / "run" / left).write_text("seed")
    told: list[str] = []
    result = train_run(config, tmp_path / "run", resume=True, tell=told.append)
    assert "the run was stopped before it had chosen its child; it starts again" in told
    assert result.metrics == train_run(config, tmp_path / "other").metrics


def test_a_run_on_another_machine_that_was_faster_is_kept(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), train_limit=20, epochs=1.0, method="child-random")
    select = ChildTrainer.select

    def other_writes_first(trainer: ChildTrainer) -> Any:
        (tmp_path / "run" / "config.toml").write_text("seed = 3\n")
        return select(trainer)

    monkeypatch.setattr(ChildTrainer, "select", other_writes_first)
    with pytest.raises(ConfigError, match="is not empty"):
        train_run(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_text() == "seed = 3\n"


def test_the_command_stops_there(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "--model",
        tiny_bert,
        "--train",
        sentiment / "train.jsonl",
        "--eval",
        sentiment / "dev.jsonl",
    ]
    words += ["--output", tmp_path / "run", "--dry-run"]
    shown = CliRunner().invoke(app, list(map(str, words)))
    assert shown.exit_code == 0 and "classification, text 'text'" in shown.stdout
    as_json = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert json.loads(as_json.stdout)["kind"] == "classification"
    with pytest.raises(ConfigError, match="no child fits the budget step=0.01"):
        app([*map(str, words), "--budget", "step=0.01"], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_a_model_that_learnt_nothing_is_named(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), learning_rate=1e-9, epochs=1.0)
    result = train_run(config, tmp_path / "run")
    assert result.constant == {"accuracy": 0.5}
    result = replace(result, interval=None)
    told = replace(result, metric={"name": "accuracy", "value": 0.5}).remarks
    assert len(told) == 1 and "0.500 is not better than 0.500" in told[0]
    assert replace(result, metric={"name": "accuracy", "value": 0.6}).remarks == []


def test_a_changed_file_is_not_continued(tiny_bert: Path, tmp_path: Path) -> None:
    files = {"train": write(tmp_path, "train.jsonl", GOOD), "eval": write(tmp_path, "dev.jsonl", OTHERS)}
    config = RunConfig(model=str(tiny_bert), **files, epochs=1.0)
    train_run(config, tmp_path / "run")
    write(tmp_path, "train.jsonl", GOOD[1:])
    with pytest.raises(ConfigError, match="train.jsonl has changed since it was trained on"):
        train_run(config, tmp_path / "run", resume=True)
    train_run(config, tmp_path / "run", overwrite=True)
    train_run(config, tmp_path / "run", resume=True)


def test_several_processes_take_the_steps_of_one(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("childtuning.runs.understood._processes", lambda: 2)
    assert understand(tiny_bert, tmp_path, GOOD, OTHERS, batch_size=4, epochs=3.0).steps == 12


def test_the_training_file_is_no_evaluation(tiny_bert: Path, tmp_path: Path) -> None:
    files = {"train": write(tmp_path, "train.jsonl", GOOD), "eval": write(tmp_path, "dev.jsonl", OTHERS)}
    train_run(RunConfig(model=str(tiny_bert), **files, epochs=1.0), tmp_path / "run")
    copied = write(tmp_path, "copy.jsonl", GOOD)
    for path, warned in ((copied, True), (files["eval"], False)):
        told: list[str] = []
        FinishedRun(tmp_path / "run", tell=told.append).read_input(path, labelled=True)
        assert any("were trained on" in line for line in told) == warned
    (tmp_path / "mine").mkdir()
    for split, path in (("train", files["train"]), ("dev", files["eval"])):
        (tmp_path / "mine" / f"{split}.jsonl").write_bytes(Path(path).read_bytes())
    named = RunConfig(model=str(tiny_bert), task="mine", data_dir=str(tmp_path), epochs=1.0)
    train_run(named, tmp_path / "named")
    told = []
    FinishedRun(tmp_path / "named", tell=told.append).read_input(copied, labelled=True)
    assert any("were trained on" in line for line in told)
