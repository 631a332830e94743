"""childtuning compare"""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, point_text, print_json, print_table, short_name, tell
from childtuning.errors import ConfigError

NAME = "compare"
_comparison, _execution = "Comparison", "Execution"
_OWN = ("task", "method", "seed", "train_limit")  # this command has its own options for several of each
_OF_TRAIN = ("folds", "fold")


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


@o.takes(name for name in o.SHARED if name not in _OWN + _OF_TRAIN)
def run(
    more_grid: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further values for --grid: NAME=VALUE,VALUE …",
            metavar="[NAME=VALUES]...",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None, _option(_comparison, "A protocol of the paper by name; see below.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        _option(
            _comparison,
            "Methods, separated by commas: full,child-d,child-d+r3f,lora:rank=8; child-d@LABEL has a grid of its own.",
        ),
    ] = None,
    seeds: Annotated[int | None, _option(_comparison, "Number of seeds: 0, 1, …  \\[5]")] = None,
    tune_seeds: Annotated[
        int | None, _option(_comparison, "Number of seeds for trying each set of hyperparameters.  \\[1]")
    ] = None,
    grid: Annotated[
        list[str] | None,
        _option(
            _comparison,
            "Values to try: lr=2e-5,4e-5; for one method: lora:lr=1e-3, child-d@fine:density=0.1; repeatable.",
        ),
    ] = None,
    train_sizes: Annotated[
        str | None, _option(_comparison, "Numbers of training examples: 100,1000,all.  \\[all]")
    ] = None,
    baseline: Annotated[
        str | None, _option(_comparison, "The method to compare the others with.  \\[the first]")
    ] = None,
    selection: Annotated[
        str | None,
        _option(
            _comparison, "Choose hyperparameters by the held-out or the reported examples.  \\[held-out]"
        ),
    ] = None,
    store: Annotated[Path, _option(_execution, "File that records the runs; created if missing.")] = Path(
        "runs/compare.db"
    ),
    executor: Annotated[
        str, _option(_execution, "local, or ray: the Ray cluster of this machine.")
    ] = "local",
    jobs: Annotated[
        int, typer.Option(help="Number of local processes.", rich_help_panel=_execution, min=1)
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Processor threads of each run; results depend on it in the last bits.  \\[cores / jobs]",
            rich_help_panel=_execution,
            min=1,
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep the runs' folders, including deltas.", rich_help_panel=_execution),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and stop.", rich_help_panel=_execution)
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Repeat failed runs.", rich_help_panel=_execution)
    ] = False,
    task: Annotated[
        list[str] | None, _option("Data", "Tasks by name, separated by commas; or files, as for train.")
    ] = None,
    as_json: o.AsJson = False,
    **given: Any,
) -> None:
    """Compare methods over seeds, each with its best hyperparameters, and test the differences for significance.

    It can be stopped at any moment; `childtuning compare --store FILE` executes the remaining runs.
    Several processes may work on one store.

    Protocols: paper, glue-small, low-resource, domain-transfer, task-transfer, ablation, overlap.

    Example:

        childtuning compare --task rte --data-dir data --methods full,child-d --grid lr=2e-5,4e-5 density=0.1,0.3

        childtuning compare --train a.csv --methods full,child-d,lora --seeds 10 --jobs 2
    """
    o.check_files(given["train"], given["eval"])
    from childtuning.cli.compare_progress import plan_content, tell_plan, watched
    from childtuning.compare import (
        EXECUTORS,
        check_installed,
        check_size,
        compare,
        foreseen,
        read_comparison,
        set_up,
        stored,
    )
    from childtuning.runs.config import RunConfig
    from childtuning.runs.inputs import Inputs
    from childtuning.runs.understood import data_warnings

    if executor not in EXECUTORS:
        raise ConfigError(f"--executor must be one of {', '.join(EXECUTORS)}, got {executor!r}.")
    if executor == "ray" and jobs > 1:
        raise ConfigError(
            f"--jobs counts processes of this machine, got {jobs} beside --executor ray. Leave it out."
        )
    comparison = read_comparison(
        stored(store),
        tasks=task,
        methods=methods,
        grid=[*(grid or ()), *(more_grid or ())],
        protocol=protocol,
        train_sizes=train_sizes,
        settings={
            "num_seeds": seeds,
            "tune_seeds": tune_seeds,
            "baseline": baseline,
            "selection": selection,
            "threads": threads,
            "keep": keep or None,
        },
        options=o.explicit(given),
        jobs=jobs,
        command=shlex.join(["childtuning", *sys.argv[1:]]),
    )
    ended = ("done",) if retry_failed else ("done", "failed")
    runs = [run for run in foreseen(store, comparison) if run.state not in ended]
    if runs:
        check_installed(comparison)
    if (
        runs and "train" in comparison.options
    ):  # what is wrong with the files is refused once, and before the first run
        largest = max(
            runs, key=lambda run: math.inf if run.group.train_size is None else run.group.train_size
        )
        read, _ = Inputs().task(RunConfig(**largest.config))
        check_size(read, largest)
        for line in (*read.notes, *(f"warning: {warning}" for warning in data_warnings(read))):
            tell(line)
    if not dry_run:
        for line in set_up(store, comparison, retry_failed=retry_failed):
            tell(line)
    runs = foreseen(store, comparison)
    tell_plan(runs, comparison, jobs=jobs, again=retry_failed, tell=tell)
    if dry_run:
        if as_json:
            print_json({"store": str(store), "plan": plan_content(runs, comparison)})
        return
    with watched(store, comparison, jobs=jobs, tell=tell, live=is_terminal()):
        recorded = compare(store, comparison, executor=executor, jobs=jobs)  # type: ignore[arg-type]
    _show(store, recorded, comparison, as_json=as_json)
    if all(run.state == "failed" for run in recorded.records):
        raise typer.Exit(1)


def _show(store: Path, recorded: Any, comparison: Any, *, as_json: bool) -> None:
    from childtuning.cli.compare_progress import plan_content, run_text
    from childtuning.report.evidence import Evidence
    from childtuning.report.findings import finding, noise
    from childtuning.report.numbers import counted

    evidence = Evidence(recorded)
    if as_json:
        print_json(
            {
                "store": str(store),
                "runs": len(recorded.records),
                "plan": plan_content(recorded.records, comparison),
                "failed": [{"id": run.id, "error": run.error} for run in evidence.failed],
                "baseline": comparison.against,
                "rows": [row.to_dict() for row in evidence.rows],
                "standings": [setting.to_dict() for setting in evidence.settings],
                "artifacts": dict(recorded.artifacts),
            }
        )
        return
    for run in evidence.failed:
        tell(f"failed: {run_text(run)}: {run.error}")
    for setting in evidence.settings:
        rows = [result.row for result in setting.results]
        of = "" if setting.train_size is None else f", {counted(setting.train_size, 'example')}"
        after = "" if setting.start is None else f", a new head after {setting.start}"
        print_table(
            f"{setting.task} ({setting.metric}){of}{after}",
            (
                "method",
                "runs",
                "mean ± sd",
                "95 % interval",
                "median",
                "best",
                "collapsed",
                "− baseline",
                "p",
                "chosen",
            ),
            [_row(row, comparison.num_seeds) for row in rows],
        )
        print(finding(rows, setting.standing, evidence.baseline))
        print(f"Measured on {noise(setting.eval_examples, setting.standard_error)}.")
        if any(row.description.num_collapsed for row in rows):
            print("Collapsed: no better than always predicting the most frequent answer, or without a score.")
        ends = [
            f"{', '.join(map(short_name, row.at_end))} of {row.group.method}" for row in rows if row.at_end
        ]
        if ends:
            print(f"Chosen at the end of the tried range, a better value may lie beyond: {'; '.join(ends)}.")
    print(f"\nNext: childtuning report {store} -o report.html")


def _row(row: Any, num_seeds: int) -> list[str]:
    from childtuning.report import numbers

    known, paired = row.description, row.paired
    return [
        row.group.method,
        f"{known.num}/{num_seeds}",
        numbers.mean_and_sd(known),
        "" if known.interval is None else numbers.interval(known.interval),
        numbers.score(known.median),
        numbers.score(known.best),
        str(known.num_collapsed),
        "" if paired is None else numbers.difference(paired.difference),
        "" if paired is None else numbers.p_value(row.p_corrected),
        point_text(row.point),
    ]
