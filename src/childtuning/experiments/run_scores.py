"""Scores without training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from childtuning.child import Child
from childtuning.experiments.prediction import Reader
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_inputs import load_run_model, read_run_task
from childtuning.experiments.run_start import apply_start
from childtuning.tasks import LengthBucketBatches
from childtuning.training import choose_child, fisher_sample, fisher_scores


def score_run(
    config: RunConfig,
    output: Path,
    *,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Estimate Fisher information on a run's training set and write it to a safetensors file.

    Args:
        config: a run's options; those of training are not used.
        output: the file.
        progress: count examples on standard error.
        tell: called with lines for the user.
    Returns:
        JSON-ready: the file, counts, and by parameter its mean score and its share in a child of the run's density.
    """
    from torch.utils.data import DataLoader

    config = replace(config.resolved(), method="child-d", density=config.density)
    child_config = config.child()
    task, _ = read_run_task(config)
    loaded = load_run_model(config, task.how, task.label_names)
    apply_start(config, loaded)
    chosen = fisher_sample(len(task.train), child_config.fisher_examples, child_config.seed)
    reader = Reader(task.how, loaded.processor, task.label_names, config.max_length, tell=tell)
    encoded = reader.encode(task.train.subset(chosen), "the training examples")
    batches = DataLoader(
        encoded,
        batch_sampler=LengthBucketBatches(encoded.lengths, config.batch_size, seed=config.seed),
        collate_fn=task.how.collator(loaded.processor),
    )
    always = loaded.new_parameters if child_config.always is None else child_config.always
    scores = fisher_scores(child_config, loaded.model, batches, always=always, progress=progress)
    child = choose_child(child_config, loaded.model, list, always=always, scores=scores)
    assert isinstance(child, Child)
    partial = output.with_name(output.name + ".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: score.cpu().contiguous() for name, score in scores.items()}, partial)
    os.replace(partial, output)
    tell(f"scores of {child.num_eligible:,} entries from {len(encoded)} examples in {output}")
    return {
        "output": str(output),
        "task": task.name,
        "examples": len(encoded),
        "density": child.density,
        "eligible_parameters": child.num_eligible,
        "parameters": {
            name: {
                "mean": float(score.float().mean()),
                "share": child.parts[name].num_trained / score.numel(),
            }
            for name, score in scores.items()
        },
    }
