"""The floor of what is measured: the bytes and operations that it cannot do without, and the time they take at best.

p is the density, n the parameters, W the weights of linear layers, N the tokens of a batch, B its examples.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHILD = re.compile(r"(?P<kind>child|task-free) (?P<density>[\d.]+), (?P<granularity>element|row|column)$")
_LINE = 16  # float32 entries of a cache line, which travels whole
_FULL, _LORA = "full fine-tuning", "PEFT LoRA r=16"
# Layers, width, width between, as in shapes.py; the packaged model is MiniLM.
_SHAPES = {"bert-base": (12, 768, 3072), "minilm": (6, 384, 1536)}


@dataclass(frozen=True)
class Work:
    """What has to travel between memory and processor, and what has to be multiplied or added."""

    num_bytes: float = 0.0
    operations: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What a machine was measured to do at best, and which it was."""

    bytes_per_second: float
    operations_per_second: float
    name: tuple[Any, ...]

    def seconds(self, work: Work) -> float:
        """Return the floor: operations and bytes of one piece of work may overlap, so the longer of the two."""
        return max(work.num_bytes / self.bytes_per_second, work.operations / self.operations_per_second)


def machine_name(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tell machines and thread counts apart."""
    about = record["environment"]
    return about["cpu"], about["capability"], about["threads"]


def measured_machine(folder: Path) -> Machine | None:
    """Read ``floors.json``, or return ``None`` where it was not recorded."""
    path = folder / "floors.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    rates = [
        max(amount / min(record["samples"][case]["values"]) for case, amount in record["facts"][kind].items())
        for kind in ("bytes", "operations")
    ]
    return Machine(rates[0], rates[1], machine_name(record))


def step_bytes(kind: str, density: float, granularity: str) -> float:
    """Return the bytes a parameter of an AdamW step: moments read and written, gradient read, weight likewise.

    >>> [round(step_bytes("child", p, "element"), 1) for p in (0.1, 0.01)]
    [11.8, 2.0]
    """
    if kind == "task-free":
        return 28.0 if granularity == "element" else 24 + 4 * density
    if granularity == "row":
        return 28 * density
    if granularity == "column":  # moments and gradient are compact; weight in and weight out are whole lines
        return 20 * density + 8 * (1 - (1 - density) ** _LINE)
    # Moments and index are compact; gradient, weight in and weight out are whole lines.
    return 20 * density + 12 * (1 - (1 - density) ** _LINE)


def bytes_held(density: float, granularity: str) -> float:
    """Return the bytes a trained entry beside model and gradient: two moments, and the entropy of where it lies."""
    if granularity != "element":
        return 8.0
    rest = 1 - density
    return 8 - (density * math.log2(density) + rest * math.log2(rest)) / density / 8


def work_of(record: Mapping[str, Any]) -> dict[str, Work]:
    """Return the work of each case of a record that has a floor of ours."""
    of = {"step": _step, "select": _select, "fisher": _fisher, "train": _train}.get(record["benchmark"])
    if of is None or record["options"].get("script") or record["options"].get("quick"):
        return {}
    return {case: work for case, work in of(record["facts"]).items() if case in record["samples"]}


def ratio_floor(row: Mapping[str, Any], work: Mapping[str, Work], machine: Machine | None) -> float | None:
    """Return what a ratio would be if both cases were at their floors.

    A machine is needed where bytes stand beside operations.
    """
    held = re.match(r"bytes (?:held )?per child entry.*, (child .*)$", row["name"])
    if held and (child := _CHILD.match(held[1])):
        return bytes_held(float(child["density"]), child["granularity"])
    over, under = work.get(row.get("over", "")), work.get(row.get("under", ""))
    if over is None or under is None:
        return None
    if not (over.operations or under.operations):
        return over.num_bytes / under.num_bytes
    if not (over.num_bytes or under.num_bytes):
        return over.operations / under.operations
    return None if machine is None else machine.seconds(over) / machine.seconds(under)


def _step(facts: Mapping[str, Any]) -> dict[str, Work]:
    n = facts["parameters"]
    work = {"AdamW fused, all parameters": Work(28 * n)}
    for kind, density, granularity in (
        ("child", 0.1, "element"),
        ("child", 0.1, "row"),
        ("task-free", 0.3, "element"),
        ("task-free", 0.3, "row"),
    ):
        work[f"{kind} {density}, {granularity}"] = Work(step_bytes(kind, density, granularity) * n)
    return work


def _select(facts: Mapping[str, Any]) -> dict[str, Work]:
    scores, chosen = facts["scores"], facts["budget"]
    return {
        "select_child 0.1, element": Work(
            4 * scores + 4 * chosen
        ),  # every score read, a 32-bit index written
        "select_child 0.1, row": Work(4 * scores),
    }


def _fisher(facts: Mapping[str, Any]) -> dict[str, Work]:
    weights, passes = _linear_weights("minilm"), 6 * facts["tokens"] * _linear_weights("minilm")
    squares = 2 * facts["examples"] * weights  # 1/(3T) of the passes
    return {"forward and backward": Work(0, passes), "fisher_information": Work(0, passes + squares)}


def _train(facts: Mapping[str, Any]) -> dict[str, Work]:
    """Forward and input gradient 2NW operations each, weight gradient 2NW of what is formed of it."""
    work: dict[str, Work] = {}
    for shape in (shape for shape in _SHAPES if shape in facts):
        (examples, tokens), trained = facts[shape]["batch"], facts[shape]["trained"]
        layers, width, _ = _SHAPES[shape]
        linear = 2 * examples * tokens * _linear_weights(shape)
        attention = 3 * 4 * layers * examples * tokens**2 * width
        for method in trained:
            child = _CHILD.match(method)
            if child:
                density = float(child["density"])
                formed = 1.0 if child["granularity"] == "element" else density
                n = trained.get(_FULL, 0)
                update = n * step_bytes(child["kind"], density, child["granularity"])
            elif method in (_FULL, _LORA):
                formed, update = (1.0 if method == _FULL else 0.0), 28 * trained[method]
            else:
                continue
            work[f"{shape}: {method}"] = Work(update, (2 + formed) * linear + attention)
    return work


def _linear_weights(shape: str) -> int:
    layers, width, between = _SHAPES[shape]
    return layers * (4 * width * width + 2 * width * between)
