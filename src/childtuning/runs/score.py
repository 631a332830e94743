"""Estimate Fisher information on a run's training set, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from childtuning.child import Child
from childtuning.child.files import write_atomically
from childtuning.runs.begin import Tell, begin
from childtuning.runs.config import RunConfig
from childtuning.runs.inputs import Inputs
from childtuning.runs.trainer import build_trainer
from childtuning.training import choose_child, in_model_order


def score_run(
    config: RunConfig,
    output: Path,
    *,
    progress: bool = False,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Estimate Fisher information on a run's training set and write it to a safetensors file.

    Args:
        config: a run's options; the training options are not used.
        output: the file.
        progress: count examples on standard error.
        tell: called with lines for the user.
    Returns:
        JSON-ready: the file, counts, and for each parameter its mean score and its share in a child of the run's
        density.
    """
    asked = config.resolved().density
    # A child that is the whole network is chosen without scores.
    config = replace(config.resolved(), method="child-d", density=0.5 if asked == 1.0 else asked)
    found: dict[str, Tensor] = {}

    def keep(make_fn: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        nonlocal found
        found = make_fn()
        return found

    inputs = Inputs()
    begun = begin(config, inputs, None, tell)
    config, task, loaded, encoded = begun.config, begun.task, begun.loaded, begun.train
    with TemporaryDirectory() as folder:
        trainer = build_trainer(config, task, encoded, loaded, Path(folder), progress=progress, scores=keep)
        child = trainer.select()
    if asked == 1.0:
        whole = replace(config, density=1.0).child()
        child = choose_child(whole, trainer.bare_model, list, always=trainer.always)
    assert isinstance(child, Child)
    scores = in_model_order(trainer.bare_model, found)
    num_scored = trainer.num_scored
    on_cpu = {name: score.cpu().contiguous() for name, score in scores.items()}
    write_atomically(output, lambda partial: save_file(on_cpu, partial))
    tell(f"scores of {child.num_eligible:,} entries from {num_scored} examples in {output}")
    return {
        "output": str(output),
        "task": task.name,
        "examples": num_scored,
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
