"""Cross-validation: the parts, the scores of all parts together, and a run that is interrupted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from childtuning.errors import ConfigError, DataError, ModelError
from childtuning.runs import FinishedRun, RunConfig, inputs, train_run, understand_run
from childtuning.runs.judgement import Answered, judge
from childtuning.tasks import Examples, find_kind


def a_config(model: Path, data: Path, **options: Any) -> RunConfig:
    files = {"train": str(data / "train.jsonl"), "model": str(model)}
    return RunConfig(
        **{**files, "learning_rate": 1e-2, "epochs": 1.0, "method": "child-d", "folds": 3, **options}
    )


@pytest.mark.parametrize("num", [2, 5])
def test_every_example_is_in_one_fold(num: int) -> None:
    labels = ["a"] * 50 + ["b"] * 25 + ["c"] * 5
    texts = [f"text {i}" for i in range(74)] + ["same"] * 6  # of two classes
    rows = Examples(texts, None, labels)
    parts = rows.folds(num, seed=3)
    assert sorted(row for part in parts for row in part) == list(range(80))
    assert parts == rows.folds(num, seed=3) != rows.folds(num, seed=4)
    assert sum(any(row >= 74 for row in part) for part in parts) == 1
    for part in parts:
        found = Counter(labels[row] for row in part)
        assert abs(found["a"] - 50 / num) <= 1 and abs(found["b"] - 25 / num) <= 3
    with pytest.raises(ConfigError, match="75 different examples cannot be split into 76 folds"):
        rows.folds(76)


def test_the_score_is_that_of_all_folds_together(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    config = a_config(tiny_bert, sentiment)
    told: list[str] = []
    result = train_run(config, tmp_path / "run", tell=told.append)
    assert [line[:11] for line in told if line.startswith("fold")] == [f"fold {i} of 3" for i in (1, 2, 3)]
    assert result.eval_examples == result.train_examples == 96
    assert result.answers is None and not (tmp_path / "run" / "folds").exists()
    right = 0
    for number in (1, 2, 3):
        one = train_run(replace(config, fold=number), tmp_path / str(number))
        assert (one.train_examples, one.eval_examples) == (64, 32)
        assert one.metrics == result.folds[number - 1]
        right += round(one.metrics["accuracy"] * 32)
    assert result.metrics["accuracy"] == pytest.approx(right / 96)
    assert result.confusion is not None and sum(map(sum, result.confusion)) == 96
    assert np.trace(result.confusion) == right
    assert result.constant == {"accuracy": 0.5}
    whole = train_run(replace(config, folds=None, eval=config.train), tmp_path / "whole")
    texts = ["a great day", "an awful day"]
    found = [FinishedRun(tmp_path / name).predict_proba(texts) for name in ("run", "whole")]
    assert np.array_equal(*found)  # it is trained on all examples
    assert whole.folds == []


def test_metrics_are_the_mean_over_folds(tiny_bert: Path) -> None:
    kind = find_kind("classification")
    rng = np.random.default_rng(0)
    parts = []
    for size in (10, 30):
        labels = ["a", "b"] * (size // 2)
        outputs = [rng.normal(size=2) + (label == "b") * np.array([0, 1]) for label in labels]
        parts.append(Answered(outputs, None, Examples(["x"] * size, None, labels)))
    names = ("f1", "accuracy", "auroc")
    alone = [judge(kind, names, [part], ("a", "b")).metrics for part in parts]
    found = judge(kind, names, parts, ("a", "b"))
    for name in names:
        assert found.metrics[name] == pytest.approx((10 * alone[0][name] + 30 * alone[1][name]) / 40)
    assert found.interval is not None and found.interval[0] < found.metrics["f1"] < found.interval[1]


def test_an_interrupted_cross_validation_goes_on(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tiny_bert, sentiment)
    whole = train_run(config, tmp_path / "whole")
    answered = FinishedRun.answered
    calls = []

    def interrupted(self: FinishedRun, *args: Any) -> Any:
        calls.append(self.path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answered(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedRun, "answered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "folds").iterdir()} == {"1", "2"}
    told: list[str] = []
    resumed = train_run(config, tmp_path / "run", resume=True, tell=told.append)
    assert (resumed.metrics, resumed.folds) == (whole.metrics, whole.folds)
    assert resumed.confusion == whole.confusion


def test_what_cannot_be_folded_is_refused(tiny_bert: Path, sentiment: Path) -> None:
    with pytest.raises(ConfigError, match="--folds evaluates on parts of the file --train"):
        a_config(tiny_bert, sentiment, eval=str(sentiment / "dev.jsonl"))
    with pytest.raises(ConfigError, match="--folds evaluates on parts of the file --train"):
        RunConfig(task="rte", folds=3)
    with pytest.raises(ConfigError, match="--folds evaluates on every part, got --eval-share"):
        a_config(tiny_bert, sentiment, eval_share=0.3)
    with pytest.raises(ConfigError, match="fold must be between 1 and --folds, got 4 of 3"):
        a_config(tiny_bert, sentiment, fold=4)
    with pytest.raises(ConfigError, match="fold must be between 1 and --folds, got 1 of none"):
        a_config(tiny_bert, sentiment, folds=None, fold=1)
    with pytest.raises(ConfigError, match="folds must be a whole number from 2 up"):
        a_config(tiny_bert, sentiment, folds=1)


def test_a_fold_that_diverges_ends_the_run(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fold 1 of 3 diverged at step .* lower --lr and --overwrite"):
        train_run(a_config(tiny_bert, sentiment, learning_rate=1e30), tmp_path / "run")


def test_a_metric_that_a_fold_cannot_have_is_refused_first(tiny_bert: Path, tmp_path: Path) -> None:
    rows = "".join(f"great {i},good\n" for i in range(20)) + "awful,bad\nawful too,bad\n"
    (tmp_path / "a.csv").write_text("text,label\n" + rows, encoding="utf-8")
    config = RunConfig(train=str(tmp_path / "a.csv"), model=str(tiny_bert), folds=3, metric="auroc")
    with pytest.raises(DataError, match="fold . of 3: auroc needs evaluation .* Or pass fewer --folds"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    told: list[str] = []
    train_run(replace(config, metric="macro-f1", epochs=1.0), tmp_path / "run", tell=told.append)
    assert "macro-f1 of folds of 7 examples means little" in told[0]


def test_folds_are_described(tiny_bert: Path, sentiment: Path) -> None:
    found = understand_run(a_config(tiny_bert, sentiment))
    assert found.duplicates == 0 and found.warnings == []
    assert "in 3 folds, each answered by a model trained on the others" in "".join(found.lines())
    for options in ({"held_out": 0.2}, {"train_limit": 60}, {"eval_limit": 20}):
        assert understand_run(a_config(tiny_bert, sentiment, **options)).warnings == [], options
    task, _ = inputs.read_run_task(a_config(tiny_bert, sentiment, fold=2))
    assert not {*task.train.text} & {*task.dev.text}  # type: ignore[attr-defined]
