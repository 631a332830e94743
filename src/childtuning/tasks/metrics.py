"""Metrics of predictions, by name, and intervals over the examples.

Shape letters: N examples, K classes, R weightings of the examples.

A metric is a function of weights [R, N], how often each example counts, and returns R values. Weights of one give the
score; weights drawn by a bootstrap give its interval, without a loop over a thousand samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from childtuning.errors import ConfigError, DataError, did_you_mean

WeightedFn = Callable[[np.ndarray], np.ndarray]
"""Weights of the examples [R, N] -> R values."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "mae", "log-loss", "calibration-error"})
_MAY_BE_NEGATIVE = frozenset({"matthews", "pearson", "spearman"})
# For two classes, these measure the second one.
OF_ONE_CLASS = frozenset({"f1", "precision", "recall", "average-precision"})
# These rank the examples of one class before the others.
OF_RANKING = frozenset({"auroc", "average-precision"})
_RESAMPLES, _AT_ONCE = 1000, 2**20  # samples of a bootstrap; weights held at once
_BINS = 15  # of confidence


@dataclass(frozen=True)
class Metric:
    """A metric: the kind of task it is for, and how it is computed.

    Attributes:
        kind: classification or regression.
        make_fn: (predictions [N], truth [N], K) -> function of weights; if `from_scores`, it takes the
            classes' logits [N, K] in place of predictions.
        from_scores: whether it needs logits.
    """

    kind: Literal["classification", "regression"]
    make_fn: Callable[[np.ndarray, np.ndarray, int], WeightedFn]
    from_scores: bool = False


def lower_is_better(metric: str | None) -> bool:
    """Return whether smaller values of a metric are better."""
    return metric in LOWER_IS_BETTER


def is_share(metric: str) -> bool:
    """Return whether a metric lies in [0, 1]."""
    return metric not in LOWER_IS_BETTER | _MAY_BE_NEGATIVE


def compute_metrics(
    task_metrics: Iterable[str], predictions: Any, labels: Any, *, logits: Any = None
) -> dict[str, float]:
    """Measure predictions against labels.

    f1, precision, recall and average-precision are those of the class with id 1, or the mean over classes if
    there are more than two; auroc is the area under the ROC curve, the mean over classes against the rest. A
    mean over classes leaves out those that do not occur. log-loss is the mean negative log probability of the
    truth; calibration-error is how far confidence and accuracy differ, the mean over 15 bins. A ratio with
    denominator 0 is 0, and so is a correlation with a constant, and Matthews'. If any prediction is not finite
    (a collapsed run), every metric is NaN, so that no report shows it as a score.

    Args:
        task_metrics: metric names.
        predictions: class ids or numbers, shape (N,) or (N, 1).
        labels: the same, the truth.
        logits: of the classes, shape (N, K); auroc and average-precision need them.
    Returns:
        Metric name -> value, in the order of `task_metrics`.
    Raises:
        ConfigError: for an unknown name, or a metric that needs logits.
        DataError: when there is nothing to measure or the shapes differ.
    Example:
        >>> compute_metrics(["accuracy", "f1"], [1, 1, 0, 0], [1, 0, 0, 0])["accuracy"]
        0.75
    """
    found = {name: metric_fn(name, predictions, labels, logits=logits) for name in task_metrics}
    return {name: score(fn, len(np.asarray(labels))) for name, fn in found.items()}


def metric_fn(name: str, predictions: Any, labels: Any, *, logits: Any = None) -> WeightedFn:
    """Return a metric of examples as a function of their weights; arguments as for `compute_metrics`."""
    if name not in METRICS:
        raise ConfigError(f"Unknown metric {name!r}. {did_you_mean(name, METRICS)}")
    metric = METRICS[name]
    if metric.from_scores and logits is None:
        raise ConfigError(f"{name} needs the logits of the classes, got predictions alone. Pass logits=.")
    predicted, truth = _column(predictions, "predictions"), _column(labels, "labels")
    if predicted.shape != truth.shape:
        raise DataError(
            f"Metrics need one prediction per label, got {len(predicted)} predictions for {len(truth)} labels. "
            f"Pass both for the same rows."
        )
    if not np.isfinite(predicted).all():
        return lambda weights: np.full(len(weights), math.nan)
    if metric.kind == "regression":
        return metric.make_fn(predicted, truth, 1)
    predicted, truth = predicted.astype(np.int64), truth.astype(np.int64)
    num_classes = 1 + max(1, int(predicted.max()), int(truth.max()))
    if logits is not None:
        num_classes = np.shape(logits)[1]
    scores = np.asarray(logits, dtype=np.float64) if metric.from_scores else predicted
    return metric.make_fn(scores, truth, num_classes)


def score(fn: WeightedFn, num_examples: int) -> float:
    """Return the value of a metric when every example counts once."""
    return float(fn(np.ones((1, num_examples)))[0])


def interval(fn: WeightedFn, num_examples: int, *, level: float = 0.95) -> tuple[float, float] | None:
    """Return a percentile bootstrap interval of a metric over the examples, from 1,000 samples with a fixed seed.

    [Efron and Tibshirani 1993, section 13.3]

    Args:
        fn: the metric.
        num_examples: how many examples there are.
        level: the interval's coverage.
    Returns:
        both ends; None if the metric has no value, or if both are equal, as when all answers are right: how far it
        may be off cannot be told from the samples then.
    """
    rng = np.random.default_rng(0)
    most = max(1, _AT_ONCE // num_examples)
    values: list[np.ndarray] = []
    for start in range(0, _RESAMPLES, most):
        size = min(most, _RESAMPLES - start)
        drawn = (
            rng.integers(num_examples, size=(size, num_examples)) + num_examples * np.arange(size)[:, None]
        )
        counts = np.bincount(drawn.ravel(), minlength=size * num_examples)
        values.append(fn(counts.reshape(size, num_examples).astype(np.float64)))
    joined = np.concatenate(values)
    joined = joined[~np.isnan(joined)]
    if not joined.size:
        return None
    low, high = np.quantile(joined, [(1 - level) / 2, (1 + level) / 2])
    return None if low == high else (float(low), float(high))


def share_interval(share: float, num_examples: int, *, level: float = 0.95) -> tuple[float, float] | None:
    """Return Wilson's score interval of a share of the examples, as accuracy is; it holds for 0 and 1 too.

    [Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1]

    Args:
        share: how many of the examples count, divided by all.
        num_examples: how many examples there are.
        level: the interval's coverage.
    Returns:
        both ends; None if the share is not finite.
    """
    from scipy.stats import binomtest

    if not math.isfinite(share):
        return None
    found = binomtest(round(share * num_examples), num_examples)
    ends = found.proportion_ci(confidence_level=level, method="wilson")
    return float(ends.low), float(ends.high)


def probabilities(logits: Any) -> np.ndarray:
    """Return the softmax of logits [N, K], float64."""
    rows = np.asarray(logits, dtype=np.float64)
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Return log p/(1 − p) of the softmax of logits [N, K]; it orders what rounds to probability 1."""
    from scipy.special import log_softmax, logsumexp

    logs = np.asarray(log_softmax(logits, axis=1))
    odds = logs - np.log1p(-np.minimum(np.exp(logs), 0.5))
    rows, most = np.arange(len(logits)), logits.argmax(1)
    others = logits.copy()
    others[rows, most] = -math.inf
    odds[rows, most] = logits[rows, most] - logsumexp(others, axis=1)
    return odds


def default_metrics(kind: Literal["classification", "regression"]) -> tuple[str, ...]:
    """Return the default metrics of a task."""
    return ("accuracy",) if kind == "classification" else ("pearson", "spearman")


def metrics_of(kind: Literal["classification", "regression"]) -> tuple[str, ...]:
    """Return the names of the metrics for this kind of task."""
    return tuple(name for name, metric in METRICS.items() if metric.kind == kind)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide; 0 where the denominator is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


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


# Metrics of counts: for each class how many examples are right, predicted as it, and of it, each [R, K]

_CountsFn = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _of_counts(value_fn: _CountsFn) -> Metric:
    def make(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> WeightedFn:
        from scipy.sparse import csr_matrix

        def per_class(ids: np.ndarray, here: np.ndarray) -> Any:
            where = (ids[here], np.flatnonzero(here))
            return csr_matrix((np.ones(len(where[0])), where), shape=(num_classes, len(truth)))

        everywhere = np.ones(len(truth), dtype=bool)
        right, said = per_class(truth, predicted == truth), per_class(predicted, everywhere)
        there = per_class(truth, everywhere)
        return lambda weights: value_fn(*((matrix @ weights.T).T for matrix in (right, said, there)))

    return Metric("classification", make)


def _mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The mean over the classes that count."""
    return ratio((values * counted).sum(1), counted.sum(1))


def _second_or_mean(of_class_fn: _CountsFn) -> Metric:
    """The value of class 1 of two, or the mean over the classes that occur."""

    def value(right: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
        values = of_class_fn(right, said, there)
        return values[:, 1] if values.shape[1] == 2 else _mean(values, said + there > 0)

    return _of_counts(value)


def _class_f1(right: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
    return ratio(2 * right, said + there)


def _macro_f1(right: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
    return _mean(_class_f1(right, said, there), said + there > 0)


def _weighted_f1(right: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
    return ratio((_class_f1(right, said, there) * there).sum(1), there.sum(1))


def _matthews(right: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The correlation of several classes [Gorodkin 2004]."""
    total = there.sum(1)
    spread = (total**2 - (said**2).sum(1)) * (total**2 - (there**2).sum(1))
    return ratio(right.sum(1) * total - (said * there).sum(1), np.sqrt(spread))


# Metrics of ranks: one class against the rest, by falling probability


def _of_scores(value_fn: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Metric:
    """A metric of (weight of the class, weight of all) above each threshold, both [R, thresholds]."""

    def one_class(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores, kind="stable")
        last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of equal scores
        ordered = weights[:, order]
        return value_fn(
            np.cumsum(ordered * positive[order], axis=1)[:, last], np.cumsum(ordered, axis=1)[:, last]
        )

    def make(logits: np.ndarray, truth: np.ndarray, num_classes: int) -> WeightedFn:
        scores = log_odds(logits)
        classes = [1] if num_classes == 2 else range(num_classes)

        def weighted(weights: np.ndarray) -> np.ndarray:
            total, count = np.zeros(len(weights)), np.zeros(len(weights))
            for index in classes:
                values = one_class(scores[:, index], truth == index, weights)
                total += np.nan_to_num(values)
                count += ~np.isnan(values)
            return np.where(count > 0, ratio(total, count), math.nan)

        return weighted

    return Metric("classification", make, from_scores=True)


def _auroc(hits: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The area by trapezoids; NaN without examples of the class, or of the others."""
    misses = above - hits
    before = np.pad(hits, ((0, 0), (1, 0)))[:, :-1]
    area = (np.diff(misses, axis=1, prepend=0) * (hits + before) / 2).sum(1)
    whole = hits[:, -1] * misses[:, -1]
    return np.where(whole > 0, ratio(area, whole), math.nan)


def _average_precision(hits: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The precision at each threshold, weighted by the recall gained there; NaN without examples of the class."""
    gained = np.diff(hits, axis=1, prepend=0)
    values = (gained * ratio(hits, above)).sum(1)
    return np.where(hits[:, -1] > 0, ratio(values, hits[:, -1]), math.nan)


def _of_probabilities(make_fn: Callable[[np.ndarray, np.ndarray], WeightedFn]) -> Metric:
    """A metric of the probabilities of all classes [N, K] and the truth [N]."""
    make = lambda logits, truth, _: make_fn(probabilities(logits), truth)  # noqa: E731
    return Metric("classification", make, from_scores=True)


def _log_loss(scores: np.ndarray, truth: np.ndarray) -> WeightedFn:
    losses = -np.log(np.maximum(scores[np.arange(len(truth)), truth], np.finfo(np.float64).tiny))
    return lambda weights: weights @ losses / weights.sum(1)


def _calibration_error(scores: np.ndarray, truth: np.ndarray) -> WeightedFn:
    """The expected calibration error, in 15 bins of equal width [Guo et al. 2017, equation 3]."""
    confidence = scores.max(1)
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    in_bin = np.eye(_BINS)[bins]
    excess = confidence - (scores.argmax(1) == truth)
    return lambda weights: np.abs((weights * excess) @ in_bin).sum(1) / weights.sum(1)


# Metrics of numbers


def _of_errors(error_fn: Callable[[np.ndarray], np.ndarray], value_fn: Any) -> Metric:
    def make(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> WeightedFn:
        errors = error_fn(predicted - truth)
        return lambda weights: value_fn(weights @ errors / weights.sum(1))

    return Metric("regression", make)


def _pearson(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> WeightedFn:
    return lambda weights: _correlation(weights, predicted[None], truth[None])


def _spearman(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> WeightedFn:
    return lambda weights: _correlation(weights, _ranks(weights, predicted), _ranks(weights, truth))


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean rank of each example among the weighted ones, [R, N]."""
    order = np.argsort(values, kind="stable")
    last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    upto = np.cumsum(weights[:, order], axis=1)[:, last]
    before = np.pad(upto, ((0, 0), (1, 0)))[:, :-1]
    places = np.searchsorted(values[order][last], values)
    return ((before + upto + 1) / 2)[:, places]


def _correlation(weights: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's correlation of weighted rows; 0 with a row that is constant up to rounding."""
    weights = weights / weights.sum(1, keepdims=True)
    left, right = (row - (weights * row).sum(1, keepdims=True) for row in (one, other))
    spreads = [(weights * row**2).sum(1) for row in (left, right)]
    least = [(1e-13 * np.abs(row).max(1)) ** 2 for row in (one, other)]
    moves = (spreads[0] > least[0]) & (spreads[1] > least[1])
    return np.clip(ratio((weights * left * right).sum(1) * moves, np.sqrt(spreads[0] * spreads[1])), -1, 1)


METRICS: Mapping[str, Metric] = {
    "accuracy": _of_counts(lambda right, said, there: ratio(right.sum(1), there.sum(1))),
    "f1": _second_or_mean(_class_f1),
    "macro-f1": _of_counts(_macro_f1),
    "weighted-f1": _of_counts(_weighted_f1),
    "precision": _second_or_mean(lambda right, said, there: ratio(right, said)),
    "recall": _second_or_mean(lambda right, said, there: ratio(right, there)),
    "balanced-accuracy": _of_counts(lambda right, said, there: _mean(ratio(right, there), there > 0)),
    "matthews": _of_counts(_matthews),
    "auroc": _of_scores(_auroc),
    "average-precision": _of_scores(_average_precision),
    "log-loss": _of_probabilities(_log_loss),
    "calibration-error": _of_probabilities(_calibration_error),
    "pearson": Metric("regression", _pearson),
    "spearman": Metric("regression", _spearman),
    "rmse": _of_errors(np.square, np.sqrt),
    "mae": _of_errors(np.abs, lambda means: means),
}
