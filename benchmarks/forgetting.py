"""What a decoder gains on a new text against what it forgets of its own, by method and learning rate.

The small Llama of examples/decoder.py writes stories; it is tuned on tinyshakespeare. Gained is what the loss on
held-out text falls by, lost what the loss on stories rises by that it wrote itself before; both in nats a token. A seed
orders the data and draws masks and added modules.

    python benchmarks/forgetting.py --data-dir DATA
"""

from __future__ import annotations

import argparse
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from decoder import BATCH_SIZE, BLOCK, FISHER_EXAMPLES, decoder, load_splits
from environment import ROOT, restart_with_settings
from recorded_runs import RecordedRuns, Way

TASK, STEPS, NUM_SEEDS = "tinyshakespeare", 100, 5
NUM_TESTED = 128  # blocks of the text, and stories
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DENSITIES = (0.02, 0.1, 0.3)
WAYS = (
    Way("full"),
    Way("l2-sp"),
    *(Way("child-d", density, kind) for kind in ("element", "column") for density in DENSITIES),
    *(Way("child-random", density) for density in DENSITIES),
    *(Way(f"lora:rank={rank},alpha={2 * rank}") for rank in (4, 16, 64)),
)


@torch.inference_mode()
def own_stories(model: Any, count: int, length: int) -> list[dict[str, list[int]]]:
    """Let a model write stories, drawn from its own probabilities."""
    torch.manual_seed(0)
    start = torch.full((count, 1), model.config.bos_token_id)
    told = model.eval().generate(start, max_new_tokens=length - 1, do_sample=True, top_k=0, eos_token_id=-1)
    return [{"input_ids": ids, "labels": ids} for ids in told.tolist()]


def main() -> None:
    """Run what is missing: all methods and rates of a seed before the next seed."""
    parser = argparse.ArgumentParser(description="Gain against forgetting, by method: runs what is missing.")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "forgetting.json")
    given = parser.parse_args()
    restart_with_settings(threads=1)
    torch.set_num_threads(1)
    recorded = RecordedRuns(given.output, threads=1)
    weights = given.data_dir / "weights_stories260K"
    splits = load_splits(TASK, given.data_dir, decoder.load_tokenizer(weights / "tokenizer.json"))
    text = splits["test"][:NUM_TESTED]

    def losses(model: Any) -> dict[str, float]:
        return {"text": math.log(decoder.perplexity(model, text)), "stories": math.log(stories_of(model))}

    @cache
    def stories() -> list[dict[str, list[int]]]:
        return own_stories(decoder.load_decoder(weights), NUM_TESTED, BLOCK)

    def stories_of(model: Any) -> float:
        return decoder.perplexity(model, stories())

    def tuned(way: Way, rate: float, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = decoder.tune(
                decoder.load_decoder(weights),
                way.method,
                splits["train"],
                rate=rate,
                steps=STEPS,
                batch_size=BATCH_SIZE,
                seed=seed,
                output=Path(folder),
                fisher_examples=FISHER_EXAMPLES,
                **way.child_options,
            )
        return {**losses(trainer.bare_model), "trained_parameters": trainer.delta().num_trained}

    def run(method: str, rate: float, seed: int, measure: Any) -> None:
        key = {"method": method, "lr": rate, "seed": seed, "steps": STEPS, "split": "test"}
        recorded.run(key, measure)

    run("none", 0.0, 0, lambda: losses(decoder.load_decoder(weights)))
    for seed in range(NUM_SEEDS):
        for way in WAYS:
            for rate in RATES:
                run(str(way), rate, seed, lambda way=way, rate=rate, seed=seed: tuned(way, rate, seed))


if __name__ == "__main__":
    main()
