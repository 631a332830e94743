"""Divergence of two predictions for the same batch. Shapes: B examples, P positions, N predictions, C classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from childtuning.errors import ModelError
from childtuning.training import IGNORED, LossStep, predicted_labels


def divergence(step: LossStep, first: Tensor, second: Tensor, *, share: float = 1.0) -> Tensor:
    """Return the symmetric divergence of two outputs for a batch, averaged over its predictions.

    Classes: share · [KL(p‖q) + KL(q‖p)] = share · Σ_c (p_c − q_c)(log p_c − log q_c). The product is never negative and
    stays accurate if p is close to q, as after a small perturbation; the sum of the two KLs does not.
    Multi-label: the same for the two outcomes of each label, summed over the labels.
    Regression: the squared difference. The task is a regression if the model's configuration specifies it, if there is
    a single output, or if labels are floating point.

    There is one prediction per example [B, C], or per position with a label [B, P, C]: −100 is no label, and a causal
    language model predicts the next token's label. Half precision is computed in float32. Gradients flow into both.

    Args:
        step: the pass whose inputs contain the labels.
        first, second: logits of two passes over them.
        share: the factor of KL in each direction.
    Raises:
        ModelError: when the logits have another shape.
    """
    first, second = _at_least_single(first), _at_least_single(second)
    kind = _kind(step, first)
    if kind == "regression":
        return (first - second).square().mean()
    first, second = _predictions(step, first), _predictions(step, second)
    if kind == "several labels":
        apart = (first.sigmoid() - second.sigmoid()) * (first - second)
    else:
        log_p, log_q = F.log_softmax(first, -1), F.log_softmax(second, -1)
        apart = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    return share * apart.sum() / max(len(first), 1)


def _kind(step: LossStep, logits: Tensor) -> Literal["regression", "several labels", "classes"]:
    problem = getattr(getattr(step.bare_model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return "several labels"
    labels = step.inputs.get("labels")
    floating = isinstance(labels, Tensor) and labels.is_floating_point()
    single = logits.ndim == 1 or logits.shape[-1] == 1
    return "regression" if problem == "regression" or single or floating else "classes"


def _predictions(step: LossStep, logits: Tensor) -> Tensor:
    """The logits of all predictions: [N, C]."""
    labels = step.inputs.get("labels")
    if logits.ndim == 2:
        return logits
    if logits.ndim != 3 or (labels is not None and labels.ndim != 2):
        shapes = f"logits of shape {list(logits.shape)}" + (
            "" if labels is None else f" and labels of shape {list(labels.shape)}"
        )
        raise ModelError(
            f"a divergence needs one prediction per example or one per token, got {shapes}. "
            "Leave out the method that adds it."
        )
    if labels is None:
        return logits.flatten(0, 1)
    return logits[predicted_labels(step.bare_model, labels, logits.shape[1]) != IGNORED]


def _at_least_single(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
