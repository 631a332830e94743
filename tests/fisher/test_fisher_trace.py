"""The pass leaves no trace: buffers, hooks, weights, gradients of others; wrappers are looked through."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.reference.fisher_loop import per_example
from torch import Tensor, nn
from torch.nn import functional as F

from childtuning.errors import ConfigError, ParameterError
from childtuning.fisher import fisher_information

pytestmark = pytest.mark.usefixtures("fast")


def rows(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def pairs(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


class Counts(nn.Module):
    """Its forward pass writes to one buffer and puts another tensor in place of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.body(x)
        self.last = y.detach()[0]
        return y


def test_buffers_are_the_same_tensors_with_the_same_values() -> None:
    model = Counts()
    before = dict(model.named_buffers())
    fisher_information(model, [pairs()], rows)
    after = dict(model.named_buffers())
    assert all(after[name] is buffer for name, buffer in before.items())
    assert not model.calls.any() and not model.last.any()
    assert all("_childtuning_mark" not in vars(tensor) for tensor in (*after.values(), *model.parameters()))


def test_hooks_on_parameters_do_not_run() -> None:
    model, plain = net(), fisher_information(net(), [pairs()], rows)
    weight, ran = model[0].weight, []
    weight.register_post_accumulate_grad_hook(lambda parameter: ran.append("after"))
    weight.register_hook(lambda gradient: ran.append("before") or 2 * gradient)
    found = fisher_information(model, [pairs()], rows)
    assert not ran and all(torch.equal(found[name], score) for name, score in plain.items())
    rows(model, pairs()).sum().backward()
    assert ran == ["before", "after"]


def test_gradients_of_other_modules_are_kept() -> None:
    model, teacher = net(), nn.Linear(4, 3)
    teacher.bias.grad = torch.ones(3)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return rows(model, batch) + (model(batch[0]) - teacher(batch[0])).square().sum(1)

    found = fisher_information(model, [pairs()], loss_fn)
    assert teacher.weight.grad is None and torch.equal(teacher.bias.grad, torch.ones(3))
    wanted = per_example(net(), [pairs()], lambda model, batch: loss_fn(model, batch).sum())
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], score)


def test_embeddings_that_renormalise_are_restored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 3))
    before = model[0].weight.detach().clone()
    batch = torch.randint(10, (5, 3)), torch.arange(5) % 3
    with pytest.warns(UserWarning, match="Set max_norm=None"):
        found = fisher_information(model, [batch], rows)
    assert torch.equal(model[0].weight, before)
    wanted = per_example(model, [batch], lambda model, batch: rows(model, batch).sum())
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-9)


class Drifts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.bias.mul_(1.0)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:Fisher information of:UserWarning")
def test_other_changes_of_weights_are_refused() -> None:
    with pytest.raises(ParameterError, match="changes parameter 'bias' in place"):
        fisher_information(Drifts(4, 3), [pairs()], rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_data_parallel_models_are_looked_into() -> None:
    plain = fisher_information(net(), [pairs()], rows)
    for wrapped in (torch.compile(net(), backend="eager"), nn.DataParallel(net())):
        found = fisher_information(wrapped, [pairs()], rows)
        assert all(torch.equal(found[name], score) for name, score in plain.items())
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    found = fisher_information(model, [pairs()], rows)
    assert list(found) == list(plain) and torch.equal(found["2.weight"], plain["2.weight"])


def test_sharded_parameters_are_refused() -> None:
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = net()
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ParameterError, match="'0.weight' is sharded"):
            fisher_information(model, [pairs()], rows)
    finally:
        distributed.destroy_process_group()


def test_sparse_gradients_are_scored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    batch = torch.randint(10, (5, 3)), torch.arange(5) % 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Fisher information of", UserWarning)
        found = fisher_information(model, [batch], rows)
    wanted = per_example(model, [batch], lambda model, batch: rows(model, batch).sum())
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], score)


def test_inference_mode_is_refused() -> None:
    model, batch = nn.Linear(4, 2), torch.ones(3, 4)
    with torch.no_grad():
        assert fisher_information(model, [batch], lambda m, b: m(b).sum(-1))["weight"].all()
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"torch.inference_mode\(\) forbids them"):
        fisher_information(model, [batch], lambda m, b: m(b).sum(-1))
