"""Overlap of the children that several tasks choose in the same model. [Xu et al. 2021, section 5]"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from childtuning.child import Child, Part
from childtuning.compare.records import Record
from childtuning.errors import ConfigError

CHILD = "child.safetensors"
Matrix = list[list[float | None]]


def overlap(runs: Sequence[Record], folder_of: Callable[[str], Path]) -> dict[str, Any]:
    """Compare the children of tasks.

    Args:
        runs: of each task one, with a fixed child; of the same method.
        folder_of: returns the folder of a run by id.
    Returns:
        JSON-ready: ``runs``, ``tasks``, ``method``, ``density``, and matrices [task, task] of |A ∩ B| / min(|A|, |B|):
        ``overall``, ``by_layer`` and ``by_kind`` of weight; a cell is ``None`` if one child has no entries there.
    Raises:
        ConfigError: when the children are not over the same parameters.
    """
    children = {run.group.task: Child.load(folder_of(run.id) / CHILD) for run in runs}
    names = list(next(iter(children.values())).parts)
    for task, child in children.items():
        if list(child.parts) != names:
            raise ConfigError(
                f"the child of {task!r} has other parameters than the others. Use the same model for all tasks."
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
    return {
        "runs": [run.id for run in runs],
        "tasks": list(children),
        "method": runs[0].group.method,
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
    """Sum the common entries over parameters and divide; the diagonal holds the sizes of the children."""
    size = len(next(iter(common.values())))
    totals = [[sum(common[name][i][j] for name in names) for j in range(size)] for i in range(size)]
    matrix: Matrix = [[None] * size for _ in range(size)]
    for i, j in itertools.product(range(size), repeat=2):
        smaller = min(totals[i][i], totals[j][j])
        matrix[i][j] = totals[i][j] / smaller if smaller else None
    return matrix


Region = Literal["layer", "embeddings", "head", "other"]

_EMBEDDINGS = re.compile(r"embed|^(wte|wpe|cls_token|tok|pos)$", re.IGNORECASE)
_HEAD = re.compile(r"classifier|^score$|head|pooler|^fc$|qa_outputs|^cls$", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """The place of a parameter in a network.

    Attributes:
        region: a numbered layer, the embeddings, the head, or none of these.
        stack: the list of layers: ``bert.encoder.layer``, ``layer1``; empty outside the layers.
        number: the index of the layer, from 0; -1 outside the layers.
        kind: the rest of the name: ``attention.self.query``, ``attention.self.query bias``.
    """

    region: Region
    stack: str
    number: int
    kind: str


def place_of(name: str) -> Place:
    """Return the place of a parameter: the first number in its name is the layer, the rest is the kind.

    Further numbers are dropped, so that equal parts of a layer are of one kind. The kind of a weight is its module's
    name; other parameters append their own name: ``query``, ``query bias``.
    """
    path = name.split(".")
    number = next((place for place, part in enumerate(path) if part.isdecimal()), None)
    if number is None:
        words = path[-2:] if path[-1] in ("weight", "bias") else path[-1:]
        region: Region = "other"
        if any(_EMBEDDINGS.search(part) for part in path):
            region = "embeddings"
        elif any(_HEAD.search(part) for part in path):
            region = "head"
        return Place(region, "", -1, _kind(path if len(words) > 1 else words))
    rest = [part for part in path[number + 1 :] if not part.isdecimal()]
    stack = ".".join(path[:number])
    region = "head" if _HEAD.search(stack) else "embeddings" if _EMBEDDINGS.search(stack) else "layer"
    if region != "layer":  # the layers of a head are not the network's
        return Place(region, "", -1, _kind([part for part in path if not part.isdecimal()]))
    return Place("layer", stack, int(path[number]), _kind(rest))


def short_names(kinds: Iterable[str], *, fewest: int = 1) -> dict[str, str]:
    """Return for each kind its shortest unique suffix of at least ``fewest`` components."""
    kinds = list(dict.fromkeys(kinds))
    return {
        kind: next(ending for ending in _endings(kind, fewest) if _is_alone(ending, kind, kinds))
        for kind in kinds
    }


def _kind(parts: Sequence[str]) -> str:
    *module, last = parts or [""]
    path = ".".join(module)
    if last == "weight" and path:
        return path
    return f"{path} {last}".strip()


def _endings(kind: str, fewest: int) -> list[str]:
    parts = kind.split(".")
    return [".".join(parts[place:]) for place in range(max(0, len(parts) - fewest), -1, -1)]


def _is_alone(ending: str, kind: str, kinds: Sequence[str]) -> bool:
    return ending == kind or not any(
        other != kind and (other == ending or other.endswith("." + ending)) for other in kinds
    )
