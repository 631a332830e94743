"""Which way a metric points."""

from __future__ import annotations

_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def lower_is_better(metric: str | None) -> bool:
    """Say whether of two values of a metric the smaller is the better one."""
    return metric in _LOWER_IS_BETTER
