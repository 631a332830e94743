"""Statistics of scores over seeds, and tests of whether two methods differ.

A run without a score (NaN, or infinite) counts as worse than any other. Rank statistics (median, best, worst,
Wilcoxon's test) rank it below every number [worst-rank analysis, Lachin 1999]. Averages (mean, sd, interval,
difference, permutation test) are ``None``, since an average over the remaining runs would favour the method that loses
most runs. The number of such runs is always reported.

The order of runs does not matter, and random draws have a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Description:
    """The scores of one method over seeds.

    Attributes:
        num: the number of runs.
        num_nan: the number of runs without a score.
        num_collapsed: the number of runs no better than a constant answer, or without a score.
        mean, sd: of the scores; the sample standard deviation (n − 1), 0 for one run. ``None`` if ``num_nan`` > 0.
        median, best, worst: a run without a score ranks below all others; ``None`` if the value is such a run's.
        interval: Student's 95 % interval of the mean; (value, value) if all are equal, ``None`` for fewer than three
            runs, or if ``num_nan`` > 0.
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
    """The comparison of a method with a baseline, over the seeds that both have.

    Attributes:
        num: the number of pairs.
        num_nan: the number of pairs in which either run has no score.
        difference: mean of (method − baseline), in units of the metric; ``None`` if ``num_nan`` > 0.
        interval: Student's 95 % interval of it; ``None`` in the same cases as in ``describe``.
        p_permutation: p of the permutation test; ``None`` for fewer than two pairs, or if ``num_nan`` > 0.
        p_wilcoxon: p of Wilcoxon's test; ``None`` for fewer than two pairs, or if no pair differs.
    """

    num: int
    num_nan: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_permutation: float | None = None
    p_wilcoxon: float | None = None

    @property
    def smallest_p(self) -> float | None:
        """As ``smallest_p``, for these pairs."""
        return smallest_p(self.num)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**asdict(self), "smallest_p": self.smallest_p}


def describe(
    values: Sequence[float], collapsed: Sequence[bool], *, lower_is_better: bool = False
) -> Description:
    """Describe the scores of one method over seeds.

    The interval is that of ``mean_interval``.

    Args:
        values: one score per run; NaN for a run without one.
        collapsed: for every run, whether it is no better than a constant answer.
        lower_is_better: true for metrics such as a loss.
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

    The permutation test flips the sign of each difference: if the methods were equal, each sign would be random.
    The two-sided p is the share of the 2ⁿ flips whose mean is at least as far from 0; see ``sign_flip_p``. With
    n seeds the smallest possible p is 2 / 2ⁿ: 0.0625 with 5, which is never below 0.05, and 0.031 with 6. Wilcoxon's
    test ignores pairs without a difference; it is exact for up to 50 pairs, or 13 if ranks tie, and uses the normal
    approximation beyond that.

    Args:
        values: seed -> score of the method; NaN for a run without one.
        baseline_values: the same for the baseline.
        lower_is_better: true for metrics such as a loss; sets the direction in which a run without a score counts.
    """
    pairs = _pairs(values, baseline_values)
    compared = compare_stratified([(values, baseline_values)])
    worst = math.inf if lower_is_better else -math.inf
    differences = [_difference(one, other, worst) for one, other in pairs]
    return replace(compared, p_wilcoxon=_wilcoxon_p(np.array(differences) / _largest_score(pairs)))


def compare_stratified(
    strata: Sequence[tuple[Mapping[int, float], Mapping[int, float]]],
) -> Paired:
    """Compare a method with a baseline over several tasks at once, with equal weight for each task.

    The difference is the mean of the tasks' mean differences. The interval resamples seeds within each task, and the
    test flips the sign of each (task, seed) pair, which never exchanges runs of different tasks. Pairs are treated as
    independent, even those of one seed on two tasks. The result holds for these tasks and does not generalise to
    others. There is no ``p_wilcoxon``: the sizes of differences cannot be ranked across metrics.

    Args:
        strata: for each task, the scores of the method and of the baseline by seed. If any task has no common seed,
            all results are ``None``.
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


def smallest_p(num_pairs: int) -> float | None:
    """Return the smallest p of the permutation test: 2 / 2ⁿ, exactly or by draws; ``None`` for fewer than two pairs."""
    return None if num_pairs < 2 else max(2 / 2**num_pairs, 2 / (NUM_RESAMPLES + 1))


def power_limit(num_seeds: int, num_comparisons: int, alpha: float) -> str | None:
    """Return one line if no difference can be significant, whatever the scores; ``None`` if one can.

    Holm's correction multiplies the smallest of m values of p by m.

    Args:
        num_seeds: the number of pairs of each comparison.
        num_comparisons: their number m.
        alpha: the level that the corrected p must be below.
    """

    def corrected(seeds: int) -> float:
        return min(1.0, num_comparisons * (smallest_p(seeds) or 1.0))

    if not num_comparisons or corrected(num_seeds) < alpha:
        return None
    seeds = f"{num_seeds} seed{'s' * (num_seeds != 1)}"
    found = next((n for n in range(2, 100) if corrected(n) < alpha), None)
    take = "Compare fewer methods or tasks" if found is None else f"Take {found} seeds or more"
    if num_seeds < 2:
        return f"{seeds} cannot show a significant difference: a test needs at least two. {take}."
    with_how_many = "" if num_comparisons == 1 else f" with {num_comparisons} comparisons"
    return (
        f"{seeds} can never reach p < {alpha:g} on a single task{with_how_many}: the smallest corrected p is "
        f"{corrected(num_seeds):.2g}. {take}."
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for multiple comparisons. [Holm 1979]

    Args:
        p_values: the p-values of one family; ``None`` for a comparison without one, which stays ``None`` and is not
            counted.
    Returns:
        the corrected p-values in the same order; rejecting those below α has a family-wise error rate of at most α.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0  # the k-th smallest of m is multiplied by m − k + 1, and is at least the previous one
    for rank, (p, place) in enumerate(known):
        corrected[place] = largest = min(1.0, max(largest, (len(known) - rank) * p))
    return corrected


def expected_best(scores: Sequence[float], *, lower_is_better: bool = False) -> list[float]:
    """Return the expected validation score of the best of k hyperparameter sets, for k = 1 … n.

    The sets are drawn with replacement from the n that were tried: with x₁ ≤ … ≤ xₙ,
    E[max of k] = Σᵢ xᵢ ((i/n)ᵏ − ((i−1)/n)ᵏ). [Dodge et al. 2019, arXiv 1909.03004]

    Args:
        scores: the score of every set tried. A set without a score (NaN) gets the worst score of the others.
        lower_is_better: true for metrics such as a loss; then the smallest of k is the best.
    Returns:
        n values, one for each k; NaN if no set has a score.
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
    """Difference of two scores; infinite if one of them is missing."""
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
    # The test uses only ranks; they replace the differences, which may be infinite.
    return float(wilcoxon(np.sign(moved) * rankdata(np.abs(moved))).pvalue)


CONFIDENCE = 0.95
NUM_RESAMPLES = 9_999
# Scores are multiples of 1 / number of examples, so sums of differences often tie, and a tie missed by a rounding error
# changes p. No metric is as fine as this, relative to the largest score.
DIGITS = 10


def mean_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean of the strata's means.

    The strata vary by different amounts, so the degrees of freedom are approximate [Satterthwaite 1946]; of one stratum
    they are n − 1. For normal values it covers the mean in 95 % of cases, however few they are. A bootstrap would cover
    it in 85 % with five values, and in 73 % with four strata of two.

    Args:
        strata: one or more lists of finite values; one list for a plain mean.
    Returns:
        low and high, both equal to the mean if the values of each stratum are equal; ``None`` with fewer than three
        values, or if a stratum has fewer than two.
    """
    if min(map(len, strata)) < 2 or sum(map(len, strata)) < 3:
        return None
    from scipy.stats import t

    center = fmean(map(fmean, strata))
    spreads = [stdev(stratum) for stratum in strata]
    if max(spreads) <= 10.0**-DIGITS * max(abs(value) for stratum in strata for value in stratum):
        return center, center
    unit = max(spreads)  # the square of a diverged run's perplexity would overflow
    terms = [
        ((spread / unit) ** 2 / len(stratum), len(stratum) - 1)
        for spread, stratum in zip(spreads, strata, strict=True)
    ]
    variance = sum(term for term, _ in terms)
    freedom = variance**2 / sum(term**2 / free for term, free in terms)
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * unit * math.sqrt(variance) / len(strata)
    return center - half, center + half


def sign_flip_p(terms: Sequence[float]) -> float:
    """Return the two-sided p of a sum of terms under random flips of their signs.

    Args:
        terms: two or more, in a unit in which 1e-10 is negligible.
    Returns:
        the share of the 2ⁿ choices of signs whose sum is at least as far from 0; over all choices for up to 13 terms,
        otherwise over 9,999 random choices and the observed one.
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
