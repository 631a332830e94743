"""What ``training_costs`` predicts, beside what is measured: step time and peak memory as shares of full fine-tuning's.

Six random children of BERT-base and of MiniLM, 16 × 128 random tokens. A ratio here is prediction ÷ measurement.
"""

from __future__ import annotations

import argparse

from environment import RETURNED
from record import Record
from shapes import HEAD, classifier, random_batch
from timing import Case, alternating, tell
from training_methods import FULL, training_step
from workers import call

import childtuning as ct
from childtuning.child import random_child

_CELLS = (("element", 0.1), ("row", 0.1), ("row", 0.3), ("column", 0.02), ("column", 0.1), ("column", 0.3))
_WITHIN = 0.1
_BUDGET = "budget step=0.5"


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure shape after shape."""
    for shape in ["tiny"] if options.quick else options.shapes:
        size = (2, 8) if options.quick else (16, 128)
        cells = {
            f"child {density:g}, {granularity}": (granularity, density) for granularity, density in _CELLS
        }
        tell(shape)
        cases = {
            f"{shape}: {name}": Case(training_step(name, shape, *size).run, ours=True)
            for name in (FULL, *cells, _BUDGET)
        }
        alternating(record, cases, options.repeats)
        del cases
        record.ratio(
            f"{shape} training step, columns within Budget(step=0.5) ÷ full fine-tuning",
            f"{shape}: {_BUDGET}",
            f"{shape}: {FULL}",
            at_most=0.53,
        )
        for number in range(min(options.repeats, 3)):
            for name in (FULL, *cells):
                tell(f"  memory: round {number + 1}: {name}")
                given = {"method": name, "shape": shape, "batch_size": size[0], "num_tokens": size[1]}
                found = record.attempt(
                    f"{shape}: {name}, memory",
                    lambda given=given: call("train-memory", options.threads, malloc=RETURNED, **given),
                    ours=True,
                )
                if found is not None:
                    record.add_samples(f"{shape}: {name}, memory", [found["peak_bytes"]], "bytes")
        model = classifier(shape)
        costs = ct.training_costs(model, random_batch(model, *size))
        for name, (granularity, density) in cells.items():
            child = random_child(model, density, granularity=granularity, always=HEAD)
            shares = costs.shares(child)
            for kind, ending, choose in (("step", "", min), ("memory", ", memory", _middle)):
                measured = _share(record, f"{shape}: {name}{ending}", f"{shape}: {FULL}{ending}", choose)
                record.facts.setdefault("shares", {})[f"{shape}: {name}, {kind}"] = {
                    "predicted": shares[kind],
                    "measured": measured,
                }
        for kind in ("step", "memory"):
            errors = [
                abs(found["predicted"] / found["measured"] - 1)
                for key, found in record.facts["shares"].items()
                if key.startswith(f"{shape}:") and key.endswith(kind) and found["measured"]
            ]
            record.value(
                f"{shape}: largest error of the predicted {kind}, six children",
                max(errors) if errors else None,
                at_most=_WITHIN,
                statistic="min" if kind == "step" else "median",
            )


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _share(record: Record, over: str, under: str, choose: object) -> float | None:
    try:
        return choose(record.samples[over]["values"]) / choose(record.samples[under]["values"])  # type: ignore[operator]
    except (KeyError, ZeroDivisionError):
        return None
