"""Mixed precision, checkpoints, compilation, function transforms, and what autograd may do with the result."""

from __future__ import annotations

import copy

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
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from childtuning.child import Part
from childtuning.fast.layers import Leaf
from childtuning.fast.structured import install

# Dynamo makes an instance of autograd.Function, of which torch then complains.
IGNORE_DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Small(nn.Module):
    """Every kind of layer once."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 8, padding_idx=0)
        self.mix = nn.Conv1d(8, 12, 3, padding=1)
        self.up = nn.Linear(12, 16)
        self.down = Conv1D(6, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.words(tokens).transpose(1, 2)).relu_().transpose(1, 2)
        return self.down(self.up(x).relu_()).tanh().sum()


def _parts(model: nn.Module) -> dict[str, Part]:
    kinds = {"words": "rows", "mix": "rows", "up": "blocks", "down": "columns"}
    return {f"{n}.weight": part_of(tuple(model.get_submodule(n).weight.shape), k) for n, k in kinds.items()}


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 13, (4, 9))


def test_small_model(small: Small, tokens: torch.Tensor) -> None:
    check(small, _parts(small), lambda model: model(tokens))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "rows") for name in ("linear-2d", "linear-3d", "conv1d-gpt2", "conv2d", "conv1d")]
    + [(name, "blocks") for name in ("linear-2d", "conv1d-gpt2", "conv2d-pointwise")],
)
def test_autocast_as_torch_does(name: str, kind: str) -> None:
    torch.manual_seed(1)
    make_layer, make_input = LAYERS[name]
    layer, x = make_layer(), make_input().detach().float().requires_grad_()
    twin, part = copy.deepcopy(layer), part_of(tuple(layer.weight.shape), kind)
    leaf = leaf_of(part, layer.weight)
    install(layer, {"weight": leaf})
    results = []
    for model in (twin, layer):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().sum()
        loss.backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        results.append((y.detach(), x.grad, *(() if model.bias is None else (model.bias.grad,))))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
    assert leaf.tensor.grad is not None and leaf.tensor.grad.dtype == torch.float32
    torch.testing.assert_close(leaf.tensor.grad, entries(twin.weight.grad, part), rtol=1.6e-2, atol=1e-2)


def test_autocast_leaves_float64_alone() -> None:
    layer = nn.Linear(5, 7).double()
    install(layer, leaves_of(layer, {"weight": part_of((7, 5), "rows")}))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 5, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parts = {
        f"{i}.weight": part_of(tuple(model[i].weight.shape), kind) for i, kind in ((0, "rows"), (2, "blocks"))
    }
    check(model, parts, lambda model: checkpoint(model, x, use_reentrant=reentrant).square().sum())


@IGNORE_DYNAMO
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(small: Small, tokens: torch.Tensor, autocast: bool) -> None:
    torch._dynamo.reset()
    parts = _parts(small)

    def run(model) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(tokens)

    expected = dense_twin(small, run)
    leaves = leaves_of(small, parts)
    install(small, leaves)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    for _ in range(2):  # the second time into the gradient that is there
        run(compiled).backward()
    for name, part in parts.items():
        leaf = leaves[name].tensor
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, 2 * entries(expected[name], part), **tolerance)
    torch.testing.assert_close(small.up.bias.grad, 2 * expected["up.bias"], **tolerance)


@IGNORE_DYNAMO
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conv2d-depthwise", "rows"),
        ("conv2d-depthwise", "run"),
        ("conv2d-pointwise", "blocks"),
        ("conv2d-single", "rows"),
    ],
)
def test_compiled_convolutions(name: str, kind: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make_layer, make_input = LAYERS[name]
    layer, x = make_layer().double(), make_input()
    part = part_of(tuple(layer.weight.shape), kind)
    expected = dense_twin(layer, lambda model: model(x).sin().sum())["weight"]
    leaf = leaf_of(part, layer.weight)
    install(layer, {"weight": leaf})
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sin().sum().backward()
    assert leaf.tensor.grad is not None
    torch.testing.assert_close(leaf.tensor.grad, entries(expected, part))


@IGNORE_DYNAMO
def test_compiled_code_sees_replaced_groups() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9), torch.randn(4, 6)
    dense = dense_twin(layer, lambda model: model(x).square().sum())["weight"]
    leaf = leaf_of(nothing_of((9, 6)), layer.weight)
    install(layer, {"weight": leaf})
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in ([], [0, 4], [1, 2], [3, 5, 8], [0, 1, 2, 3, 7]):
        leaf.groups = [(torch.tensor(rows, dtype=torch.int64), None)]
        leaf.tensor = Leaf.of([], 6 * len(rows), layer.weight).tensor
        compiled(x).square().sum().backward()
        assert leaf.tensor.grad is not None
        torch.testing.assert_close(leaf.tensor.grad.view(-1, 6), dense[rows])


def test_a_mapped_model_is_the_plain_one(small: Small) -> None:
    """Values under vmap, and each batch's gradients under vmap of grad."""
    batches = torch.randint(0, 13, (3, 4, 9))
    values = torch.stack([small(tokens) for tokens in batches])
    expected = [dense_twin(small, lambda model, tokens=tokens: model(tokens)) for tokens in batches]
    install(small, leaves_of(small, _parts(small)))
    torch.testing.assert_close(torch.func.vmap(small)(batches), values)

    def loss(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(small, weights, (tokens,))

    weights = {name: p.detach() for name, p in small.named_parameters()}
    by_batch = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, batches)
    for name, found in by_batch.items():
        torch.testing.assert_close(found, torch.stack([one[name] for one in expected]))


@IGNORE_DYNAMO
def test_a_compiled_map_is_the_plain_one_and_leaves_the_layers_in_use() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9), torch.randn(4, 6)
    dense, plain = dense_twin(layer, lambda model: model(x).square().sum())["weight"], layer(x)
    part = part_of((9, 6), "rows")
    leaf = leaf_of(part, layer.weight)
    install(layer, {"weight": leaf})
    mapped = torch.compile(lambda x: torch.func.vmap(layer)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(mapped(x), plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(leaf.tensor.grad, entries(dense, part))


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_may_be_changed_in_place(name: str) -> None:
    make_layer, make_input = LAYERS[name]
    layer, x = make_layer().double(), make_input()
    check(layer, {"weight": part_of(tuple(layer.weight.shape), "rows")}, lambda model: model(x).exp_().sum())


def test_double_backward_is_refused() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(2, 5, requires_grad=True)
    install(layer, leaves_of(layer, {"weight": part_of((7, 5), "rows")}))
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_no_graph_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(5, 7), torch.randn(2, 5)
    install(layer, leaves_of(layer, {"weight": part_of((7, 5), "rows")}))
    monkeypatch.delattr(type(layer), "compute")  # what is plain runs as it would without structured layers
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
