"""The AdamW step of the kernels, once more: float64, whole tensors, the paper's symbols."""

from __future__ import annotations

import torch
from torch import Tensor

from childtuning.kernels import AdamWStep

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
