"""Take batches apart: how many examples a batch has, and one or some of them as a batch of their own.

The number of examples is the first axis that all tensors agree on. Tensors without axes or of length 1 are shared, and
so is everything that is not a tensor. A list inside the batch with one item per example (ragged sequences, masks of
objects) is split by item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor

from childtuning.errors import DataError

IGNORED_LABEL = -100  # as torch's cross entropy and Hugging Face mark positions without a label


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on the model's device; the batch itself is not changed.

    Raises:
        DataError: the device is ``meta``.
    """
    if device.type == "meta":
        raise DataError("the model is on the meta device, where tensors have no values. Load its weights.")
    return _mapped(batch, lambda tensor: tensor.detach().to(device))


def num_examples(batch: Any) -> int:
    """Return the number of examples.

    Raises:
        DataError: no tensor counts examples, or tensors disagree.
    """
    lengths = {path: len(t) for path, t in _tensors(batch, lists=False) if t.dim()}
    if not lengths:
        lengths = {path: len(t) for path, t in _tensors(batch) if t.dim()}
    if not lengths:
        raise DataError(
            f"a batch must hold tensors whose first axis counts examples, got {type(batch).__name__}. "
            "Pass dicts, tuples or tensors."
        )
    size = next((length for length in lengths.values() if length != 1), 1)
    _check(batch, size, "", lists=False)
    return size


def num_entries(batch: Any) -> int:
    """Return the number of entries of a batch's tensors: a measure of its size."""
    return sum(tensor.numel() for _, tensor in _tensors(batch))


def _check(batch: Any, size: int, path: str, *, lists: bool) -> None:
    """Refuse a batch with a tensor whose first axis is not the examples."""
    if isinstance(batch, Tensor):
        if batch.dim() and len(batch) not in (1, size):
            raise DataError(
                f"the first axis of every tensor in a batch must count examples, got {size} and, in "
                f"{path or 'the batch'}, {tuple(batch.shape)}. Put the examples first, or pass a list of one tensor an "
                "example."
            )
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            _check(value, size, f"{path}[{key!r}]", lists=True)
    elif isinstance(batch, (list, tuple)) and not (lists and _is_one_an_example(batch, size, path)):
        for index, value in enumerate(batch):
            _check(value, size, f"{path}[{index}]", lists=True)


def _is_one_an_example(items: Any, size: int, path: str = "") -> bool:
    """Tell whether a list inside the batch holds one item for each example.

    Raises:
        DataError: it may, and its tensors may as well hold one row for each.
    """
    if len(items) != size:
        return False
    lengths = {len(tensor) if tensor.dim() else 1 for _, tensor in _tensors(items)}
    if size > 1 and size in lengths and lengths <= {1, size}:
        raise DataError(
            f"{path or 'a list'} holds {size} items of {size} rows in a batch of {size} examples, which may be one "
            "item or one row an example. Stack them to one tensor, or pass another batch size."
        )
    return bool(lengths - {size}) if lengths else isinstance(items, list)  # a tuple of numbers is a size


def examples(batch: Any, size: int, indices: list[int]) -> Any:
    """Return some examples as a batch, each as it was given."""

    def rows(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != size:
            return tensor
        return tensor.narrow(0, indices[0], 1) if len(indices) == 1 else tensor[indices]

    return _mapped(batch, rows, size, lambda items: [items[index] for index in indices])


def example(batch: Any, size: int, index: int) -> Any:
    """Return one example as a batch of one, as it was given."""
    return examples(batch, size, [index])


def example_tensors(batch: Any, size: int) -> list[Tensor]:
    """Return the tensors that count examples, and those of lists with one item an example."""
    found: list[Tensor] = []

    def rows(tensor: Tensor) -> Tensor:
        if tensor.dim() and len(tensor) == size:
            found.append(tensor)
        return tensor

    def entries(items: Any) -> Any:
        found.extend(tensor for _, tensor in _tensors(items))
        return items

    _mapped(batch, rows, size, entries)
    return found


def is_ragged(batch: Any, size: int) -> bool:
    """Tell whether a list inside the batch has one item an example."""
    found: list[Any] = []
    _mapped(batch, lambda tensor: tensor, size, lambda items: found.append(items) or items)
    return bool(found)


def with_example_tensors(batch: Any, size: int, tensors: Iterable[Tensor]) -> Any:
    """Return the batch with other tensors in place of those that count examples, in their order."""
    others = iter(tensors)
    return _mapped(
        batch, lambda t: next(others) if t.dim() and len(t) == size else t, size, lambda items: items
    )


def is_token_level(labels: Any) -> TypeGuard[Tensor]:
    """Tell whether the labels are a class for each position: whole numbers [B, T]."""
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


_OF_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def packed_sequences(batch: Any) -> list[slice]:
    """Return where the sequences of a packed row of a causal language model lie; nothing where a batch is none.

    A packed row [1, T] has no ``attention_mask`` and holds sequences one after another: ``position_ids`` start anew at
    each, or ``cu_seq_lens_q`` counts where they end. [transformers' DataCollatorWithFlattening, TRL's packing] A
    sequence without a label behind its first token is no example.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not is_token_level(labels) or len(labels) != 1 or batch.get("attention_mask") is not None:
        return []
    others = [value for key, value in batch.items() if key not in _OF_ROW and isinstance(value, Tensor)]
    if any(value.dim() and value.shape[:2] != labels.shape for value in others):
        return []
    positions, ends = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if positions is not None:
        starts = (positions[0, 1:] != positions[0, :-1] + 1).nonzero().flatten() + 1
    elif ends is not None:
        starts = ends[1:-1]
    else:
        return []
    bounds = [0, *starts.tolist(), labels.shape[1]]
    found = [slice(start, stop) for start, stop in pairwise(bounds)]
    read = labels[0] != IGNORED_LABEL
    found = [where for where in found if bool(read[where.start + 1 : where.stop].any())]
    return found if len(found) > 1 else []


def packed_sequence(batch: Mapping[str, Any], where: slice) -> dict[str, Any]:
    """Return one sequence of a packed row as a batch of one."""
    return {
        key: value[:, where] if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
        if key not in _OF_ROW
    }


def unpacked(batch: Any) -> list[Any]:
    """Return a batch with an example a row: a packed row as padded batches, none of them larger than it was."""
    sequences = sorted(packed_sequences(batch), key=lambda where: where.stop - where.start)
    if not sequences:
        return [batch]
    found: list[Any] = []
    while sequences:
        longest = sequences[-1].stop - sequences[-1].start
        count = max(batch["labels"].shape[1] // longest, 1)
        found.append(_padded([packed_sequence(batch, where) for where in sequences[-count:]], longest))
        del sequences[-count:]
    return found


def _padded(sequences: list[dict[str, Any]], length: int) -> dict[str, Any]:
    def joined(key: str) -> Tensor:
        rows = [sequence[key] for sequence in sequences]
        whole = rows[0].new_full(
            (len(rows), length, *rows[0].shape[2:]), IGNORED_LABEL if key == "labels" else 0
        )
        for into, row in zip(whole, rows, strict=True):
            into[: row.shape[1]] = row[0]
        return whole

    batch = {
        key: joined(key) if isinstance(value, Tensor) and value.dim() else value
        for key, value in sequences[0].items()
    }
    sizes = batch["labels"].new_tensor([sequence["labels"].shape[1] for sequence in sequences])
    mask = torch.arange(length, device=sizes.device) < sizes[:, None]
    return {**batch, "attention_mask": mask.to(sizes.dtype)}


def _mapped(
    batch: Any,
    tensor_fn: Callable[[Tensor], Tensor],
    size: int | None = None,
    entries_fn: Callable[[Any], Any] | None = None,
    *,
    inside: bool = False,
) -> Any:
    """Return the batch with its tensors, and lists with one item an example, replaced by what the functions return."""
    if isinstance(batch, Tensor):
        return tensor_fn(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, tensor_fn, size, entries_fn, inside=True) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if inside and entries_fn is not None and size is not None and _is_one_an_example(batch, size):
            return _rebuilt(batch, entries_fn(batch))
        return _rebuilt(batch, [_mapped(value, tensor_fn, size, entries_fn, inside=True) for value in batch])
    return batch


def _rebuilt(batch: Any, values: Iterable[Any]) -> Any:
    """A sequence of the batch's own type; a named tuple takes its values one by one."""
    values = list(values)
    is_named = hasattr(batch, "_fields") and len(values) == len(batch)
    return (
        type(batch)(*values)
        if is_named
        else list(values)
        if hasattr(batch, "_fields")
        else type(batch)(values)
    )


def _tensors(
    batch: Any, path: str = "", *, lists: bool = True, inside: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch with their places; without those in lists inside it where ``lists`` is False."""
    if isinstance(batch, Tensor):
        yield path, batch
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(batch, Mapping):
        items = batch.items()
    elif isinstance(batch, (list, tuple)) and (lists or not inside):
        items = enumerate(batch)
    for key, value in items:
        yield from _tensors(value, f"{path}[{key!r}]", lists=lists, inside=True)
