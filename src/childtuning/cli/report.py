"""childtuning report"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import json_text, print_json
from childtuning.errors import ConfigError

NAME = "report"


class Format(StrEnum):
    """The formats of a report."""

    html = "html"
    json = "json"
    md = "md"
    latex = "latex"


_OF_SUFFIX = {
    ".html": Format.html,
    ".htm": Format.html,
    ".json": Format.json,
    ".md": Format.md,
    ".tex": Format.latex,
}


def run(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE",
            help="Stores of `childtuning compare`, or their JSON exports; several are joined.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write.  \\[STORE.html for html of one store, else standard output]",
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="html: a page; md, latex: tables; json: everything.  \\[by --output's ending, or html]",
            show_default=False,
        ),
    ] = None,
    no_examples: Annotated[
        bool,
        typer.Option(
            "--no-examples", help="Leave out the texts of evaluation examples, for a report to share."
        ),
    ] = False,
    as_json: o.AsJson = False,
) -> None:
    """Report the results of one or more comparisons as a self-contained page or as tables.

    Example:

        childtuning report rte.db -o rte.html

        childtuning report rte.db --format latex

        childtuning report rte.db mrpc.json -o both.html
    """
    stores = list(dict.fromkeys(store.expanduser() for store in stores))
    output = output.expanduser() if output is not None else None
    kind = format or _format_of(output)
    if kind is Format.html and output is None:
        if len(stores) > 1:
            raise ConfigError(f"a page of {len(stores)} stores has no default path. Pass -o FILE.")
        output = stores[0].with_suffix(".html") if stores[0].name else None
    if output is None and as_json and kind is not Format.json:
        raise ConfigError(
            f"--json prints one JSON object, but --format {kind} without --output prints text. Pass -o FILE."
        )
    if output is not None and output.resolve() in {store.resolve() for store in stores}:
        raise ConfigError(f"output {str(output)!r} is the store itself. Pass another file.")
    from childtuning import report
    from childtuning.runs.folder import write_text

    recorded = report.joined({str(store): report.read_recorded(store) for store in stores})
    if no_examples:
        recorded = recorded.without_examples()
    if kind is Format.json:
        text = json_text(report.json_content(recorded)) + "\n"
    else:
        make = {
            Format.html: report.html_page,
            Format.md: report.markdown_tables,
            Format.latex: report.latex_tables,
        }
        text = make[kind](recorded)
    if output is None:
        print(text, end="")
        return
    if output.exists() and not output.is_file():  # a pipe, or a device
        output.write_text(text, encoding="utf-8")
    else:
        write_text(output.resolve(), text)  # a link stays
    if as_json:
        print_json(
            {
                "stores": [str(store) for store in stores],
                "output": str(output),
                "format": str(kind),
                "runs": len(recorded.records),
            }
        )
    else:
        print(output)


def _format_of(output: Path | None) -> Format:
    if output is None:
        return Format.html
    if output.suffix.lower() not in _OF_SUFFIX:
        raise ConfigError(
            f"the ending of {str(output)!r} is not that of a format. Pass --format html, json, md or latex."
        )
    return _OF_SUFFIX[output.suffix.lower()]
