"""Layers, parts of their weights, and the dense twin that structured gradients are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from childtuning.child import Granularity, Part
from childtuning.fast.layers import Leaf
from childtuning.fast.structured import Installed, install

V = 11


def real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64, requires_grad=True)


def tokens(*shape: int, dtype: torch.dtype = torch.int64) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, V, shape).to(dtype)


# name: (layer, input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear-1d": (lambda: nn.Linear(5, 7), real(5)),
    "linear-2d": (lambda: nn.Linear(5, 7), real(4, 5)),
    "linear-3d": (lambda: nn.Linear(5, 7), real(2, 3, 5)),
    "linear-4d": (lambda: nn.Linear(5, 7, bias=False), real(2, 1, 3, 5)),
    "linear-none": (lambda: nn.Linear(5, 7), real(0, 3, 5)),
    "conv1d-gpt2": (lambda: Conv1D(7, 5), real(2, 3, 5)),
    "embedding-1d": (lambda: nn.Embedding(V, 4), tokens(9)),
    "embedding-2d": (lambda: nn.Embedding(V, 4, padding_idx=3), tokens(3, 8)),
    "embedding-int32": (lambda: nn.Embedding(V, 4, padding_idx=-1), tokens(3, 8, dtype=torch.int32)),
    "conv2d": (lambda: nn.Conv2d(3, 7, 3), real(2, 3, 6, 5)),
    "conv2d-strided": (
        lambda: nn.Conv2d(3, 7, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=False),
        real(2, 3, 7, 8),
    ),
    "conv2d-single": (lambda: nn.Conv2d(3, 7, 3), real(3, 6, 5)),
    "conv2d-same": (lambda: nn.Conv2d(3, 7, 3, padding="same"), real(2, 3, 5, 5)),
    "conv2d-valid": (lambda: nn.Conv2d(3, 7, (1, 2), padding="valid"), real(2, 3, 4, 4)),
    "conv2d-pointwise": (lambda: nn.Conv2d(5, 7, 1, stride=2, bias=False), real(2, 5, 4, 4)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), real(2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 7, 3, padding=1), real(2, 3, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), real(1, 2, 3, 3, 3)),
}


def part_of(shape: tuple[int, ...], kind: str) -> Part:
    """A part of a parameter of this shape that is neither empty nor whole."""
    granularity = {
        "rows": Granularity("row"),
        "run": Granularity("row"),
        "columns": Granularity("row", axis=1),
        "last": Granularity("row", axis=-1),
        "blocks": Granularity("block", block_shape=(2, 3)),
        "tile": Granularity("block", block_shape=(2, 2)),
    }[kind]
    num_units = granularity.num_units(shape)
    if kind == "run":
        units = torch.arange(1, num_units - 1)
    elif kind == "tile":
        units = torch.tensor([num_units - 1])
    else:
        units = torch.randperm(num_units)[: max(1, num_units // 2)].sort().values
    return Part(shape, units, granularity)


def nothing_of(shape: tuple[int, ...]) -> Part:
    """The part of rows that holds none."""
    return Part(shape, torch.zeros(0, dtype=torch.int32), Granularity("row"))


def leaf_of(part: Part, weight: Tensor, dtype: torch.dtype | None = None) -> Leaf:
    """The leaf of a part that has a structure."""
    groups = part.groups(weight.device)
    assert groups is not None
    return Leaf.of(groups, part.num_trained, weight, dtype)


def leaves_of(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Leaf]:
    """The leaves of parts that all have a structure."""
    return {name: leaf_of(part, model.get_parameter(name)) for name, part in parts.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The dense gradients, zero where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def dense_twin(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The gradients of ``run(model)`` as torch computes them on a copy."""
    twin = copy.deepcopy(model)
    run(twin).backward()
    return gradients(twin)


def entries(gradient: Tensor, part: Part) -> Tensor:
    return gradient.reshape(-1)[part.indices()]


def check(
    model: nn.Module,
    parts: Mapping[str, Part],
    run: Callable[[nn.Module], Tensor],
    *,
    names: set[str] | None = None,
    **tolerance: Any,
) -> Installed:
    """Assert that leaf and other gradients are those of the dense twin; with a dense rest only of tied weights."""
    expected = dense_twin(model, run)
    leaves = leaves_of(model, parts)
    installed = install(model, leaves)
    assert set(installed.names) == (set(parts) if names is None else names)
    run(model).backward()
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, parameter in model.named_parameters():
        if name in installed.names:
            leaf, part = leaves[name].tensor, parts[name]
            got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if parameter.grad is not None:
                assert owners.count(id(parameter)) > 1, f"{name} has a dense gradient"
                got = got + entries(parameter.grad, part)
            assert got.shape == (part.num_trained,) and got.dtype == leaf.dtype
            torch.testing.assert_close(
                got, entries(expected[name], part), msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
        elif parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], **tolerance)
    return installed
