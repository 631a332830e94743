"""The whole training step: forward, backward and optimizer, batches of 16 × 128 random tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench_script import run_scripts
from record import Record
from timing import Case, alternating, tell
from training_methods import COLUMN, FULL, LORA, METHODS, OURS, PACA, ROW, training_step


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure the steps, shape after shape; with ``--script``, whole runs in their place."""
    if options.script:
        run_scripts(record, options)
        return
    for shape in ["tiny"] if options.quick else options.shapes:
        size = (2, 8) if options.quick else (16, 128)
        tell(f"{shape}, {size[0]} × {size[1]}")
        _one_shape(record, shape, size, options.repeats, options.methods or list(METHODS))


def _one_shape(
    record: Record, shape: str, size: tuple[int, int], repeats: int, methods: Sequence[str]
) -> None:
    cases: dict[str, Case] = {}
    trained: dict[str, int] = {}
    for method in methods:
        name = f"{shape}: {method}"
        step = record.attempt(
            name, lambda method=method: training_step(method, shape, *size), ours=method in OURS
        )
        if step is not None:
            cases[name] = Case(step.run, ours=method in OURS)
            trained[method] = step.trained
    alternating(record, cases, repeats)
    record.facts[shape] = {"batch": list(size), "trained": trained}
    full, row, lora = (f"{shape}: {method}" for method in (FULL, ROW, LORA))
    record.ratio(f"{shape} training step, row child 0.1 ÷ full fine-tuning", row, full, at_most=0.75)
    record.ratio(f"{shape} training step, row child 0.1 ÷ LoRA r=16", row, lora, at_most=0.95)
    column, paca = f"{shape}: {COLUMN}", f"{shape}: {PACA}"
    record.ratio(f"{shape} training step, column child 0.1 ÷ full fine-tuning", column, full, at_most=0.75)
    record.ratio(f"{shape} training step, column child 0.1 ÷ LoRA r=16", column, lora, at_most=0.9)
    record.ratio(f"{shape} training step, column child 0.1 ÷ PaCA", column, paca)
    for method in methods:
        if method not in (FULL, ROW, COLUMN):
            record.ratio(f"{shape} training step, {method} ÷ full fine-tuning", f"{shape}: {method}", full)
