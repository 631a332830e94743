"""Each way in which a function can use a parameter: the engine's squares are those of a loop, or it hands it back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from childtuning.fast.gradients import Computed, Dense, Outer, Rows
from childtuning.fast.per_example import Inputs, PerExampleEngine
from childtuning.fast.watch import Layout, differs, find_layouts

B, T, D = 4, 3, 5


class Uses(nn.Module):
    """Parameters of several shapes, and a function that uses some of them."""

    def __init__(self, function: Callable[[Uses, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"d": (D,), "td": (T, D), "one": (1, 1, D), "square": (D, D), "tt": (T, T), "scalar": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        self.table = nn.Parameter(torch.randn(7, D, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.function(self, x, ids)


def _in_place(m: Uses, x: Tensor, ids: Tensor) -> Tensor:
    y = (x @ m.square).clone()
    y += m.td
    y.mul_(m.d)
    return y


def _relative(m: Uses, x: Tensor, ids: Tensor) -> Tensor:
    bias = m.table[(torch.arange(T)[:, None] - torch.arange(T)).abs()].permute(2, 0, 1).unsqueeze(0)
    return F.scaled_dot_product_attention(*[x.unsqueeze(1).expand(-1, D, -1, -1)] * 3, attn_mask=bias)


SERVED: dict[str, Callable[[Uses, Tensor, Tensor], Tensor]] = {
    "operators": lambda m, x, ids: (1 - m.d) * x + 2 / (3 + m.td.square()) - (m.scalar - x) ** 2,
    "where": lambda m, x, ids: torch.where(x > 0, m.td, x),
    "in place": _in_place,
    "from the left": lambda m, x, ids: m.tt @ x,
    "products": lambda m, x, ids: torch.tanh(x @ m.square.t()) @ (m.square @ m.square),
    "tied": lambda m, x, ids: F.linear(F.embedding(ids, m.table) + x, m.table),
    "a shared table": lambda m, x, ids: x + F.embedding(torch.arange(T), m.table) + m.table[:T],
    "a table for each": lambda m, x, ids: x * F.embedding(torch.arange(T).expand(B, T)[: len(x)], m.table),
    "joined": lambda m, x, ids: torch.cat([m.one.expand(len(x), -1, -1), x], 1),
    "repeated": lambda m, x, ids: torch.cat([m.one.repeat(len(x), 1, 1), x], 1).square(),
    "repeated rows": lambda m, x, ids: x.flatten(0, 1) * m.td.repeat(len(x), 1),
    "stacked": lambda m, x, ids: torch.stack([x[:, 0], x[:, 1] * m.d], 1),
    "relative positions": _relative,
    "time first": lambda m, x, ids: F.linear(x.transpose(0, 1), m.square, m.d).transpose(0, 1),
    "interleaved": lambda m, x, ids: (
        F.linear(x.mT.permute(2, 0, 1).reshape(-1, D), m.square, m.d).view(T, -1, D).transpose(0, 1)
    ),
    "several rows": lambda m, x, ids: F.layer_norm(x.reshape(-1, D), (D,), m.d, m.one.flatten()),
    "split": lambda m, x, ids: x * m.square.chunk(2, 0)[0][0] + m.square.unbind(1)[1],
    "unused": lambda m, x, ids: (F.linear(x, m.square), x * m.d)[1],
    "a view is written to": lambda m, x, ids: F.linear(x, m.square).div_(2).clamp_(min=0),
}
HANDED_BACK: dict[str, tuple[Callable[[Uses, Tensor, Tensor], Tensor], set[str]]] = {
    "no rule": (lambda m, x, ids: torch.einsum("bti,oi->bto", x, m.square) * m.d, {"square"}),
    "a slope for each channel": (lambda m, x, ids: F.prelu(x.mT, m.d), {"d"}),
    "a list of weights": (
        lambda m, x, ids: torch.gru(
            x,
            x.new_zeros(1, len(x), 1),
            [m.td[:, :5], m.tt[:, :1], m.d[:3], m.d[:3]],
            True,
            1,
            0.0,
            False,
            False,
            True,
        )[0],
        {"td", "tt", "d"},
    ),
    "written to": (lambda m, x, ids: x.index_fill(1, torch.tensor(0), m.scalar) * m.d, {"scalar"}),
    "a mean over the batch": (lambda m, x, ids: x * (m.d * x.mean()), {"d"}),
}


def squares(
    function: Callable[[Uses, Tensor, Tensor], Tensor], has_losses: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """The engine's sums of squares, the loop's, and what the engine handed back."""
    model = Uses(function)
    x, ids = (
        torch.randn(B, T, D, dtype=torch.float64),
        torch.tensor([[0, 1, 1], [2, 2, 2], [3, 0, 4], [6, 5, 6]]),
    )
    weight = torch.randn(T * D * 9, dtype=torch.float64)

    def loss(rows: slice) -> Tensor:
        size = len(x[rows])
        y = model(x[rows], ids[rows])
        y = y.reshape(size, -1)
        return (y.sin() * weight[: y.shape[1]]).sum()

    wanted, own = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, []
    for index in range(B):
        found = torch.autograd.grad(
            loss(slice(index, index + 1)), list(model.parameters()), allow_unused=True
        )
        own.append([0 if gradient is None else gradient.square() for gradient in found])
        for total, square in zip(wanted.values(), own[-1], strict=True):
            total += square
    model.requires_grad_(False)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def inputs(rows: slice) -> Inputs:
        mine = x[rows], ids[rows]

        def loss_fn(left_out: int | None) -> Tensor:
            y = model(*mine).reshape(len(mine[0]), -1)
            losses = (y.sin() * weight[: y.shape[1]]).sum(1)
            return losses.sum() if left_out is None else losses.sum() - losses[left_out]

        return Inputs(list(mine), loss_fn, has_losses)

    outcome = PerExampleEngine(model, dict(model.named_parameters())).run(
        B, inputs(slice(None)), lambda i: inputs(slice(i, i + 1)), sums, lambda name, add: add(sums[name])
    )
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert (outcome.left_out is not None) == has_losses
    if outcome.left_out is not None:
        for (name, total), square in zip(sums.items(), own[outcome.left_out], strict=True):
            total += 0 if name in outcome.failed else square
    return sums, wanted, set(outcome.failed)


@pytest.mark.parametrize("has_losses", [False, True])
@pytest.mark.parametrize("name", SERVED)
def test_uses_that_are_served(name: str, has_losses: bool) -> None:
    sums, wanted, failed = squares(SERVED[name], has_losses)
    assert not failed
    for parameter, total in wanted.items():
        torch.testing.assert_close(sums[parameter], total)


@pytest.mark.parametrize("name", HANDED_BACK)
def test_uses_that_are_handed_back(name: str) -> None:
    function, expected = HANDED_BACK[name]
    sums, wanted, failed = squares(function)
    assert expected <= failed
    for parameter, total in wanted.items():
        torch.testing.assert_close(sums[parameter], torch.zeros_like(total) if parameter in failed else total)


def test_layouts() -> None:
    x = torch.randn(3, 4, 2, 5)  # T, B, k, D
    alone = [(1, x[:, 1])]
    (outer,) = find_layouts(x.flatten(1, 2), alone, 4)
    assert outer == Layout(4, 1, 2)
    assert torch.equal(outer.split(x.flatten(1, 2)), x.permute(1, 2, 0, 3))
    mixed = x.transpose(1, 2).flatten(1, 2)
    (inner,) = find_layouts(mixed, alone, 4)
    assert inner == Layout(4, 1, 2, interleaved=True)
    assert torch.equal(inner.split(mixed), x.permute(1, 2, 0, 3))
    assert torch.equal(inner.example(mixed, 2), x[:, 2])
    assert len(find_layouts(torch.ones(3, 8, 5), [(1, torch.ones(3, 2, 5))], 4)) == 2
    assert not find_layouts(x, [(0, x)], 4) and not find_layouts(x[..., :1], alone, 4)


def test_large_numbers_do_not_blur_small_ones() -> None:
    mask = torch.tensor([0.0, -3e38, float("-inf")])
    assert not differs(mask, mask) and differs(mask + torch.tensor([0.5, 0, 0]), mask)
    assert not differs(mask.half().clamp(-6e4), mask.half().clamp(-6e4))


def test_forms_of_gradients_agree() -> None:
    left, right = torch.randn(B, T, D), torch.randn(B, T, 2)
    dense = torch.einsum("bto,bti->boi", left, right)
    ids = torch.tensor([[0, 1, 1], [2, 2, 2], [0, 0, 0], [1, 2, 0]])
    rows = torch.stack(
        [torch.zeros(3, D).index_add_(0, i[i != 0], v[i != 0]) for i, v in zip(ids, left, strict=True)]
    )
    for part, wanted in (
        (Outer(left, right), dense),
        (Computed(lambda i: dense[i], B, dense.shape[1:]), dense),
        (Dense(dense), dense),
        (Rows(ids, left, 3, skip=0), rows),
    ):
        score, one = torch.zeros(wanted.shape[1:]), torch.zeros(wanted.shape[1:])
        part.add_squares_(score)
        part.add_(one, 2)
        torch.testing.assert_close(score, wanted.square().sum(0))
        torch.testing.assert_close(one, wanted[2])
