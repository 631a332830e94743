"""Copies of a model in several processes: what the Trainer sends for a fixed child, and what comes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import on_ranks
from tests.tiny import save_tiny_bert, without_dropout
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from childtuning import ChildConfig
from childtuning.training import ChildTrainer

STEPS = 3
CHILDREN = {kind: ChildConfig(density=0.1, granularity=kind) for kind in ("element", "row", "column")}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    plain: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
    return TrainingArguments(
        str(folder), use_cpu=True, max_steps=STEPS, learning_rate=1e-2, disable_tqdm=True, **plain | options
    )


def model(folder: Path) -> BertForSequenceClassification:
    set_seed(0)
    made = BertForSequenceClassification.from_pretrained(folder / "tiny", num_labels=2)
    without_dropout(made)
    return made


def examples(count: int = 24) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(5, 40, (8,), generator=draw), "labels": i % 2, "attention_mask": [1] * 8}
        for i in range(count)
    ]


def trained(folder: Path, child: Any, batch_size: int, **options: Any) -> tuple[ChildTrainer, list[int]]:
    """Train, and return what every step sent: entries added up over the processes."""
    trainer = ChildTrainer(
        model(folder),
        arguments(folder, per_device_train_batch_size=batch_size, **options),
        train_dataset=examples(),
        child=child,
    )
    sent: list[int] = []
    original = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    trainer.select()  # the Fisher pass sends too
    torch.distributed.all_reduce = counted
    try:
        trainer.train()
    finally:
        torch.distributed.all_reduce = original
    return trainer, sent


def values(trainer: ChildTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()}


def _train(rank: int, folder: Path) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    for kind, child in CHILDREN.items():
        for accumulation in (1, 2):
            more = {"gradient_accumulation_steps": accumulation}
            trainer, sent = trained(folder, child, 4 // accumulation, **more)
            assert trainer.model_wrapped is trainer.bare_model
            shapes = {name: value.shape for name, value in values(trainer).items()}
            num_trained = sum(part.num_trained for part in trainer.select().resolve(shapes).values())
            assert STEPS * num_trained <= sum(sent) < STEPS * (num_trained + 200)
            wanted = torch.load(folder / f"{kind}.pt")
            for name, value in values(trainer).items():
                torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)

    # What a later trainer does with that model is not ours to decide.
    again = Trainer(trainer.bare_model, arguments(folder), train_dataset=examples())
    again.train()
    assert isinstance(again.model_wrapped, nn.parallel.DistributedDataParallel)

    for child in ("child-f", ChildConfig(density=0.1, release_gradients=False), ChildConfig(density=1.0)):
        trainer, _ = trained(folder, child, 4)
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)


@pytest.mark.slow
def test_copies_send_the_childs_gradient_alone(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny")
    for kind, child in CHILDREN.items():
        trainer, _ = trained(tmp_path, child, 8)
        torch.save(values(trainer), tmp_path / f"{kind}.pt")
    on_ranks(_train, tmp_path)
