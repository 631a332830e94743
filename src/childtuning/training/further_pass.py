"""Extra forward passes besides the trainer's own, and the label predicted at each position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from childtuning.fisher.losses import shifts_labels


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile.

    Extra passes use it: compiled code ignores hooks added later, and DDP prepares for a backward pass in each of its
    forward passes. DDP still averages the gradients of all passes, where they are accumulated.
    """
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
            continue
        compiled = vars(model).get("_orig_mod") or model._modules.get("_orig_mod")
        if compiled is None:
            return model
        model = compiled


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of normalisation layers bitwise unchanged by forward passes."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    counts = [None if count is None else count.clone() for _, count in before]
    # Restoring a copy would not do: the backward pass of an earlier forward pass fails if its buffers were modified.
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count), kept in zip(layers, before, counts, strict=True):
            layer.momentum = momentum
            if count is not None and kept is not None:
                count.copy_(kept)


IGNORED = -100


def predicted_labels(model: nn.Module, labels: Tensor, num_positions: int) -> Tensor:
    """Return the label that is predicted at each position: [B, T] -> [B, P], −100 where there is none.

    A causal language model predicts the next token's label at each position, as in its loss. Positions without a
    label, such as those of a soft prompt, come first.

    Args:
        model: unwrapped; causal language models are recognised by their class name, as in transformers.
        labels: one per token.
        num_positions: P, at least T.
    """
    labels = F.pad(labels, (num_positions - labels.shape[-1], 0), value=IGNORED)
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if shifts_labels(model) else labels
