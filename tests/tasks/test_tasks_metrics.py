"""Metrics against closed forms, and at the edges where libraries warn or return NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.metrics import METRICS, compute_metrics, default_metrics

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
    values = compute_metrics(list(METRICS), [0.0, bad, 1.0], [0, 1, 1])
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
