"""Passes beside the trainer's own: through wrappers, and without a trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from childtuning.methods import Combination
from childtuning.methods.perturbation import perturbed_logits
from childtuning.training import LossStep, predicted_labels
from childtuning.training.further_pass import statistics_kept, unwrapped

METHODS = "r3f:weight=2,eps=0.5+r-drop:4+smart:weight=3,step=0.3,noise_variance=0.1,epsilon=0.25"


class Net(nn.Module):
    """Embeddings, dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 4), nn.BatchNorm1d(4)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(4, 3)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.out(self.drop(self.norm(self.embed(input_ids).mean(1))))
        return {
            "logits": logits,
            "loss": None if labels is None else nn.functional.cross_entropy(logits, labels),
        }


def a_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {
        "input_ids": torch.randint(0, 20, (6, 5), generator=generator),
        "labels": torch.randint(0, 3, (6,), generator=generator),
    }


def loss_with_terms(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    def task(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        return outputs["loss"], outputs

    loss, outputs = task(model, inputs)
    step = LossStep(model, inputs, outputs, loss, task)
    for method in Combination.parse(METHODS).methods:
        loss = method.loss(loss, step)
    return loss


def gradients(model: nn.Module, rank: int) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    for step in range(2):  # accumulated
        loss_with_terms(model, batch(rank, step)).backward()
    return {name: p.grad for name, p in unwrapped(model).named_parameters() if p.grad is not None}


def work(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(a_net())
    save_file(gradients(model, rank), folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_ranks_average_the_gradients_of_all_passes(tmp_path: Path) -> None:
    on_ranks(work, tmp_path)
    alone = [gradients(a_net(), rank) for rank in range(2)]
    for rank in range(2):
        for name, value in load_file(tmp_path / f"{rank}.safetensors").items():
            torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)


def test_compiled_code_sees_the_noise() -> None:
    net, inputs = a_net().eval(), batch(0, 0)
    compiled: Any = torch.compile(net, backend="eager")
    outputs = compiled(**inputs)
    step = LossStep(
        compiled, inputs, outputs, outputs["loss"], lambda model, given: (model(**given)["loss"], outputs)
    )
    assert step.bare_model is net
    noisy = perturbed_logits(step, lambda x, axis: torch.ones_like(x))
    assert not torch.allclose(noisy, outputs["logits"])
    torch.testing.assert_close(step.forward(), outputs["logits"])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_kept_bitwise(momentum: float | None) -> None:
    """Also where an error ends the pass; the passes before and after count."""
    net, twin = a_net(), a_net()
    net.norm.momentum = twin.norm.momentum = momentum
    first, second, last = (batch(0, step)["input_ids"] for step in range(3))
    loss = net(first)["logits"].square().sum()
    with statistics_kept(net):
        loss = loss + net(second)["logits"].square().sum()
    with pytest.raises(ValueError, match="expected 2D"), statistics_kept(net):
        net.norm(torch.zeros(()))
    loss.backward()
    net(last)
    twin(first)
    twin(last)
    assert net.norm.momentum == momentum
    for mine, other in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_where_labels_are_predicted() -> None:
    class TinyForCausalLM(nn.Module):
        loss_type = "ForCausalLM"

    class TinyForTokenClassification(nn.Module):
        pass

    class TinyForConditionalGeneration(nn.Module):
        def __init__(self, encodes: bool) -> None:
            super().__init__()
            self.config = SimpleNamespace(is_encoder_decoder=encodes)

    labels = torch.tensor([[1, 2, -100, 4]])
    shifted, soft = [[2, -100, 4, -100]], [[-100, 1, 2, -100, 4, -100]]
    assert predicted_labels(TinyForCausalLM(), labels, 4).tolist() == shifted
    assert predicted_labels(TinyForCausalLM(), labels, 6).tolist() == soft
    assert predicted_labels(TinyForTokenClassification(), labels, 4).tolist() == labels.tolist()
    assert predicted_labels(TinyForConditionalGeneration(True), labels, 4).tolist() == labels.tolist()
    assert predicted_labels(TinyForConditionalGeneration(False), labels, 4).tolist() == shifted
