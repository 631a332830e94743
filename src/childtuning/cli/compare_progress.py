"""Show the plan and the progress of a comparison."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from childtuning.cli.printing import point_text
from childtuning.compare import Comparison, Record, Store, num_runs
from childtuning.compare.statistics import power_limit, smallest_p
from childtuning.compare.summary import SIGNIFICANT
from childtuning.report.numbers import counted

_SECONDS = 2.0
_QUIET_SECONDS = 60.0  # then a line tells how far the running runs are
Tell = Callable[[str], None]


def tell_plan(runs: Sequence[Record], comparison: Comparison, *, jobs: int, again: bool, tell: Tell) -> None:
    """Print the number and kind of runs, how many are done, and the estimated time for the rest.

    Args:
        runs: the known runs, as ``foreseen`` returns them.
        comparison: their comparison.
        jobs: the number of processes.
        again: whether failed runs are repeated.
        tell: called with each line.
    """
    total = num_runs(comparison, () if again else runs)
    shape = [counted(len(comparison.tasks), "task"), counted(len(comparison.methods), "method")]
    if len(comparison.train_sizes) > 1:
        shape.append(counted(len(comparison.train_sizes), "size"))
    tell(f"{counted(total, 'run')}: {' × '.join(shape)}, {counted(comparison.num_seeds, 'seed')}")
    for method in comparison.methods:
        points = comparison.points(method)
        if len(points) > 1:
            tell(
                f"  {method}: {len(points)} sets of hyperparameters, "
                f"each with {counted(comparison.tune_seeds, 'seed')}"
            )
        elif points[0]:
            tell(f"  {method}: {point_text(points[0])}")
    limit = _power_limit(comparison)
    if limit is not None:
        tell(limit)
    done = sum(run.state == "done" for run in runs)
    failed = 0 if again else sum(run.state == "failed" for run in runs)
    ended = f"{done} done, {failed} failed" if failed else f"{done} done"
    tell(f"{ended}, {total - done - failed} to do; {_left(runs, total, jobs)}")


def plan_content(runs: Sequence[Record], comparison: Comparison) -> dict[str, Any]:
    """Return the plan for ``--json``: counts, and what the number of seeds cannot show."""
    return {
        "runs": num_runs(comparison),
        "done": sum(run.state == "done" for run in runs),
        "seeds": comparison.num_seeds,
        "comparisons": comparison.num_comparisons,
        "smallest_p": smallest_p(comparison.num_seeds),
        "power_limit": _power_limit(comparison),
    }


def _power_limit(comparison: Comparison) -> str | None:
    return power_limit(comparison.num_seeds, comparison.num_comparisons, SIGNIFICANT)


@contextmanager
def watched(path: Path, comparison: Comparison, *, jobs: int, tell: Tell, live: bool) -> Iterator[None]:
    """Show the progress of the runs in a store: a live table, or one line per finished run."""
    total = num_runs(comparison)
    with Store.open(path, create=True) as store:  # whoever closes it last has to be able to write
        if live:
            console = Console(stderr=True)
            with Live(
                get_renderable=lambda: _table(store.records_in_brief(), total, jobs),
                console=console,
                refresh_per_second=1 / _SECONDS,
                transient=True,
            ):
                yield
            return
        told = {run.id for run in store.records_in_brief() if run.state in ("done", "failed")}
        stop = threading.Event()

        def watch() -> None:
            before, waited = len(told), 0.0
            while not stop.wait(_SECONDS):
                runs = store.records_in_brief()
                _tell_new(runs, told, total, tell)
                before, waited = len(told), (waited + _SECONDS if len(told) == before else 0.0)
                if waited >= _QUIET_SECONDS:
                    waited = 0.0
                    for run in runs:
                        if run.state == "running":
                            tell(f"{run_text(run)}: {_last_step(store.folder_of(run.id))}")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            _tell_new(store.records_in_brief(), told, total, tell)


def _last_step(folder: Path) -> str:
    """Return the last line of a run's log in words."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has not begun, or is over
        lines = []
    whole = [entry for line in lines if line.endswith("}") and "loss" in (entry := json.loads(line))]
    if not whole:
        return "begun"
    step, epoch, loss = (whole[-1][name] for name in ("step", "epoch", "loss"))
    return f"step {step:,}, epoch {epoch:.1f}, loss {'not finite' if loss is None else f'{loss:.3f}'}"


def _tell_new(runs: Sequence[Record], told: set[str], total: int, tell: Tell) -> None:
    for run in runs:
        if run.state in ("done", "failed") and run.id not in told:
            told.add(run.id)
            came = f"{run.metric} {run.score:.4f}" if run.state == "done" else f"failed: {run.error}"
            tell(f"[{len(told)}/{total}] {run_text(run)}: {came}")


def run_text(run: Record) -> str:
    """Return a short description of a run."""
    size = "" if run.group.train_size is None else counted(run.group.train_size, "example")
    start = "" if run.group.start is None else f"after {run.group.start}"
    words = (run.group.task, run.group.method, start, size, f"seed {run.seed}", point_text(run.point))
    return " ".join(word for word in words if word)


def _table(runs: Sequence[Record], total: int, jobs: int) -> Table:
    done = [run for run in runs if run.state in ("done", "failed")]
    table = Table(
        title=f"{len(done)} of {counted(total, 'run')}, {_left(runs, total, jobs)}",
        title_justify="left",
        header_style="bold",
    )
    for name in ("task", "method", "runs", "failed", "mean so far", "now"):
        table.add_column(name, justify="left" if name in ("task", "method", "now") else "right")
    groups: dict[Any, list[Record]] = {}
    for run in runs:
        groups.setdefault(
            (run.group.task, run.group.train_size, run.group.start, run.group.method), []
        ).append(run)
    for (task, size, start, method), members in groups.items():
        finished = [run for run in members if run.state == "done"]
        where = task + (f" {size}" if size else "") + (f" after {start}" if start else "")
        now = [f"seed {run.seed} {point_text(run.point)}" for run in members if run.state == "running"]
        table.add_row(
            where,
            method,
            f"{len(finished)}/{len(members)}",
            str(sum(run.state == "failed" for run in members) or ""),
            f"{fmean(run.score for run in finished):.4f}" if finished else "",
            "; ".join(now),
        )
    return table


def _left(runs: Sequence[Record], total: int, jobs: int) -> str:
    """Estimate the time left from the durations of similar runs."""
    took: dict[Any, list[float]] = {}
    for run in runs:
        if run.seconds is not None:
            for key in (run.group, run.group.method, None):
                took.setdefault(key, []).append(run.seconds)
    if not took:
        return "no estimate before the first run"
    waiting = [run for run in runs if run.state in ("planned", "running")]
    known = [fmean(took.get(run.group) or took.get(run.group.method) or took[None]) for run in waiting]
    unknown = max(0, total - len(runs))
    seconds = (sum(known) + unknown * fmean(took[None])) / jobs
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
