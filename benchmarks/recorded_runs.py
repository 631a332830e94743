"""What tables of methods share: ways to fine-tune, runs that are recorded one by one, the rate chosen for each way."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from environment import ROOT, environment

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Way:
    """A method by its name, with the child's density and granularity where it takes them."""

    method: str
    density: float | None = None
    granularity: str = "element"

    @property
    def child_options(self) -> dict[str, Any]:
        """What differs from the method's own child."""
        return {} if self.density is None else {"density": self.density, "granularity": self.granularity}

    def __str__(self) -> str:
        words = [] if self.density is None else [f"{self.density:g}", self.granularity]
        return " ".join([self.method, *words])


class RecordedRuns:
    """What ran, by its key; written after every run.

    Args:
        path: the file; what it holds already is not run again.
        threads: that the runs compute with.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.is_file() else {"environments": [], "runs": []}
        self.environments: list[dict[str, Any]] = found["environments"]
        self.runs: list[dict[str, Any]] = found["runs"]
        here = environment(threads)
        del here["load_average"]  # of the start alone, which says nothing about runs of many minutes
        if here not in self.environments:
            self.environments.append(here)
        self._here = self.environments.index(here)

    def run(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the recorded result of this key, or measure and record it."""
        for run in self.runs:
            if run["key"] == key:
                return run["result"]
        result = measure()
        self.runs.append({"key": key, "result": result, "environment": self._here})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"environments": self.environments, "runs": self.runs}
        written = self.path.with_suffix(".new")
        written.write_text(json.dumps(record, indent=1) + "\n")
        written.replace(self.path)  # at once, so that a stop leaves a whole file
        print(*key.values(), result, file=sys.stderr, flush=True)
        return result


def best_rate(score: Callable[[float], float], start: Sequence[float]) -> float:
    """Return the rate of highest score, the lower one of equals; the grid is widened while the best is at its edge.

    Args:
        score: of one rate, on data that is not the test's.
        start: neighbours in ``RATES`` to begin with.
    """
    scores = {rate: score(rate) for rate in start}
    while True:
        best = max(sorted(scores), key=lambda rate: scores[rate])
        place = RATES.index(best)
        beside = [RATES[i] for i in (place - 1, place + 1) if 0 <= i < len(RATES) and RATES[i] not in scores]
        if not beside:
            return best
        scores |= {rate: score(rate) for rate in beside}


def folder_bytes(folder: str | Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def example(name: str) -> ModuleType:
    """Import a script of ``examples/``: what it shows is what is measured."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
