"""What the scores of several seeds say, and whether two methods differ by more than chance.

One rule holds for runs without a score (NaN, or infinite): such a run is the worst there is. What only puts runs in
order (median, best, worst, Wilcoxon's test) ranks it below every number [worst-rank analysis, Lachin
1999]; what averages (mean, sd, interval, difference, permutation test) is ``None``, since an average over the runs that
came through would flatter the method that loses most. How many there are is always told.

The order of runs changes nothing, and random draws have a fixed seed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Description:
    """The scores of one method over seeds.

    Attributes:
        num: runs.
        num_nan: those without a score.
        num_collapsed: those no better than a constant answer, and those without a score.
        mean, sd: of the scores; the sample's standard deviation (n − 1), 0 for one run. ``None`` if ``num_nan`` > 0.
        median, best, worst: a run without a score is below all others; ``None`` where it is such a run's.
        interval: 95 % bootstrap interval of the mean; (value, value) where all are equal, ``None`` for fewer than two
            runs, of which it could say nothing, or if ``num_nan`` > 0.
    """

    num: int
    num_nan: int
    num_collapsed: int
    mean: float | None
    sd: float | None
    median: float | None
    best: float | None
    worst: float | None
    interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """A method beside a baseline, over the runs that both have.

    Attributes:
        num: pairs.
        num_nan: those in which either run has no score.
        difference: mean of (method − baseline), in units of the metric; ``None`` if ``num_nan`` > 0.
        interval: its 95 % bootstrap interval; ``None`` where ``describe`` has none.
        p_permutation: of the permutation test; ``None`` for fewer than two pairs, or if ``num_nan`` > 0.
        p_wilcoxon: of Wilcoxon's test; ``None`` for fewer than two pairs, or if no pair differs.
    """

    num: int
    num_nan: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_permutation: float | None = None
    p_wilcoxon: float | None = None

    @property
    def smallest_p(self) -> float | None:
        """The smallest p that so many pairs can give: 2 / 2ⁿ, exactly or by draws; ``None`` for fewer than two."""
        return None if self.num < 2 else max(2 / 2**self.num, 2 / (NUM_RESAMPLES + 1))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**asdict(self), "smallest_p": self.smallest_p}


def describe(
    values: Sequence[float], collapsed: Sequence[bool], *, lower_is_better: bool = False
) -> Description:
    """Describe the scores of one method over seeds.

    The interval is the bootstrap of ``mean_interval``, which says how far it can be trusted for few seeds.

    Args:
        values: a score a run; NaN for a run without one.
        collapsed: for every run, whether it is no better than a constant answer.
        lower_is_better: as for a loss.
    """
    worst_first = sorted(filter(math.isfinite, values), reverse=lower_is_better)
    num, num_nan = len(values), len(values) - len(worst_first)
    ordered = [*[None] * num_nan, *worst_first]
    middle = [score for score in ordered[(num - 1) // 2 : num // 2 + 1] if score is not None] if num else []
    whole = bool(worst_first) and num_nan == 0
    return Description(
        num=num,
        num_nan=num_nan,
        num_collapsed=sum(
            flag or not math.isfinite(value) for value, flag in zip(values, collapsed, strict=True)
        ),
        mean=fmean(worst_first) if whole else None,
        sd=(stdev(worst_first) if num > 1 else 0.0) if whole else None,
        median=fmean(middle) if len(middle) == 2 - num % 2 else None,
        best=worst_first[-1] if worst_first else None,
        worst=ordered[0] if ordered else None,
        interval=mean_interval([worst_first]) if whole else None,
    )


def compare_paired(
    values: Mapping[int, float],
    baseline_values: Mapping[int, float],
    *,
    lower_is_better: bool = False,
) -> Paired:
    """Compare a method with a baseline over the seeds that both have.

    The permutation test flips the sign of each difference: if the methods were the same, each sign would be a coin's.
    Two-sided p is the share of the 2ⁿ flips whose mean is at least as far from 0, as ``sign_flip_p`` counts them. With
    n seeds the smallest possible p is 2 / 2ⁿ: 0.0625 with 5, which never is below 0.05, and 0.031 with 6. Wilcoxon's
    test leaves out pairs without a difference; it is exact for up to 50 pairs, or 13 where ranks tie, and beyond that
    the normal approximation.

    Args:
        values: by seed, the method's scores; NaN for a run without one.
        baseline_values: the baseline's.
        lower_is_better: as for a loss; decides which way a run without a score counts.
    """
    pairs = _pairs(values, baseline_values)
    compared = compare_stratified([(values, baseline_values)])
    worst = math.inf if lower_is_better else -math.inf
    differences = [_difference(one, other, worst) for one, other in pairs]
    return replace(compared, p_wilcoxon=_wilcoxon_p(np.array(differences) / _largest_score(pairs)))


def compare_stratified(
    strata: Sequence[tuple[Mapping[int, float], Mapping[int, float]]],
) -> Paired:
    """Compare a method with a baseline over several tasks at once, each task weighing the same.

    The difference is the mean of the tasks' mean differences. The interval resamples seeds within each task, and the
    test flips the sign of each (task, seed) pair, which never exchanges runs of different tasks. Pairs count as
    independent, those of one seed on two tasks too. What is found holds for these tasks, and says nothing of others.
    There is no ``p_wilcoxon``: sizes of differences cannot be ranked across metrics.

    Args:
        strata: for each task the method's scores by seed, and the baseline's. A task without a common seed leaves
            everything ``None``.
    """
    by_task = [_pairs(values, baseline_values) for values, baseline_values in strata]
    pairs = [pair for task_pairs in by_task for pair in task_pairs]
    num_nan = sum(not all(map(math.isfinite, pair)) for pair in pairs)
    if num_nan or not by_task or not all(by_task):
        return Paired(len(pairs), num_nan)
    differences = [[one - other for one, other in task_pairs] for task_pairs in by_task]
    terms = [
        difference / (len(task_differences) * len(differences) * _largest_score(pairs))
        for task_differences in differences
        for difference in task_differences
    ]
    return Paired(
        num=len(pairs),
        difference=fmean(map(fmean, differences)),
        interval=mean_interval(differences),
        p_permutation=sign_flip_p(terms) if len(terms) > 1 else None,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for how many there are. [Holm 1979]

    Args:
        p_values: of one family; ``None`` for a comparison that has none, which stays ``None`` and does not count.
    Returns:
        in the same order; rejecting those below α errs anywhere in the family with a probability of at most α.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0  # the k-th smallest of m is multiplied by m − k + 1, and never falls below one before it
    for rank, (p, place) in enumerate(known):
        corrected[place] = largest = min(1.0, max(largest, (len(known) - rank) * p))
    return corrected


def expected_best(scores: Sequence[float], *, lower_is_better: bool = False) -> list[float]:
    """Return the expected validation score of the best of k hyperparameter sets, for k = 1 … n.

    The sets are drawn with replacement from the n that were tried: with x₁ ≤ … ≤ xₙ,
    E[max of k] = Σᵢ xᵢ ((i/n)ᵏ − ((i−1)/n)ᵏ). [Dodge et al. 2019, arXiv 1909.03004]

    Args:
        scores: of every set that was tried. A set without a score (NaN) counts as the worst that has one.
        lower_is_better: as for a loss; then of the smallest of k.
    Returns:
        n values, the budget in sets being the position; NaN if no set has a score.
    """
    sign = -1.0 if lower_is_better else 1.0
    known = [sign * score for score in scores if math.isfinite(score)]
    if not known:
        return [math.nan] * len(scores)
    num = len(scores)
    ascending = np.sort([*[min(known)] * (num - len(known)), *known])
    budgets = np.arange(1, num + 1)[:, None]
    below = (np.arange(num + 1) / num) ** budgets  # (k, i): the probability that all k are among the lowest i
    return (sign * (np.diff(below, axis=1) @ ascending)).tolist()


def _pairs(values: Mapping[int, float], baseline_values: Mapping[int, float]) -> list[tuple[float, float]]:
    return [(values[seed], baseline_values[seed]) for seed in values if seed in baseline_values]


def _difference(one: float, other: float, worst: float) -> float:
    """Difference of two scores, infinite where one of them is missing."""
    scored = math.isfinite(one), math.isfinite(other)
    if all(scored):
        return one - other
    return {(False, True): worst, (True, False): -worst}.get(scored, 0.0)


def _largest_score(pairs: Sequence[tuple[float, float]]) -> float:
    return max((abs(score) for pair in pairs for score in pair if math.isfinite(score)), default=0.0) or 1.0


def _wilcoxon_p(differences: np.ndarray) -> float | None:
    from scipy.stats import rankdata, wilcoxon

    rounded = np.sort(np.round(differences, DIGITS))
    moved = rounded[rounded != 0]
    if len(rounded) < 2 or not len(moved):
        return None
    # Ranks stand in for the differences, which may be infinite; the test looks at nothing else.
    return float(wilcoxon(np.sign(moved) * rankdata(np.abs(moved))).pvalue)


CONFIDENCE = 0.95
NUM_RESAMPLES = 9_999
# Scores are multiples of one over the number of examples, so sums of differences tie often, and a tie missed by a
# rounding error changes p. No metric is as fine as this, relative to the largest score.
DIGITS = 10


def mean_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return a 95 % bootstrap interval of the mean of the strata's means, resampled within each.

    It is the bias-corrected and accelerated one [Efron 1987] over 9,999 resamples, or the percentile one where that is
    undefined. With few values any bootstrap is too narrow: of such intervals for a normal mean about 71 % hold it with
    3 values, 85 % with 5, 90 % with 10.

    Args:
        strata: one or more lists of finite values; one list for a plain mean.
    Returns:
        low and high, both the mean itself where all values are equal; ``None`` where a stratum has fewer than two.
    """
    if min(map(len, strata)) < 2:
        return None
    from scipy.stats import bootstrap

    center = fmean(map(fmean, strata))
    deviations = [np.sort(stratum) - fmean(stratum) for stratum in strata]
    spread = max(float(np.abs(deviation).max()) for deviation in deviations)
    if spread <= 10.0**-DIGITS * max(abs(value) for stratum in strata for value in stratum):
        return center, center
    samples = [deviation / spread for deviation in deviations]
    lowest, highest = (fmean(float(end(sample)) for sample in samples) for end in (np.min, np.max))

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        means = [sample.mean(axis=axis) for sample in drawn]
        return np.round(np.mean(means, axis=0), DIGITS)  # the correction of bias counts ties

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():  # where the first is undefined it says so, and the second is taken
            warnings.simplefilter("ignore")
            found = bootstrap(
                samples,
                statistic,
                vectorized=True,
                confidence_level=CONFIDENCE,
                n_resamples=NUM_RESAMPLES,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            low = max(float(found.low), lowest)  # what is rounded may lie outside
            high = min(float(found.high), highest)
            return center + spread * low, center + spread * high
    return None


def sign_flip_p(terms: Sequence[float]) -> float:
    """Return the two-sided p of a sum of terms, each of which might as well have had the other sign.

    Args:
        terms: two or more, in a unit in which 1e-10 is nothing.
    Returns:
        the share of the 2ⁿ choices of signs whose sum is at least as far from 0; of all of them for up to 13 terms,
        beyond that of 9,999 draws and the observed choice.
    """
    from scipy.stats import permutation_test

    found = permutation_test(
        (np.sort(terms),),
        lambda flipped, axis: np.round(flipped.sum(axis=axis), DIGITS),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
