"""The ranking as Markdown and LaTeX tables, and the complete data as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from childtuning.compare.records import Recorded
from childtuning.compare.summary import SIGNIFICANT, significance
from childtuning.report import numbers
from childtuning.report.evidence import Across, Evidence, Result, Setting
from childtuning.report.findings import finding, noise

_SIGNS = {1: "▲", -1: "▼", 0: ""}
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "–": "--",
    "…": r"\dots{}",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$",
    "“": "``",
    "”": "''",
}


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: what it shows.
        columns, rows: headers and cells; the first column is text, the others numbers.
        bold: the methods in bold.
        note: what the table says, in a sentence or two.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[str]
    note: str


def markdown_tables(recorded: Recorded) -> str:
    """Return the ranking on every task and across tasks as Markdown."""
    evidence = Evidence(recorded)
    code = "".join(f"    {' '.join(command.split())}\n" for command in evidence.commands)
    return f"{_document(evidence, _markdown)}{_plain(_note(evidence))}\n" + (f"\n{code}" if code else "")


def latex_tables(recorded: Recorded) -> str:
    """Return the same as LaTeX, which needs the packages booktabs and amssymb."""
    head = "% needs \\usepackage{booktabs,amssymb}\n"
    evidence = Evidence(recorded)
    comments = "".join(f"% {' '.join(note.split())}\n" for note in [_note(evidence), *evidence.commands])
    return f"{head}{_document(evidence, _latex)}{comments}"


def json_content(recorded: Recorded) -> dict[str, Any]:
    """Return a store's export, with the statistics of the ranking, and who is ahead, in ``summary``."""
    evidence = Evidence(recorded)
    averages = [average.to_dict() for across in evidence.across for average in across.averages]
    return {
        **recorded.to_dict(),
        "summary": {
            "rows": [row.to_dict() for row in evidence.rows],
            "standings": [setting.to_dict() for setting in evidence.settings],
            "across_tasks": averages,
        },
    }


def _document(evidence: Evidence, table_fn: Callable[[Table], str]) -> str:
    tables = [_across(across, evidence.baseline) for across in evidence.across]
    tables += [_ranking(setting, evidence.baseline) for setting in evidence.ranked]
    return "".join(f"{table_fn(table)}\n" for table in tables)


def _note(evidence: Evidence) -> str:
    count = evidence.count
    text = f"{numbers.counted(count['done'], 'run')} finished, {count['failed']:,} failed, "
    text += f"{count['collapsed']:,} collapsed."
    if any(row.paired for row in evidence.rows):
        text += (
            f" p: paired permutation test against {evidence.baseline} over seeds, with Holm's correction;"
            f" ▲ ▼: p below {SIGNIFICANT:g}."
        )
    return text


def _ranking(setting: Setting, baseline: str | None) -> Table:
    compared = any(result.row.paired for result in setting.results)
    columns = ["method", setting.metric, "95 % interval", "median", "best", "collapsed"]
    columns += [f"minus {baseline}", "p"] if compared else []
    rows = [
        [result.method, *_scores(result), *(_comparison(result) if compared else [])]
        for result in setting.results
    ]
    found = finding([result.row for result in setting.results], setting.standing, baseline)
    note = f"{found} {noise(setting.eval_examples, setting.standard_error)}."
    return Table(setting.label, columns, rows, setting.standing.clear, note)


def _scores(result: Result) -> list[str]:
    found = result.row.description
    collapsed = f"{found.num_collapsed} of {found.num}"
    return [
        numbers.mean_and_sd(found),
        numbers.interval(found.interval),
        numbers.score(found.median),
        numbers.score(found.best),
        collapsed,
    ]


def _comparison(result: Result) -> list[str]:
    paired = result.row.paired
    if paired is None:
        return ["", ""]
    difference = f"{numbers.difference(paired.difference)} {_SIGNS[result.sign]}".strip()
    return [difference, numbers.p_value(result.row.p_corrected)]


def _across(across: Across, baseline: str | None) -> Table:
    compared = any(average.paired for average in across.averages)
    columns = ["method", "mean", *([f"minus {baseline}", "p"] if compared else [])]
    columns += [f"{setting.task} ({setting.metric})" for setting in across.settings]
    rows = []
    for average in across.averages:
        row = [average.method, numbers.score(average.mean)]
        if compared:
            paired = average.paired
            difference = "" if paired is None else numbers.difference(paired.difference)
            row += [f"{difference} {_SIGNS[significance(average)]}".strip()]
            row += ["" if paired is None else numbers.p_value(average.p_corrected)]
        means = [{r.method: r.row.description.mean for r in setting.results} for setting in across.settings]
        rows.append([*row, *(numbers.score(by_method.get(average.method)) for by_method in means)])
    note = str(finding(across.averages, across.standing, baseline))
    return Table(across.label, columns, rows, across.standing.clear, note)


def _markdown(table: Table) -> str:
    lines = [
        f"### {_plain(table.title)}",
        "",
        _markdown_row(table.columns),
        _markdown_row(["---", *["---:"] * (len(table.columns) - 1)], plain=False),
    ]
    for row in table.rows:
        cells = [_plain(cell) for cell in row]
        if row[0] in table.bold:
            cells = [f"**{cell}**" if cell else "" for cell in cells[:2]] + cells[2:]
        lines.append(_markdown_row(cells, plain=False))
    return "\n".join([*lines, "", _plain(table.note)]) + "\n"


def _markdown_row(cells: Sequence[str], *, plain: bool = True) -> str:
    return f"| {' | '.join(_plain(cell) if plain else cell for cell in cells)} |"


def _plain(text: str) -> str:
    """Escape characters that Markdown would read as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _latex(table: Table) -> str:
    body = []
    for row in table.rows:
        cells = [_tex(cell) for cell in row]
        if row[0] in table.bold:
            cells = [f"\\textbf{{{cell}}}" for cell in cells[:2]] + cells[2:]
        body.append(f"    {' & '.join(cells)} \\\\")
    return "\n".join(
        [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            "    \\toprule",
            f"    {' & '.join(map(_tex, table.columns))} \\\\",
            "    \\midrule",
            *body,
            "    \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
