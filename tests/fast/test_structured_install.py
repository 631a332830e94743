"""Structured layers go in and out without a trace, and only where they are sure to be right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.fast.layer_cases import check, dense_twin, entries, leaf_of, leaves_of, part_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from childtuning.errors import ParameterError
from childtuning.fast.layers import StructuredLayer, register_structured
from childtuning.fast.structured import install


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.weight.sum()


def _patched() -> nn.Module:
    layer = nn.Linear(4, 6)
    layer.forward = OwnLinear.forward.__get__(layer)  # type: ignore[method-assign]
    return layer


UNSUPPORTED = {
    "subclass": lambda: OwnLinear(4, 6),
    "attention's own": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6),
    "patched": _patched,
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 2),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "same, uneven": lambda: nn.Conv2d(3, 4, 2, padding="same"),
    "grouped": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "max_norm": lambda: nn.Embedding(8, 4, max_norm=1.0),
    "frequency": lambda: nn.Embedding(8, 4, scale_grad_by_freq=True),
    "sparse": lambda: nn.Embedding(8, 4, sparse=True),
    "bag": lambda: nn.EmbeddingBag(8, 4),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_left_dense(name: str) -> None:
    layer = UNSUPPORTED[name]()
    before = type(layer)
    installed = install(layer, leaves_of(layer, {"weight": part_of(tuple(layer.weight.shape), "rows")}))
    assert installed.names == () and installed.dense == ("weight",)
    assert type(layer) is before


def test_a_shut_room_leaves_everything_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 6)
    leaves = leaves_of(layer, {"weight": part_of((6, 4), "rows")})
    monkeypatch.setenv("CHILDTUNING_FAST", "0")
    assert install(layer, leaves).dense == ("weight",)
    assert type(layer) is nn.Linear
    monkeypatch.delenv("CHILDTUNING_FAST")
    assert install(layer, leaves).names == ("weight",)


@pytest.mark.parametrize("make", [lambda: nn.Embedding(8, 6), lambda: nn.Conv2d(4, 6, 3)])
def test_tiles_that_would_save_nothing_are_left_dense(make) -> None:
    layer = make()
    part = part_of(tuple(layer.weight.shape), "blocks")
    assert install(layer, leaves_of(layer, {"weight": part})).dense == ("weight",)


def test_parametrized_weights_are_left_dense() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 6))
    name = "parametrizations.weight.original1"
    assert install(layer, leaves_of(layer, {name: part_of((6, 4), "rows")})).dense == (name,)


def test_tensor_subclasses_are_left_dense() -> None:
    class Quantized(nn.Parameter):
        pass

    layer = nn.Linear(4, 6)
    layer.weight = Quantized(torch.randn(6, 4))
    assert install(layer, leaves_of(layer, {"weight": part_of((6, 4), "rows")})).names == ()


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), Conv1D(5, 6), nn.Conv2d(1, 3, 2), OwnLinear(2, 3), nn.Embedding(7, 3)
    )


def test_nothing_is_left_behind() -> None:
    model = _model()
    before = [(type(module), dict(vars(module))) for module in model]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    parts = {name: part_of(tuple(model.get_parameter(name).shape), "rows") for name in names}
    installed = install(model, leaves_of(model, parts))
    assert installed.names == ("0.weight", "1.weight", "2.weight", "4.weight")
    assert installed.dense == ("3.weight",)
    assert all(isinstance(module, cls) for module, (cls, _) in zip(model, before, strict=True))
    assert isinstance(model[1], StructuredLayer)
    assert model.state_dict().keys() == state.keys()
    assert [name for name, p in model.named_parameters() if p.dim() > 1] == names
    assert all(p.requires_grad for p in model.parameters())
    copy.deepcopy(model).load_state_dict(state)

    installed.remove()
    installed.remove()
    assert [(type(module), dict(vars(module))) for module in model] == before
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    install(copy.deepcopy(model), leaves_of(model, parts))


def test_unknown_names_and_a_second_installation_are_refused() -> None:
    model = _model()
    leaves = leaves_of(model, {"0.weight": part_of((6, 4), "rows")})
    with pytest.raises(ParameterError, match="Did you mean '0.weight'"):
        install(model, {"0.wieght": leaves["0.weight"]})
    installed = install(model, leaves)
    with pytest.raises(ParameterError, match="remove()"):
        install(model, leaves)
    installed.remove()
    install(model, leaves).remove()


def test_a_refused_installation_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    first = install(model[1], leaves_of(model[1], {"weight": part_of((4, 6), "rows")}))
    parts = {"0.weight": part_of((6, 4), "rows"), "1.weight": part_of((4, 6), "rows")}
    with pytest.raises(ParameterError):
        install(model, leaves_of(model, parts))
    assert type(model[0]) is nn.Linear
    first.remove()


class Tied(nn.Module):
    """An embedding tied to the head, and its weight once more by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight
        self.by_hand = by_hand

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).sin()
        y = self.head(x)
        return (y + F.linear(x, self.words.weight) if self.by_hand else y).square().sum()


def test_tied_weights_share_a_leaf() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(by_hand=False).double(), torch.randint(0, 11, (2, 5))
    check(model, {"words.weight": part_of((11, 6), "rows")}, lambda model: model(tokens))


def test_a_use_elsewhere_comes_as_a_dense_gradient() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(by_hand=True).double(), torch.randint(0, 11, (2, 5))
    part = part_of((11, 6), "rows")
    expected = dense_twin(model, lambda model: model(tokens))["words.weight"]
    leaf = leaf_of(part, model.words.weight)
    install(model, {"words.weight": leaf})
    model(tokens).backward()
    formed, dense = leaf.tensor.grad, model.words.weight.grad
    assert formed is not None and dense is not None
    torch.testing.assert_close(formed + entries(dense, part), entries(expected, part))


def test_a_layer_of_ones_own() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    @register_structured(Scaled)
    class StructuredScaled(StructuredLayer, Scaled):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * F.linear(input, self.weight.detach(), self.bias)

    layer = Scaled(4, 6)
    assert install(layer, leaves_of(layer, {"weight": part_of((6, 4), "rows")})).names == ("weight",)
    assert type(layer) is StructuredScaled
