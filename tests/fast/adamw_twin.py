"""The AdamW step of the kernels, once more: float64, whole tensors, the paper's symbols. And parameters to update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from childtuning.child import Granularity, Part
from childtuning.fast.adamw import ChildTable
from childtuning.fast.library import AdamWStep, Member
from childtuning.fast.runs import Runs

DECOUPLED = AdamWStep(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, step=3, scale=4.0)
COUPLED = AdamWStep(
    lr=0.02, beta1=0.8, beta2=0.99, eps=1e-7, weight_decay=0.05, step=1, decoupled=False, scale=-1.5
)
STEPS = {"adamw": DECOUPLED, "adam, L2, maximised": COUPLED}


def twin(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: AdamWStep, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight and moments after a step, float64; entries that are not kept have a gradient of 0."""
    w, g, m, v = w.double(), g.double() * step.scale, m.double(), v.double()
    if keep is not None:
        g = torch.where(keep, g, 0.0)
    if not step.decoupled:
        g = g + step.weight_decay * w
    m = step.beta1 * m + (1 - step.beta1) * g
    v = step.beta2 * v + (1 - step.beta2) * g * g
    if step.decoupled:
        w = w - step.lr * step.weight_decay * w
    m_hat, v_hat = m / (1 - step.beta1**step.step), v / (1 - step.beta2**step.step)
    return w - step.lr * m_hat / (v_hat.sqrt() + step.eps), m, v


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Compare with float64 numbers of order 1, up to a few roundings to got's dtype."""
    unit = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double().cpu(), expected.cpu(), rtol=4 * unit, atol=4 * unit)


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same ones for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def child_of(numel: int, width: int, seed: int) -> Runs:
    """A third of a parameter's runs of this width, at random."""
    order = torch.randperm(numel // width, generator=torch.Generator().manual_seed(seed))
    return Runs(order[: numel // width // 3].sort().values.to(torch.int32), width)


def columns_of(shape: tuple[int, ...]) -> Runs:
    """Every second column of a matrix or kernel [O, I, …]."""
    units = torch.arange(0, shape[1], 2)
    return Part(shape, units, Granularity("column")).runs()


def table_of(kept: Sequence[Runs], device: str = "cpu") -> ChildTable:
    """The table of these runs, brought to a device."""
    return ChildTable([runs.to(torch.device(device)) for runs in kept])


def child_members(
    kept: Sequence[Runs],
    shapes: Sequence[tuple[int, ...]],
    steps: Sequence[AdamWStep],
    *,
    compact: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> list[Member]:
    """A member for each parameter, on the CPU; those in compact have the trained entries' gradient alone.

    Compact gradients are float32, as a leaf's may be; weights of 16 bits have master values.
    """
    members = []
    for i, (runs, shape, step) in enumerate(zip(kept, shapes, steps, strict=True)):
        weight, gradient = draws(*shape, seed=i, dtype=dtype), draws(*shape, seed=40 + i, dtype=dtype)
        if i in compact:
            gradient = runs.gather(gradient, torch.float32)
        first, second, master = (draws(len(runs), seed=50 + 10 * i + k) for k in range(3))
        has_master = dtype != torch.float32
        members.append(Member(weight, gradient, first, second**2, step, master if has_master else None))
    return members


def copied(m: Member, device: str = "cpu") -> Member:
    """A copy on a device."""
    tensors = (m.weight, m.gradient, m.first, m.second)
    master = None if m.master is None else m.master.to(device, copy=True)
    return Member(*(tensor.to(device, copy=True) for tensor in tensors), m.step, master)


def assert_stepped(
    before: Member, after: Member, runs: Runs, rounded: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to
) -> None:
    """Compare the child's entries with the twin's, and all others with what they were, bitwise."""
    is_dense = before.gradient.numel() == before.weight.numel()
    gradient = runs.gather(before.gradient) if is_dense else before.gradient
    inside, weight = runs.gather(before.weight), after.weight.cpu().clone()
    start = inside if before.master is None else before.master
    w, m, v = twin(start, gradient, before.first, before.second, before.step)
    if after.master is None:
        assert_near(runs.gather(weight), w)
    else:
        assert_near(after.master, w)
        assert torch.equal(runs.gather(weight), rounded(after.master.cpu(), weight.dtype))
    assert_near(after.first, m)
    assert_near(after.second, v)
    runs.scatter_(weight, inside)
    assert torch.equal(weight, before.weight)
    assert torch.equal(after.gradient.cpu(), before.gradient)


def assert_same(before: Member, after: Member) -> None:
    """Compare every tensor, bitwise."""
    for name in ("weight", "gradient", "first", "second"):
        assert torch.equal(getattr(after, name).cpu(), getattr(before, name))


def assert_updated(got: Member, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare weight and moments with the twin's."""
    for tensor, wanted in zip((got.weight, got.first, got.second), expected, strict=True):
        assert_near(tensor, wanted)
