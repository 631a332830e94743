"""Where a structured layer's weight is not the one it was installed for, gradients are as ever."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.fast.layer_cases import leaf_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from childtuning.child import Granularity, Part
from childtuning.fast.layers import Leaf
from childtuning.fast.structured import install, set_aside
from childtuning.fisher import fisher_information

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "conv1d": (lambda: Conv1D(6, 4), (3, 4)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 4), None),
}


@pytest.fixture(params=LAYERS)
def installed(request):
    """A layer of which one row is trained, its input, and the dense gradient of its weight."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer, x = make(), torch.tensor([1, 1, 5]) if shape is None else torch.randn(shape)
    layer(x).square().sum().backward()
    dense, layer.weight.grad = layer.weight.grad, None
    assert install(layer, {"weight": one_row(layer.weight)}).names == ("weight",)
    return layer, x, dense


def one_row(weight: Tensor) -> Leaf:
    return leaf_of(Part(tuple(weight.shape), torch.tensor([1]), Granularity("row")), weight)


def gradient(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor | None:
    return torch.autograd.grad(layer(x).square().sum(), weight, allow_unused=True)[0]


def test_of_a_copy_the_weight_has_its_gradient(installed) -> None:
    layer, x, dense = installed
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(gradient(copied, x, copied.weight), dense)
    assert gradient(layer, x, layer.weight) is None


def test_a_functional_call_differentiates_what_it_is_given(installed) -> None:
    layer, x, dense = installed
    given = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, given, (x,)).square().sum()
    torch.testing.assert_close(torch.autograd.grad(y, given["weight"])[0], dense)
    assert gradient(layer, x, layer.weight) is None


def test_under_vmap_a_layer_is_the_plain_one(installed) -> None:
    layer, x, dense = installed
    plain, together = copy.deepcopy(layer), torch.stack([x, x.flip(0)])
    expected = torch.stack([plain(one) for one in together])
    torch.testing.assert_close(torch.func.vmap(layer)(together), expected)
    assert gradient(layer, x, layer.weight) is None

    mapped = torch.func.vmap(layer)(x[None]).square().sum()
    torch.testing.assert_close(torch.autograd.grad(mapped, layer.weight)[0], dense)
    assert layer.leaf.tensor.grad is None


# Torch's own decompositions for forward mode are scripted.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_under_grad_and_jvp_a_layer_is_the_plain_one(installed) -> None:
    layer, x, _ = installed

    def run(layer: nn.Module, factor: Tensor) -> Tensor:
        return layer(x * factor if x.is_floating_point() else x).mul(factor).sin().sum()

    factor = torch.tensor(0.7, requires_grad=True)
    expected = run(copy.deepcopy(layer), factor)
    (slope,) = torch.autograd.grad(expected, factor)
    factor = factor.detach()
    torch.testing.assert_close(torch.func.grad(lambda s: run(layer, s))(factor), slope)
    value, tangent = torch.func.jvp(lambda s: run(layer, s), (factor,), (torch.ones(()),))
    torch.testing.assert_close((value, tangent), (expected, slope))


def test_set_aside_and_back(installed) -> None:
    layer, x, dense = installed
    with set_aside(layer):
        torch.testing.assert_close(gradient(layer, x, layer.weight), dense)
    assert gradient(layer, x, layer.weight) is None


def test_a_weight_parametrized_afterwards_trains() -> None:
    layer = nn.Linear(4, 6)
    install(layer, {"weight": one_row(layer.weight)})
    parametrizations.weight_norm(layer)
    layer(torch.ones(2, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hooked_weight_stays_dense(register: str) -> None:
    layer = nn.Linear(4, 6)
    getattr(layer.weight, register)(lambda tensor: None)
    assert install(layer, {"weight": one_row(layer.weight)}).dense == ("weight",)


def test_fisher_information_of_a_model_with_structured_layers_is_whole() -> None:
    layer, x = nn.Linear(4, 6), torch.linspace(-1, 1, 12).view(3, 4)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(1).mean()

    wanted = fisher_information(layer, [x], loss_fn, "mean")
    install(layer, {"weight": one_row(layer.weight)})
    found = fisher_information(layer, [x], loss_fn, "mean")
    torch.testing.assert_close(found, wanted)
    assert bool((wanted["weight"] > 0).all())
