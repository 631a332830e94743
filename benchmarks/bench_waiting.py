"""Training steps whose threads wait at barriers as the command line lets them, against spinning and sleeping.

Spinning, for milliseconds, is what the OpenMP library does where nothing is set. Each sample is a process of its own,
alone or beside another that keeps one core busy. The busy one belongs to a session of its own, as a program in another
terminal does: Linux shares the cores among sessions first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from record import Record
from timing import tell
from workers import call

from childtuning.cli.app import SPINS

_BRIEF, _SPIN, _SLEEP = "threads that spin briefly", "threads that spin on", "threads that sleep at once"
# The first is what the command line sets, the second what libgomp takes where nothing is set, the third its number
# under OMP_WAIT_POLICY=PASSIVE.
_SETTINGS = {
    name: {"GOMP_SPINCOUNT": spins} for name, spins in ((_BRIEF, SPINS), (_SPIN, "300000"), (_SLEEP, "0"))
}
_METHOD = "child 0.1, element"
_CASES = (
    {"shape": "minilm", "batch_size": 16, "num_tokens": 32, "steps": 8},
    {"shape": "bert-base", "batch_size": 16, "num_tokens": 64, "steps": 2},
)
_QUICK = ({"shape": "tiny", "batch_size": 2, "num_tokens": 8, "steps": 2},)


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure every shape alone and beside a busy process, in turn there and back."""
    places = {"alone": 0, "beside a busy process": 1}
    for case in _QUICK if options.quick else _CASES:
        about = "{shape} training step, {batch_size} × {num_tokens} tokens".format_map(case)
        seconds: dict[str, list[float]] = {}
        for number in range(options.repeats):
            tell(f"  {about}: round {number + 1} of {options.repeats}")
            for place, processes in places.items():
                order = list(_SETTINGS) if number % 2 == 0 else list(reversed(_SETTINGS))
                for waiting in order:
                    name = f"{about}, {place}: {waiting}"
                    with _busy(processes):
                        result = record.attempt(
                            name,
                            lambda waiting=waiting, case=case: call(
                                "waiting-steps", options.threads, variables=_SETTINGS[waiting], **case
                            ),
                            ours=True,
                        )
                    if result is not None:
                        seconds.setdefault(name, []).append(result["seconds"])
        for name, values in seconds.items():
            record.add_samples(name, values, "seconds")
        for place, limit in zip(places, (1.05, 0.5), strict=True):
            brief, spin, sleep = (f"{about}, {place}: {waiting}" for waiting in _SETTINGS)
            record.ratio(f"{about}, {place}: {_BRIEF} ÷ {_SPIN}", brief, spin, at_most=limit)
            record.ratio(f"{about}, {place}: {_BRIEF} ÷ {_SLEEP}", brief, sleep)


def measure(shape: str, batch_size: int, num_tokens: int, steps: int) -> dict[str, Any]:
    """Return the seconds of a training step, the first of the process left out."""
    from training_methods import training_step

    step = training_step(_METHOD, shape, batch_size, num_tokens).run
    step()
    start = perf_counter()
    for _ in range(steps):
        step()
    return {"seconds": (perf_counter() - start) / steps}


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """Keep as many cores busy meanwhile."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        for _ in range(processes)
    ]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()
