"""Every layer, every kind of part: the leaf's gradient is the dense gradient's entries, and all else is as it was."""

from __future__ import annotations

import pytest
import torch
from tests.fast.layer_cases import (
    LAYERS,
    check,
    dense_twin,
    entries,
    leaf_of,
    leaves_of,
    nothing_of,
    part_of,
)
from tests.products import BackwardProducts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from childtuning.fast import products
from childtuning.fast.layers import Leaf
from childtuning.fast.structured import install

KINDS = ("rows", "run", "columns", "last", "blocks", "tile")
# Tiles of an embedding, and of a kernel where they are not whole input channels, are left dense.
UNFIT = [(name, "blocks") for name in LAYERS if name.startswith("embedding")]
UNFIT += [
    (name, kind)
    for name in LAYERS
    if name.startswith("conv") and name not in ("conv1d-gpt2", "conv2d-pointwise")
    for kind in ("last", "blocks", "tile")
    if (name, kind) not in (("conv1d", "blocks"), ("conv2d-valid", "tile"))  # these are whole input channels
]
CASES = [
    (name, kind)
    for name in LAYERS
    for kind in KINDS
    if (name, kind) not in [*UNFIT, ("conv2d-depthwise", "columns"), ("conv2d-pointwise", "last")]
]
NUMERIC = ("linear-3d", "conv1d-gpt2", "embedding-1d", "conv2d", "conv2d-depthwise", "conv2d-pointwise")


def _case(name: str, kind: str):
    torch.manual_seed(len(name) + 7 * len(kind))
    make_layer, make_input = LAYERS[name]
    layer = make_layer().double()
    part = part_of(tuple(layer.weight.shape), kind)
    return layer, part, make_input()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_equals_the_dense_gradient(name: str, kind: str) -> None:
    layer, part, x = _case(name, kind)
    with torch.no_grad():
        expected = layer(x)
    factor = torch.randn_like(expected)
    by_torch = torch.autograd.grad((layer(x) * factor).sum(), x)[0] if x.is_floating_point() else None

    check(layer, {"weight": part}, lambda model: (model(x) * factor).sum(), rtol=1e-11, atol=1e-11)

    assert torch.equal(layer(x), expected)
    if by_torch is not None:
        got = torch.autograd.grad((layer(x) * factor).sum(), x)[0]
        torch.testing.assert_close(got, by_torch, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "kind"), UNFIT)
def test_groups_that_come_later_are_never_wrong(name: str, kind: str) -> None:
    """Groups that would have been left dense, put where others were installed, save nothing but are right."""
    layer, part, x = _case(name, kind)
    expected = dense_twin(layer, lambda model: model(x).sin().sum())["weight"]
    leaf = leaf_of(part, layer.weight)
    assert not install(layer, {"weight": leaf}).names
    later = Leaf([], leaf.tensor)
    install(layer, {"weight": later})
    later.groups = leaf.groups
    layer(x).sin().sum().backward()
    assert later.tensor.grad is not None
    torch.testing.assert_close(later.tensor.grad, entries(expected, part), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("freeze", ["bias", "input", "both"])
@pytest.mark.parametrize("name", ["linear-3d", "conv1d-gpt2", "conv2d", "conv1d"])
def test_what_is_frozen_gets_no_gradient(name: str, freeze: str) -> None:
    layer, part, x = _case(name, "rows")
    layer.bias.requires_grad_(freeze == "input")
    x.requires_grad_(freeze == "bias")
    check(layer, {"weight": part}, lambda model: model(x).square().sum(), rtol=1e-11, atol=1e-11)
    assert (layer.bias.grad is None) == (freeze != "input")


@pytest.mark.parametrize("name", ["linear-3d", "conv1d-gpt2", "embedding-2d", "conv2d"])
def test_calls_add_up_in_the_optimizers_own_buffer(name: str) -> None:
    """A module called twice, two backward passes, and a ``.grad`` that is a view of a larger flat buffer."""
    layer, part, x = _case(name, "rows")
    run = lambda: (layer(x).sin() + layer(x.flip(0)).cos()).sum()  # noqa: E731
    for _ in range(2):
        run().backward()
    expected = layer.weight.grad.reshape(-1)[part.indices()]
    layer.weight.grad = None

    leaf = leaf_of(part, layer.weight)
    buffer = torch.zeros(part.num_trained + 5, dtype=torch.float64)
    leaf.tensor.grad = buffer[3:-2]
    install(layer, {"weight": leaf})
    for _ in range(2):
        run().backward()
    torch.testing.assert_close(buffer[3:-2], expected, rtol=1e-11, atol=1e-11)
    assert buffer[:3].count_nonzero() == buffer[-2:].count_nonzero() == 0
    assert layer.weight.grad is None


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in CASES if n in NUMERIC and k != "run"])
def test_numeric_gradients(name: str, kind: str) -> None:
    """The weight as a function of the trained values: they are perturbed through the leaf."""
    layer, part, x = _case(name, kind)
    leaf = leaf_of(part, layer.weight)
    install(layer, {"weight": leaf})
    start = layer.weight.detach().clone()
    inputs = (x,) if x.is_floating_point() else ()

    def run(values: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        leaf.tensor = values
        weight = start.clone()
        weight.view(-1)[part.indices()] = values.detach()
        layer.weight = leaf.weight = nn.Parameter(weight)
        return layer(*inputs or (x,))

    values = start.view(-1)[part.indices()].requires_grad_()
    assert torch.autograd.gradcheck(run, (values, *inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_trained(name: str) -> None:
    """Where the loss reached the weight its leaf has an empty gradient, though all else is frozen."""
    layer, _, x = _case(name, "rows")
    layer.requires_grad_(False)
    by_torch = torch.autograd.grad(layer(x).sin().sum(), x)[0] if x.requires_grad else None
    layer.weight.requires_grad_(True)
    leaf = leaf_of(nothing_of(tuple(layer.weight.shape)), layer.weight)
    assert install(layer, {"weight": leaf}).names == ("weight",)
    layer(x)
    assert leaf.tensor.grad is None
    for _ in range(2):
        layer(x.detach()).sin().sum().backward()
        assert leaf.tensor.grad is not None and leaf.tensor.grad.shape == (0,)
    if by_torch is not None:
        got = torch.autograd.grad(layer(x).sin().sum(), x)[0]
        torch.testing.assert_close(got, by_torch, rtol=1e-11, atol=1e-11)
    layer.weight.requires_grad_(False)  # frozen: the layer is the one that it stands in for
    leaf.tensor.grad = None
    assert layer(x.detach()).requires_grad is False


def test_a_weight_that_the_loss_does_not_reach_has_no_gradient() -> None:
    model = nn.ModuleList([nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 7)])
    parts = {f"{i}.weight": part_of((7, 5), "rows") if i < 2 else nothing_of((7, 5)) for i in range(3)}
    leaves = leaves_of(model, parts)
    install(model, leaves)
    model[0](torch.ones(5)).sum().backward()
    assert leaves["0.weight"].tensor.grad is not None
    assert leaves["1.weight"].tensor.grad is None and leaves["2.weight"].tensor.grad is None


def test_groups_may_be_replaced_between_steps() -> None:
    """Task-free rows: the leaf and its size are new in each step."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(3, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense, layer.weight.grad = layer.weight.grad, None
    leaf = Leaf([], torch.empty(0).requires_grad_())
    install(layer, {"weight": leaf})
    for rows in ([0, 4], [], [1, 2, 3], [2]):
        leaf.groups = [(torch.tensor(rows, dtype=torch.int64), None)]
        leaf.tensor = Leaf.of([], 6 * len(rows), layer.weight).tensor
        layer(x).square().sum().backward()
        assert leaf.tensor.grad is not None
        torch.testing.assert_close(leaf.tensor.grad.view(-1, 6), dense[rows], rtol=1e-12, atol=1e-12)


def test_the_leaf_may_be_of_another_precision() -> None:
    layer = nn.Linear(6, 5).bfloat16()
    leaf = leaf_of(part_of((5, 6), "rows"), layer.weight, torch.float32)
    install(layer, {"weight": leaf})
    layer(torch.randn(3, 6, dtype=torch.bfloat16)).sum().backward()
    assert leaf.tensor.grad is not None and leaf.tensor.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 9, 1), (4, 0, 3)])
def test_wide_products_take_a_piece_of_a_factor_at_a_time(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SLOW", frozenset({torch.bfloat16}))
    monkeypatch.setattr(products, "_AT_ONCE", 10)
    n, inner, m = shape
    left, right = torch.randn(inner, n).bfloat16().t(), torch.randn(inner, m).bfloat16()
    with torch.device("meta"):  # the default device is nobody's
        found = products.multiply(left, right)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (left.double() @ right.double()).bfloat16())


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_where_a_cpu_has_no_product_of_bf16_the_backward_pass_takes_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 16, bias=False).bfloat16(), torch.randn(40, 24).bfloat16()
    dY = torch.randn(40, 16).bfloat16()
    monkeypatch.setattr(products, "_SLOW", frozenset({torch.bfloat16}))
    part = part_of((16, 24), kind)
    leaf = leaf_of(part, layer.weight)
    install(layer, {"weight": leaf})
    given = x.clone().requires_grad_()
    y = layer(given)
    with BackwardProducts() as seen:
        y.backward(dY)
    assert seen.dtypes == {torch.float32}
    assert torch.equal(given.grad, (dY.float() @ layer.weight.detach().float()).bfloat16())  # type: ignore[arg-type]
    dense = (dY.float().t() @ x.float()).bfloat16()
    assert leaf.tensor.grad is not None
    torch.testing.assert_close(leaf.tensor.grad, part.runs().gather(dense))


@pytest.mark.parametrize("num_columns", [0, 1, 7, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_thin_products_have_few_rows(num_columns: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(24, 40, dtype=dtype), torch.randn(40, num_columns, dtype=dtype)
    shapes = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                shapes.append(tuple(out.shape))
            return out

    with Watched():
        found = products.multiply(left, right)
    assert shapes and set(shapes) == {(num_columns, 24) if num_columns < 16 else (24, 16)}
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(
        found.double(), left.double() @ right.double(), rtol=tolerance, atol=10 * tolerance
    )
