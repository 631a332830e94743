"""Statistics over seeds, against values worked out by hand and by counting every case."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_ind

from childtuning.compare.statistics import (
    Paired,
    compare_paired,
    compare_stratified,
    describe,
    expected_best,
    holm,
    mean_interval,
    power_limit,
)

NAN = math.nan
# Numbers of right answers out of 277, as RTE's dev set has: the differences tie, their sums do too.
MOVES = st.lists(st.integers(-6, 6), min_size=2, max_size=8)
SKEWED = [0.50, 0.51, 0.53, 0.54, 0.60, 0.72]


def scores_of(moves: Sequence[int], unit: float = 1 / 277) -> tuple[dict[int, float], dict[int, float]]:
    """A method's and a baseline's scores by seed, which differ by so many right answers."""
    starts = [150 + 7 * seed % 31 for seed in range(len(moves))]
    values = {
        seed: (start + move) * unit for seed, (start, move) in enumerate(zip(starts, moves, strict=True))
    }
    return values, {seed: start * unit for seed, start in enumerate(starts)}


def flipped_p(terms: Sequence[int | Fraction]) -> float:
    """Share of all choices of signs with which the sum is as far from 0, in exact arithmetic."""
    observed = abs(sum(terms))
    sums = [
        abs(sum(sign * term for sign, term in zip(signs, terms, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(terms))
    ]
    return sum(one >= observed for one in sums) / len(sums)


def signed_ranks(differences: Sequence[float]) -> list[int]:
    """Twice the mid-ranks of the sizes, with signs; without the zeros."""
    moved = [difference for difference in differences if difference]
    sizes = [abs(difference) for difference in moved]
    return [
        (1 if difference > 0 else -1)
        * (sum(size < abs(difference) for size in sizes) + sum(size <= abs(difference) for size in sizes) + 1)
        for difference in moved
    ]


# describe


def test_description_by_hand() -> None:
    found = describe([0.7, 0.5, 0.9, 0.5], [False, True, False, True])
    assert (found.num, found.num_nan, found.num_collapsed) == (4, 0, 2)
    assert found.mean == pytest.approx(0.65)
    assert found.sd == pytest.approx(math.sqrt((0.05**2 + 0.15**2 + 0.25**2 + 0.15**2) / 3))
    assert (found.median, found.best, found.worst) == (pytest.approx(0.6), 0.9, 0.5)
    assert describe([3.0, 1.0, 2.0], [False] * 3).median == 2.0


def test_a_lower_score_may_be_better() -> None:
    found = describe([3.0, 1.0, 2.0, NAN], [False] * 4, lower_is_better=True)
    assert (found.best, found.worst, found.median) == (1.0, None, 2.5)
    whole = describe([3.0, 1.0, 2.5], [False] * 3, lower_is_better=True)
    assert (whole.best, whole.worst, whole.median) == (1.0, 3.0, 2.5)


def test_one_run_has_no_interval_and_equal_runs_a_point() -> None:
    one = describe([0.6], [False])
    assert (one.num, one.mean, one.sd, one.median, one.interval) == (1, 0.6, 0.0, 0.6, None)
    equal = describe([0.6] * 5, [False] * 5)
    assert (equal.mean, equal.sd, equal.interval) == (0.6, 0.0, (0.6, 0.6))
    assert describe([0.6, 0.7], [False] * 2).interval is None
    rounded = describe([0.3, 0.1 + 0.2, 0.3], [False] * 3)  # the same score but for the last bit
    assert rounded.interval is not None and rounded.interval[0] == rounded.interval[1] == pytest.approx(0.3)


@pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf])
def test_a_run_without_score_is_the_worst_and_leaves_no_mean(missing: float) -> None:
    found = describe([0.8, missing, 0.7, 0.9], [False] * 4)
    assert (found.num, found.num_nan, found.num_collapsed) == (4, 1, 1)
    assert (found.mean, found.sd, found.interval, found.worst) == (None, None, None, None)
    assert (found.best, found.median) == (0.9, pytest.approx(0.75))  # of none, 0.7, 0.8, 0.9
    assert describe([0.8, missing, missing], [False, True, False]).median is None
    assert describe([0.8, missing, missing], [False, True, False]).num_collapsed == 2
    assert describe([0.8, missing], [False] * 2).median is None  # half-way to no score at all
    nothing = describe([missing] * 2, [True] * 2)
    assert (nothing.num_nan, nothing.best, nothing.median, nothing.mean) == (2, None, None, None)


def test_no_runs() -> None:
    found = describe([], [])
    assert (found.num, found.mean, found.median, found.best, found.interval) == (0, None, None, None, None)


def test_interval_is_students() -> None:
    expected = ttest_1samp(SKEWED, 0).confidence_interval(0.95)
    assert describe(SKEWED, [False] * 6).interval == pytest.approx(tuple(expected), rel=1e-12)
    huge = describe([value * 1e300 for value in SKEWED], [False] * 6).interval  # a perplexity may be
    assert huge == pytest.approx([end * 1e300 for end in expected], rel=1e-12)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(0, [[[1.0]], [[3.0]]], (2, 1000, 3))  # two tasks, three seeds
    ends = [mean_interval(strata) for strata in np.moveaxis(draws, 1, 0).tolist()]
    assert 0.94 < np.mean([low <= 0 <= high for low, high in filter(None, ends)]) < 0.99


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(100, 250), min_size=3, max_size=8),
    shift=st.integers(-90, 20),
    seed=st.integers(0, 9),
)
@example(counts=[100, 157, 209], shift=0, seed=0)
@example(counts=[100, 142, 198], shift=0, seed=0)
def test_interval_moves_with_the_scores_and_not_with_their_order(
    counts: list[int], shift: int, seed: int
) -> None:
    values = [count / 277 for count in counts]
    found = describe(values, [False] * len(values))
    assert found.interval is not None and found.mean is not None
    assert found.interval[0] <= found.mean <= found.interval[1]
    shuffled = random.Random(seed).sample(values, len(values))
    assert describe(shuffled, [False] * len(values)) == found
    moved = describe([value + shift / 277 for value in values], [False] * len(values))
    assert moved.interval == pytest.approx([end + shift / 277 for end in found.interval], abs=1e-9)


# compare_paired


@settings(max_examples=30, deadline=None)
@given(moves=MOVES)
def test_p_counts_every_flip(moves: list[int]) -> None:
    found = compare_paired(*scores_of(moves))
    assert found.num == len(moves) and found.num_nan == 0
    assert found.difference == pytest.approx(sum(moves) / len(moves) / 277)
    assert found.p_permutation == pytest.approx(flipped_p(moves), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(moves=MOVES)
def test_wilcoxon_counts_every_flip_of_ranks(moves: list[int]) -> None:
    found = compare_paired(*scores_of(moves)).p_wilcoxon
    if any(moves):
        assert found == pytest.approx(flipped_p(signed_ranks(moves)), abs=1e-12)
    else:
        assert found is None


@settings(max_examples=8, deadline=None)
@given(moves=MOVES, seed=st.integers(0, 9))
def test_comparison_depends_on_neither_order_nor_unit_and_is_the_same_from_both_sides(
    moves: list[int], seed: int
) -> None:
    values, baseline = scores_of(moves)
    found = compare_paired(values, baseline)
    seeds = random.Random(seed).sample(list(values), len(values))
    assert compare_paired({one: values[one] for one in seeds}, baseline) == found
    percent = compare_paired(*scores_of(moves, 100 / 277))
    assert (percent.p_permutation, percent.p_wilcoxon) == (found.p_permutation, found.p_wilcoxon)
    back = compare_paired(baseline, values)
    assert (back.p_permutation, back.p_wilcoxon) == (found.p_permutation, found.p_wilcoxon)
    assert found.difference is not None and back.difference == pytest.approx(-found.difference, abs=1e-15)


@pytest.mark.parametrize("num", [2, 5, 6, 13])
def test_no_p_is_below_two_in_all_flips(num: int) -> None:
    found = compare_paired(*scores_of(range(1, num + 1)))
    assert found.p_permutation == found.p_wilcoxon == found.smallest_p == 2 / 2**num


def test_many_pairs_are_drawn_from() -> None:
    rng = random.Random(0)
    moves = [rng.randint(-5, 7) for _ in range(16)]
    found = compare_paired(*scores_of(moves)).p_permutation
    exact = flipped_p(moves)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / 9_999))
    assert found != exact
    assert found == compare_paired(*scores_of(moves)).p_permutation
    clear = compare_paired(*scores_of([9] * 20))
    assert clear.p_permutation == clear.smallest_p == 2 / 10_000


def test_only_common_seeds_are_compared() -> None:
    found = compare_paired({0: 0.6, 1: 0.7, 5: 0.1}, {1: 0.6, 0: 0.4, 2: 0.9})
    assert found.num == 2
    assert found.difference == pytest.approx(0.15)
    assert found.p_permutation == 0.5
    assert compare_paired({0: 0.5}, {1: 0.5}) == Paired(0)
    assert Paired(0).smallest_p is None


def test_one_pair_has_a_difference_and_no_p() -> None:
    found = compare_paired({0: 0.6}, {0: 0.5})
    assert found == Paired(1, difference=pytest.approx(0.1))  # type: ignore[arg-type]
    assert found.smallest_p is None


def test_no_difference_at_all() -> None:
    found = compare_paired(*scores_of([0, 0, 0]))
    assert (found.difference, found.interval, found.p_permutation, found.p_wilcoxon) == (0, (0, 0), 1, None)


def test_interval_is_of_the_differences() -> None:
    baseline = {seed: 0.1 * seed for seed in range(6)}  # seeds differ much more than methods
    values = {seed: baseline[seed] + SKEWED[seed] for seed in range(6)}
    interval = describe(SKEWED, [False] * 6).interval
    assert interval is not None
    assert compare_paired(values, baseline).interval == pytest.approx(interval, abs=1e-9)


def test_a_run_without_score_leaves_ranks_alone_to_compare() -> None:
    baseline = dict.fromkeys(range(6), 0.5)
    values = {0: 0.6, 1: 0.7, 2: NAN, 3: 0.8, 4: 0.55, 5: 0.65}
    found = compare_paired(values, baseline)
    assert (found.num, found.num_nan) == (6, 1)
    assert (found.difference, found.interval, found.p_permutation) == (None, None, None)
    assert found.p_wilcoxon == flipped_p([2, 4, -6, 5, 1, 3])
    both = compare_paired(values, baseline | {2: NAN})  # no worse than the other
    assert (both.num_nan, both.p_wilcoxon) == (1, flipped_p([2, 4, 5, 1, 3]))
    assert compare_paired(baseline, values).p_wilcoxon == found.p_wilcoxon
    loss = compare_paired({seed: 1 - value for seed, value in values.items()}, baseline, lower_is_better=True)
    assert loss.p_wilcoxon == found.p_wilcoxon
    wrong_way = compare_paired({seed: 1 - value for seed, value in values.items()}, baseline)
    assert wrong_way.p_wilcoxon == flipped_p([-2, -4, -6, -5, -1, -3])


# compare_stratified


@settings(max_examples=25, deadline=None)
@given(
    tasks=st.lists(st.lists(st.integers(-6, 6), min_size=1, max_size=4), min_size=1, max_size=3).filter(
        lambda tasks: 2 <= sum(map(len, tasks)) <= 9
    )
)
def test_every_task_weighs_the_same(tasks: list[list[int]]) -> None:
    found = compare_stratified([scores_of(moves) for moves in tasks])
    assert found.num == sum(map(len, tasks))
    mean = sum(Fraction(sum(moves), len(moves)) for moves in tasks) / len(tasks)
    assert found.difference == pytest.approx(float(mean) / 277, abs=1e-12)
    terms = [Fraction(move, len(moves)) for moves in tasks for move in moves]
    assert found.p_permutation == pytest.approx(flipped_p(terms), abs=1e-12)
    assert found.p_wilcoxon is None


def test_one_task_is_the_plain_comparison() -> None:
    pair = scores_of([3, -1, 4, 1, -5, 9])
    plain, stratified = compare_paired(*pair), compare_stratified([pair])
    assert plain.p_wilcoxon is not None
    assert (stratified.difference, stratified.interval) == (plain.difference, plain.interval)
    assert stratified.p_permutation == plain.p_permutation


def test_interval_is_of_seeds_within_tasks() -> None:
    apart = [scores_of([2] * 4), scores_of([-40] * 5)]  # tasks differ, seeds do not
    found = compare_stratified(apart)
    assert found.interval == (found.difference, found.difference)

    one, other = [-3, 0, 3], [-30, -7, 11, 3]
    welch = ttest_ind(one, [-move for move in other], equal_var=False).confidence_interval(0.95)
    interval = compare_stratified([scores_of(one), scores_of(other)]).interval
    assert interval == pytest.approx([end / 2 / 277 for end in welch], rel=1e-9)


def test_strata_without_pairs_or_scores_say_nothing() -> None:
    pair = scores_of([1, 2])
    assert compare_stratified([pair, ({0: 0.5}, {1: 0.5})]) == Paired(2)
    assert compare_stratified([pair, ({0: NAN}, {0: 0.5})]) == Paired(3, num_nan=1)
    assert compare_stratified([]) == Paired(0)
    assert compare_stratified([({0: 0.6}, {0: 0.5})]).p_permutation is None


# holm


def test_holm_by_hand() -> None:
    # 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 is no smaller than the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]


def test_holm_leaves_out_what_has_no_p() -> None:
    found = holm([None, 0.02, None, 0.03])
    assert found == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([None, None]) == [None, None]
    assert holm([]) == []


def test_holm_by_definition() -> None:
    p_values = [0.21, 0.004, 0.03, 0.03, 0.0625, 0.004, 0.9, 0.011]
    found = holm(p_values)
    for p, corrected in zip(p_values, found, strict=True):
        steps = [min(1, other * sum(one >= other for one in p_values)) for other in p_values if other <= p]
        assert corrected == pytest.approx(max(steps))


# expected_best


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=5), lower=st.booleans())
def test_expected_best_over_all_draws(counts: list[int], lower: bool) -> None:
    found = expected_best([float(count) for count in counts], lower_is_better=lower)
    best = min if lower else max
    for budget, value in enumerate(found, start=1):
        draws = [best(draw) for draw in itertools.product(counts, repeat=budget)]
        assert value == pytest.approx(sum(draws) / len(draws))
    assert len(found) == len(counts)


def test_expected_best_counts_a_missing_score_as_the_worst() -> None:
    assert expected_best([0.5, NAN, 0.9]) == pytest.approx(expected_best([0.5, 0.5, 0.9]))
    assert expected_best([0.5, NAN, 0.9], lower_is_better=True) == pytest.approx(
        expected_best([0.5, 0.9, 0.9], lower_is_better=True)
    )
    assert all(map(math.isnan, expected_best([NAN, NAN])))
    assert expected_best([]) == []


# to_dict


def test_results_are_json() -> None:
    description = describe([0.5, 0.6, 0.7], [False, False, True]).to_dict()
    assert json.loads(json.dumps(description, allow_nan=False)) == {
        **description,
        "interval": list(description["interval"]),
    }
    paired = compare_paired({0: 0.5, 1: NAN}, {0: 0.4, 1: 0.6}).to_dict()
    assert json.loads(json.dumps(paired, allow_nan=False))["smallest_p"] == 0.5


@pytest.mark.parametrize(
    ("seeds", "comparisons", "words"),
    [
        (6, 1, None),  # 2 / 64
        (
            5,
            1,
            "5 seeds can never reach p < 0.05 on a single task: the smallest corrected p is 0.062. Take 6 seeds",
        ),
        (6, 2, "with 2 comparisons: the smallest corrected p is 0.062. Take 7 seeds or more."),
        (7, 2, None),
        (
            1,
            2,
            "1 seed cannot show a significant difference: a test needs at least two. Take 7 seeds or more.",
        ),
        (20, 300, "Compare fewer methods or tasks."),
        (3, 0, None),
    ],
)
def test_what_the_seeds_cannot_show_is_said(seeds: int, comparisons: int, words: str | None) -> None:
    line = power_limit(seeds, comparisons, 0.05)
    assert line is None if words is None else words in (line or "")
