"""How far the children overlap that several tasks choose in one model. [Xu et al. 2021, section 5]"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from childtuning.child import Child, Part
from childtuning.errors import ConfigError
from childtuning.experiments.comparison.choice import Choice
from childtuning.experiments.comparison.parameter_places import place_of

CHILD = "child.safetensors"
Matrix = list[list[float | None]]


def overlap(choices: Sequence[Choice], folder_of: Callable[[str], Path]) -> dict[str, Any] | None:
    """Compare the children of tasks: those of each one's first seed with the hyperparameters that were chosen.

    Returns:
        JSON-ready: ``tasks``, ``method``, ``density``, and matrices [task, task] of |A ∩ B| / min(|A|, |B|):
        ``overall``, ``by_layer`` and ``by_kind`` of weight; ``None`` in a cell where one child has nothing there.
        ``None`` where fewer than two tasks have a fixed child.
    Raises:
        ConfigError: the tasks' children are not over the same parameters.
    """
    found: dict[str, tuple[Choice, Child]] = {}
    for choice in choices:
        path = folder_of(choice.records[0].id) / CHILD
        if choice.group.task not in found and path.is_file():
            found[choice.group.task] = (choice, Child.load(path))
    if len(found) < 2:
        return None
    children = {task: child for task, (_, child) in found.items()}
    names = list(next(iter(children.values())).parts)
    for task, child in children.items():
        if list(child.parts) != names:
            raise ConfigError(
                f"the child of {task!r} is over other parameters than the others. Use one model."
            )
    common = {
        name: [[_common(a.parts[name], b.parts[name]) for b in children.values()] for a in children.values()]
        for name in names
    }
    by_layer: dict[str, list[str]] = {}
    by_kind: dict[str, list[str]] = {}
    for name in names:
        place = place_of(name)
        layer = f"{place.stack}.{place.number}" if place.region == "layer" else place.region
        by_layer.setdefault(layer, []).append(name)
        by_kind.setdefault(place.kind, []).append(name)
    first = next(iter(found.values()))[0]
    return {
        "tasks": list(children),
        "method": first.group.method,
        "density": next(iter(children.values())).density,
        "overall": _matrix(common, names),
        "by_layer": {layer: _matrix(common, inside) for layer, inside in by_layer.items()},
        "by_kind": {kind: _matrix(common, inside) for kind, inside in by_kind.items()},
    }


def _common(first: Part, second: Part) -> int:
    if first.is_empty or second.is_empty:
        return 0
    return int((first.mask() & second.mask()).sum())


def _matrix(common: Mapping[str, list[list[int]]], names: Sequence[str]) -> Matrix:
    """Sum up what is common over parameters; a child has itself in common with itself."""
    size = len(next(iter(common.values())))
    totals = [[sum(common[name][i][j] for name in names) for j in range(size)] for i in range(size)]
    matrix: Matrix = [[None] * size for _ in range(size)]
    for i, j in itertools.product(range(size), repeat=2):
        smaller = min(totals[i][i], totals[j][j])
        matrix[i][j] = totals[i][j] / smaller if smaller else None
    return matrix
