"""The small decoder of examples/decoder.py tuned on a text and on instructions, by method: perplexity.

The text is tinyshakespeare, in blocks of 128 tokens: nine tenths to train, and of the rest one half to choose the
learning rate on seed 0, the other to test. The instructions are those that the example makes: 500 to train, 100 to
choose the rate, 100 to test, where the perplexity is that of responses. A seed orders the data and draws masks.

    python benchmarks/decoder.py --data-dir DATA
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, restart_with_settings
from recorded_runs import RecordedRuns, Way, best_rate, example, folder_bytes

decoder = example("decoder")
BATCH_SIZE, BLOCK = 16, 128
STEPS = {"instructions": 60, "tinyshakespeare": 40}
NUM_SEEDS = 3
FISHER_EXAMPLES = 256
START = (1e-3, 3e-3, 1e-2)
WAYS = (
    Way("full"),
    Way("head"),
    Way("last-k:2"),
    Way("child-f", 0.3),
    Way("child-d", 0.3),
    Way("child-d", 0.3, "row"),
    Way("lora"),
)


def load_splits(task: str, folder: Path, tokenizer: Any) -> dict[str, list[dict[str, list[int]]]]:
    """Return the examples to train, to choose the rate, and to test."""
    if task == "instructions":
        examples = decoder.encode_instructions(tokenizer, decoder.make_instructions(700, seed=0))
        return {"train": examples[:500], "validation": examples[500:600], "test": examples[600:]}
    text = decoder.read_text(folder / "tinyshakespeare" / "input.txt.gz")
    cuts = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
    parts = (text[start:end] for start, end in pairwise(cuts))
    return {
        split: decoder.encode_text(tokenizer, part, BLOCK)
        for split, part in zip(("train", "validation", "test"), parts, strict=True)
    }


def measure(way: Way, weights: Path, splits: dict[str, Any], split: str, **options: Any) -> dict[str, Any]:
    """Train once; return perplexity and costs."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = decoder.tune(
            decoder.load_decoder(weights),
            way.method,
            splits["train"],
            batch_size=BATCH_SIZE,
            output=Path(folder),
            fisher_examples=FISHER_EXAMPLES,
            **options,
            **way.child_options,
        )
        delta = trainer.delta()
        delta.save(Path(folder) / "delta")
        return {
            "perplexity": decoder.perplexity(trainer.bare_model, splits[split]),
            "trained_parameters": delta.num_trained,
            "state_bytes": trainer.child_optimizer.num_state_bytes,
            "delta_bytes": folder_bytes(Path(folder) / "delta"),
            "train_examples": len(splits["train"]),
            "measured_examples": len(splits[split]),
            "steps": options["steps"],
        }


def main() -> None:
    """Run what is missing from the table."""
    parser = argparse.ArgumentParser(description="Tuning a small decoder, by method: runs what is missing.")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "decoder.json")
    given = parser.parse_args()
    restart_with_settings(threads=1)
    torch.set_num_threads(1)
    recorded = RecordedRuns(given.output, threads=1)
    for task in given.tasks:
        _fill(recorded, given.data_dir, task)


def _fill(recorded: RecordedRuns, folder: Path, task: str) -> None:
    weights = folder / "weights_stories260K"
    splits = load_splits(task, folder, decoder.load_tokenizer(weights / "tokenizer.json"))

    def run(way: Way, rate: float, seed: int, split: str) -> float:
        key = {"task": task, "method": str(way), "lr": rate, "seed": seed, "split": split}
        options = {"rate": rate, "seed": seed, "steps": STEPS[task]}
        return recorded.run(key, lambda: measure(way, weights, splits, split, **options))["perplexity"]

    before = {"task": task, "method": "none", "lr": 0.0, "seed": 0, "split": "test"}
    model = decoder.load_decoder(weights)
    recorded.run(before, lambda: {"perplexity": decoder.perplexity(model, splits["test"])})
    for way in WAYS:
        rate = best_rate(lambda rate, way=way: -run(way, rate, 0, "validation"), START)
        for seed in range(NUM_SEEDS):
            run(way, rate, seed, "test")


if __name__ == "__main__":
    main()
