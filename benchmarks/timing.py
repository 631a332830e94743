"""Alternating samples of several cases in one process."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from record import Record


@dataclass
class Case:
    """One thing to measure.

    Attributes:
        run: what is timed.
        prepare: what puts the inputs back before each sample, not timed.
        ours: a failure of it is a failure of the benchmark; any other case may say why it cannot run.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    ours: bool = False


def alternating(record: Record, cases: Mapping[str, Case], repeats: int) -> None:
    """Time every case once a round, in turn there and back, and record the seconds.

    Each case runs once before, and that is no sample: states are made then, and kernels and thread pools started.
    """
    ready: dict[str, Case] = {}
    for name, case in cases.items():
        tell(f"  warming up: {name}")
        first = record.attempt(name, lambda case=case: _sample(case), ours=case.ours)
        if first is not None:
            ready[name] = case
            record.facts.setdefault("first_run_seconds", {})[name] = first
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(repeats):
        tell(f"  round {number + 1} of {repeats}")
        order = list(ready) if number % 2 == 0 else list(reversed(ready))
        for name in order:
            seconds[name].append(_sample(ready[name]))
    for name, values in seconds.items():
        record.add_samples(name, values, "seconds")


def _sample(case: Case) -> float:
    case.prepare()
    gc.collect()
    gc.disable()
    try:
        start = perf_counter()
        case.run()
        return perf_counter() - start
    finally:
        gc.enable()


def tell(line: str) -> None:
    """Say on standard error how far the benchmark is."""
    print(line, file=sys.stderr, flush=True)
