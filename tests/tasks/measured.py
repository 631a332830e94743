"""A kind's metrics of one model's outputs, as runs measure them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from childtuning.runs.judgement import Answered, measure
from childtuning.tasks import Kind


def measured(
    kind: Kind, names: Sequence[str], outputs: Sequence[Any], encoded: Any, split: Any, labels: Sequence[str]
) -> dict[str, float]:
    return measure(kind, names, [Answered(outputs, encoded, split)], labels)
