"""Every method on one task through the command line: train, be killed and go on, predict; and combinations of methods.

    python benchmarks/methods.py --data-dir DATA --output benchmarks/results/methods.json

Each method is trained twice on the same examples: once in one go, once killed with SIGKILL behind its first checkpoint
and resumed. The two deltas have to be the same bytes. What is recorded already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import ROOT, child_environment
from recorded_runs import RecordedRuns

from childtuning.methods import Combination, all_methods

# What cannot be trained alone, or takes a value that fits a short run.
_WORDS = {"freeze": "freeze:2+full", "recadam": "recadam:k=0.5,t0=8", "child-dynamic": "child-dynamic:8"}
COMBINATIONS = (
    "child-d+r3f",
    "child-f+mixout:0.5",
    "child-d+l2-sp",
    "child-d+sam",
    "child-f+lora",
    "child-d+adapter",
    "child-f+r-drop",
    "child-d+llrd+reinit:1",
    "child-f+recadam:k=0.5,t0=8",
    "last-k:3+smart+sam",
)
REFUSED = ("child-d+child-f", "lora+l2-sp", "recadam+l2-sp")
_FEW_PARAMETERS = ("head", "bitfit")  # and added modules: they want a larger rate


def main() -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--task", default="rte")
    parser.add_argument("--train-limit", default="500")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "methods.json")
    given = parser.parse_args()
    recorded = RecordedRuns(given.output, given.threads)
    for method in all_methods():
        word = _WORDS.get(method.name, method.name)
        recorded.run({"method": word}, lambda word=word: _measure(word, given, kill=True))
    for word in COMBINATIONS:
        recorded.run({"method": word}, lambda word=word: _measure(word, given, kill=False))
    for word in REFUSED:
        recorded.run({"refused": word}, lambda word=word: _refused(word, given))
    faults = [run["key"] for run in recorded.runs if not run["result"]["right"]]
    print(f"not as it should be: {faults}" if faults else "all as it should be", file=sys.stderr)
    return 1 if faults else 0


def _words(word: str, given: argparse.Namespace, output: Path) -> list[str]:
    methods = Combination.parse(word).methods
    few = any(m.part == "modules" or m.name in _FEW_PARAMETERS for m in methods)
    options = {
        "--task": given.task,
        "--data-dir": given.data_dir,
        "--train-limit": given.train_limit,
        "--epochs": given.epochs,
        "--method": word,
        "--lr": "1e-3" if few else "1e-4",
        "--save-steps": "10",
        "--output": str(output),
    }
    return [
        sys.executable,
        "-m",
        "childtuning",
        "train",
        "--json",
        *(w for pair in options.items() for w in pair),
    ]


def _measure(word: str, given: argparse.Namespace, *, kill: bool) -> dict[str, Any]:
    env = child_environment(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        straight, stopped = Path(scratch, "straight"), Path(scratch, "stopped")
        done = subprocess.run(
            _words(word, given, straight),
            capture_output=True,
            env=env,
            check=False,
        )
        if done.returncode:
            return {"right": False, "fault": done.stderr.decode()[-500:]}
        told = json.loads(done.stdout)
        result: dict[str, Any] = {
            "score": told["metric"]["value"],
            "metric": told["metric"]["name"],
            **{
                name: told[name]
                for name in (
                    "trained_parameters",
                    "state_bytes",
                    "delta_bytes",
                    "fisher_seconds",
                    "train_seconds",
                )
            },
            "saved_bytes": sum(path.stat().st_size for path in straight.glob("delta.*")),
        }
        if kill:
            _kill_behind_a_checkpoint(_words(word, given, stopped), stopped, env)
            subprocess.run(
                [*_words(word, given, stopped), "--resume"], stdout=subprocess.DEVNULL, env=env, check=True
            )
            names = ("delta.json", "delta.safetensors")
            result["resumed_bitwise"] = all(
                (straight / name).read_bytes() == (stopped / name).read_bytes() for name in names
            )
        source = Path(scratch, "ask.jsonl")
        source.write_text('{"text1": "A cat sleeps.", "text2": "An animal sleeps."}\n' * 3, encoding="utf-8")
        asked = subprocess.run(
            [sys.executable, "-m", "childtuning", "predict", str(straight), "--input", str(source), "--json"],
            stdout=subprocess.PIPE,
            env=env,
            check=True,
        )
        result["predicted"] = len(json.loads(asked.stdout)["predictions"])
        result["right"] = result["predicted"] == 3 and result.get("resumed_bitwise", True)
        return result


def _kill_behind_a_checkpoint(words: list[str], folder: Path, env: dict[str, str]) -> None:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    while process.poll() is None and not list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")):
        time.sleep(0.2)
    if process.poll() is not None:
        raise RuntimeError(f"training ended before its first checkpoint, with {process.returncode}")
    time.sleep(1.0)  # somewhere behind it
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _refused(word: str, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        words = [
            sys.executable,
            "-m",
            "childtuning",
            "train",
            "--task",
            given.task,
            "--data-dir",
            given.data_dir,
        ]
        done = subprocess.run(
            [*words, "--method", word, "--output", f"{scratch}/run"],
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(given.threads),
            check=False,
        )
    return {"said": done.stderr.strip(), "right": done.returncode == 2}


if __name__ == "__main__":
    sys.exit(main())
