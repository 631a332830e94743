"""What the machine can do at best: bytes a second in a copy and in an update in place, operations a second in matmul.

``floors.py`` turns the fastest samples into the shortest time that a piece of work could take here. Bytes are those
that the program reads and writes. Some copies also read what they overwrite, which an update in place does anyway, so
the faster of the two is the machine's rate.
"""

from __future__ import annotations

import argparse

import torch
from record import Record
from timing import Case, alternating

_COPY, _IN_PLACE = "copy of float32", "negation of float32 in place"
_ENTRIES = 1 << 26  # 256 MB, many times any cache
_SIZES = [(2048, 768, 768), (2048, 768, 3072), (2048, 2048, 2048)]  # 16 × 128 tokens of BERT-base; a square


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure both rates."""
    entries = 1 << 16 if options.quick else _ENTRIES
    sizes = [(64, 64, 64)] if options.quick else _SIZES
    source, target = torch.ones(entries), torch.zeros(entries)
    cases = {
        _COPY: Case(lambda: target.copy_(source), ours=True),
        _IN_PLACE: Case(source.neg_, ours=True),
    }
    record.facts["bytes"] = dict.fromkeys(cases, 2 * source.nbytes)
    operations: dict[str, int] = {}
    for rows, inner, columns in sizes:
        name = f"matmul of float32, {rows} × {inner} by {inner} × {columns}"
        cases[name] = _matmul(rows, inner, columns)
        operations[name] = 2 * rows * inner * columns
    record.facts["operations"] = operations
    alternating(record, cases, options.repeats)
    for kind, unit in (("bytes", "10⁹ bytes a second"), ("operations", "10⁹ operations a second")):
        for name, amount in record.facts[kind].items():
            if name in record.samples:
                record.value(
                    f"{name}, {unit}", amount / min(record.samples[name]["values"]) / 1e9, statistic="min"
                )


def _matmul(rows: int, inner: int, columns: int) -> Case:
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    return Case(lambda: torch.mm(left, right, out=out), ours=True)
