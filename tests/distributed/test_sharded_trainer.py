"""ChildTrainer on a model that transformers shards over two processes does as one process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import WORLD, on_ranks
from tests.tiny_kinds import save_tiny_lm
from transformers import AutoModelForCausalLM, TrainingArguments

from childtuning import ChildConfig
from childtuning.training import ChildTrainer

CHILDREN = {
    kind: ChildConfig(density=0.2, granularity=kind) for kind in ("element", "row", "column", "block")
}
CHILDREN["task-free"] = ChildConfig(density=0.3, variant="task-free")


def examples(count: int = 32) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 30, (12,), generator=draw) for _ in range(count)]
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in rows]


def trained(folder: Path, kind: str, output: Path, resume: Path | None = None) -> list[float]:
    """Train as many processes as there are; return the losses on the evaluation examples, epoch by epoch."""
    world, sharding = int(os.environ.get("WORLD_SIZE", "1")), {}
    if world > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        sharding = {"distributed_config": DistributedConfig(fsdp_size=world)}
    plain: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(
        str(output),
        per_device_train_batch_size=8 // world,
        num_train_epochs=3,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        dataloader_pin_memory=False,
        **plain,
    )
    trainer = ChildTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "base", **sharding),
        arguments,
        train_dataset=examples(),
        eval_dataset=examples(8),
        child=CHILDREN[kind],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_model(str(output / "final"))
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def begun(whole: Path, output: Path) -> Path:
    """Copy a run's folder as it was after two epochs; return its checkpoint."""
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("final", "checkpoint-12"))
    return output / "checkpoint-8"


def _on_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    for kind in CHILDREN:
        trained(folder, kind, folder / f"two {kind}")
        for start in ("one", "two"):  # from what one process wrote, and from what these wrote
            output = folder / f"two {kind} after {start}"
            if rank == 0:
                begun(folder / f"{start} {kind}", output)
            torch.distributed.barrier()
            trained(folder, kind, output, output / "checkpoint-8")


@pytest.mark.slow
def test_a_sharded_trainer_does_as_one_process(tmp_path: Path) -> None:
    save_tiny_lm(tmp_path / "base")
    for kind in CHILDREN:
        trained(tmp_path, kind, tmp_path / f"one {kind}")
    on_ranks(_on_two, tmp_path)
    for kind in CHILDREN:
        output = tmp_path / f"one {kind} after two"
        trained(tmp_path, kind, output, begun(tmp_path / f"two {kind}", output))
        wanted = load_file(tmp_path / f"one {kind}" / "final" / "delta.safetensors")
        for way in ("two", "two {} after one", "two {} after two", "one {} after two"):
            name = way.format(kind) if "{}" in way else f"{way} {kind}"
            found = load_file(tmp_path / name / "final" / "delta.safetensors")
            assert set(found) == set(wanted), name
            for key, value in wanted.items():
                torch.testing.assert_close(
                    found[key], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
