"""A bar for the Fisher pass, beside the Trainer's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from childtuning.training.child_choice import Progress


@contextmanager
def fisher_bar() -> Iterator[Progress]:
    """Yield a progress function that draws a bar on standard error once it is called."""
    bars: list[tqdm] = []

    def advance(done: int, total: int | None) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc="Fisher information", unit=" examples"))
        bars[0].update(done - bars[0].n)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
