"""Metrics of predictions, by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from childtuning.errors import ConfigError, DataError, did_you_mean

_MetricFn = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """A metric: the kind of task it is for, and its function of (predictions, labels)."""

    kind: Literal["classification", "regression"]
    compute_fn: _MetricFn


def compute_metrics(task_metrics: Iterable[str], predictions: Any, labels: Any) -> dict[str, float]:
    """Measure predictions against labels.

    accuracy; f1 (of the class with id 1, or the mean over classes if an id above 1 occurs); matthews;
    pearson and spearman correlation. A correlation with a constant is 0.0, and so is Matthews'. If any
    prediction is not finite (a collapsed run), every metric is NaN, so that no report shows it as a score.

    Args:
        task_metrics: metric names.
        predictions: class ids or numbers, shape (N,) or (N, 1).
        labels: the same, the truth.
    Returns:
        Metric name -> value, in the order of `task_metrics`.
    Raises:
        ConfigError: for an unknown name.
        DataError: when there is nothing to measure or the shapes differ.
    Example:
        >>> compute_metrics(["accuracy", "f1"], [1, 1, 0, 0], [1, 0, 0, 0])["accuracy"]
        0.75
    """
    names = list(task_metrics)
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"Unknown metric {name!r}. {did_you_mean(name, METRICS)}")
    predicted, truth = _column(predictions, "predictions"), _column(labels, "labels")
    if predicted.shape != truth.shape:
        raise DataError(
            f"Metrics need one prediction per label, got {len(predicted)} predictions for {len(truth)} labels. "
            f"Pass both for the same rows."
        )
    if not np.isfinite(predicted).all():
        return dict.fromkeys(names, math.nan)
    return {name: METRICS[name].compute_fn(predicted, truth) for name in names}


def default_metrics(kind: Literal["classification", "regression"]) -> tuple[str, ...]:
    """Return the default metrics of a task."""
    return ("accuracy",) if kind == "classification" else ("pearson", "spearman")


def _column(values: Any, name: str) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    if column.ndim != 1 or not column.size:
        raise DataError(
            f"{name} must be one number per row, at least one, got shape {column.shape}. "
            f"Pass class ids (the argmax of logits) or numbers."
        )
    return column


def _accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(truth.astype(np.int64), predicted.astype(np.int64)))


def _f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    average = "macro" if max(predicted.max(), truth.max()) > 1 else "binary"
    truth_ids, predicted_ids = truth.astype(np.int64), predicted.astype(np.int64)
    return float(f1_score(truth_ids, predicted_ids, average=average, zero_division=0))  # type: ignore[arg-type]


def _matthews(predicted: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:  # sklearn returns 0 too, with a warning
        return 0.0
    return float(matthews_corrcoef(truth.astype(np.int64), predicted.astype(np.int64)))


def _pearson(predicted: np.ndarray, truth: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, truth)


def _spearman(predicted: np.ndarray, truth: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, truth)


def _correlation(correlate: Callable[..., Any], predicted: np.ndarray, truth: np.ndarray) -> float:
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return 0.0
    with warnings.catch_warnings():  # scipy warns of nearly constant input
        warnings.simplefilter("ignore")
        value = float(correlate(predicted, truth).statistic)
    return value if math.isfinite(value) else 0.0


def metrics_of(kind: Literal["classification", "regression"]) -> tuple[str, ...]:
    """Return the names of the metrics for this kind of task."""
    return tuple(name for name, metric in METRICS.items() if metric.kind == kind)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("classification", _accuracy),
    "f1": Metric("classification", _f1),
    "matthews": Metric("classification", _matthews),
    "pearson": Metric("regression", _pearson),
    "spearman": Metric("regression", _spearman),
}
