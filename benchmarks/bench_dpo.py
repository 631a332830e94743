"""DPO with one copy of a model, beside TRL's two: losses, time and memory.

Losses and time are those of 50 steps of the small decoder of examples/decoder.py: the right answer to each of its
instructions is preferred to another's. Memory is the peak of a process of its own, less what is resident after a tiny
model's training, of a Llama of 86 million random weights. Both train the same row child of 0.1.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from environment import RETURNED
from record import Record
from recorded_runs import example
from shapes import LLAMAS
from timing import Case, alternating, tell
from workers import call

decoder = example("decoder")
_COPIES = {"one copy": True, "two copies": False}
_LARGE, _DENSITY = "llama-86m", 0.1


def run(record: Record, options: argparse.Namespace) -> None:
    """Train with one copy and with two, in turn; then measure both peaks."""
    weights = None if options.data_dir is None else options.data_dir / "weights_stories260K"
    if weights is None or not weights.is_dir():
        record.skipped.append({"name": "dpo", "skipped": "no --data-dir that holds weights_stories260K"})
        return
    steps = 2 if options.quick else 50
    with TemporaryDirectory() as place:
        folder = Path(place)
        decoder.load_decoder(weights).save_pretrained(folder / "model")
        trainers: dict[str, Any] = {}

        def build(name: str) -> None:
            trainers[name] = _trainer(folder, weights, _COPIES[name], steps)

        cases = {
            name: Case(
                lambda name=name: trainers[name].train(), prepare=lambda name=name: build(name), ours=True
            )
            for name in _COPIES
        }
        alternating(record, cases, options.repeats)
        if record.failed:
            return
        record.ratio(
            f"{steps} steps of DPO, one copy ÷ two",
            "one copy",
            "two copies",
            at_most=None if options.quick else 1.1,
        )
        losses = {
            name: [line["loss"] for line in trainer.state.log_history if "loss" in line]
            for name, trainer in trainers.items()
        }
        record.value(
            "largest difference of a step's loss",
            max(abs(one - two) for one, two in zip(*losses.values(), strict=True)),
            at_most=1e-6,
            statistic="maximum",
        )
        record.facts["losses"] = losses
    shape = "llama-tiny" if options.quick else _LARGE
    found = {}
    for name, alone in _COPIES.items():
        tell(f"  {shape}, {name}: memory")
        found[name] = record.attempt(
            f"{shape}, {name}",
            lambda alone=alone: call(
                "dpo-memory", options.threads, malloc=RETURNED, shape=shape, alone=alone, weights=str(weights)
            ),
            ours=True,
        )
    if all(found.values()):
        record.facts[shape] = found
        saved = found["two copies"]["peak_bytes"] - found["one copy"]["peak_bytes"]
        record.value(
            f"{shape}: peak saved by one copy ÷ the model",
            saved / found["one copy"]["weight_bytes"],
            statistic="median",
        )


def _trainer(folder: Path, weights: Path, alone: bool, steps: int) -> Any:
    """Return a trainer of the model in the folder, with TRL's second copy unless alone."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    import childtuning as ct
    from childtuning.training import ChildOptimizerFactory, ReferenceModel

    rows = decoder.make_instructions(4 * steps + 1, seed=0)
    data = [
        {"prompt": row["prompt"], "chosen": f" {row['response']}", "rejected": f" {other['response']}"}
        for row, other in pairwise(rows)
    ]
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    child = ct.random_child(model, _DENSITY, granularity="row")
    trainer = DPOTrainer(
        model,
        ReferenceModel(model, child) if alone else None,
        args=DPOConfig(output_dir=str(folder / "out"), **arguments),
        train_dataset=Dataset.from_list(data),
        processing_class=decoder.load_tokenizer(weights / "tokenizer.json"),
    )
    trainer.optimizer_cls_and_kwargs = (ChildOptimizerFactory, {"child": child, "lr": 1e-3})
    return trainer


def measure_memory(shape: str, alone: bool, weights: str) -> dict[str, Any]:
    """Train two steps in this process; return the peak less what a tiny model's training leaves resident."""
    import peak
    from transformers import LlamaConfig, LlamaForCausalLM

    with TemporaryDirectory() as place:
        sizes = {}
        for name in ("llama-tiny", shape):
            torch.manual_seed(0)
            vocabulary = max(512, LLAMAS[name]["vocab_size"])
            model = LlamaForCausalLM(LlamaConfig(**{**LLAMAS[name], "vocab_size": vocabulary}))
            model.save_pretrained(Path(place, name, "model"))
            sizes[name] = sum(p.nbytes for p in model.parameters())
            del model
        _trainer(Path(place, "llama-tiny"), Path(weights), alone, 2).train()
        before = peak.resident_bytes()
        peak.start_peak()
        _trainer(Path(place, shape), Path(weights), alone, 2).train()
        return {"peak_bytes": peak.peak_bytes() - before, "weight_bytes": sizes[shape]}
