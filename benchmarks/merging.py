"""Six tasks in one network: children that avoid each other and add exactly, against merges of whole changes.

Each task trains the packaged model alone; then the changes of all six are put into one network, with each task's own
head. What is multiplied into merged changes is chosen on half of the evaluation examples, for all tasks together;
scores are those of the other half. Exact sums have nothing to choose.

    python benchmarks/merging.py --data-dir DATA
    python benchmarks/merging.py --data-dir DATA --model MPNET --tasks sst2,stsb --epochs 4 --eval-limit 400
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, restart_with_settings
from recorded_runs import RecordedRuns

from childtuning import Child, Delta, load, merge_deltas
from childtuning.runs import RunConfig, train_run
from childtuning.runs.inputs import Inputs, read_run_task

TASKS = ("sst2", "stsb", "mrpc", "qqp", "snli", "sick")
METHODS = ("child-d disjoint", "full", "lora:rank=16,alpha=32")
DENSITY, TRAIN, MAX_LENGTH = 0.05, 500, 64
HEADS = ("classifier.*",)
WEIGHTS = (1.0, 2.0, 3.0, 6.0)  # times the mean of six changes: 6 is their sum
DROPPED = 0.9  # of DARE


class Apart(Inputs):
    """Inputs of a run whose child avoids others."""

    def __init__(self, avoid: Child | None) -> None:
        super().__init__()
        self._avoid = avoid

    def scores(self, config: RunConfig) -> Any:
        """Return scores that rank what is to be avoided last."""

        def scored(make_fn: Any) -> dict[str, torch.Tensor]:
            found = make_fn()
            for name, part in (self._avoid.parts if self._avoid else {}).items():
                found[name].view(-1)[part.indices()] = -float("inf")
            return found

        return scored


def trained(method: str, common: RunConfig, folder: Path) -> list[tuple[Any, Delta]]:
    """Train every task alone; return the finished runs and what each changed in the base model's parameters."""
    found: list[tuple[Any, Delta]] = []
    avoid: Child | None = None
    tasks, first = str(common.task).split(","), common.seed
    for name in (*tasks[first:], *tasks[:first]):
        density = DENSITY if method.startswith("child") else None
        config = replace(common, task=name, method=method.split()[0], density=density)
        place = folder / name
        inputs = Apart(avoid if method.endswith("disjoint") else None)
        train_run(config, place, resume=(place / "config.toml").is_file(), inputs=inputs)
        run = load(place)
        if method.startswith("child"):
            delta = run.delta
            child = Child.load(place / "child.safetensors")
            avoid = child if avoid is None else reduce(or_, (avoid, child))
        else:
            model = run.merged()
            delta = Delta.capture(model, Child.whole({n: p.shape for n, p in model.named_parameters()}))
        found.append((run, delta))
    return found


def thinned(delta: Delta, base: Mapping[str, torch.Tensor], seed: int) -> Delta:
    """Drop a share of the changes at random and scale up the rest (DARE)."""
    draw = torch.Generator().manual_seed(seed)
    values = {}
    for name, value in delta.values.items():
        if name in base:
            keep = torch.rand(value.shape, generator=draw) >= DROPPED
            value = base[name] + (value - base[name]) * keep / (1 - DROPPED)
        values[name] = value
    return replace(delta, values=values)


def merged(how: str, weight: float, deltas: list[Delta], base: Any, seed: int) -> list[Delta]:
    """Merge in one of the ways that are compared."""
    if how == "exact":
        return merge_deltas(deltas, base=base, own=HEADS)
    if how == "dare":
        originals = {n: p.detach() for n, p in base.named_parameters() if not n.startswith("classifier")}
        deltas = [thinned(delta, originals, 100 * seed + i) for i, delta in enumerate(deltas)]
        how = "mean"
    # TIES averages what agrees: its own weights lie near 1
    weight = weight / 2 if how == "ties" else weight
    return merge_deltas(deltas, how, base=base, own=HEADS, weight=weight)  # type: ignore[arg-type]


def scores(runs: list[Any], deltas: list[Delta], halves: list[Any]) -> dict[str, float]:
    """Return each task's score with a delta in its model."""
    found = {}
    for run, delta, half in zip(runs, deltas, halves, strict=True):
        model = run.base().model
        delta.apply_(model)
        run.adopt(model.eval())
        found[run.config.task] = run.evaluate(half)[run.about["metrics"][0]]
    return found


def measure(method: str, common: RunConfig, folder: Path) -> dict[str, Any]:
    """Train all tasks in one way, merge them in each way that goes with it, and return all scores."""
    seed = common.seed
    tasks = trained(method, common, folder)
    runs, deltas = [run for run, _ in tasks], [delta for _, delta in tasks]
    splits = [read_run_task(run.config)[0].dev for run in runs]
    chosen, told = ([split.subset(range(i, len(split), 2)) for split in splits] for i in (0, 1))
    base = runs[0].base().model
    result: dict[str, Any] = {"alone": scores(runs, deltas, told)}
    ways = {"child-d disjoint": ["exact", "mean"], "full": ["mean", "ties", "dare"]}.get(
        method, ["mean", "ties"]
    )
    for how in ways:
        best: tuple[float, float] | None = None
        for weight in WEIGHTS if how != "exact" else (1.0,):
            found = scores(runs, merged(how, weight, deltas, base, seed), chosen) if how != "exact" else {}
            total = sum(found.values())
            if best is None or total > best[0]:
                best = total, weight
        assert best is not None
        result[how] = {
            "weight": best[1],
            "scores": scores(runs, merged(how, best[1], deltas, base, seed), told),
        }
    return result


def main() -> None:
    """Run what is missing: all methods of a seed before the next seed."""
    parser = argparse.ArgumentParser(description="Merges of six tasks: runs what is missing.")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "merging.json")
    parser.add_argument("--model", help="a folder; the packaged model if not given")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--epochs", type=float, help="as many as train takes by itself if not given")
    parser.add_argument("--eval-limit", type=int, default=1000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/merging"), help="keeps runs until all are merged"
    )
    given = parser.parse_args()
    restart_with_settings(threads=1)
    torch.set_num_threads(1)
    recorded = RecordedRuns(given.output, threads=1)
    common = RunConfig(
        task=given.tasks,
        model=given.model,
        data_dir=str(given.data_dir),
        epochs=given.epochs or "auto",
        train_limit=TRAIN,
        eval_limit=given.eval_limit,
        max_length=MAX_LENGTH,
    )
    name = Path(given.model).name if given.model else "default"
    for seed in map(int, given.seeds.split(",")):
        for method in METHODS:
            key = {"model": name, "tasks": given.tasks, "method": method, "seed": seed, "density": DENSITY}
            runs = given.runs / f"{name}-{method.split(':')[0].replace(' ', '-')}-{seed}"
            recorded.run(
                key,
                lambda method=method, seed=seed, runs=runs: measure(method, replace(common, seed=seed), runs),
            )
            shutil.rmtree(runs, ignore_errors=True)


if __name__ == "__main__":
    main()
