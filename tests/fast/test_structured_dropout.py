"""Dropouts beside structured layers: the same numbers as torch's, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import childtuning as ct
from childtuning.child import random_child
from childtuning.fast.structured import BooleanDropout, install_dropouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_values_gradients_and_random_numbers_are_torchs(dtype: torch.dtype, p: float) -> None:
    plain = nn.Dropout(p)
    ours = copy.deepcopy(plain)
    assert install_dropouts(ours).names == () and type(ours) is BooleanDropout
    x, found = torch.randn(17, 33, dtype=dtype), []
    for module in (plain, ours):
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        y = module(given)
        y.backward(x)
        found.append((y.detach(), given.grad, torch.rand(4)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_are_those_of_the_function() -> None:
    module = nn.Dropout(0.4)
    install_dropouts(module)

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return module(x)

    assert torch.autograd.gradcheck(call, torch.randn(5, 4, dtype=torch.float64, requires_grad=True))


def test_the_mask_takes_a_byte_an_entry() -> None:
    module, x = nn.Dropout(0.5), torch.randn(64, 64, requires_grad=True)
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    for install in (False, True):
        if install:
            install_dropouts(module)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
    assert sizes == [64 * 64 * 4, 64 * 64]


@pytest.mark.parametrize("change", ["eval", "no_grad", "inplace", "frozen input", "vmap"])
def test_elsewhere_torchs_own_runs(change: str) -> None:
    plain = nn.Dropout(0.5, inplace=change == "inplace").train(change != "eval")
    ours = copy.deepcopy(plain)
    install_dropouts(ours)
    x, found = torch.randn(6, 5), []
    for module in (plain, ours):
        torch.manual_seed(1)
        given = (x.clone() * 1).requires_grad_(change not in ("inplace", "frozen input"))
        if change == "vmap":
            found.append(torch.func.vmap(module, randomness="different")(given))
            continue
        with torch.set_grad_enabled(change != "no_grad"):
            found.append(module(given))
    assert torch.equal(*found)


def test_they_come_and_go_with_the_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    dense = copy.deepcopy(model)
    child = random_child(model, 0.4, granularity="column")
    trained = []
    for net, own in ((dense, None), (model, model)):
        optimizer = ct.ChildOptimizer(
            net.named_parameters(), child, torch.optim.AdamW, lr=0.1, model=own, release_gradients=True
        )
        assert isinstance(net[1], BooleanDropout) == (own is not None)
        torch.manual_seed(2)
        for _ in range(3):
            net(torch.randn(7, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.remove()
        assert type(net[1]) is nn.Dropout
        trained.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert type(copy.deepcopy(model)[1]) is nn.Dropout
