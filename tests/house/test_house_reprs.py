"""What a notebook shows of an object is one short line, without tensors."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch

import childtuning as ct
from childtuning.runs.folder import RunResult


def shown() -> dict[str, tuple[Any, str]]:
    model = torch.nn.Linear(8, 4)
    child = ct.random_child(model, 0.3, seed=0)
    optimizer = ct.ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, lr=1e-3)
    rows = ct.TaskFree(0.3, 1, "row", ("head.*",), {f"{i}.weight": 1 for i in range(99)})
    given = {field.name: 1 for field in fields(RunResult) if field.default is MISSING}
    given |= {
        "task": "rte",
        "method": "child-d",
        "metric": {"name": "accuracy", "value": 0.9},
        "output": "runs/a",
    }
    line = "rte, child-d, seed 1: accuracy 0.9000, 1 trained entries, density 1, 'runs/a'"
    kept = ct.Delta.capture(model, child, base="bert")
    return {
        "Child": (child, "density=0.3056, num_trained=11 of 36"),
        "ChildConfig": (ct.ChildConfig(density=0.1, seed=3), "variant='task-driven', density=0.1, seed=3"),
        "Delta": (kept, "num_trained=11 of 36, 30.56%, base='bert'"),
        "TaskFree": (rows, "density=0.3, seed=1, granularity='row', always=['head.*']"),
        "ChildOptimizer": (optimizer, "AdamW, Child(density=0.3056, num_trained=11 of 36)"),
        "RunResult": (RunResult(**given), line),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", ["Child", "ChildConfig", "Delta", "TaskFree", "ChildOptimizer", "RunResult"])
def test_an_object_is_one_short_line(name: str) -> None:
    value, inside = shown()[name]
    assert repr(value) == f"{name}({inside})"


def test_the_version_is_that_of_the_package() -> None:
    assert ct.__version__.count(".") == 2
