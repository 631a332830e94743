"""Take batches apart: how many examples, one example alone, its own padding cut off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from childtuning.errors import DataError

IGNORED_LABEL = -100  # as torch's cross entropy and Hugging Face mark positions without a label
_SEQUENCE_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on the device; the batch itself is not changed."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return _rebuilt(batch, (to_device(value, device) for value in batch))
    return batch


def _rebuilt(batch: Any, values: Iterable[Any]) -> Any:
    """A sequence of the batch's own type; a named tuple takes its values one by one."""
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def num_examples(batch: Any) -> int:
    """Return the length of the first tensor in the batch.

    Raises:
        DataError: there is none.
    """
    size = _first_length(batch)
    if size is None:
        raise DataError(
            f"a batch must hold tensors whose first axis counts examples, got {type(batch).__name__}. "
            "Pass dicts, tuples or tensors."
        )
    return size


def _first_length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    values = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    )
    return next((size for size in map(_first_length, values) if size is not None), None)


def example(batch: Any, index: int, size: int) -> Any:
    """Return one example as a batch of one, without its trailing padding."""
    return examples(batch, [index], size)


def examples(batch: Any, indices: list[int], size: int) -> Any:
    """Return some examples as a batch, without the padding that trails all of them."""
    return without_trailing_padding(_rows(batch, indices, size))


def _rows(batch: Any, indices: list[int], size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[indices] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _rows(value, indices, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if len(batch) == size and not any(isinstance(value, Tensor) for value in batch):
            return _rebuilt(batch, (batch[index] for index in indices))
        return _rebuilt(batch, (_rows(value, indices, size) for value in batch))
    return batch


def without_trailing_padding(batch: Any) -> Any:
    """Cut the columns after the last one that any row attends to; leading padding stays, it sets positions."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return batch
    used = mask.bool().any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else mask.shape[1]
    if length == mask.shape[1]:
        return batch
    return {
        key: value[:, :length].contiguous()  # models view their labels flat
        if key in _SEQUENCE_KEYS and isinstance(value, Tensor) and value.shape == mask.shape
        else value
        for key, value in batch.items()
    }


def own_labels(batch: Any) -> Any:
    """Set labels after an example's last attended position to −100: alone, it would not have them."""
    if not isinstance(batch, Mapping):
        return batch
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, Tensor) or not is_token_level(labels) or mask.shape != labels.shape:
        return batch
    attended_later = mask.bool().flip(1).cummax(1).values.flip(1)
    attended_later |= ~attended_later[:, :1]  # nothing attended: such an example is not cut either
    return {**batch, "labels": labels.masked_fill(~attended_later, IGNORED_LABEL)}


def is_token_level(labels: Any) -> TypeGuard[Tensor]:
    """Tell whether the labels are a class for each position: whole numbers [B, T]."""
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def class_labels(batch: Any, size: int) -> list[tuple[int, ...]]:
    """Return each example's class: its entry of ``labels``, or of every tensor with one whole number an example."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    tensors = [labels] if isinstance(labels, Tensor) else _tensors(batch)
    columns = [
        tensor.tolist()
        for tensor in tensors
        if tensor.dim() == 1
        and len(tensor) == size
        and not (tensor.is_floating_point() or tensor.is_complex())
    ]
    return list(zip(*columns, strict=True)) if columns else [()] * size


def contrasting_pair(batch: Any, size: int) -> list[int]:
    """Return the first example and the one least like it in labels and lengths: where weights of examples show."""
    looks = [_looks(tensor) for tensor in _tensors(batch) if tensor.dim() and len(tensor) == size]
    unlike = [sum(look[index] != look[0] for look in looks) for index in range(1, size)]
    return [0, 1 + max(range(size - 1), key=unlike.__getitem__)]


def _looks(tensor: Tensor) -> list[int]:
    """A class label as it is; of a row of whole numbers, how many are neither padding nor ignored."""
    if tensor.is_floating_point() or tensor.is_complex():
        return [0] * len(tensor)
    if tensor.dim() > 1:
        tensor = ((tensor != 0) & (tensor != IGNORED_LABEL)).flatten(1).sum(1)
    return tensor.tolist()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    values = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    )
    for value in values:
        yield from _tensors(value)
