"""What a run reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What a run reports.

    Attributes:
        task, method, seed: as configured.
        metric: name and value of the task's main metric on the dev split.
        metrics: all of the task's metrics.
        held_out: the same on the training examples that were set aside; ``None`` where there were none.
        constant: the same for always giving the most frequent answer of the training examples; ``None`` where a kind of
            task has no such thing.
        elsewhere: by other task, its metrics under a mapping of labels.
        density: the share of the eligible entries in the child.
        trained_parameters: entries that were trained, the new head included.
        child_parameters: those of them that are eligible.
        eligible_parameters: entries that the selection could choose from.
        state_bytes: the optimizer's memory beside the model and its gradients.
        delta_bytes: size of the delta's two files.
        fisher_seconds, train_seconds: wall time of the scores and of training.
        peak_memory_bytes: of the GPU where there is one, else of the process, during choice and training.
        train_examples, eval_examples, empty_texts: counts.
        cut_by_length: what ``max_length`` cut in both splits: words or rows, as the kind of task counts them.
        output: the run's folder.
    """

    task: str
    method: str
    seed: int
    metric: dict[str, Any]
    metrics: dict[str, float]
    density: float
    trained_parameters: int
    child_parameters: int
    eligible_parameters: int
    state_bytes: int
    delta_bytes: int
    fisher_seconds: float
    train_seconds: float
    peak_memory_bytes: int
    train_examples: int
    eval_examples: int
    empty_texts: int
    cut_by_length: int
    output: str
    held_out: dict[str, float] | None = None
    constant: dict[str, float] | None = None
    elsewhere: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)
