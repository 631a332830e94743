"""childtuning predict"""

from __future__ import annotations

import json
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
    text: Annotated[str | None, typer.Option(help="One text or prompt, in place of a file.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Its second text, for runs on pairs.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens in a generated response.", min=1)
    ] = 64,
    output: Annotated[Path | None, typer.Option(help="Write predictions here as JSON Lines.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Predict new examples with a run's model, restored from the base model and the delta.

    Example:

        childtuning predict runs/rte --input new.jsonl

        childtuning predict runs/mine --text "What a lovely day."
    """
    from childtuning.runs import load
    from childtuning.tasks import Answers

    output = output.expanduser() if output is not None else None
    if output is not None and not output.parent.is_dir():
        raise ConfigError(
            f"there is no folder {str(output.parent)!r} for the output. Create it, or pass another."
        )
    if (input is None) == (text is None):
        raise ConfigError("pass the examples either as --input FILE or as --text STRING.")
    if input is not None and text_pair is not None:
        raise ConfigError("--text-pair needs --text; in a file the second text is a column. Leave it out.")
    if output is not None and output.exists():
        raise ConfigError(f"output file {str(output)!r} already exists. Pass another.")
    opened = load(run_dir, progress=is_terminal(), tell=tell)
    if text is not None:
        examples = opened.kind.of_texts([text], None if text_pair is None else [text_pair])
    else:
        assert input is not None
        examples = opened.read_input(input, labelled=False)
    if examples.num_empty:
        tell(f"{examples.num_empty} rows have empty text")
    rows = opened.predict(examples, Answers(max_new_tokens))
    if output is not None:
        output.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        tell(f"{len(rows)} predictions in {output}")
    if as_json:
        print_json({"run": str(run_dir), "label_names": opened.label_names, "predictions": rows})
    elif output is None:
        for index, row in enumerate(rows):
            print(opened.kind.line(row, examples.shown(index)))
