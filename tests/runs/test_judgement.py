"""The interval, the classes and the errors of a judged model, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from childtuning.compare.work import _kept
from childtuning.runs import FinishedRun, RunConfig, train_run
from childtuning.runs.folder import RunResult
from childtuning.runs.judgement import Answered, judge
from childtuning.tasks import Examples, find_kind

KIND = find_kind("classification")
NAMES = ("a", "b", "c")


def test_classes_and_errors_are_those_counted_by_hand() -> None:
    truth, said = [0, 0, 1, 2, 2, 2, 2], [0, 1, 1, 0, 2, 2, 1]
    sure = [1.0, 5.0, 1.0, 9.0, 1.0, 1.0, 7.0]
    logits = [np.eye(3)[one] * much for one, much in zip(said, sure, strict=True)]
    split = Examples([f"text {i}" for i in range(7)], None, [NAMES[i] for i in truth])
    found = judge(KIND, ("accuracy", "macro-f1"), [Answered(logits, None, split)], NAMES)
    assert found.metrics["accuracy"] == pytest.approx(4 / 7)
    assert found.confusion == [[1, 1, 0], [0, 1, 0], [1, 1, 2]]
    assert found.per_class is not None and list(found.per_class) == list(NAMES)
    assert found.per_class["c"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 4})
    assert [(error["text"], error["label"], error["prediction"]) for error in found.errors] == [
        ("text 3", "c", "a"),
        ("text 6", "c", "b"),
        ("text 1", "a", "b"),
    ]
    assert found.errors[0]["confidence"] == pytest.approx(np.exp(9) / (np.exp(9) + 2))
    assert found.interval is not None and found.interval[0] < 4 / 7 < found.interval[1]


def test_many_classes_have_no_matrix() -> None:
    names = [str(i) for i in range(51)]
    split = Examples(["x"] * 51, None, names)
    found = judge(KIND, ("accuracy",), [Answered(list(np.eye(51)), None, split)], names)
    assert found.confusion is None and found.per_class is not None and len(found.per_class) == 51
    assert found.errors == []
    assert found.interval == pytest.approx([0.92996, 1.0], abs=1e-4)  # n / (n + 1.96²)


def test_a_perfect_score_of_few_examples_is_remarked(result: RunResult) -> None:
    split = Examples(["x"] * 12, None, ["a", "b", "c"] * 4)
    answers = [Answered(list(np.tile(np.eye(3), (4, 1))), None, split)]
    for name, words in (
        ("accuracy", "between 0.76 and 1.00 with these 12"),
        ("macro-f1", "no sample of these 12 examples"),
    ):
        found = judge(KIND, (name,), answers, NAMES)
        metric = {"name": name, "value": found.metrics[name]}
        told = replace(
            result, metric=metric, interval=found.interval, eval_examples=12, constant=None
        ).remarks
        assert len(told) == 1 and words in told[0]


def test_a_collapsed_model_has_no_classes() -> None:
    split = Examples(["x", "y"], None, ["a", "b"])
    found = judge(KIND, ("accuracy",), [Answered([np.array([np.nan, 0, 0])] * 2, None, split)], NAMES)
    assert np.isnan(found.metrics["accuracy"]) and found.interval is None and found.per_class is None


def test_numbers_have_an_interval_alone() -> None:
    targets = np.arange(40.0)
    outputs = [np.array([value]) for value in targets + np.tile([1.0, -1.0], 20)]
    split = Examples(["x"] * 40, None, targets.tolist())
    found = judge(find_kind("regression"), ("mae", "pearson"), [Answered(outputs, None, split)], ())
    assert found.metrics["mae"] == 1.0 and found.interval is None  # every sample has this error
    assert found.per_class is None and found.confusion is None and found.errors == []


@pytest.fixture(scope="module")
def result(tiny_bert: Path, sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), method="head", epochs=1.0)
    return train_run(config, tmp_path_factory.mktemp("judged") / "run")


def test_a_run_records_what_evaluating_it_finds(result: RunResult, sentiment: Path) -> None:
    run = FinishedRun(result.output)
    again = run.judge(sentiment / "dev.jsonl")
    for name in ("metrics", "interval", "per_class", "confusion", "errors"):
        assert getattr(again, name) == getattr(result, name) == run.metrics[name], name
    assert sum(map(sum, again.confusion or [])) == 24
    assert 1 <= len(again.errors) <= 5


def test_a_comparison_keeps_what_is_small(result: RunResult) -> None:
    assert _kept(result)["confusion"] == result.confusion and _kept(result)["errors"] == []
    many = replace(result, per_class={str(i): {} for i in range(21)})
    assert _kept(many)["confusion"] is None and _kept(many)["per_class"] is None


@pytest.mark.parametrize(
    ("metric", "interval", "words"),
    [
        (
            "accuracy",
            [0.52, 0.71],
            "0.620 lies between 0.52 and 0.71 with these 24 examples: differences below 0.09 are noise",
        ),
        ("accuracy", [0.58, 0.66], None),
        ("rmse", [0.52, 0.71], None),
        ("accuracy", None, None),
    ],
)
def test_a_wide_interval_is_remarked(result: RunResult, metric, interval, words) -> None:
    told = replace(result, metric={"name": metric, "value": 0.62}, interval=interval, constant=None).remarks
    assert len(told) == (words is not None) and (words or "") in "".join(told)


def test_a_low_error_is_better_than_the_constant_answer(result: RunResult) -> None:
    low = replace(result, metric={"name": "rmse", "value": 0.5}, constant={"rmse": 0.9}, interval=None)
    assert low.remarks == []
    assert "learnt nothing" in replace(low, constant={"rmse": 0.4}).remarks[0]
