"""Each class of a task, and the examples on which methods disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from childtuning.compare.records import artifact_of
from childtuning.report import numbers
from childtuning.report.charts.figure import data_table, figure
from childtuning.report.evidence import Evidence, Result, Setting
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section

_SHOWN = 8  # examples


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return for every task the F1 of its classes and the disagreements, from the artifact ``examples``."""
    known = evidence.recorded.artifacts
    content: list[Markup] = []
    for setting in evidence.main:
        content += _classes(setting, marks)
        digest = _examples_of(setting)
        if digest is not None and artifact_of(digest) in known:
            content += _disagreements(setting, digest, known[artifact_of(digest)], marks)
    if not content:
        return None
    lead = "The methods at their chosen hyperparameters, over all seeds."
    return Section("examples", "Classes and examples", "Examples", lead, content)


def _classes(setting: Setting, marks: MethodMarks) -> list[Markup]:
    """Return the mean F1 of each class."""
    tables = {
        result.method: [found for record in result.choice.records if (found := _per_class(record.result))]
        for result in setting.results
    }
    tables = {method: found for method, found in tables.items() if found}
    if not tables:
        return []
    first = next(iter(tables.values()))[0]
    rows = [
        [
            label,
            f"{first[label]['support']:,}",
            *(numbers.score(fmean(one[label]["f1"] for one in found)) for found in tables.values()),
        ]
        for label in first
    ]
    name = f"{setting.label}: F1 of each class"
    table = data_table(["class", "evaluation examples", *map(marks.named, tables)], rows, label=name)
    return [
        figure(
            setting.label, table, note="F1 of each class, mean over the seeds", task=setting.task, kind="wide"
        )
    ]


def _per_class(result: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, float]] | None:
    return (result or {}).get("per_class")


@dataclass(frozen=True)
class _Answers:
    """The answers of a method: for each of its seeds, those to all examples."""

    method: str
    of_seeds: Sequence[Sequence[str]]

    @classmethod
    def of(cls, result: Result, examples: str) -> _Answers:
        found = [record.result or {} for record in result.choice.records]
        return cls(result.method, [one["answers"] for one in found if one.get("examples") == examples])

    def right(self, row: int, label: str) -> float:
        """The share of seeds that give this label to an example."""
        return fmean(answers[row] == label for answers in self.of_seeds)

    def text(self, row: int) -> str:
        """The most frequent answer, and how many seeds give it."""
        ((answer, count),) = Counter(answers[row] for answers in self.of_seeds).most_common(1)
        return answer if len(self.of_seeds) == 1 else f"{answer} {count}/{len(self.of_seeds)}"


def _examples_of(setting: Setting) -> str | None:
    """Return the hash of the examples that most of the runs were measured on."""
    results = [record.result or {} for one in setting.results for record in one.choice.records]
    counts = Counter(result["examples"] for result in results if result.get("examples"))
    return counts.most_common(1)[0][0] if counts else None


def _disagreements(
    setting: Setting, digest: str, examples: Mapping[str, Any], marks: MethodMarks
) -> list[Markup]:
    """Return the examples on which the share of right answers differs most between methods."""
    labels, shown = examples["labels"], examples["shown"]
    methods = [found for one in setting.results if (found := _Answers.of(one, digest)).of_seeds]
    if len(methods) < 2:
        return []
    spreads = []
    for row, label in enumerate(labels):
        shares = [method.right(row, label) for method in methods]
        spreads.append(max(shares) - min(shares))
    order = sorted((row for row, spread in enumerate(spreads) if spread > 0), key=lambda row: -spreads[row])
    name = f"{setting.label}: examples on which methods disagree"
    if not order:
        lines = el("p", "The methods are right and wrong on the same examples.", class_="soft")
        return [figure(f"{setting.label}: disagreements", lines, task=setting.task)]
    rows = [
        [shown[row], labels[row], *(_cell(method, row, labels[row]) for method in methods)]
        for row in order[:_SHOWN]
    ]
    columns = ["example", "label", *(marks.named(method.method) for method in methods)]
    whole = sum(spread == 1 for spread in spreads)
    note = (
        f"methods differ on {len(order):,} of {numbers.counted(len(labels), 'example')}; on {whole:,} of them one is "
        f"right and another wrong with every seed. ✓: the answer is right"
    )
    table = data_table(columns, rows, left=len(columns), label=name)
    return [
        figure(f"{setting.label}: disagreements", table, note=note, task=setting.task, kind="wide answers")
    ]


def _cell(method: _Answers, row: int, label: str) -> Any:
    text = method.text(row)
    return [text, " ✓"] if method.right(row, label) > 0.5 else el("span", text, class_="soft")
