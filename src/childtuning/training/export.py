"""A delta on its way to production: as a patch of the base's checkpoint, and as a whole model folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from childtuning.child.files import write_atomically
from childtuning.delta import Delta
from childtuning.delta.files import frozen_hash
from childtuning.delta.patch import Patch
from childtuning.errors import BaseMismatchError, ConfigError, ModelError
from childtuning.training.on_disk import INDEX, Checkpoint, Group, Layout, Stored, write_tensors

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".index.json")


def make_patch(delta: Delta, model: Any, base: str | Path | Checkpoint) -> Patch:
    """Return what a delta writes, in the names and places of its base model's checkpoint.

    Args:
        delta: of the model.
        model: of transformers, of the delta's architecture; its values are not read, it may lie on the ``meta`` device.
        base: the folder that the base model was loaded from.
    Raises:
        BaseMismatchError: the checkpoint is another base model's.
        ModelError: it is not of safetensors, has another dtype, lacks what is not trained whole, or a parameter is
            computed from it.
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    layout = Layout(model, checkpoint)
    buffers = {name: value for name, value in delta.buffers.items() if name not in delta.parts}
    written: dict[str, list[tuple[Tensor | None, Tensor]]] = {}
    hashes: dict[str, str] = {}
    there: set[str] = set()
    for group in layout.groups([*delta.parts, *buffers]):
        there.update(group.targets)
        if group.positions is None:
            _take_as_it_is(delta, checkpoint, group, written, hashes)
        else:
            _take_moved(delta, checkpoint, group, written, hashes)
    shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.tensors if name in layout.used}
    added = tuple(name for name in (*delta.parts, *buffers) if name not in there)
    for name in added:
        if name not in buffers and not delta.parts[name].is_whole:
            raise ModelError(
                f"{name!r} is neither in {checkpoint.folder} nor trained whole, so that a patch cannot hold it. "
                "Train it (always=…), or save the model."
            )
        value = buffers[name] if name in buffers else delta.values[name].view(delta.parts[name].shape)
        shapes[name] = tuple(value.shape)
        written[name] = [(None, value)]
    indices, values, taken = {}, {}, set[int]()
    for name in (name for name in shapes if name in written):
        where, what = _in_order(written[name], shapes[name])
        # Tied weights may be stored under two names.
        values[name] = what.clone() if what.data_ptr() in taken else what
        taken.add(what.data_ptr())
        if where is not None:
            indices[name] = where
    known = Path(str(delta.base.get("name") or checkpoint.folder))
    name = known.name if known.is_absolute() or known.exists() else str(known)  # no path travels
    return Patch(shapes, indices, values, hashes, added, {**delta.base, "name": name})


def _take_as_it_is(
    delta: Delta,
    checkpoint: Checkpoint,
    group: Group,
    written: dict[str, list[tuple[Tensor | None, Tensor]]],
    hashes: dict[str, str],
) -> None:
    (source,), (target,) = group.sources, group.targets
    stored, part = checkpoint.tensors[source], delta.parts.get(target)
    value = delta.values.get(target) if part is not None else delta.buffers[target]
    shape = part.shape if part is not None else tuple(delta.buffers[target].shape)
    if value is not None and value.dtype != stored.dtype:
        raise ModelError(
            f"{source!r} is {stored.dtype} in {checkpoint.folder}, and {value.dtype} in the delta. Save the model."
        )
    if shape != stored.shape:
        if part is not None and not part.is_whole:
            raise BaseMismatchError(
                f"{source!r} has shape {list(stored.shape)} in {checkpoint.folder}, the delta is for {list(shape)}."
            )
        raise ModelError(f"{source!r} has another shape in {checkpoint.folder}. Save the model.")
    if target in delta.hashes:
        hashes[source] = delta.hashes[target]
    if value is not None:
        written[source] = [(None if part is None or part.is_whole else part.indices(), value)]


def _take_moved(
    delta: Delta,
    checkpoint: Checkpoint,
    group: Group,
    written: dict[str, list[tuple[Tensor | None, Tensor]]],
    hashes: dict[str, str],
) -> None:
    """Move a delta's entries to where a conversion takes them from, after a check against the values there."""
    assert group.positions is not None
    values = [checkpoint.tensors[name].read() for name in group.sources]
    laid = torch.cat([value.reshape(-1) for value in values])
    starts = torch.tensor([0, *(value.numel() for value in values)], device="cpu").cumsum(0)
    found: list[list[tuple[Tensor | None, Tensor]]] = [[] for _ in values]
    for target, where in group.positions.items():
        part = delta.parts[target]
        if where.shape != part.shape:
            raise ModelError(f"{target!r} has another shape in {checkpoint.folder}. Save the model.")
        entries = part.indices()
        if target in delta.hashes and frozen_hash(laid[where], entries) != delta.hashes[target]:
            raise BaseMismatchError(
                f"the delta was made for another base model: {target!r} differs in {checkpoint.folder}."
            )
        if part.is_empty:
            continue
        if delta.values[target].dtype != laid.dtype:
            raise ModelError(f"{target!r} has another dtype in {checkpoint.folder}. Save the model.")
        places = where.reshape(-1)[entries]
        owners = torch.bucketize(places, starts, right=True) - 1
        for owner in owners.unique().tolist():
            mine = owners == owner
            found[owner].append((places[mine] - starts[owner], delta.values[target].reshape(-1)[mine]))
    for name, value, some in zip(group.sources, values, found, strict=True):
        if some:
            written[name] = some
        moved = torch.cat([where for where, _ in some if where is not None]) if some else None
        if moved is None or len(moved) < value.numel():
            hashes[name] = frozen_hash(value, moved)


def _in_order(
    some: list[tuple[Tensor | None, Tensor]], shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor]:
    """Join entries of one tensor; all of them need no positions."""
    if some[0][0] is None:
        return None, some[0][1].view(shape)
    where = torch.cat([place for place, _ in some if place is not None])
    what = torch.cat([value.reshape(-1) for _, value in some])
    order = where.argsort()
    if len(where) == math.prod(shape):
        return None, what[order].view(shape)
    return where[order].to(torch.int32 if math.prod(shape) <= 2**31 else torch.int64), what[order]


def check_empty(folder: Path) -> None:
    """Raise a ConfigError if a folder to write is not new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output {str(folder)!r} is not an empty folder. Pass a new one.")


def write_model(patch: Patch, model: Any, base: str | Path | Checkpoint, folder: str | Path) -> None:
    """Write the base model with a patch applied, as an ordinary model folder, one tensor at a time.

    Weights are sharded as the base's are. Tensors that the model does not take are left out. Where the patch adds a
    head to a base model's bare checkpoint, names get the prefix that a model with a head has. Files of the base folder
    that hold no weights are kept, but for ``config.json``, which is the model's, and ``README.md``.

    Args:
        patch: of ``make_patch``, with the same model and base.
        model, base: as for ``make_patch``.
        folder: new or empty.
    Raises:
        ConfigError: the folder is not empty.
        BaseMismatchError: the checkpoint is another base model's. What was written is removed.
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    layout, folder = Layout(model, checkpoint), Path(folder)
    check_empty(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    prefix = layout.prefix if layout.lacks_prefix and patch.added else ""
    try:
        _write_weights(patch, layout, checkpoint, folder, prefix)
    except BaseException:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    for path in sorted(checkpoint.folder.rglob("*")):
        place = folder / path.relative_to(checkpoint.folder)
        inside = str(path.relative_to(checkpoint.folder))
        is_kept = not path.name.endswith(_WEIGHTS) and inside not in ("README.md", "config.json")
        if (
            path.is_file()
            and is_kept
            and not any(part.startswith(".") for part in place.parts[len(folder.parts) :])
        ):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _write_weights(patch: Patch, layout: Layout, checkpoint: Checkpoint, folder: Path, prefix: str) -> None:
    used, weight_map = layout.used, {}
    for file in checkpoint.files:
        mine = [(n, stored) for n, stored in checkpoint.tensors.items() if stored.file == file and n in used]
        added = patch.added if file == checkpoint.files[-1] else ()
        header = [(prefix + name, stored.dtype, stored.shape) for name, stored in mine]
        header += [(name, patch.values[name].dtype, patch.shapes[name]) for name in added]
        if header:
            write_tensors(folder / file.name, header, _patched(patch, mine, added), like=file)
        weight_map |= {name: file.name for name, _, _ in header}
    if checkpoint.is_sharded:
        sizes = [(folder / name).stat().st_size for name in set(weight_map.values())]
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        write_atomically(folder / INDEX, lambda partial: partial.write_text(text, encoding="utf-8"))


def _patched(patch: Patch, stored: list[tuple[str, Stored]], added: tuple[str, ...]) -> Iterator[Tensor]:
    for name, one in stored:
        yield patch.apply_(name, one.read())
    for name in added:
        yield patch.values[name]
