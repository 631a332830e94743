"""ScoreSums in bf16: what one addition does, bit by bit, and how far long sums stray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from childtuning.child.task_free import random_bits
from childtuning.fisher import rounding
from childtuning.fisher.rounding import add_rounded_

WIDTH = 2048  # sums side by side; their mean strays by a 45th of what one does


def long_sum(terms: Tensor, *, name: str = "sum") -> Tensor:
    """Add terms [n, W] in bf16, in order."""
    total = torch.zeros(terms.shape[1], dtype=torch.bfloat16)
    for number, term in enumerate(terms):
        add_rounded_(total, term, name, number)
    return total


def test_one_addition_is_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    before = (torch.rand(5000, generator=draw) * 3).exp().bfloat16()
    terms = torch.rand(5000, generator=draw) ** 4 * 20
    sums = before.clone()
    add_rounded_(sums, terms, "seed", 3)
    exact = (before.float() + terms).double().numpy()
    step = 2.0 ** (np.floor(np.log2(exact)) - 7)
    low = np.floor(exact / step) * step
    up = (exact - low) / step * 2**16 + random_bits("seed", 3, numel=5000).numpy() >= 2**16
    assert np.array_equal(sums.double().numpy(), low + up * step)
    assert 0 < up.mean() < 1


def test_the_bits_are_the_streams_and_uniform() -> None:
    bits = random_bits("seed", 3, numel=200_000)
    assert torch.equal(bits[65_536 : 65_536 + 99], random_bits("seed", 3, numel=99, start=65_536))
    assert int(bits.min()) >= 0 and int(bits.max()) < 2**16
    assert not torch.equal(bits[:99], random_bits("seed", 4, numel=99))
    counts = (bits >> 8).bincount(minlength=256).double()
    assert float(((counts - 200_000 / 256) ** 2).sum() / (200_000 / 256)) < 255 + 5 * (2 * 255) ** 0.5


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = torch.rand(3, 5000, generator=torch.Generator().manual_seed(1))
    whole = long_sum(terms)
    monkeypatch.setitem(rounding._ENTRIES_AT_ONCE, "cpu", 512)
    assert torch.equal(whole, long_sum(terms))
    assert not torch.equal(whole, long_sum(terms, name="other"))


def test_what_is_not_finite_stays_so() -> None:
    odd = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x400000], dtype=torch.int32).view(torch.float32)
    sums = torch.ones(4, dtype=torch.bfloat16)
    add_rounded_(sums, odd, 0)
    assert sums.isnan().tolist() == [True, True, False, True] and sums[2] == torch.inf


def constant(n: int) -> Tensor:
    return torch.full((n, WIDTH), 0.7)


def squares(n: int) -> Tensor:
    """Squared normal draws: heavy tails, as gradients have them."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(2)) ** 2


def falling(n: int) -> Tensor:
    """The first term is as large as all others together."""
    return torch.cat([torch.full((1, WIDTH), 1.1 * n), torch.full((n - 1, WIDTH), 1.1)])


@pytest.mark.parametrize("n", [12, 1200])
@pytest.mark.parametrize("terms_of", [constant, squares, falling])
def test_long_sums_are_unbiased_and_stray_no_further_than_stated(terms_of, n: int) -> None:
    terms = terms_of(n)
    error = long_sum(terms).double() / terms.double().sum(0) - 1
    bound = 1.01 * min(2**-8 * n**0.5, 2**-4)
    deviation = float(error.square().mean().sqrt())
    assert 0 < deviation <= bound
    assert abs(float(error.mean())) <= 4.5 * deviation / WIDTH**0.5


def test_rounding_to_the_nearest_would_stand_still() -> None:
    total = torch.zeros(1, dtype=torch.bfloat16)
    for term in constant(1200)[:, :1]:
        total += term
    assert float(total) == 256 < 0.4 * 1200 * 0.7
