"""Trainers of methods on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, TrainingArguments, set_seed

from childtuning import ChildConfig
from childtuning.errors import ConfigError
from childtuning.methods import Combination
from childtuning.training import ChildTrainer, task_head

_TRAINER_OPTIONS = ("data_collator", "eval_dataset", "callbacks")


def examples(count: int = 40, length: int = 12, num_labels: int = 2) -> list[dict[str, torch.Tensor]]:
    """Random token sequences with random classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(5, 40, (length,), generator=generator),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": torch.randint(0, num_labels, (), generator=generator),
        }
        for _ in range(count)
    ]


def method_trainer(
    model: Path | torch.nn.Module,
    output: Path,
    method: str,
    *,
    density: float | str | None = None,
    child: dict[str, Any] | None = None,
    dataset: Any = None,
    **options: Any,
) -> ChildTrainer:
    """Return a trainer of a method or combination, by its name, on a tiny BERT or another model."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 7,
        "logging_steps": 1,
        "seed": 1,
        "disable_tqdm": True,
    }
    extra = {key: options.pop(key) for key in _TRAINER_OPTIONS if key in options}
    set_seed(0)
    if isinstance(model, Path):
        model = BertForSequenceClassification.from_pretrained(model, num_labels=2)
    methods = Combination.parse(method)
    prepared = methods.prepare(model, task_head(model))
    config = methods.child(
        ChildConfig(density=methods.density if density is None else density, **(child or {}))
    )  # type: ignore[arg-type]
    if prepared.eligible is not None:
        config = replace(config, eligible=prepared.eligible)
    arguments = TrainingArguments(
        str(output), use_cpu=True, dataloader_pin_memory=False, report_to="none", **(settings | options)
    )
    return ChildTrainer(
        prepared.model,
        arguments,
        train_dataset=dataset or examples(),
        child=config,
        always=prepared.always,
        methods=methods.methods,
        **extra,
    )


def weights(trainer: ChildTrainer) -> dict[str, torch.Tensor]:
    """Copy the model's parameters."""
    return {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()}


def check_resume(model: Path, output: Path, method: str, **options: Any) -> None:
    """Train straight, and again from a checkpoint, in a new trainer and in the same: the weights must be equal."""
    straight = method_trainer(model, output, method, gradient_accumulation_steps=2, **options)
    straight.train()
    resumed = method_trainer(model, output, method, gradient_accumulation_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-7"))
    ours, theirs = weights(straight), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if any(method.reselects for method in straight.methods):  # the base's values are lost
        with pytest.raises(
            ConfigError, match="has trained entries that .* does not hold. Resume with a new trainer"
        ):
            straight.train(resume_from_checkpoint=str(output / "checkpoint-7"))
    else:
        straight.train(resume_from_checkpoint=str(output / "checkpoint-7"))
    again = weights(straight)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "resumed in the same trainer"
    files = {path.suffix for path in output.rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors"}
