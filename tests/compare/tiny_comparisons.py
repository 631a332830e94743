"""Tiny comparisons, and what two of them must have in common."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny import WORDS

from childtuning.compare import Comparison, Recorded, Store, read_comparison

TIMES = ("fisher_seconds", "train_seconds", "peak_memory_bytes", "output")


def write_tasks(folder: Path, *names: str) -> Path:
    """Write folders with train.jsonl and dev.jsonl: sentences that one word decides, a little noisy."""
    for seed, name in enumerate(names):
        rng = random.Random(seed)
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 48), ("dev", 24)):
            rows = []
            for index in range(count):
                words = [*rng.choices(WORDS, k=rng.randint(2, 6)), "great" if index % 2 else "awful"]
                rows.append({"text": " ".join(words), "label": "good" if index % 2 else "bad"})
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def a_comparison(model: Path, data: Path, **asked: Any) -> Comparison:
    """Return a comparison of 12 short runs, with what is asked for in place of the defaults."""
    options = {"data_dir": str(data), "model": str(model), "epochs": 1.0, **asked.pop("options", {})}
    settings = {"num_seeds": 3, "threads": 1, **asked.pop("settings", {})}
    words: dict[str, Any] = {
        "tasks": ["alpha"],
        "methods": ["full,child-d,child-f"],
        "grid": ["lr=1e-2,3e-2"],
        **asked,
    }
    return read_comparison(None, **words, settings=settings, options=options)


def outcomes(recorded: Recorded) -> dict[str, Any]:
    """Return by run everything that must not depend on who did it, when and how often it was stopped."""
    found = {}
    for run in recorded.records:
        result = {name: value for name, value in (run.result or {}).items() if name not in TIMES}
        found[run.id] = (
            run.group,
            run.seed,
            run.point,
            run.state,
            result,
            list(run.curve),
            dict(run.parts),
            run.error,
        )
    return found


def read(path: Path) -> Recorded:
    """Return what a store holds."""
    with Store.open(path) as store:
        return store.read()
