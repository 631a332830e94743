"""Peak memory of a training step of 16 × 128 random tokens (or --batch-size × 128), each in a process of its own.

What counts is resident memory: the peak during three steps (the first makes the optimizer's state), less what was
resident after the imports and before the model. So weights, activations, gradients and states are all in it. Freed
tensors go back to the system in every process alike; ``--malloc kept`` measures with the allocator settings of the
timings instead.
"""

from __future__ import annotations

import argparse
from typing import Any

from environment import KEPT, RETURNED
from record import Record
from timing import tell
from training_methods import COLUMN, ELEMENT, FULL, LORA, METHODS, OURS, PACA, ROW, training_step
from workers import call

_STEPS = 3
_BATCH_SIZE = 16  # that the targets are for


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure every method in turn, shape after shape."""
    malloc = KEPT if options.malloc == "kept" else RETURNED
    record.facts["allocator"] = malloc
    usual = options.batch_size == _BATCH_SIZE
    for shape in ["tiny"] if options.quick else options.shapes:
        size = (2, 8) if options.quick else (options.batch_size, 128)
        methods = list(METHODS) if usual and not options.quick else [FULL, ROW, COLUMN, LORA]
        methods = [method for method in methods if options.methods is None or method in options.methods]
        said = shape if usual else f"{shape}, {options.batch_size} × 128,"
        for number in range(options.repeats):
            for method in methods if number % 2 == 0 else reversed(methods):
                name = f"{shape}: {method}"
                tell(f"  round {number + 1} of {options.repeats}: {name}")
                given = {"method": method, "shape": shape, "batch_size": size[0], "num_tokens": size[1]}
                found = record.attempt(
                    name,
                    lambda given=given: call("train-memory", options.threads, malloc=malloc, **given),
                    ours=method in OURS,
                )
                if found is None:
                    continue
                record.add_samples(name, [found["peak_bytes"]], "bytes")
                record.facts.setdefault("building", {})[name] = found["building_peak_bytes"]
        full, row, lora = (f"{shape}: {method}" for method in (FULL, ROW, LORA))
        _ratio(
            record,
            f"{said} peak memory, row child 0.1, released gradients ÷ full fine-tuning",
            row,
            full,
            0.45 if usual else None,
        )
        at_most = 1.1 if usual else None
        _ratio(
            record, f"{said} peak memory, row child 0.1, released gradients ÷ LoRA r=16", row, lora, at_most
        )
        _columns(record, shape, said, usual)
        for method in methods:
            if method not in (FULL, ROW, COLUMN):
                released = ", released gradients" if method == ELEMENT else ""
                name = f"{said} peak memory, {method}{released} ÷ full fine-tuning"
                _ratio(record, name, f"{shape}: {method}", full, None)


_AT_MOST = {"bert-base": (0.56, 0.76), "minilm": (0.62, 0.78)}  # of full fine-tuning, of LoRA


def _columns(record: Record, shape: str, said: str, usual: bool) -> None:
    of_full, of_lora = _AT_MOST.get(shape, (None, None)) if usual else (None, None)
    column = f"{shape}: {COLUMN}"
    name = f"{said} peak memory, column child 0.1, released gradients"
    _ratio(record, f"{name} ÷ full fine-tuning", column, f"{shape}: {FULL}", of_full)
    _ratio(record, f"{name} ÷ LoRA r=16", column, f"{shape}: {LORA}", of_lora)
    if f"{shape}: {PACA}" in record.samples:
        _ratio(record, f"{name} ÷ PaCA", column, f"{shape}: {PACA}", 1.0 if usual else None)


def _ratio(record: Record, name: str, over: str, under: str, at_most: float | None) -> None:
    record.ratio(name, over, under, at_most=at_most, statistic="median")


def measure(method: str, shape: str, batch_size: int, num_tokens: int) -> dict[str, Any]:
    """Run a few steps in this process and say how much memory they took, and how much building them did."""
    import peak

    # The thread pools and the libraries' own buffers, which belong to no method.
    warm = training_step(method, "tiny", 2, 8)
    warm.run()
    del warm
    before = peak.resident_bytes()
    peak.start_peak()
    step = training_step(method, shape, batch_size, num_tokens)
    building = peak.peak_bytes()
    peak.start_peak()
    for _ in range(_STEPS):
        step.run()
    return {"peak_bytes": peak.peak_bytes() - before, "building_peak_bytes": building - before}
