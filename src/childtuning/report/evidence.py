"""`Evidence`: a comparison's records, ordered and grouped as every part of a report shows them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from childtuning.compare.plan import Choice, choose
from childtuning.compare.records import Group, Record, Recorded
from childtuning.compare.summary import (
    Average,
    Row,
    Standing,
    across_tasks,
    best_first,
    significance,
    standard_error,
    standing,
    summarize,
)
from childtuning.report.joining import commands
from childtuning.report.numbers import counted


@dataclass(frozen=True)
class Result:
    """A method in a setting: its table row, and the runs behind it."""

    row: Row
    choice: Choice

    @property
    def method(self) -> str:
        """The method as the user wrote it."""
        return self.row.group.method

    @property
    def sign(self) -> int:
        """+1 or -1 if significantly better or worse than the baseline, else 0."""
        return significance(self.row)


@dataclass(frozen=True)
class Setting:
    """A setting in which methods are compared: one task, one training size, one starting model.

    Attributes:
        task, train_size, start: as in ``Group``.
        results: best first; those without a mean last.
        label: the setting in words.
        standing: who is ahead.
    """

    task: str
    train_size: int | None
    start: str | None
    results: Sequence[Result]
    label: str
    standing: Standing

    @property
    def metric(self) -> str:
        """Name of the main metric."""
        return next((result.row.metric for result in self.results if result.row.metric), "score")

    @property
    def scores(self) -> list[float]:
        """All numbers that a chart of the scores must include: the runs' scores and the ends of intervals."""
        scores = [score for result in self.results for score in result.row.scores.values()]
        return scores + [end for result in self.results for end in result.row.description.interval or ()]

    @property
    def examples(self) -> int:
        """The number of training examples of its runs."""
        return self.train_size if self.train_size is not None else self._most("train_examples")

    @property
    def eval_examples(self) -> int:
        """The number of examples that its scores are measured on."""
        return self._most("eval_examples")

    @property
    def standard_error(self) -> float | None:
        """The noise of its evaluation examples, at the best mean; ``None`` if it is not known for the metric."""
        return standard_error(self.metric, self.results[0].row.mean, self.eval_examples)

    def _most(self, name: str) -> int:
        return max(record.result[name] for one in self.results for record in one.choice.records)  # type: ignore[index]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready: the setting, who is ahead, and the noise of its evaluation examples."""
        return {
            "task": self.task,
            "train_size": self.train_size,
            "start": self.start,
            "metric": self.metric,
            **self.standing.to_dict(),
            "eval_examples": self.eval_examples,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class Across:
    """Methods over several tasks.

    Attributes:
        averages: best first; methods without a mean are left out.
        settings: the averaged tasks.
        label: what is averaged, in words.
        standing: who is ahead.
    """

    averages: Sequence[Average]
    settings: Sequence[Setting]
    label: str
    standing: Standing


class Evidence:
    """What a report shows.

    Args:
        recorded: the contents of a store.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.comparison = recorded.comparison
        self.commands = commands(recorded.comparison)
        self.records = recorded.records
        self.baseline: str | None = self.comparison.get("baseline") or next(
            iter(self.comparison.get("methods") or ()), None
        )

    @cached_property
    def methods(self) -> list[str]:
        """All methods: the baseline first, then in the order requested."""
        asked = [*filter(None, [self.baseline]), *(self.comparison.get("methods") or [])]
        present = dict.fromkeys(record.group.method for record in self.records)
        return [*(m for m in dict.fromkeys(asked) if m in present), *(m for m in present if m not in asked)]

    @cached_property
    def tasks(self) -> list[str]:
        """All training tasks, in order of appearance."""
        return list(dict.fromkeys(record.group.task for record in self.records))

    @cached_property
    def count(self) -> Counter[str]:
        """The number of runs in each state, and of those that ``collapsed``."""
        states = Counter[str](record.state for record in self.records)
        states["collapsed"] = sum(record.collapsed for record in self.records)
        return states

    @cached_property
    def failed(self) -> list[Record]:
        """The runs that ended with an error."""
        return [record for record in self.records if record.state == "failed"]

    @cached_property
    def choices(self) -> list[Choice]:
        """The hyperparameters and runs reported for each method."""
        seeds = range(self.comparison.get("tune_seeds") or 1)
        return choose(self.records, seeds, self.comparison.get("selection") or "held-out")

    @cached_property
    def rows(self) -> list[Row]:
        """One row of statistics per choice, in the same order."""
        return summarize(self.choices, self.baseline)

    @cached_property
    def across(self) -> list[Across]:
        """The methods across tasks, for every size and start with at least two methods to compare."""
        found: dict[tuple[int | None, str | None], list[Average]] = {}
        for average in across_tasks(self.rows, self.baseline):
            if len(average.tasks) > 1:
                found.setdefault((average.train_size, average.start), []).append(average)
        tables = []
        for (size, start), every in found.items():
            averages = [average for average in every if average.mean is not None]
            if not averages:
                continue
            settings = [s for s in self.settings if (s.train_size, s.start) == (size, start)]
            settings = [setting for setting in settings if setting.task in averages[0].tasks]
            if max(len(setting.results) for setting in settings) > 1:
                averages.sort(key=best_first)
                label = _label("Across tasks", size, start, self._several_sizes)
                tables.append(Across(averages, settings, label, standing(every, self.baseline)))
        return sorted(tables, key=lambda table: -_size(table.settings[0].train_size))

    @cached_property
    def _several_sizes(self) -> bool:
        return len({record.group.train_size for record in self.records}) > 1

    @cached_property
    def settings(self) -> list[Setting]:
        """All settings: by task, with the largest training set first and the base model before other starts."""
        found: dict[tuple[str, int | None, str | None], list[Result]] = {}
        for row, choice in zip(self.rows, self.choices, strict=True):
            place = (row.group.task, row.group.train_size, row.group.start)
            found.setdefault(place, []).append(Result(row, choice))
        settings = [
            Setting(
                task,
                size,
                start,
                sorted(results, key=lambda result: best_first(result.row)),
                _label(task, size, start, self._several_sizes),
                standing([result.row for result in results], self.baseline),
            )
            for (task, size, start), results in found.items()
        ]
        order = {task: place for place, task in enumerate(self.tasks)}
        settings.sort(key=lambda s: (order[s.task], s.start is not None, s.start or "", -_size(s.train_size)))
        return settings

    @cached_property
    def ranked(self) -> list[Setting]:
        """The settings with something to rank; transfers of a single method appear in a matrix instead."""
        return [setting for setting in self.settings if setting.start is None or len(setting.results) > 1]

    @cached_property
    def main(self) -> list[Setting]:
        """The first of ``ranked`` for every task: the one with the most training examples."""
        return list({setting.task: setting for setting in reversed(self.ranked)}.values())[::-1]

    def group_label(self, group: Group) -> str:
        """Return a label for a run's group, without the method."""
        return _label(group.task, group.train_size, group.start, self._several_sizes)


def _size(train_size: int | None) -> float:
    return math.inf if train_size is None else train_size


def _label(task: str, size: int | None, start: str | None, with_size: bool) -> str:
    words = [task]
    if start is not None:
        words.append(f"from {start}")
    if with_size:
        words.append("all examples" if size is None else counted(size, "example"))
    return " · ".join(words)
