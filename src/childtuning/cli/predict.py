"""childtuning predict"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, print_json, tell
from childtuning.errors import ConfigError

if TYPE_CHECKING:
    from childtuning.runs import FinishedRun

NAME = "predict"


def run(
    run_dirs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN_DIR", help="The output folder of `childtuning train`.", show_default=False
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Several runs of one base model, which is in memory once: --runs A B C."),
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="File or folder of examples, of any type that `train` reads.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text or prompt, in place of a file; repeatable.")
    ] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(help="Its second text, for runs on pairs; repeatable.")
    ] = None,
    encoding: o.Encoding = None,
    sheet: o.Sheet = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens in a generated response.", min=1)
    ] = 64,
    output: Annotated[
        Path | None, typer.Option(help="Write the input and its predictions here: a new .csv or .jsonl file.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Predict new examples with a run's model, restored from the base model and the delta.

    Example:

        childtuning predict runs/rte --input new.jsonl --output labelled.csv

        childtuning predict runs/mine --text "What a lovely day."

        childtuning predict --runs runs/mood runs/topic --input new.csv --output labelled.csv
    """
    folders = [*(runs or ()), *(run_dirs or ())]
    if not folders:
        raise ConfigError("pass a run's folder, got none: childtuning predict RUN_DIR --input FILE.")
    if (input is None) == (not text):
        raise ConfigError("pass the examples either as --input FILE or as --text STRING.")
    if input is not None and text_pair:
        raise ConfigError("--text-pair needs --text; in a file the second text is a column. Leave it out.")
    if text and (encoding or sheet):
        raise ConfigError("--encoding and --sheet are of a file, got --text. Leave them out.")
    if text_pair and len(text_pair) != len(text or ()):
        raise ConfigError(
            f"each --text needs its --text-pair, got {len(text or ())} and {len(text_pair)}. Pass as many of each."
        )
    o.check_files(input)
    from childtuning.runs import load
    from childtuning.runs.predict import PredictionsFile
    from childtuning.runs.several import RunsOfOneBase
    from childtuning.tasks import Answers

    into = PredictionsFile(output) if output is not None else None
    opened = {
        name: load(folder, progress=is_terminal(), tell=tell)
        for name, folder in zip(_names(folders), folders, strict=True)
    }
    files = {"encoding": encoding, "sheet": sheet}
    asked = {name: _examples(one, input, files, text, text_pair) for name, one in opened.items()}
    if into is not None:
        for name, (_, given) in asked.items():
            into.check(list(given[0]) if given else [], opened[name], _prefix(name, opened))
    answered: dict[str, dict[str, Any]] = {}
    joined: list[dict[str, Any]] = []
    shared = RunsOfOneBase(opened) if len(opened) > 1 else None
    for name, (examples, given) in asked.items():
        with shared.using(name) if shared else nullcontext(opened[name]) as one:
            rows = one.predict(examples, Answers(max_new_tokens))
        answered[name] = {"label_names": one.label_names, "predictions": rows}
        if into is not None:
            joined = into.joined(joined or given, rows, one, _prefix(name, opened))
        elif not as_json:
            if shared:
                print(f"{name}:")
            for index, row in enumerate(rows):
                print(one.kind.line(row, examples.shown(index)))
    if into is not None:
        into.write(joined)
        tell(f"{len(joined)} predictions in {into.path}")
    if as_json and len(opened) > 1:
        print_json({"runs": answered})
    elif as_json:
        print_json({"run": str(folders[0]), **next(iter(answered.values()))})


def _names(folders: list[Path]) -> list[str]:
    """Return what the runs are called: by their folders' names, or by their paths if two are the same."""
    names = [folder.expanduser().resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [str(folder) for folder in folders]
    if len({*names}) < len(names):
        raise ConfigError(f"a run is given twice: {max(names, key=names.count)!r}. Leave one out.")
    return names


def _prefix(name: str, runs: Mapping[str, Any]) -> str:
    return f"{name}_" if len(runs) > 1 else ""


def _examples(
    run: FinishedRun,
    input: Path | None,
    files: Mapping[str, str | None],
    text: list[str] | None,
    text_pair: list[str] | None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Return the examples as a run reads them, and their rows for the output."""
    if text:
        examples = run.typed(text, text_pair or None)
        pairs = [{"text_pair": other} for other in text_pair] if text_pair else [{} for _ in text]
        return examples, [{"text": one, **pair} for one, pair in zip(text, pairs, strict=True)]
    assert input is not None
    from childtuning.tasks.rows import is_image

    source = run.source(input, labelled=False, **files)
    examples = run.read_input(source, labelled=False)
    if examples.num_empty:
        tell(f"rows with empty text: {examples.num_empty:,}")
    if not source.is_table:
        return examples, [{} for _ in range(len(examples))]
    return examples, [{name: cell for name, cell in row.items() if not is_image(cell)} for row in source.rows]
