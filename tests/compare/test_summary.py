"""Rows and averages of a comparison, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from childtuning.compare.plan import Choice, choose
from childtuning.compare.records import Group, Record
from childtuning.compare.summary import Row, across_tasks, standard_error, standing, summarize

NAN = math.nan


def record(group: Group, seed: int, score: float, *, metric: str = "accuracy", **result: Any) -> Record:
    return Record(
        id=f"{hash((group, seed)):x}",
        group=group,
        seed=seed,
        point={"learning_rate": 2e-5},
        config={},
        state="done",
        result={
            "metric": {"name": metric, "value": score},
            "constant": {metric: 0.5},
            "trained_parameters": 100,
            "state_bytes": 800,
            "delta_bytes": 400,
            "peak_memory_bytes": 5_000,
            "fisher_seconds": 1.0,
            "train_seconds": 10.0,
            **result,
        },
    )


def choice(group: Group, scores: Mapping[int, float], **result: Any) -> Choice:
    return choose([record(group, seed, score, **result) for seed, score in scores.items()], [0])[0]


def above(base: float, *steps: int) -> dict[int, float]:
    """Scores by seed that lie so many hundredths above."""
    return {seed: base + step / 100 for seed, step in enumerate(steps)}


def by_method(rows: list[Row], task: str = "rte") -> dict[str, Row]:
    return {row.group.method: row for row in rows if row.group.task == task}


FLAT = dict.fromkeys(range(6), 0.6)
CHOICES = [
    choice(Group("rte", "full"), FLAT),
    choice(Group("rte", "child-d"), above(0.6, 1, 2, 3, 4, 5, 6)),
    choice(Group("rte", "lora"), above(0.6, 1, 1, -1, -1)),
    choice(Group("cola", "full"), FLAT),
    choice(Group("cola", "child-d"), above(0.6, 6, 5, 4, 3, 2, -1)),
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return summarize(CHOICES, "full")


def test_rows_describe_and_compare(rows: list[Row]) -> None:
    assert [row.group for row in rows] == [one.group for one in CHOICES]
    rte = by_method(rows)
    assert rte["child-d"].description.mean == pytest.approx(0.635)
    assert rte["child-d"].scores == above(0.6, 1, 2, 3, 4, 5, 6)
    assert rte["child-d"].metric == "accuracy" and rte["child-d"].point == {"learning_rate": 2e-5}
    assert rte["full"].paired is None and rte["full"].p_corrected is None
    assert rte["child-d"].paired is not None and rte["lora"].paired is not None
    assert rte["child-d"].paired.p_permutation == 2 / 64
    assert (rte["lora"].paired.num, rte["lora"].paired.p_permutation) == (4, 1.0)
    cola = by_method(rows, "cola")["child-d"].paired
    assert cola is not None and cola.p_permutation == 4 / 64  # one step back, and nothing smaller than it


def test_the_family_is_the_whole_table(rows: list[Row]) -> None:
    # three comparisons: 2/64 · 3, 4/64 · 2, 1
    assert [row.p_corrected for row in rows] == [None, 6 / 64, 1.0, None, 8 / 64]
    # one of them by itself needs no correction; one seed has no p and does not count
    single = [*CHOICES[:2], choice(Group("rte", "bitfit"), {0: 0.9})]
    assert [row.p_corrected for row in summarize(single, "full")] == [None, 2 / 64, None]


@pytest.mark.parametrize("baseline", [None, "lorax", "Full"])
def test_no_baseline_no_comparison(baseline: str | None) -> None:
    rows = summarize(CHOICES, baseline)
    assert all(row.paired is None and row.p_corrected is None for row in rows)
    assert all(one.paired is None for one in across_tasks(rows, baseline))


def test_a_group_is_compared_at_its_own_task_size_and_start() -> None:
    groups = [
        Group("rte", "full", 100),
        Group("rte", "child-d", 100),
        Group("rte", "child-d"),
        Group("cola", "child-d", 100),
        Group("rte", "child-d", 100, "mrpc"),
    ]
    rows = summarize([choice(group, above(0.6, 1, 2)) for group in groups], "full")
    assert [row.paired is not None for row in rows] == [False, True, False, False, False]


def test_costs_are_medians() -> None:
    group = Group("rte", "child-d")
    records = [
        record(
            group,
            seed,
            0.6,
            trained_parameters=100 + seed,
            state_bytes=10 * seed,
            delta_bytes=7 * seed,
            peak_memory_bytes=seed**2,
            fisher_seconds=fisher,
            train_seconds=train,
        )
        for seed, fisher, train in ((1, 5.0, 1.0), (2, 0.0, 2.0), (9, 1.0, 3.0))
    ]
    (row,) = summarize(choose(records, [1]), None)
    costs = row.costs
    assert (costs.trained_parameters, costs.state_bytes, costs.delta_bytes) == (102, 20, 14)
    assert costs.peak_memory_bytes == 4
    assert costs.seconds == 4.0  # of 6, 2 and 4


def test_budget_counts_all_sets_that_were_tried() -> None:
    group = Group("rte", "full")
    records = [
        replace(
            record(group, 0, score, held_out={"accuracy": held_out}), point={"learning_rate": learning_rate}
        )
        for learning_rate, score, held_out in ((1e-5, 0.9, 0.6), (2e-5, 0.5, 0.8))
    ]
    (row,) = summarize(choose(records, [0]), None)
    assert row.point == {"learning_rate": 2e-5} and row.scores == {0: 0.5}
    assert row.expected_best == pytest.approx([0.7, 0.75 * 0.8 + 0.25 * 0.6])


@pytest.mark.parametrize(
    ("best", "at_end"),
    [
        ((1e-5, 0.2), ("learning_rate",)),
        ((2e-5, 0.2), ()),
        ((3e-5, 0.3), ("learning_rate", "density")),
    ],
)
def test_values_at_the_end_of_what_was_tried_are_told(
    best: tuple[float, float], at_end: tuple[str, ...]
) -> None:
    records = [
        replace(
            record(Group("rte", "child-d"), 0, 0.9 if (rate, density) == best else 0.5),
            point={
                "learning_rate": rate,
                "density": density,
                "granularity": "row",
                "mass": 0.9,
                "rescale": True,
            },
        )
        for rate in (2e-5, 1e-5, 3e-5)
        for density in (0.1, 0.2, 0.3)
    ]
    (row,) = summarize(choose(records, [0]), None)
    assert tuple(row.at_end) == at_end


def test_a_set_that_failed_was_tried() -> None:
    group, rates = Group("rte", "full"), {1e-5: 0.5, 3e-5: 0.9, 1e-4: None}
    records = [
        replace(
            record(group, 0, score or 0.0), point={"learning_rate": rate}, state="done" if score else "failed"
        )
        for rate, score in rates.items()
    ]
    (found,) = choose(records, [0])
    assert found.point == {"learning_rate": 3e-5} and found.at_end == ()
    assert [len(tried.records) for tried in found.tried] == [1, 1, 0]
    assert choose(records[2:], [0]) == []


def test_collapsed_and_missing_scores_are_told() -> None:
    rows = summarize(
        [
            choice(Group("rte", "full"), {0: 0.7, 1: 0.6}),
            choice(Group("rte", "child-d"), {0: NAN, 1: 0.5}),
        ],
        "full",
    )
    row = rows[1]
    assert (row.description.num_collapsed, row.description.num_nan) == (2, 1)
    assert row.paired is not None and row.paired.p_permutation is None and row.paired.p_wilcoxon == 0.5
    content = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert content["scores"] == {"0": None, "1": 0.5} and content["expected_best"] == [None]
    assert content["group"] == {"task": "rte", "method": "child-d", "train_size": None, "start": None}
    assert content["paired"]["num_nan"] == 1 and content["description"]["mean"] is None
    averages = across_tasks(rows, "full")
    assert [one.mean for one in averages] == [pytest.approx(0.65), None]
    json.dumps([one.to_dict() for one in averages], allow_nan=False)


def test_of_losses_the_smaller_is_better() -> None:
    tuned = choice(Group("wiki", "lora"), {0: 2.0, 1: 3.0}, metric="loss", constant=None)
    (row,) = summarize([tuned], None)
    assert (row.description.best, row.description.worst) == (2.0, 3.0)


# across_tasks


def test_averages_are_over_tasks_that_every_method_has(rows: list[Row]) -> None:
    averages = {one.method: one for one in across_tasks(rows, "full")}
    assert averages["full"].tasks == averages["child-d"].tasks == ("rte",)  # lora has no other
    assert averages["child-d"].mean == pytest.approx(0.635)
    averages = {
        one.method: one for one in across_tasks([row for row in rows if row.group.method != "lora"], "full")
    }
    assert averages["child-d"].tasks == ("rte", "cola")
    assert averages["child-d"].mean == pytest.approx((0.635 + 0.6 + 0.19 / 6) / 2)
    assert averages["full"].mean == pytest.approx(0.6) and averages["full"].paired is None
    paired = averages["child-d"].paired
    assert paired is not None and paired.num == 12
    assert paired.difference == pytest.approx((0.21 + 0.19) / 12)
    # in hundredths the terms sum to 40 of at most 42: as far from 0 are 42 itself, and 40 by turning either 1 back
    assert paired.p_permutation == 2 * 3 / 2**12
    assert averages["child-d"].p_corrected == paired.p_permutation  # the only comparison


def test_averages_are_apart_for_every_size_and_start() -> None:
    groups = {
        Group("rte", "full", 100): 0.1,
        Group("cola", "full", 100): 0.3,
        Group("rte", "full"): 0.6,
        Group("rte", "full", None, "mrpc"): 0.8,
    }
    rows = summarize([choice(group, {0: score}) for group, score in groups.items()], "full")
    found = {(one.train_size, one.start): (one.tasks, one.mean) for one in across_tasks(rows, "full")}
    assert found == {
        (100, None): (("rte", "cola"), pytest.approx(0.2)),
        (None, None): (("rte",), 0.6),
        (None, "mrpc"): (("rte",), 0.8),
    }


def test_averages_are_corrected_together() -> None:
    methods = (("full", 0), ("child-d", 1), ("lora", 2))
    choices = [
        choice(Group(task, method), above(0.6, *[step] * 6))
        for task in ("rte", "cola")
        for method, step in methods
    ]
    alone = [choice(Group("rte", method, 100), above(0.6, *[step] * 6)) for method, step in methods]
    averages = across_tasks(summarize([*choices, *alone], "full"), "full")
    assert [one.p_corrected for one in averages] == [None, 4 / 2**12, 4 / 2**12, None, None, None]


def test_what_cannot_be_averaged_has_no_mean() -> None:
    apart = [choice(Group("rte", "full"), {0: 0.5}), choice(Group("cola", "lora"), {0: 0.6})]
    assert [(one.tasks, one.mean) for one in across_tasks(summarize(apart, "full"), "full")] == [
        ((), None),
        ((), None),
    ]
    missing = [choice(Group("rte", "full"), {0: 0.5}), choice(Group("cola", "full"), {0: NAN})]
    assert [one.mean for one in across_tasks(summarize(missing, None), None)] == [None]
    mixed = [
        choice(Group(task, method), {0: 0.5, 1: 0.6}, metric=metric, constant=None)
        for task, metric in (("rte", "accuracy"), ("wiki", "loss"))
        for method in ("full", "lora")
    ]
    averages = across_tasks(summarize(mixed, "full"), "full")
    assert [(one.mean, one.paired) for one in averages] == [(None, None)] * 2
    assert across_tasks([], "full") == []


STANDINGS: dict[str, tuple[dict[str, dict[int, float]], list[str], set[str]]] = {
    "a clear lead": ({"full": FLAT, "child-d": above(0.7, 1, 2, 3, 4, 5, 6)}, ["child-d"], {"child-d"}),
    "too few seeds": ({"full": above(0.6, 1, 2), "child-d": above(0.7, 1, 2)}, ["child-d"], set()),
    "equal means": ({"full": FLAT, "child-d": above(0.6, -1, 1, 0, 0, -2, 2)}, ["full", "child-d"], set()),
    "equal as shown": (
        {"full": FLAT, "child-d": above(0.6002, 0, 0, 0, 0, 0, 0)},
        ["child-d", "full"],
        set(),
    ),
    "equal on every seed": ({"full": FLAT, "child-d": FLAT}, ["full", "child-d"], set()),
    "equal on the only common seed": ({"full": {0: 0.6, 1: 0.7}, "child-d": {1: 0.7}}, ["child-d"], set()),
    "a clear baseline": ({"full": FLAT, "child-d": above(0.5, 1, 2, 3, 4, 5, 6)}, ["full"], {"full"}),
    "no mean": ({"full": {0: NAN}, "child-d": {0: NAN}}, [], set()),
}


@pytest.mark.parametrize("name", STANDINGS)
def test_only_a_significant_difference_is_a_lead(name: str) -> None:
    scores, best, clear = STANDINGS[name]
    found = standing(summarize([choice(Group("rte", m), s) for m, s in scores.items()], "full"), "full")
    assert (list(found.best), found.clear, found.is_tie) == (best, clear, len(best) > 1)


def test_lower_is_better_ranks_from_below() -> None:
    rows = summarize(
        [choice(Group("lm", m), {0: s}, metric="perplexity") for m, s in (("full", 20.0), ("lora", 15.0))],
        None,
    )
    assert standing(rows, None).best == ("lora",)


def test_the_noise_of_evaluation_examples() -> None:
    assert standard_error("accuracy", 0.8, 100) == pytest.approx(0.04)
    assert standard_error("f1", 0.8, 100) is None and standard_error("accuracy", None, 100) is None
    assert standard_error("accuracy", 1.0, 100) is None and standard_error("accuracy", 0.0, 100) is None
