"""The embedded default: three methods on a real text task that every machine has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from childtuning.runs.config import RunConfig
from childtuning.runs.folder import CONFIG, RunResult
from childtuning.runs.predict import FinishedRun
from childtuning.runs.run import train_run
from childtuning.tasks import Examples

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


def demo_runs(
    folder: Path,
    *,
    num_seeds: int = 2,
    methods: Sequence[str] = METHODS,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Iterator[RunResult]:
    """Train each method over several seeds on the standard library's docstrings; yield results as they come.

    Args:
        folder: holds a run folder for each; earlier demo runs there are replaced.
        num_seeds: seeds 0 … num_seeds − 1.
        methods: names of methods.
        options: of ``RunConfig``, in place of the demo's.
    """
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
    """Put the seeds of each method together, in order of appearance.

    Returns:
        per method: mean and sample standard deviation of the metric, every seed's value, and means of the costs.
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
    """Return what a run's model calls a sentence, and how sure it is."""
    predicted = FinishedRun(run).predict(Examples([sentence], None, None))[0]
    return predicted["prediction"], predicted["confidence"]
