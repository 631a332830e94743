"""childtuning demo"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, is_terminal, print_json, print_table, tell
from childtuning.runs.config import RunConfig

if TYPE_CHECKING:
    from childtuning.runs.folder import RunResult

NAME = "demo"
METHODS = ("full", "child-f", "child-d")
SENTENCE = "Return a dictionary that counts how often each word occurs in the message's subject line."
_OPTIONS: dict[str, Any] = {
    "task": "docstrings",
    "train_limit": 400,
    "epochs": 3.0,
    "learning_rate": 3e-4,
    "max_length": 64,
    "save_steps": 100_000,
}


@o.takes(["model"])
def run(
    *,
    output: Annotated[
        Path, typer.Option(help="Folder for the runs; earlier demo runs there are replaced.")
    ] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Seeds for each method.", min=1)] = 2,
    text: Annotated[
        str | None, typer.Option(help="A sentence to label at the end; prompted for on a terminal.")
    ] = None,
    train_limit: Annotated[int, typer.Option(help="Training examples.", min=24)] = 400,
    as_json: o.AsJson = False,
    **given: Any,
) -> None:
    """Compare full, task-free and task-driven tuning on docstrings of Python's standard library.

    The task is to predict the topic of a docstring. It uses a real pretrained model and needs no download.

    Example:

        childtuning demo --text "Open a socket and wait for a reply."
    """
    tell("Loading a pretrained encoder and a few hundred docstrings of Python's standard library …")
    options = {"train_limit": train_limit, **o.explicit(given)}
    results = list(demo_runs(output, num_seeds=seeds, progress=is_terminal(), tell=tell, **options))
    rows = summarize(results)
    best = max(results, key=lambda result: result.metric["value"])
    if text is None and sys.stdin.isatty() and not as_json:
        print(
            "\nType a sentence about code (press Enter for an example): ", end="", file=sys.stderr, flush=True
        )
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
    print(f"\n“{sentence}”\n→ {label} ({confidence:.0%}), by {best.output}")
    print(f"\nNext: childtuning predict {best.output} --text '…'   or   childtuning train --help")


def demo_runs(
    folder: Path,
    *,
    num_seeds: int = 2,
    methods: Sequence[str] = METHODS,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Iterator[RunResult]:
    """Train each method with several seeds on the standard library's docstrings; yield results as they finish.

    Args:
        folder: the folder of the runs' folders; earlier demo runs there are replaced.
        num_seeds: seeds 0 … num_seeds − 1.
        methods: names of methods.
        options: options of ``RunConfig`` that replace the demo's.
    """
    from childtuning.runs.folder import CONFIG
    from childtuning.runs.run import train_run

    for seed in range(num_seeds):
        for method in methods:
            output = folder / f"{method}-{seed}"
            config = RunConfig(**{**_OPTIONS, "method": method, "seed": seed, **options})
            start = time.perf_counter()
            result = train_run(
                config,
                output,
                overwrite=(output / CONFIG).is_file(),
                progress=progress,
                tell=lambda line: None,
            )
            took = time.perf_counter() - start
            tell(f"{method} seed {seed}: {result.metric['name']} {result.metric['value']:.3f}, {took:.0f} s")
            yield result


def summarize(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Summarise the seeds of each method, in order of appearance.

    Returns:
        for each method: mean and sample standard deviation of the metric, the value of every seed, and the costs.
    """
    rows = []
    for method in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == method]
        values = [run.metric["value"] for run in runs]
        rows.append(
            {
                "method": method,
                "metric": runs[0].metric["name"],
                "values": values,
                "mean": mean(values),
                "sd": stdev(values) if len(values) > 1 else 0.0,
                "trained_parameters": runs[0].trained_parameters,
                "state_bytes": runs[0].state_bytes,
                "delta_bytes": runs[0].delta_bytes,
                "seconds": mean(run.fisher_seconds + run.train_seconds for run in runs),
            }
        )
    return rows


def label_sentence(run: str | Path, sentence: str) -> tuple[str, float]:
    """Return the label that a run's model predicts for a sentence, and its probability."""
    from childtuning.runs import FinishedRun
    from childtuning.tasks import Examples

    predicted = FinishedRun(run).predict(Examples([sentence], None, None))[0]
    return predicted["prediction"], predicted["confidence"]
