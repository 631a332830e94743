"""Comparisons that nobody ran: records as a store would hold them, for the report to show."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from childtuning.compare.records import Group, Record, Recorded

METRICS = {
    "rte": "accuracy",
    "mrpc": "f1",
    "cola": "matthews",
    "stsb": "pearson",
    "mnli": "accuracy",
    "snli": "accuracy",
}
FLOORS = {"accuracy": 0.53, "f1": 0.812, "matthews": 0.0, "pearson": None}
LEVELS = {"rte": 0.565, "mrpc": 0.868, "cola": 0.26, "stsb": 0.86, "mnli": 0.71, "snli": 0.74}
EXAMPLES = {"rte": 2490, "mrpc": 3668, "cola": 8551, "stsb": 5749, "mnli": 5000, "snli": 5000}
GAINS = {"child-d": 0.022, "child-f": 0.008, "lora": -0.012, "r3f": 0.004}
TRAINED = {
    "full": 22_713_986,
    "child-f": 22_713_986,
    "child-d": 6_814_196,
    "lora": 296_450,
    "r3f": 22_713_986,
    "head": 770,
}
COMMAND = "childtuning compare --task rte --methods full,child-d --seeds 5 --store rte.db"


def record(
    task: str = "rte",
    method: str = "full",
    seed: int = 0,
    *,
    point: Mapping[str, Any] | None = None,
    size: int | None = None,
    start: str | None = None,
    score: float | None = None,
    elsewhere: Mapping[str, float] | None = None,
    curve: int = 0,
    parts: Mapping[str, tuple[int, int]] | None = None,
    **changed: Any,
) -> Record:
    """Return a finished run; ``changed`` are other fields of ``Record``."""
    point = dict(point or {})
    name = f"{task} {method} {seed} {sorted(point.items())} {size} {start}"
    rng = random.Random(name)
    metric = METRICS.get(task, "accuracy")
    if score is None:
        level = (
            LEVELS.get(task, 0.6)
            + GAINS.get(method.split(":")[0], 0.0)
            - (0.1 * math.exp(-size / 400) if size else 0)
        )
        score = level + rng.gauss(0, 0.009) - 0.006 * abs(math.log(point.get("learning_rate", 4e-5) / 4e-5))
    floor = FLOORS[metric]
    examples = min(size or math.inf, EXAMPLES.get(task, 1000))
    result = {
        "task": task,
        "method": method,
        "seed": seed,
        "metric": {"name": metric, "value": score},
        "metrics": {metric: score, "loss": 0.69},
        "held_out": {metric: score + rng.gauss(0, 0.01)},
        "constant": None if floor is None else {metric: floor},
        "elsewhere": {other: {"accuracy": value} for other, value in (elsewhere or {}).items()},
        "density": 0.3 if "child" in method else 1.0,
        "trained_parameters": TRAINED.get(method.split(":")[0], 22_713_986),
        "child_parameters": 6_813_426,
        "eligible_parameters": 22_713_216,
        "state_bytes": 136_000_000,
        "delta_bytes": 29_000_000,
        "fisher_seconds": 31.0 * ("child-d" in method),
        "train_seconds": 0.11 * examples * (2 if method == "r3f" else 1) * rng.uniform(0.9, 1.1),
        "peak_memory_bytes": int((1.1e9 if method == "lora" else 1.8e9) * rng.uniform(0.97, 1.03)),
        "train_examples": examples,
        "eval_examples": 277,
        "empty_texts": 0,
        "cut_by_length": 12,
        "output": f"runs/{name}",
    }
    options = {
        "task": task,
        "data_dir": "/data/glue",
        "method": method,
        "density": result["density"],
        "epochs": 3.0,
    }
    fields = {
        "id": hashlib.sha256(name.encode()).hexdigest()[:16],
        "group": Group(task, method, size, start),
        "seed": seed,
        "point": point,
        "config": {**options, "batch_size": 16, "train_limit": size, **point, "seed": seed},
        "state": "done",
        "result": result,
        "curve": losses(rng, curve),
        "parts": parts or {},
        "seconds": result["train_seconds"] + result["fisher_seconds"] + 9,
        "finished": "2031-04-05T06:07:08+00:00",
    }
    return Record(**{**fields, **changed})


def failed(error: str, **fields: Any) -> Record:
    """Return a run that ended with an error."""
    return record(**fields, state="failed", result=None, error=error, seconds=3.0)


def losses(rng: random.Random, num: int) -> list[dict[str, float]]:
    """Return what was logged of a falling loss, and the last line, which has none."""
    if not num:
        return []
    low = 0.15 + 0.3 * rng.random()
    logged = [
        {
            "step": 10 * (i + 1),
            "loss": low + (0.7 - low) * math.exp(-3 * i / num) + rng.gauss(0, 0.03),
            "learning_rate": 2e-5,
        }
        for i in range(num)
    ]
    return [*logged, {"step": 10 * num, "train_runtime": 12.0}]


def bert_parts(method: str, seed: int = 0, layers: int = 6) -> dict[str, tuple[int, int]]:
    """Return trained and existing entries of a small BERT."""
    rng = random.Random(f"{method} {seed}")
    sizes = {"embeddings.word_embeddings.weight": 11_720_448, "embeddings.position_embeddings.weight": 196_608,
             "embeddings.LayerNorm.weight": 384, "pooler.dense.weight": 147_456}  # fmt: skip
    for layer in range(layers):
        kinds = {f"attention.self.{kind}": 147_456 for kind in ("query", "key", "value")}
        kinds |= {"attention.output.dense": 147_456, "attention.output.LayerNorm": 384}
        kinds |= {"intermediate.dense": 589_824, "output.dense": 589_824, "output.LayerNorm": 384}
        for kind, size in kinds.items():
            sizes[f"encoder.layer.{layer}.{kind}.weight"] = size
            sizes[f"encoder.layer.{layer}.{kind}.bias"] = size // 384 if size > 384 else 384
    parts = {}
    for name, size in sizes.items():
        layer = int(name.split(".")[2]) if name.startswith("encoder") else 0
        fraction = min(1.0, (0.08 + 0.07 * layer) * (2.2 if "value" in name else 1.0) * rng.uniform(0.8, 1.2))
        parts[f"bert.{name}"] = (round(size * fraction) if method == "child-d" else size, size)
    return parts | {"classifier.weight": (768, 768), "classifier.bias": (2, 2)}


def comparison(
    tasks: Sequence[str], methods: Sequence[str], num_seeds: int, **changed: Any
) -> dict[str, Any]:
    """Return what was asked for."""
    asked = {
        "tasks": list(tasks),
        "methods": list(methods),
        "baseline": "full",
        "num_seeds": num_seeds,
        "tune_seeds": 1,
        "grid": {},
        "grid_of": {},
        "train_sizes": [None],
        "protocol": None,
        "selection": "held-out",
        "options": {"data_dir": "/data/glue"},
        "command": COMMAND,
    }
    return {**asked, **changed}


def grid_runs(
    tasks: Sequence[str],
    methods: Sequence[str],
    num_seeds: int,
    *,
    curve: int = 60,
    rates: Sequence[float] = (2e-5, 4e-5, 1e-4),
) -> list[Record]:
    """Return runs as a comparison leaves them: every rate with seed 0, the best of them with all seeds."""
    runs = []
    for task, method in itertools.product(tasks, methods):
        parts = {seed: bert_parts(method, seed) for seed in range(min(num_seeds, 3))}
        for rate in rates:
            seeds = range(num_seeds) if rate == 4e-5 else range(1)
            for seed in seeds:
                # The best rate is the middle one whatever the noise, so that it is the one with all seeds.
                fields: dict[str, Any] = {
                    "point": {"learning_rate": rate},
                    "curve": curve,
                    "parts": parts.get(seed),
                }
                one = record(task, method, seed, **fields)
                result = dict(one.result or {})
                if rate != 4e-5 and seed == 0:
                    result["held_out"] = {one.metric: one.score - 0.05 - rate}
                runs.append(record(task, method, seed, **fields, result=result))
    return runs


ENVIRONMENT = {
    "python": "3.11.9",
    "cpu": "AMD EPYC",
    "cores": 2,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
}
FIVE = ("full", "child-f", "child-d", "lora", "r3f")


def glue(num_seeds: int = 8) -> Recorded:
    """Return five methods on three tasks, with a collapsed run, a run without a score, and two failed ones."""
    tasks = ("rte", "mrpc", "cola")
    runs = grid_runs(tasks, FIVE, num_seeds)
    runs = [
        _changed(run, 0.527) if (run.group.task, run.group.method, run.seed) == ("rte", "full", 3) else run
        for run in runs
    ]
    runs += [
        failed(
            "out of memory: 1.9 GB wanted",
            task="mrpc",
            method="r3f",
            seed=num_seeds,
            point={"learning_rate": 4e-5},
        ),
        failed(
            "out of memory: 1.9 GB wanted",
            task="cola",
            method="r3f",
            seed=num_seeds,
            point={"learning_rate": 4e-5},
        ),
    ]
    asked = comparison(
        tasks, FIVE, num_seeds, protocol="glue-small", grid={"learning_rate": [2e-5, 4e-5, 1e-4]}
    )
    return Recorded(asked, runs, {"overlap": overlap(tasks)}, ENVIRONMENT)


def low_resource(num_seeds: int = 3) -> Recorded:
    """Return two tasks at four sizes."""
    tasks, sizes = ("rte", "mrpc"), (100, 300, 1000, None)
    runs = [
        record(task, method, seed, size=size, curve=12)
        for task, size, method, seed in itertools.product(tasks, sizes, FIVE[:3], range(num_seeds))
    ]
    return Recorded(
        comparison(tasks, FIVE[:3], num_seeds, protocol="low-resource", train_sizes=list(sizes)), runs
    )


def domain_transfer(num_seeds: int = 3) -> Recorded:
    """Return two tasks, measured on three others."""
    runs = []
    for task, method, seed in itertools.product(("mnli", "snli"), FIVE[:3], range(num_seeds)):
        rng = random.Random(f"{task} {method} {seed}")
        others = {
            other: rng.uniform(0.45, 0.75)
            for other in ("mnli", "snli", "sick", "scitail", "rte")
            if other != task
        }
        runs.append(record(task, method, seed, elsewhere=others))
    return Recorded(comparison(("mnli", "snli"), FIVE[:3], num_seeds, protocol="domain-transfer"), runs)


def task_transfer(num_seeds: int = 3) -> Recorded:
    """Return two methods on two tasks, and heads on what they tuned for the other tasks."""
    sources, targets = ("mrpc", "rte"), ("mrpc", "rte", "cola")
    runs = [
        record(task, method, seed)
        for task, method, seed in itertools.product(sources, FIVE[:3:2], range(num_seeds))
    ]
    runs += [
        record(target, method, seed, start=source)
        for source, target, method, seed in itertools.product(sources, targets, FIVE[:3:2], range(num_seeds))
        if source != target
    ]
    return Recorded(comparison(sources, FIVE[:3:2], num_seeds, protocol="task-transfer"), runs)


def odd() -> dict[str, Recorded]:
    """Return what is rarely recorded, but can be."""
    nasty = "</script><b>&\"'`\\ {x} é\u2028"
    long = "child-d+" + "r3f:weight=0.7,eps=1e-05+" * 12 + "sam"
    nan = [
        record("rte", method, seed, score=math.nan if seed == nan_seed else None)
        for method, nan_seed in (("full", 1), ("child-d", -1), ("lora", 0))
        for seed in range(3)
    ]
    all_nan = [
        record("rte", method, seed, score=math.nan, curve=5) for method in FIVE[:2] for seed in range(2)
    ]
    names = [f"method-{i}:density={i / 300:.4f}" for i in range(300)]
    steep = [{"step": i, "loss": 10.0 ** (3 - i / 5)} for i in range(30)]
    return {
        "empty": Recorded({}, []),
        "nothing finished": Recorded(
            comparison(["rte"], FIVE[:2], 1),
            [
                record(method=method, state=state, result=None)
                for method, state in (("full", "planned"), ("child-d", "running"))
            ],
        ),
        "failed only": Recorded(
            comparison(["rte"], ["full"], 14),
            [failed(f"{nasty} {seed % 2}", seed=seed) for seed in range(40)],
        ),
        "one run": Recorded(comparison(["rte"], ["full"], 1), [record(curve=1)]),
        "one seed": Recorded(
            comparison(["rte"], FIVE[:2], 1), [record(method=method) for method in FIVE[:2]]
        ),
        "one method": Recorded(
            comparison(["rte"], ["child-d"], 3), [record(method="child-d", seed=s) for s in range(3)]
        ),
        "nan": Recorded(comparison(["rte"], FIVE, 3), nan),
        "all nan": Recorded(comparison(["rte"], FIVE[:2], 2), all_nan),
        "equal scores": Recorded(
            comparison(["rte"], FIVE[:2], 3),
            [record(method=m, seed=s, score=0.5) for m in FIVE[:2] for s in range(3)],
        ),
        "markup": Recorded(
            comparison([nasty], [nasty, "full"], 2, baseline=nasty, command=nasty, options={nasty: nasty}),
            [
                record(
                    nasty, method, seed, point={nasty: nasty}, parts={f"{nasty}.0.{nasty}": (1, 2)}, curve=4
                )
                for method in (nasty, "full")
                for seed in range(2)
            ]
            + [failed(nasty, task=nasty, seed=7)],
            {},
            {nasty: nasty},
        ),
        "long names": Recorded(
            comparison(["rte", "a-very-long-name-of-a-task-" * 4], [long, "full"], 2),
            [
                record(task, method, seed, curve=4)
                for task in ("rte", "a-very-long-name-of-a-task-" * 4)
                for method in (long, "full")
                for seed in range(2)
            ],
        ),
        "hundreds of methods": Recorded(
            comparison(["rte"], names, 1, baseline=names[0]), [record(method=name, curve=8) for name in names]
        ),
        "steep loss": Recorded(
            comparison(["rte"], ["full"], 1), [Record(**{**vars(record()), "curve": steep})]
        ),
    }


def overlap(tasks: Sequence[str], layers: int = 6) -> dict[str, Any]:
    """Return the artifact ``overlap``."""
    rng = random.Random(0)

    def matrix(level: float) -> list[list[float]]:
        return [[1.0 if a == b else level + rng.uniform(-0.04, 0.04) for a in tasks] for b in tasks]

    by_kind = {
        kind: matrix(0.45 + 0.05 * place) for place, kind in enumerate(("query", "key", "value", "output"))
    }
    by_layer = {str(layer): matrix(0.75 - 0.05 * layer) for layer in range(layers)}
    return {
        "tasks": list(tasks),
        "overall": matrix(0.6),
        "by_layer": by_layer,
        "by_kind": by_kind,
        "density": 0.3,
    }


def many(num_runs: int = 2000) -> Recorded:
    """Return a comparison of that many runs: eight methods on five tasks with fifty seeds."""
    tasks = ("rte", "mrpc", "cola", "stsb", "mnli")
    methods = (*FIVE, "child-d:0.1", "child-d+r3f", "last-k:3")
    num_seeds = num_runs // (len(tasks) * len(methods))
    runs = grid_runs(tasks, methods, num_seeds - 2, curve=200)
    return Recorded(comparison(tasks, methods, num_seeds), runs, {"overlap": overlap(tasks)}, ENVIRONMENT)


def _changed(run: Record, score: float) -> Record:
    result = {**(run.result or {}), "metric": {"name": run.metric, "value": score}}
    return Record(**{**vars(run), "result": result})
