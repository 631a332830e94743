"""`Record`: one run of a comparison, with its result if finished."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from childtuning.errors import ConfigError
from childtuning.tasks.metrics import lower_is_better

SCHEMA = 1  # version of stores and of their exports
State = Literal["planned", "running", "done", "failed"]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seed and hyperparameters: one method on one task, at one size.

    Attributes:
        task: the training task.
        method: with its options and label, as typed.
        train_size: the number of training examples; ``None``: all.
        start: the task whose tuned network it started from; ``None``: the base model.
    """

    task: str
    method: str
    train_size: int | None = None
    start: str | None = None


@dataclass(frozen=True)
class Record:
    """One run of a comparison: its configuration and its result.

    Attributes:
        id: a hash of everything that determines the run, 16 hexadecimal digits.
        group: the group it belongs to.
        seed: as configured.
        point: the hyperparameters that are compared, by name: ``{"learning_rate": 2e-5}``.
        config: every option of the run that is not ``None``, as in ``RunConfig``.
        state: planned, running, done or failed.
        result: ``RunResult`` as a dict, for runs that are done; its scores may be NaN. ``examples`` is a hash of the
            evaluation examples that ``answers`` belong to.
        curve: the training log: ``[{"step": 10, "loss": 0.7, "learning_rate": …}, …]``.
        parts: parameter name -> (trained entries, all entries); parameters without trained entries are left out.
        error: the error of a failed run, in one line.
        seconds: wall time from start to end, for runs that are done or failed.
        finished: the time of completion, as ISO 8601 in UTC.
    """

    id: str
    group: Group
    seed: int
    point: Mapping[str, Any]
    config: Mapping[str, Any]
    state: State = "planned"
    result: Mapping[str, Any] | None = None
    curve: Sequence[Mapping[str, Any]] = ()
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    error: str | None = None
    seconds: float | None = None
    finished: str | None = None

    @property
    def metric(self) -> str | None:
        """Name of the task's main metric."""
        return None if self.result is None else self.result["metric"]["name"]

    @property
    def score(self) -> float:
        """The main metric on the reported examples; NaN if there is none."""
        return _number(None if self.result is None else self.result["metric"]["value"])

    @property
    def selection(self) -> float:
        """The score for choosing hyperparameters: on the held-out examples if any, else the reported score."""
        held_out = None if self.result is None else self.result.get("held_out")
        return _number(held_out[self.metric]) if held_out else self.score

    @property
    def elsewhere(self) -> dict[str, float]:
        """The main score on other tasks' examples, by task."""
        found = (self.result or {}).get("elsewhere") or {}
        return {task: _number(next(iter(metrics.values()))) for task, metrics in found.items()}

    @property
    def collapsed(self) -> bool:
        """Whether a finished run has no score, or is no better than the most frequent training label.

        If that baseline has no score, or does not exist, only runs without a score are collapsed.
        """
        if self.state != "done" or self.result is None:
            return False
        constant = self.result.get("constant")
        if math.isnan(self.score) or constant is None:
            return math.isnan(self.score)
        sign = -1 if lower_is_better(self.metric) else 1
        return sign * self.score <= sign * _number(constant[self.metric])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Return the record whose fields ``to_dict`` returned."""
        values = dict(content)
        values["group"] = Group(**values["group"])
        values["curve"] = tuple(values.get("curve", ()))
        values["parts"] = {name: tuple(counts) for name, counts in values["parts"].items()}
        return cls(**values)


@dataclass(frozen=True)
class Recorded:
    """The content of a store.

    Attributes:
        comparison: the comparison, as ``Comparison.to_dict`` returns it.
        records: the runs, in the order of planning.
        artifacts: name -> JSON-ready result that belongs to no single run, such as ``overlap``.
        environment: versions and machine.
    """

    comparison: Mapping[str, Any]
    records: Sequence[Record]
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def without_examples(self) -> Self:
        """Return the content without the evaluation examples, to be given away where their texts must not be."""
        kept = {
            name: content for name, content in self.artifacts.items() if not name.startswith(artifact_of(""))
        }
        return replace(self, artifacts=kept)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields, the store's export."""
        return {
            "schema": SCHEMA,
            "comparison": dict(self.comparison),
            "environment": dict(self.environment),
            "records": [record.to_dict() for record in self.records],
            "artifacts": dict(self.artifacts),
        }

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Return the content whose fields ``to_dict`` returned.

        Raises:
            ConfigError: when it is not an export, or has another version.
        """
        if not isinstance(content, Mapping) or content.get("schema") != SCHEMA or "records" not in content:
            raise ConfigError(
                f"this is not an export of a store with schema {SCHEMA}. Pass a file that `report --format json` wrote."
            )
        return cls(
            comparison=content["comparison"],
            environment=content["environment"],
            records=[Record.from_dict(record) for record in content["records"]],
            artifacts=content["artifacts"],
        )


def artifact_of(examples: str) -> str:
    """Return the name of the artifact that holds evaluation examples, by their hash in a run's result."""
    return f"examples {examples}"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
