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


class _Statistics(nn.Module):
    """A classifier that keeps statistics of its inputs in a layer other than BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.head = nn.Linear(4 * 8, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.norm(x).flatten(1))
        return {"logits": logits} if labels is None else {"loss": _mean(logits, labels), "logits": logits}


def _mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits[:, 0] - labels).square().mean()


def _sum_by_items(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return (outputs["logits"][:, 0] - labels).square().sum() / (num_items_in_batch or len(labels))


def _mean_of_batch(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return _mean(outputs["logits"], labels)


CASES: dict[str, dict[str, Any]] = {
    "drawn, after an evaluation": {"child": "child-f", "evaluate": True},
    "whole, after an evaluation": {"child": ChildConfig(density=1.0), "evaluate": True},
    "resumed after an evaluation": {"child": ChildConfig(density=1.0), "evaluate": True, "resume": True},
    "statistics of a layer": {"child": ChildConfig(density=0.1, always=[]), "statistics": True},
    "another start on rank 1": {"child": CHILDREN["row"], "moved": True},
    "another start on rank 1, under DDP": {
        "child": ChildConfig(density=0.1, release_gradients=False),
        "moved": True,
    },
    "summed loss": {"child": CHILDREN["element"], "loss": _sum_by_items},
    "averaged loss": {"child": CHILDREN["element"], "loss": _mean_of_batch},
    "averaged loss, accumulated": {"child": CHILDREN["element"], "loss": _mean_of_batch, "accumulation": 2},
}


def _batches(count: int, size: int) -> Any:
    """Batches of which the last one has a single example: rank 1 gets none of it."""
    order = list(range(count))
    return [order[i : i + size] for i in range(0, count, size)]


def _run(folder: Path, case: dict[str, Any], rank: int | None) -> ChildTrainer:
    regression = case.get("loss") is not None
    set_seed(0)
    made: Any = _Statistics() if case.get("statistics") else model(folder).double()
    if case.get("moved") and rank == 1:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1)
    data: list[dict[str, Any]] = examples(13)
    if case.get("statistics"):
        data = [{"x": torch.randn(4, 8) * (i + 1), "labels": float(i % 2)} for i in range(13)]
    elif regression:
        data = [{**row, "labels": float(row["labels"])} for row in data]
    more = {"save_strategy": "steps", "save_steps": 2} if case.get("resume") else {}
    accumulation = case.get("accumulation", 1)

    def trainer(**options: Any) -> ChildTrainer:
        common = arguments(
            folder / f"run-{rank}",
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=4,
            **more,
        )
        common.max_steps = options.pop("steps")
        return ChildTrainer(
            made,
            common,
            train_dataset=data,
            eval_dataset=data,
            child=case["child"],
            train_batches=_batches(13, 4 // accumulation),
            compute_loss_func=case.get("loss"),
            **options,
        )

    steps = 4
    found = trainer(steps=2 if case.get("resume") else steps)
    if case.get("evaluate"):
        found.evaluate()
    found.train()
    if case.get("resume"):
        found = trainer(steps=steps)
        found.evaluate()
        found.train(resume_from_checkpoint=str(folder / f"run-{rank}" / "checkpoint-2"))
    return found


def _cases(rank: int, folder: Path) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    for name, case in CASES.items():
        trainer = _run(folder, case, 0 if case.get("resume") else rank)
        if case.get("evaluate") or case.get("statistics"):
            assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel), name
        wanted = torch.load(folder / f"{name}.pt")
        for key, value in values(trainer).items():
            if not case.get("statistics"):  # which depend on the share of the batch
                torch.testing.assert_close(
                    value, wanted[key], rtol=0, atol=1e-8, msg=lambda told, n=name, k=key: f"{n}, {k}: {told}"
                )
            mine = value.clone()
            torch.distributed.broadcast(mine, src=0)
            assert torch.equal(mine, value), (name, key)


@pytest.mark.slow
def test_what_one_process_would_train(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny")
    for name, case in CASES.items():
        torch.save(values(_run(tmp_path, case, None)), tmp_path / f"{name}.pt")
    on_ranks(_cases, tmp_path)


def test_what_was_frozen_between_two_trainings_is_trained_again(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny")
    trainer = ChildTrainer(
        model(tmp_path), arguments(tmp_path), train_dataset=examples(), child=CHILDREN["row"]
    )
    trainer.train()
    before = values(trainer)
    trainer.bare_model.requires_grad_(False)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in values(trainer).items())
