"""Hashes that tell one base model from another, before and after a child of it was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from childtuning.patterns import canonical_names


def _absorb(digest: hashlib._Hash, tensor: Tensor) -> None:
    tensor = tensor.detach().to("cpu").contiguous()
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def frozen_hash(tensor: Tensor, trained: Tensor | None) -> str:
    """Return the sha256 of what a child leaves alone in a tensor: dtype, shape, and the bits outside the child.

    Training cannot change it, so it is the same before and after, with the delta applied or displaced.

    Args:
        tensor: any dtype and shape.
        trained: flat indices of the child's entries, int64, or ``None`` for none of them.
    """
    digest = hashlib.sha256()
    if trained is not None and len(trained):
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        tensor.view(-1)[trained] = 0
    _absorb(digest, tensor)
    return digest.hexdigest()


def model_hash(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Return the sha256 over all parameters in order, names, dtypes and shapes included.

    Args:
        model: the model.
        without: names of parameters to leave out, such as a new head that is random.
    """
    digest = hashlib.sha256()
    named = dict(model.named_parameters())
    for name, parameter in zip(canonical_names(named), named.values(), strict=True):
        if name not in without:
            digest.update(name.encode())
            _absorb(digest, parameter)
    return digest.hexdigest()
