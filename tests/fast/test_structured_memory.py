"""What the layers keep for the backward pass, and what they never make."""

from __future__ import annotations

import pytest
import torch
from tests.fast.layer_cases import LAYERS, leaf_of, leaves_of, nothing_of, part_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from childtuning.child import Granularity, Part
from childtuning.fast.structured import install

WITH_INPUT = [name for name in LAYERS if not name.startswith("embedding") and name != "linear-none"]


def _saved(layer: nn.Module, x: Tensor) -> list[int]:
    """Addresses of what a forward pass keeps."""
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    return [tensor.data_ptr() for tensor in kept]


@pytest.mark.parametrize("name", WITH_INPUT)
def test_the_input_is_kept_only_for_trained_rows(name: str) -> None:
    make_layer, make_input = LAYERS[name]
    layer, x = make_layer().double(), make_input()
    shape = tuple(layer.weight.shape)
    weight = layer.weight.data_ptr()

    installed = install(layer, {"weight": leaf_of(nothing_of(shape), layer.weight)})
    assert _saved(layer, x) == [weight]
    assert _saved(layer, x.detach()) == []
    installed.remove()

    outputs = "columns" if name == "conv1d-gpt2" else "rows"
    install(layer, leaves_of(layer, {"weight": part_of(shape, outputs)}))
    assert set(_saved(layer, x)) == {x.data_ptr(), weight}
    assert _saved(layer, x.detach()) == [x.data_ptr()]


@pytest.mark.parametrize("name", WITH_INPUT)
def test_of_columns_nothing_else_is_kept(name: str) -> None:
    """Also where several layers read the same input: each has its own columns of it, and none has all."""
    make_layer, make_input = LAYERS[name]
    layer, x = make_layer().double(), make_input()
    shape = tuple(layer.weight.shape)
    axis = 0 if name == "conv1d-gpt2" else 1
    if shape[axis] == 1:  # depthwise: one input channel each
        return
    part = Part(shape, torch.tensor([1]), Granularity("row", axis))
    install(layer, leaves_of(layer, {"weight": part}))
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    (own,) = [tensor for tensor in kept if tensor.data_ptr() != layer.weight.data_ptr()]
    assert own.untyped_storage().nbytes() == x.untyped_storage().nbytes() // shape[axis]


def test_autocast_keeps_the_low_input_and_no_copy_of_the_weight() -> None:
    layer, x = nn.Linear(16, 32), torch.randn(4, 16, requires_grad=True)
    install(layer, leaves_of(layer, {"weight": part_of((32, 16), "rows")}))
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        layer(x)
    assert {tensor.dtype for tensor in kept if tensor.shape == x.shape} == {torch.bfloat16}
    assert {tensor.data_ptr() for tensor in kept if tensor.shape == (32, 16)} == {layer.weight.data_ptr()}


class _Made(TorchDispatchMode):
    """Notes the size of everything that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


SIZED = {
    "linear": (lambda: nn.Linear(40, 60), lambda: torch.randn(2, 40)),
    "embedding": (lambda: nn.Embedding(60, 40), lambda: torch.randint(0, 60, (7,))),
    "pointwise": (lambda: nn.Conv2d(40, 60, 1), lambda: torch.randn(1, 40, 2, 2)),
    "conv2d": (lambda: nn.Conv2d(8, 48, 5), lambda: torch.randn(1, 8, 6, 6)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", "rows"), ("linear", "columns"), ("linear", "blocks"), ("embedding", "rows"),
     ("embedding", "columns"), ("conv2d", "rows"), ("pointwise", "blocks")],
)  # fmt: skip
def test_no_dense_gradient_is_made(name: str, kind: str) -> None:
    make_layer, make_input = SIZED[name]
    layer = make_layer()
    install(layer, leaves_of(layer, {"weight": part_of(tuple(layer.weight.shape), kind)}))
    loss = layer(make_input()).sum()
    with _Made() as made:
        loss.backward()
    assert made.sizes and max(made.sizes) < layer.weight.numel()
