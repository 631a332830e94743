"""childtuning demo"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, is_terminal, print_json, print_table, tell

NAME = "demo"


@o.takes(["model"])
def run(
    *,
    output: Annotated[
        Path, typer.Option(help="Folder for the runs; earlier demo runs there are replaced.")
    ] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Seeds for each method.", min=1)] = 2,
    text: Annotated[
        str | None, typer.Option(help="A sentence of yours to label at the end; asked for on a terminal.")
    ] = None,
    train_limit: Annotated[int, typer.Option(help="Training examples.", min=24)] = 400,
    as_json: o.AsJson = False,
    **given: Any,
) -> None:
    """Compare full, task-free and task-driven tuning on docstrings of Python's standard library.

    A real pretrained model and a real task, both on every machine: name the topic of a docstring.

    Example:

        childtuning demo --text "Open a socket and wait for a reply."
    """
    tell("Loading a pretrained encoder and a few hundred docstrings of Python's standard library …")
    from childtuning.runs.demo import SENTENCE, demo_runs, label_sentence, summarize

    options = {"train_limit": train_limit, **o.explicit(given)}
    results = list(demo_runs(output, num_seeds=seeds, progress=is_terminal(), tell=tell, **options))
    rows = summarize(results)
    best = max(results, key=lambda result: result.metric["value"])
    if text is None and sys.stdin.isatty() and not as_json:
        print("\nType a sentence about code (Enter takes an example): ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline().strip() or None
    sentence = text or SENTENCE
    label, confidence = label_sentence(best.output, sentence)
    if as_json:
        print_json(
            {
                "methods": rows,
                "train_examples": results[0].train_examples,
                "eval_examples": results[0].eval_examples,
                "sentence": sentence,
                "prediction": label,
                "confidence": confidence,
                "run": best.output,
            }
        )
        return
    print_table(
        f"Topic of a docstring: {results[0].train_examples} training, {results[0].eval_examples} evaluation examples, "
        f"{seeds} seeds",
        ("method", f"{rows[0]['metric']}", "trained", "optimizer state", "delta", "time"),
        [
            [
                row["method"],
                f"{row['mean']:.3f} ± {row['sd']:.3f}",
                f"{row['trained_parameters']:,}",
                human_bytes(row["state_bytes"]),
                human_bytes(row["delta_bytes"]),
                f"{row['seconds']:.0f} s",
            ]
            for row in rows
        ],
    )
    print(f"\n“{sentence}”\n→ {label} ({confidence:.0%}), says {best.output}")
    print(f"\nNext: childtuning predict {best.output} --text '…'   or   childtuning train --help")
