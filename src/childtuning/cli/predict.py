"""childtuning predict"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, print_json, tell
from childtuning.errors import ConfigError

NAME = "predict"


def run(
    run_dir: o.RunDir,
    input: Annotated[
        Path | None, typer.Option(help="File or folder of examples, of any type that `train` reads.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text or prompt, in place of a file; repeatable.")
    ] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(help="Its second text, for runs on pairs; repeatable.")
    ] = None,
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
    """
    from childtuning.runs import load
    from childtuning.runs.predict import PredictionsFile
    from childtuning.tasks import Answers

    into = PredictionsFile(output) if output is not None else None
    if (input is None) == (not text):
        raise ConfigError("pass the examples either as --input FILE or as --text STRING.")
    if input is not None and text_pair:
        raise ConfigError("--text-pair needs --text; in a file the second text is a column. Leave it out.")
    opened = load(run_dir, progress=is_terminal(), tell=tell)
    if text:
        if text_pair and len(text_pair) != len(text):
            raise ConfigError(
                f"each --text needs its --text-pair, got {len(text)} and {len(text_pair)}. Pass as many of each."
            )
        examples = opened.kind.of_texts(text, text_pair or None)
        given = [
            {"text": one} | ({"text_pair": text_pair[i]} if text_pair else {}) for i, one in enumerate(text)
        ]
    else:
        assert input is not None
        source = opened.source(input, labelled=False)
        examples = opened.read_input(source, labelled=False)
        given = (
            source.rows
            if source.is_table and opened.kind.auto_processor == "AutoTokenizer"
            else [{} for _ in range(len(examples))]
        )
    if into is not None:
        into.check(list(given[0]) if given else [], opened.label_names)
    if examples.num_empty:
        tell(f"{examples.num_empty} rows have empty text")
    rows = opened.predict(examples, Answers(max_new_tokens))
    if into is not None:
        into.write(given, rows, opened.label_names)
        tell(f"{len(rows)} predictions in {into.path}")
    if as_json:
        print_json({"run": str(run_dir), "label_names": opened.label_names, "predictions": rows})
    elif into is None:
        for index, row in enumerate(rows):
            print(opened.kind.line(row, examples.shown(index)))
