"""The tables of transfer, from the recorded runs of ``cnn.py`` and ``decoder.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from costs import table

Run = dict[str, Any]
NOTHING = "Nothing is recorded yet."


def cnn(folder: Path) -> str:
    """Return a table of accuracies for each target of ``cnn.json``."""
    tests = _tests(folder / "cnn.json")
    texts = []
    for target in _values(tests, "target"):
        mine = [run for run in tests if run["key"]["target"] == target]
        sizes = _values(mine, "per_class")
        rows = []
        for method in _values(mine, "method"):
            num = len(_of(mine, method=method, per_class=sizes[0]))
            if num < 2:
                continue  # one seed says nothing beside five
            fewer = f" ({num} seeds)" if num < _num_seeds(mine) else ""
            cells = []
            for size in sizes:
                found = _of(mine, method=method, per_class=size)
                full = _of(mine, method="full", per_class=size)
                cells += [_spread(found, "accuracy"), _difference(found, full, "accuracy")]
            first = _of(mine, method=method)[0]
            rows.append([method + fewer, *cells, f"{first['key']['lr']:g}", *_costs(first["result"])])
        header = ["method"]
        for size in sizes:
            header += [f"{size} a class", "− full"]
        about = "; ".join(_setting(mine, size) for size in sizes)
        head = f"**{target}** ({about}; {_num_seeds(mine)} seeds):"
        texts.append(head + "\n\n" + table([*header, "lr", *_COSTS], rows))
    return "\n\n".join(texts) or NOTHING


def decoder(folder: Path) -> str:
    """Return a table of perplexities for each task of ``decoder.json``."""
    tests = _tests(folder / "decoder.json")
    texts = []
    for task in _values(tests, "task"):
        mine = [run for run in tests if run["key"]["task"] == task]
        rows = []
        for method in _values(mine, "method"):
            found = _of(mine, method=method)
            if method == "none":
                rows.append(["pretrained", _spread(found, "perplexity", 2), "—", "—", "—", "—", "—"])
                continue
            difference = _difference(found, _of(mine, method="full"), "perplexity", 2)
            rate = f"{found[0]['key']['lr']:g}"
            rows.append(
                [method, _spread(found, "perplexity", 2), difference, rate, *_costs(found[0]["result"])]
            )
        last = mine[-1]["result"]
        about = f"{last['train_examples']:,} examples to train, {last['measured_examples']} to test"
        head = f"**{task}** ({about}; {last['steps']} steps of 16; {_num_seeds(mine)} seeds):"
        texts.append(head + "\n\n" + table(["method", "perplexity", "− full", "lr", *_COSTS], rows))
    return "\n\n".join(texts) or NOTHING


_COSTS = ("trained", "optimizer", "delta")


def _costs(result: Run) -> list[str]:
    kilobytes = (f"{result[name] / 1000:,.0f} kB" for name in ("state_bytes", "delta_bytes"))
    return [f"{result['trained_parameters']:,}", *kilobytes]


def _tests(path: Path) -> list[Run]:
    """The runs on test data."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return [run for run in runs if run["key"]["split"] == "test"]


def _values(runs: Sequence[Run], name: str) -> list[Any]:
    return list(dict.fromkeys(run["key"][name] for run in runs))


def _of(runs: Sequence[Run], **wanted: Any) -> list[Run]:
    return [run for run in runs if all(run["key"][name] == value for name, value in wanted.items())]


def _num_seeds(runs: Sequence[Run]) -> int:
    return len({run["key"]["seed"] for run in runs})


def _setting(tests: Sequence[Run], size: int) -> str:
    result = _of(tests, per_class=size)[0]["result"]
    return f"{size} a class: {result['train_images']:,} images, {result['steps']} steps of 32"


def _spread(runs: Sequence[Run], metric: str, digits: int = 3) -> str:
    return _mean_and_deviation([run["result"][metric] for run in runs], f".{digits}f")


def _difference(runs: Sequence[Run], full: Sequence[Run], metric: str, digits: int = 3) -> str:
    """Seed by seed, so that what the seeds share cancels."""
    beside = {run["key"]["seed"]: run["result"][metric] for run in full}
    if not runs or runs[0]["key"]["method"] == "full":
        return "—"
    pairs = [run for run in runs if run["key"]["seed"] in beside]
    return _mean_and_deviation(
        [run["result"][metric] - beside[run["key"]["seed"]] for run in pairs], f"+.{digits}f"
    )


def _mean_and_deviation(values: Sequence[float], form: str) -> str:
    if not values:
        return "—"
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")
