"""childtuning demo"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, is_terminal, print_json, print_table, tell

if TYPE_CHECKING:
    from childtuning.compare import Record, Row

NAME = "demo"
METHODS = ("full", "child-d")
MORE_METHODS = ("full", "child-d", "child-f", "lora")
SENTENCES = (
    "Return a list of the recipients in the message's Cc header.",
    "Extract all members of a compressed tar archive.",
    "Return the number of days between two dates.",
)
_OPTIONS: Mapping[str, Any] = {
    "train_limit": 400,
    "epochs": 10.0,
    "learning_rate": 3e-4,
    "max_length": 32,
    "density": 0.1,
    "granularity": "row",
    "save_steps": 100_000,
}


@o.takes(["model"])
def run(
    *,
    output: Annotated[
        Path, typer.Option(help="Folder for the runs; runs that it holds already are not repeated.")
    ] = Path("runs/demo"),
    full: Annotated[bool, typer.Option("--full", help="Four methods with five seeds; half an hour.")] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds for each method.  \\[1, or 5 with --full]", min=1)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A sentence to label at the end; prompted for on a terminal.")
    ] = None,
    as_json: o.AsJson = False,
    **given: Any,
) -> None:
    """Compare full tuning with a child on docstrings of Python's standard library.

    The task is to predict the topic of a docstring. It uses a real pretrained model and needs no download.

    Example:

        childtuning demo --text "Open a socket and wait for a reply."
    """
    methods = MORE_METHODS if full else METHODS
    output = output.expanduser()
    records, rows = run_demo(output, methods, seeds or (5 if full else 1), o.explicit(given))
    facts = [summary(row, [r for r in records if r.group == row.group]) for row in rows]
    page = write_page(output)
    best = max((record for record in records if record.state == "done"), key=lambda record: record.score)
    if text is None and sys.stdin.isatty() and not as_json:
        print("\nType a sentence about code (Enter for examples): ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline().strip() or None
    folder = str(folder_of(output, best))
    labelled = label_sentences(folder, [text] if text else SENTENCES)
    result = best.result or {}
    counts = {name: result[name] for name in ("train_examples", "eval_examples")}
    if as_json:
        print_json({"methods": facts, **counts, "predictions": labelled, "run": folder, "report": str(page)})
        return
    print_table(
        f"Topic of a docstring: 12 topics, {counts['train_examples']} training and {counts['eval_examples']} "
        "evaluation examples",
        ("method", facts[0]["metric"], "trained", "optimizer", "saved file", "to choose", "a step"),
        [
            [
                fact["method"],
                f"{fact['mean']:.3f}" + (f" ± {fact['sd']:.3f}" if fact["sd"] is not None else ""),
                f"{fact['trained_parameters']:,}",
                human_bytes(fact["state_bytes"]),
                human_bytes(fact["delta_bytes"]),
                f"{fact['choose_seconds']:.0f} s",
                f"{1000 * fact['step_seconds']:.0f} ms",
            ]
            for fact in facts
        ],
    )
    print()
    for one in labelled:
        print(f"“{one['text']}” → {one['prediction']} ({one['confidence']:.0%})")
    print(f"\nReport: {page}")
    print(f"Next: childtuning predict {folder} --text '…'   or   childtuning train --train FILE")


def run_demo(
    folder: Path, methods: Sequence[str], num_seeds: int, options: Mapping[str, Any]
) -> tuple[Sequence[Record], Sequence[Row]]:
    """Compare methods on the standard library's docstrings.

    Args:
        folder: the folder of the comparison; its finished runs are not repeated.
        methods: names of methods; the first is the baseline.
        num_seeds: seeds 0 … num_seeds − 1.
        options: options of ``RunConfig`` that replace the demo's.
    Returns:
        the runs, and a summary of each method.
    """
    from childtuning.cli.compare_progress import watched
    from childtuning.compare import Comparison, choose, compare, foreseen, set_up, summarize

    folder.mkdir(parents=True, exist_ok=True)
    asked = Comparison(
        tasks=("docstrings",),
        methods=tuple(methods),
        num_seeds=num_seeds,
        options={**_OPTIONS, **options},
        threads=os.cpu_count() or 1,
        keep=True,
    )
    store = store_of(folder)
    set_up(store, asked, retry_failed=True)
    if all(run.state == "done" for run in foreseen(store, asked)):
        tell(f"These runs were done before. Delete {folder} to repeat them.")
    else:
        tell("Training a pretrained encoder to tell the topic of a docstring of Python's standard library.")
        tell("On two cores this takes some minutes …")
    with watched(store, asked, jobs=1, tell=tell, live=is_terminal()):
        recorded = compare(store, asked)
    wanted = {run.id for run in foreseen(store, asked)}
    records = [record for record in recorded.records if record.id in wanted]
    return records, summarize(choose(records, asked.seeds_to_tune), asked.against)


def store_of(folder: Path) -> Path:
    """Return the store of the demo's runs."""
    return folder / "demo.db"


def folder_of(folder: Path, record: Record) -> Path:
    """Return the folder of one of the demo's runs."""
    from childtuning.compare import Store

    with Store.open(store_of(folder)) as store:
        return store.folder_of(record.id)


def write_page(folder: Path) -> Path:
    """Write the report of the demo's runs beside them; return its path."""
    from childtuning.report import html_page, read_recorded

    page = folder / "demo.html"
    page.write_text(html_page(read_recorded(store_of(folder))), encoding="utf-8")
    return page


def summary(row: Row, records: Sequence[Record]) -> dict[str, Any]:
    """Return what the demo shows of a method, JSON-ready.

    Args:
        row: its summary over seeds.
        records: its runs.
    """
    results = [record.result for record in records if record.result is not None]
    steps = [
        result["train_seconds"] / record.curve[-1]["step"]
        for record in records
        if (result := record.result) is not None and record.curve
    ]
    found = row.description
    return {
        "method": row.group.method,
        "metric": row.metric,
        "values": list(row.scores.values()),
        "mean": found.mean,
        "sd": found.sd if found.num > 1 else None,
        "trained_parameters": row.costs.trained_parameters,
        "state_bytes": row.costs.state_bytes,
        "delta_bytes": row.costs.delta_bytes,
        "choose_seconds": median(result["fisher_seconds"] for result in results),
        "step_seconds": median(steps),
    }


def label_sentences(run: str | Path, sentences: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each sentence the label that a run's model predicts, and its probability."""
    from childtuning.runs import FinishedRun
    from childtuning.tasks import Examples

    predicted = FinishedRun(run).predict(Examples(list(sentences), None, None))
    return [
        {"text": text, "prediction": one["prediction"], "confidence": one["confidence"]}
        for text, one in zip(sentences, predicted, strict=True)
    ]
