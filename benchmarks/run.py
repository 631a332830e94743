"""Measure one thing side by side with its references, in alternating runs, and print every ratio and sample.

    python benchmarks/run.py step --json --output benchmarks/results/step.json
    python benchmarks/run.py train --script --data-dir DATA --train-limit 1000 --epochs 1 --repeats 3
    python benchmarks/run.py fisher --quick

Without a name it lists the benchmarks. With --json the one JSON object goes to standard output; the table for a
reader goes to standard error. The exit status is 1 where something of childtuning's own could not run; references that
cannot run are named with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from environment import ROOT, environment, restart_with_settings

BENCHMARKS = {
    "step": "the optimizer step alone, beside torch's AdamW, the official twin and memory-saving optimizers",
    "fisher": "per-example Fisher information, beside the batch-of-one loop and other libraries",
    "choose": "choosing a child by as many examples as it takes, beside a training epoch",
    "select": "choosing a child from scores, beside numpy and torch",
    "memory": "peak memory of a training step, beside full fine-tuning and PEFT",
    "large": "the memory of training 1.1 billion weights, beside what plan predicts",
    "dpo": "DPO with one copy of the model, beside two: losses, time and memory",
    "serving": "exporting a model of 1.1 billion weights, and switching between children of it",
    "costs": "what the cost model predicts of a training step and its peak memory, beside what is measured",
    "train": "the whole training step, beside the same; with --script, whole runs",
    "waiting": "training steps whose threads wait briefly, beside spinning and sleeping; alone, and on a busy machine",
    "import": "import childtuning, beside import torch",
    "compare": "a comparison, beside plain training of the same runs",
    "report": "opening a report of 2,000 runs in Chromium, beside an empty page",
    "floors": "the machine's memory bandwidth and matmul rate, which floors are computed from",
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("benchmark", nargs="?", choices=BENCHMARKS, help="which; none: list them")
    add("--json", action="store_true", help="print the JSON object on standard output")
    add("--output", type=Path, help="write the JSON object to this file as well")
    add("--repeats", type=int, help="samples of each case  [7; 2 with --quick]")
    add("--threads", type=int, default=2, help="of torch  [2]")
    add("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast")
    add("--shapes", nargs="+", default=["minilm", "bert-base"], help="train, memory: minilm, bert-base")
    add(
        "--malloc",
        choices=("returned", "kept"),
        default="returned",
        help="memory: what happens to freed memory",
    )
    add("--methods", nargs="+", help="train, memory: only these, by the names of the tables  [all]")
    add("--batch-size", type=int, default=16, help="memory: examples of 128 tokens a batch  [16]")
    add("--batches", type=int, default=6, help="fisher: batches of 16 a pass  [6]")
    add("--data-dir", type=Path, default=ROOT.parent / "shared" / "data", help="holds TASK/train.jsonl.gz")
    add("--script", action="store_true", help="train: whole runs against the official script's loop")
    add("--tasks", nargs="+", default=["rte", "cola"], help="train --script: tasks")
    add("--train-limit", type=int, help="train --script, compare: training examples")
    add("--epochs", type=float, default=3, help="train --script: epochs of both  [3]")
    given = parser.parse_args(words)
    given.repeats = given.repeats or (2 if given.quick else 7)
    if given.quick:
        given.tasks, given.train_limit, given.epochs = ["docstrings"], given.train_limit or 32, 1
    if given.data_dir is not None and not given.data_dir.is_dir():
        given.data_dir = None
    return given


def main() -> int:
    """Run one benchmark."""
    given = parse()
    if given.benchmark is None:
        for name, measures in BENCHMARKS.items():
            print(f"{name:<8} {measures}")
        return 0
    restart_with_settings(given.threads)

    import torch
    from record import Record

    torch.set_num_threads(given.threads)
    # What the benchmarked code prints must not mix with the JSON object.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kept = (
        "quick",
        "repeats",
        "shapes",
        "malloc",
        "methods",
        "batches",
        "script",
        "tasks",
        "train_limit",
        "epochs",
    )
    record = Record(given.benchmark, {name: getattr(given, name) for name in kept})
    record.environment = environment(given.threads)
    importlib.import_module(f"bench_{given.benchmark}").run(record, given)
    print(record.table(), file=sys.stderr)
    if given.output:
        record.write(given.output)
    if given.json:
        print(json.dumps(record.to_dict()), file=out)
    out.close()
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
