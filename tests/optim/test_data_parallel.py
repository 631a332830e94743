"""Two processes under DistributedDataParallel train the same child, and the same one as a single process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import WORLD, on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from childtuning import Child, ChildOptimizer, TaskFree, random_child

STEPS, BATCH = 6, 8
KINDS = ("fixed", "task-free")


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).double()


def a_child(kind: str) -> Child | TaskFree:
    return TaskFree(0.4, seed=2) if kind == "task-free" else random_child(a_model(), 0.3, always=("2.*",))


def train(kind: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    model = a_model()
    child = a_child(kind)
    opt = ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, lr=0.05)
    module = DistributedDataParallel(model) if world > 1 else model
    data = torch.randn(STEPS, BATCH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for batch in data:
        module(batch[rank::world]).square().mean().backward()
        opt.clip_grad_norm_(0.1)
        opt.step()
        opt.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def work(rank: int, folder: Path) -> None:
    for kind in KINDS:
        save_file(train(kind, rank, WORLD), folder / f"{kind}-{rank}.safetensors")


@pytest.mark.slow
def test_ranks_agree(tmp_path: Path) -> None:
    on_ranks(work, tmp_path)
    for kind in KINDS:
        first, second = (load_file(tmp_path / f"{kind}-{rank}.safetensors") for rank in range(WORLD))
        for name, value in train(kind, 0, 1).items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value)
