"""`Evidence`: a comparison's records, ordered and grouped as every part of a report shows them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from childtuning.compare.plan import Choice, choose
from childtuning.compare.records import Group, Record, Recorded, lower_is_better
from childtuning.compare.statistics import Paired
from childtuning.compare.summary import Average, Row, across_tasks, summarize
from childtuning.report.joining import commands
from childtuning.report.numbers import counted

SIGNIFICANT = 0.05


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
        return significance(self.row.paired, self.row.p_corrected, self.row.metric)


@dataclass(frozen=True)
class Setting:
    """A setting in which methods are compared: one task, one training size, one starting model.

    Attributes:
        task, train_size, start: as in ``Group``.
        results: best first; those without a mean last.
        label: the setting in words.
    """

    task: str
    train_size: int | None
    start: str | None
    results: Sequence[Result]
    label: str

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
        if self.train_size is not None:
            return self.train_size
        return max(record.result["train_examples"] for one in self.results for record in one.choice.records)  # type: ignore[index]


@dataclass(frozen=True)
class Across:
    """Methods over several tasks.

    Attributes:
        averages: best first; methods without a mean are left out.
        settings: the averaged tasks.
        label: what is averaged, in words.
    """

    averages: Sequence[Average]
    settings: Sequence[Setting]
    label: str

    def sign(self, average: Average) -> int:
        """As ``Result.sign``."""
        return significance(average.paired, average.p_corrected, self.settings[0].metric)


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
        return choose(self.records, range(self.comparison.get("tune_seeds") or 1))

    @cached_property
    def rows(self) -> list[Row]:
        """One row of statistics per choice, in the same order."""
        return summarize(self.choices, self.baseline)

    @cached_property
    def across(self) -> list[Across]:
        """The methods across tasks, for every size and start with at least two methods to compare."""
        found: dict[tuple[int | None, str | None], list[Average]] = {}
        for average in across_tasks(self.rows, self.baseline):
            if len(average.tasks) > 1 and average.mean is not None:
                found.setdefault((average.train_size, average.start), []).append(average)
        tables = []
        for (size, start), averages in found.items():
            settings = [s for s in self.settings if (s.train_size, s.start) == (size, start)]
            settings = [setting for setting in settings if setting.task in averages[0].tasks]
            if max(len(setting.results) for setting in settings) > 1:
                sign = 1 if lower_is_better(settings[0].metric) else -1
                averages.sort(key=lambda average: sign * (average.mean or 0.0))
                label = _label("Across tasks", size, start, self._several_sizes)
                tables.append(Across(averages, settings, label))
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
                sorted(results, key=_best_first),
                _label(task, size, start, self._several_sizes),
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


def significance(paired: Paired | None, p_corrected: float | None, metric: str | None) -> int:
    """Return +1 or -1 if a method is better or worse than the baseline at 5 % after Holm's correction, else 0."""
    if paired is None or p_corrected is None or p_corrected >= SIGNIFICANT or not paired.difference:
        return 0
    return 1 if (paired.difference > 0) != lower_is_better(metric) else -1


def _best_first(result: Result) -> tuple[bool, float]:
    mean = result.row.description.mean
    if mean is None:
        return True, 0.0
    return False, mean if lower_is_better(result.row.metric) else -mean


def _size(train_size: int | None) -> float:
    return math.inf if train_size is None else train_size


def _label(task: str, size: int | None, start: str | None, with_size: bool) -> str:
    words = [task]
    if start is not None:
        words.append(f"from {start}")
    if with_size:
        words.append("all examples" if size is None else counted(size, "example"))
    return " · ".join(words)
