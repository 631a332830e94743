"""Measurements that need a process of their own.

``python workers.py NAME '{"threads": 2, …}'`` prints one JSON object; ``call`` starts that and reads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import KEPT, child_environment


def call(
    name: str,
    threads: int,
    *,
    malloc: dict[str, str] = KEPT,
    variables: dict[str, str] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Run a worker in a process of its own, with more environment variables, and return what it measured.

    Raises:
        RuntimeError: it failed, with the last line that it wrote.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__)),
            name,
            json.dumps({"threads": threads, **given}),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**child_environment(threads, malloc), **(variables or {})},
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _train_memory(**given: Any) -> dict[str, Any]:
    from bench_memory import measure

    return measure(**given)


def _fisher_memory(**given: Any) -> dict[str, Any]:
    from bench_fisher import measure_memory

    return measure_memory(**given)


def _large_memory(**given: Any) -> dict[str, Any]:
    from bench_large import measure

    return measure(**given)


def _dpo_memory(**given: Any) -> dict[str, Any]:
    from bench_dpo import measure_memory

    return measure_memory(**given)


def _serving_files(**given: Any) -> dict[str, Any]:
    from bench_serving import make_files

    return make_files(**given)


def _serving_export(**given: Any) -> dict[str, Any]:
    from bench_serving import export

    return export(**given)


def _serving_switch(**given: Any) -> dict[str, Any]:
    from bench_serving import switch

    return switch(**given)


def _waiting_steps(**given: Any) -> dict[str, Any]:
    from bench_waiting import measure

    return measure(**given)


def _official_script(**given: Any) -> dict[str, Any]:
    from references.official_script import official_run

    return official_run(**given)


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "train-memory": _train_memory,
    "fisher-memory": _fisher_memory,
    "large-memory": _large_memory,
    "dpo-memory": _dpo_memory,
    "serving-files": _serving_files,
    "serving-export": _serving_export,
    "serving-switch": _serving_switch,
    "waiting-steps": _waiting_steps,
    "official-script": _official_script,
}


def main() -> None:
    """Do what the parent process asked for."""
    import torch

    name, given = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(given.pop("threads"))
    print(json.dumps(WORKERS[name](**given)))


if __name__ == "__main__":
    main()
