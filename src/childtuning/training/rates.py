"""A learning rate and a number of epochs that suit a model, a method and the number of examples.

AdamW moves every entry by about the learning rate in each step, so that what a layer adds to its output grows with
the number of its inputs: the rate that suits a network falls as 1 / width [Yang et al. 2021, arXiv 2203.03466]. The
constants were measured with the packaged model: ``docs/learning-rates.md`` has the table.
"""

from __future__ import annotations

import math

from torch import nn

from childtuning.child.eligible import is_conv1d

RATE = 5e-5
"""The rate of full tuning at ``WIDTH``, and of a child."""
WIDTH = 768
"""The width of BERT-base."""
STEPS = 300
"""The steps that a new head and its features need, however few the examples are."""
EPOCHS = (3, 20)
"""The fewest and the most passes over the training set."""


def layer_width(model: nn.Module) -> int:
    """Return the number of inputs of a model's typical layer: the median over the entries of its weight matrices.

    768 for BERT-base, 384 for MiniLM; of a convolution, input channels times kernel. ``WIDTH`` for a model without such
    layers.
    """
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if is_conv1d(module):
            found.append((weight.shape[0], weight.numel()))  # type: ignore[union-attr]
        elif isinstance(module, nn.Linear):  # a quantised one stores its weight in another shape
            found.append((module.in_features, module.in_features * module.out_features))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found.append((weight[0].numel(), weight.numel()))  # type: ignore[union-attr,index]
    left = sum(entries for _, entries in found) / 2
    for width, entries in sorted(found):
        left -= entries
        if left <= 0:
            return width
    return WIDTH


def suggested_rate(model: nn.Module, times: float = 1.0) -> float:
    """Return a peak learning rate for AdamW with warm-up and linear decay, to two digits.

    Args:
        model: the pretrained model.
        times: the method's factor, ``Method.rate``: 1 for full tuning and children, 3 for LoRA.
    """
    return float(f"{times * RATE * WIDTH / layer_width(model):.1e}")


def suggested_epochs(num_examples: int, batch_size: int) -> int:
    """Return the passes over the training set that make ``STEPS`` steps, within ``EPOCHS``.

    Args:
        num_examples: training examples, at least 1.
        batch_size: examples per optimizer step, over all processes and accumulated batches.
    """
    fewest, most = EPOCHS
    return min(most, max(fewest, math.ceil(STEPS * batch_size / num_examples)))
