"""Metrics against closed forms, and at the edges where libraries warn or return NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.metrics import (
    METRICS,
    compute_metrics,
    default_metrics,
    interval,
    metric_fn,
    metrics_of,
    probabilities,
    score,
    share_interval,
)

CLASSES = ["accuracy", "f1", "matthews"]
NUMBERS = ["pearson", "spearman"]


def test_binary_closed_forms():
    truth = [1] * 50 + [0] * 50
    guess = [1] * 40 + [0] * 10 + [1] * 20 + [0] * 30  # tp 40, fn 10, fp 20, tn 30
    values = compute_metrics(CLASSES, guess, truth)
    assert list(values) == CLASSES
    assert values["accuracy"] == pytest.approx(0.7)
    assert values["f1"] == pytest.approx(2 * 40 / (2 * 40 + 20 + 10))
    assert values["matthews"] == pytest.approx((40 * 30 - 20 * 10) / math.sqrt(60 * 50 * 50 * 40))


def test_f1_of_many_classes_is_the_mean():
    values = compute_metrics(["f1"], [0, 1, 2, 2], [0, 1, 2, 1])
    assert values["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_correlations_closed_forms():
    x = np.arange(1.0, 6.0)
    assert compute_metrics(NUMBERS, 3 * x - 2, x) == pytest.approx({"pearson": 1.0, "spearman": 1.0})
    assert compute_metrics(NUMBERS, -x, x)["pearson"] == pytest.approx(-1.0)
    cubes = compute_metrics(NUMBERS, x**3, x)
    assert cubes["spearman"] == pytest.approx(1.0)
    assert cubes["pearson"] == pytest.approx(np.corrcoef(x**3, x)[0, 1])


def test_tensors_and_columns_are_taken():
    values = compute_metrics(["pearson"], torch.tensor([[1.0], [2.0], [4.0]]), [1, 2, 4])
    assert values["pearson"] == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_are_zero_without_a_warning(constant):
    assert compute_metrics(["matthews"], [constant] * 4, [0, 1, 1, 0]) == {"matthews": 0.0}
    assert compute_metrics(["matthews"], [constant] * 4, [constant] * 4) == {"matthews": 0.0}
    assert compute_metrics(NUMBERS, [constant] * 4, [0.0, 1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert compute_metrics(NUMBERS, [1.0], [2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert compute_metrics(["f1"], [0] * 3, [0] * 3) == {"f1": 0.0}


def test_nearly_constant_predictions_do_not_warn():
    values = compute_metrics(NUMBERS, [1.0, 1.0, 1.0 + 1e-15], [1.0, 2.0, 3.0])
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_not_finite_give_nan(bad):
    values = compute_metrics(list(METRICS), [0.0, bad, 1.0], [0, 1, 1], logits=np.zeros((3, 2)))
    assert list(values) == list(METRICS) and all(math.isnan(value) for value in values.values())


def test_errors():
    with pytest.raises(ConfigError, match="Did you mean 'matthews'"):
        compute_metrics(["mathews"], [0], [0])
    with pytest.raises(DataError, match="got 1 predictions for 2 labels"):
        compute_metrics(["accuracy"], [0], [0, 1])
    with pytest.raises(DataError, match="at least one, got shape"):
        compute_metrics(["accuracy"], [], [])
    with pytest.raises(DataError, match="argmax of logits"):
        compute_metrics(["accuracy"], [[0.1, 0.9]], [1])


def test_defaults_fit_their_kind():
    for kind in ("classification", "regression"):
        assert all(METRICS[name].kind == kind for name in default_metrics(kind))


def calibration_error_by_bins(chances: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The expected calibration error, bin after bin: Σ n_b/n · |accuracy − confidence|."""
    confidence, right = chances.max(1), chances.argmax(1) == truth
    total = 0.0
    for low in np.arange(15) / 15:
        here = (confidence >= low) & ((confidence < low + 1 / 15) | (low == 14 / 15))
        if weights[here].sum():
            gap = np.average(right[here], weights=weights[here]) - np.average(
                confidence[here], weights=weights[here]
            )
            total += weights[here].sum() / weights.sum() * abs(gap)
    return total


def twin(name: str, logits: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The metric as scikit-learn and scipy have it."""
    from scipy import stats
    from sklearn import metrics

    if name in metrics_of("regression"):
        x, y = np.repeat(logits[:, 0], weights), np.repeat(truth, weights)
        return {
            "pearson": lambda: stats.pearsonr(x, y).statistic,
            "spearman": lambda: stats.spearmanr(x, y).statistic,
            "rmse": lambda: metrics.root_mean_squared_error(y, x),
            "mae": lambda: metrics.mean_absolute_error(y, x),
        }[name]()
    two = logits.shape[1] == 2
    chances = probabilities(logits)
    kept: dict = {"sample_weight": weights}
    if name == "auroc":
        return metrics.roc_auc_score(truth, chances[:, 1] if two else chances, multi_class="ovr", **kept)
    if name == "log-loss":
        return metrics.log_loss(truth, chances, **kept)
    if name == "calibration-error":
        return calibration_error_by_bins(chances, truth, weights)
    if name == "average-precision":
        every = [truth == c for c in range(logits.shape[1])]
        of_class = [
            metrics.average_precision_score(t, c, **kept) for t, c in zip(every, chances.T, strict=True)
        ]
        return of_class[1] if two else float(np.mean(of_class))
    mean = "binary" if two else "macro"
    return {
        "accuracy": lambda: metrics.accuracy_score(truth, logits.argmax(1), **kept),
        "balanced-accuracy": lambda: metrics.balanced_accuracy_score(truth, logits.argmax(1), **kept),
        "matthews": lambda: metrics.matthews_corrcoef(truth, logits.argmax(1), **kept),
        "f1": lambda: metrics.f1_score(truth, logits.argmax(1), average=mean, **kept),
        "macro-f1": lambda: metrics.f1_score(truth, logits.argmax(1), average="macro", **kept),
        "weighted-f1": lambda: metrics.f1_score(truth, logits.argmax(1), average="weighted", **kept),
        "precision": lambda: metrics.precision_score(truth, logits.argmax(1), average=mean, **kept),
        "recall": lambda: metrics.recall_score(truth, logits.argmax(1), average=mean, **kept),
    }[name]()


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("name", METRICS)
def test_weighted_metrics_are_those_of_scikit_learn(name: str, num_classes: int) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(num_classes, size=60)
    logits = rng.normal(size=(60, num_classes)) + np.eye(num_classes)[truth]
    logits = np.round(8 * logits) / 8  # some are equal
    said = logits[:, 0] if METRICS[name].kind == "regression" else logits.argmax(1)
    weights = np.stack([np.ones(60, dtype=int), rng.integers(4, size=60)])
    expected = [twin(name, logits, truth, row) for row in weights]
    assert metric_fn(name, said, truth, logits=logits)(weights * 1.0) == pytest.approx(expected)


def test_a_metric_of_scores_needs_both_classes():
    logits = np.zeros((4, 2))
    found = compute_metrics(["auroc", "average-precision"], [0] * 4, [0, 1, 1, 0], logits=logits)
    assert found == {"auroc": 0.5, "average-precision": 0.5}
    assert math.isnan(compute_metrics(["auroc"], [0] * 4, [1] * 4, logits=logits)["auroc"])
    with pytest.raises(ConfigError, match="auroc needs the logits"):
        compute_metrics(["auroc"], [0], [1])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_ranks_do_not_depend_on_how_sure_a_model_is(num_classes: int) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=50)
    logits = np.full((50, num_classes), -1e6)
    logits[:, 0], logits[:, 1] = 0, truth + rng.normal(size=50)
    names = ["auroc", "average-precision"] if num_classes == 2 else ["auroc"]
    found = [compute_metrics(names, logits.argmax(1), truth, logits=scale * logits) for scale in (1, 1000)]
    assert found[0] == found[1] and 0.6 < found[0]["auroc"] < 0.95


def test_the_interval_is_a_bootstrap_over_examples():
    said = np.arange(100) < 70
    fn = metric_fn("accuracy", said, np.ones(100))
    low, high = interval(fn, 100) or (0, 0)
    assert (low, high) == interval(fn, 100)
    spread = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert (low, high) == pytest.approx((0.7 - spread, 0.7 + spread), abs=0.02)
    draws = np.random.default_rng(0).integers(100, size=(1000, 100))
    assert (low, high) == tuple(np.quantile(said[draws].mean(1), [0.025, 0.975]))
    assert interval(lambda weights: np.full(len(weights), math.nan), 3) is None
    assert score(fn, 100) == 0.7


def test_equal_samples_tell_no_interval():
    truth = np.tile([0, 1], 6)
    assert interval(metric_fn("f1", truth, truth), 12) is None
    assert interval(metric_fn("mae", truth + 1.0, truth), 12) is None


@pytest.mark.parametrize("right", [0, 1, 7, 12])
def test_the_interval_of_a_share_holds_the_shares_that_a_score_test_accepts(right):
    ends = share_interval(right / 12, 12)
    assert ends is not None and 0 <= ends[0] <= right / 12 <= ends[1] <= 1
    for end in set(ends) - {0.0, 1.0}:
        assert abs(right / 12 - end) / math.sqrt(end * (1 - end) / 12) == pytest.approx(1.959964)
    assert ends[1] - ends[0] > 0.2
    assert share_interval(math.nan, 12) is None
