"""Examples and Task: what they keep, count, draw and refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest

import childtuning.tasks as tasks
from childtuning.errors import ConfigError, DataError
from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Task


def make_task(train_labels: list, dev_labels: list, **changes) -> Task:
    arguments = {
        "name": "toy",
        "kind": "classification",
        "label_names": ("x", "y"),
        "metrics": ("accuracy",),
        "train": Examples([f"t{i}" for i in range(len(train_labels))], None, train_labels),
        "dev": Examples([f"d{i}" for i in range(len(dev_labels))], None, dev_labels),
    }
    return Task(**{**arguments, **changes})  # type: ignore[arg-type]


def test_public_names_are_sorted_and_exist():
    assert tasks.__all__ == sorted(tasks.__all__)
    assert all(hasattr(tasks, name) for name in tasks.__all__)


def test_import_is_light():
    code = (
        "import sys, childtuning.tasks\n"
        "heavy = {'transformers', 'datasets', 'sklearn', 'scipy', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_count_empty_and_take_subsets():
    rows = Examples(["a", " \n", "", "b"], ["1", "2", "3", "4"], ["x", "y", "x", "y"])
    assert (len(rows), rows.num_empty) == (4, 2)
    picked = rows.subset([3, 0])
    assert (picked.text, picked.text_pair, picked.labels) == (["b", "a"], ["4", "1"], ["y", "x"])
    assert Examples(["a"]).subset([0]).labels is None


def test_examples_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="labels must have one entry per row, got 1 for 2"):
        Examples(["a", "b"], None, ["x"])
    with pytest.raises(DataError, match="text_pair"):
        Examples(["a", "b"], ["x"])


def test_sample_is_nested_ordered_and_a_function_of_the_seed():
    rows = Examples([str(i) for i in range(50)])
    small, large = rows.sample(5, seed=3).text, rows.sample(20, seed=3).text
    assert set(small) <= set(large) and len(small) == 5 and len(large) == 20
    assert large == sorted(large, key=int) == rows.sample(20, seed=3).text
    assert large != rows.sample(20, seed=4).text
    assert rows.sample(None) is rows and rows.sample(99) is rows
    assert len(rows.sample(2, seed=-1)) == 2
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        rows.sample(0)


SHARES = {"a": 400, "b": 60, "c": 10, "d": 1}


def by_class(rows: Examples) -> Counter[str]:
    return Counter(map(str, rows.labels or ()))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("limit", [1, 2, 4, 5, 40, 100, 470])
def test_a_draw_keeps_the_shares_of_classes(limit: int, seed: int) -> None:
    labels = [name for name, count in SHARES.items() for _ in range(count)]
    rows = Examples([str(i) for i in range(len(labels))], None, labels)
    drawn = rows.sample(limit, seed=seed)
    counts = by_class(drawn)
    assert len(drawn) == limit and len(counts) == min(limit, len(SHARES))
    for name, count in SHARES.items():  # the largest classes first where there is no room for all
        assert abs(counts[name] - limit * count / len(rows)) < 3.5 or counts[name] == 1
    assert set(drawn.text) <= set(rows.sample(limit + 1, seed=seed).text)
    assert drawn == rows.sample(limit, seed=seed) and drawn != rows.sample(limit, seed=seed + 2)


def test_what_is_held_out_has_the_shares_of_classes_and_leaves_every_class() -> None:
    labels = [name for name, count in SHARES.items() for _ in range(count)]
    rest, aside = Examples(["t"] * len(labels), None, labels).hold_out(0.2, seed=5)
    assert by_class(aside) == {"a": 80, "b": 12, "c": 2} and by_class(rest)["d"] == 1


def test_numbers_are_drawn_whatever_they_are() -> None:
    rows = Examples([str(i) for i in range(50)], None, [float(i % 2) for i in range(50)])
    assert rows.sample(9, seed=3).text == Examples(rows.text).sample(9, seed=3).text


def test_classes_that_a_draw_lost_are_known_and_told() -> None:
    task = make_task(["x", "y", "z"] * 4, ["z", "x"], label_names=("x", "y", "z"))
    assert task.draw(3).notes == ()
    drawn = task.draw(2)
    assert drawn.label_names == ("x", "y", "z") and len(drawn.train.classes()) == 2
    (lost,) = set(task.label_names) - drawn.train.classes()
    assert drawn.notes == (f"the 2 training examples drawn have none of {lost!r}",)


def test_task_knows_its_labels():
    task = make_task(["x", "y"], ["y"])
    assert (task.num_labels, task.label_ids) == (2, {"x": 0, "y": 1})
    regression = make_task([0.5, 1.0], [2.0], kind="regression", label_names=(), metrics=("pearson",))
    assert (regression.num_labels, regression.label_ids) == (1, None)


def test_task_counts_empty_texts_of_both_splits():
    task = make_task(
        ["x", "y"], ["y"], train=Examples(["", "a"], None, ["x", "y"]), dev=Examples([""], None, ["x"])
    )
    assert task.num_empty == 2


@pytest.mark.parametrize(
    ("train", "dev", "changes", "message"),
    [
        (
            ["x", "x"],
            ["x"],
            {"label_names": ("x",)},
            "only 'x' in the train split of 'toy'. Add examples of another",
        ),
        (["x", "x"], ["x"], {}, "got only 'x' in the train split of 'toy'. Pass a larger --train-limit"),
        (
            ["x", "y"],
            ["z", "x"],
            {},
            "never saw in the dev split of 'toy': 'z'",
        ),
        (["x", "y", "q"], ["x"], {}, "train split of 'toy': 'q'. Known: 'x', 'y'"),
        ([], ["x"], {}, "train split of 'toy' has no rows"),
        (["x", "y"], [], {}, "dev split of 'toy' has no rows"),
        (["x", "y"], ["x"], {"dev": Examples(["a"])}, "dev split of 'toy' has no labels"),
        (["x", "y"], ["x"], {"dev": Examples(["a"], ["b"], ["x"])}, "single texts in train"),
        (["x", "y"], ["x"], {"metrics": ()}, "at least one metric"),
        (["x", "y"], ["x"], {"kind": "ranking"}, "got 'ranking'"),
        (["x", "y"], ["x"], {"label_names": ("x", "y", "x")}, "distinct"),
        (
            [1.0, math.nan],
            [1.0],
            {"kind": "regression", "label_names": ()},
            "got nan in row 2 of the train split",
        ),
        (
            [1.0, 2.0],
            [math.inf],
            {"kind": "regression", "label_names": ()},
            "got inf in row 1 of the dev split",
        ),
        ([1.0, 2.0], [1.0], {"kind": "regression"}, "has no label names"),
    ],
)
def test_task_refuses(train, dev, changes, message):
    with pytest.raises(DataError) as caught:
        make_task(train, dev, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_at_most_five_unknown_labels_are_named():
    with pytest.raises(DataError, match="'5' and 3 more"):
        make_task(["x", "y"], [str(i) for i in range(1, 9)])
