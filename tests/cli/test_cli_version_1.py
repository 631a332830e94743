"""Files that the version before wrote are still read: children, deltas, optimizer states, configurations.

``tests/data/version-1`` holds one of each kind, written by that version after three steps of a small network, with
the weights that its fourth step led to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_child_trainer import a_trainer
from torch import nn

from childtuning import Child, ChildConfig, ChildOptimizer, Delta, TaskFree
from childtuning.training.state_files import load_state

DATA = Path(__file__).parents[1] / "data" / "version-1"
EXPECTED = json.loads((DATA / "expected.json").read_text())


def a_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))


@pytest.mark.parametrize(
    "name", [name for name, about in EXPECTED.items() if about["num_trained"] is not None]
)
def test_children(name: str) -> None:
    child = Child.load(DATA / f"{name}.child.safetensors")
    assert child.fingerprint() == EXPECTED[name]["fingerprint"]
    assert child.num_trained == EXPECTED[name]["num_trained"]
    assert child.always == ("3.*",)


@pytest.mark.parametrize("name", EXPECTED)
def test_deltas_and_optimizer_states_go_on(name: str) -> None:
    """The fourth step is the one that the version before took."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    net = a_net().to(dtype)
    Delta.load(DATA / f"{name}.delta").apply_(net)
    if name.startswith("task-free"):
        child: Child | TaskFree = TaskFree(0.4, seed=2)
        assert child.fingerprint() == EXPECTED[name]["fingerprint"]
    else:
        child = Child.load(DATA / f"{name}.child.safetensors")
    named = dict(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    opt = ChildOptimizer(groups, child, torch.optim.AdamW, lr=0.05)
    opt.load_state_dict(load_state(DATA / f"{name}.optimizer.safetensors"))
    x = torch.linspace(-1, 1, 12).view(2, 6).to(dtype)
    (net(x * 4).float()).square().sum().backward()
    opt.clip_grad_norm_(1.0)
    opt.step()
    for key, wanted in load_file(DATA / f"{name}.next.safetensors").items():
        # Whole parameters of 16 bits had no float32 master values then.
        tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(named[key].detach(), wanted, **tolerance)


def test_configurations() -> None:
    config = ChildConfig.from_dict(json.loads((DATA / "child.json").read_text()))
    assert config == ChildConfig(density=0.1, granularity="row", always=("head.*",))


def test_a_checkpoint_of_the_trainer_goes_on(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(DATA / "checkpoint", tmp_path / "checkpoint-3")
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "num_train_epochs": 1}
    trainer = a_trainer(tiny_bert, tmp_path / "out", ChildConfig(density=0.05), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    wanted, found = Delta.load(DATA / "checkpoint-end"), trainer.delta()
    for name, value in wanted.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_folder_predicts(tiny_bert: Path, tmp_path: Path, childtuning: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(DATA / "run", run)
    for name in ("config.toml", "labels.json"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("FOLDER/bert", str(tiny_bert)))
    done = childtuning("predict", run, "--text", "the great cat sat", "--json")
    assert done.code == 0, done.err
    (prediction,) = json.loads(done.out)["predictions"]
    assert prediction["prediction"] == "bad"
    assert prediction["logits"] == pytest.approx([0.00027638114988803864, -0.005320502445101738], abs=1e-6)
