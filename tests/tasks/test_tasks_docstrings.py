"""The embedded task: split by module, deterministic, balanced, without leaks."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from childtuning.errors import ConfigError, DataError
from childtuning.tasks import docstrings
from childtuning.tasks.docstrings import AREAS, load_docstring_task


def test_size_balance_and_metric():
    task = load_docstring_task()
    assert (task.name, task.kind, task.metrics) == ("docstrings", "classification", ("accuracy",))
    assert len(task.train) == 400 and 200 <= len(task.dev) <= 300
    assert task.label_names == tuple(sorted(AREAS)) and task.num_empty == 0
    assert task.train.text_pair is None
    counts = Counter(task.train.labels)
    assert max(counts.values()) - min(counts.values()) <= 5
    assert len(set(Counter(task.dev.labels).values())) == 1
    assert all(
        10 <= len(text.split()) <= 60 and ">>>" not in text for text in task.train.text + task.dev.text
    )


def test_a_pure_function_of_the_seed_that_imports_nothing():
    first = load_docstring_task(seed=1)
    modules = set(sys.modules)
    docstrings._pools.cache_clear()
    again = load_docstring_task(seed=1)
    assert first == again
    assert set(sys.modules) == modules
    other = load_docstring_task(seed=2)
    assert other.train.text != first.train.text and other.dev == first.dev
    assert load_docstring_task(seed=1, train_limit=100).train.text == first.train.text[:100]


def test_modules_are_wholly_in_one_split():
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    train = [
        file
        for modules, _ in AREAS.values()
        for name in modules.split()
        for file in docstrings._files_of(stdlib, name)
    ]
    dev = [
        file
        for _, modules in AREAS.values()
        for name in modules.split()
        for file in docstrings._files_of(stdlib, name)
    ]
    assert not set(train) & set(dev)
    assert len(set(train)) == len(train) and len(set(dev)) == len(dev)


def test_no_first_sentence_is_in_both_splits():
    task = load_docstring_task(train_limit=None)
    train = {docstrings._first_sentence(text) for text in task.train.text}
    dev = [docstrings._first_sentence(text) for text in task.dev.text]
    assert not train & set(dev) and len(set(dev)) == len(dev)


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        (
            "Return the   name\n\nof one thing here, or of none.",
            "Return the name of one thing here, or of none.",
        ),
        ("Return True if it is too short.", None),
        (">>> f(1)\n1 2 3 4 5 6 7 8 9 10 11 12", None),
        ("f(x, y) -> z\n\n" + "word " * 10, " ".join(["word"] * 10)),
        ("word " * 10 + "\n>>> f(1)\n1", " ".join(["word"] * 10)),
        ("word " * 80, " ".join(["word"] * 60)),
    ],
)
def test_cleaning(docstring, text):
    assert docstrings._clean(docstring) == text


def test_definitions_inside_conditions_are_found(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        'if x:\n    def f():\n        "one"\nclass C:\n    "two"\n    def g(self):\n        "three"\n'
    )
    assert docstrings._docstrings(file) == ["one", "two", "three"]
    file.write_text("not python")
    assert docstrings._docstrings(file) == []


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="at least 12, one row per area, got 3"):
        load_docstring_task(train_limit=3)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="sources of Python's standard library"):
        load_docstring_task()
