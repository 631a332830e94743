"""A checkpoint on disk: its tensors, one at a time, and where a model's parameters lie in them.

transformers renames tensors as it loads them, joins them (experts, one tensor each, into one) and splits them. Where an
entry of a parameter lies on disk is found by the conversion itself: it is given positions in place of values.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from childtuning.child.eligible import canonical_name
from childtuning.child.files import bytes_of, read_json
from childtuning.errors import CorruptFileError, ModelError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OTHER_FILE = "transformers_weights"  # of a configuration: the weights to load in place of it
_LINE = 64  # bytes of a cache line
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file.

    Args:
        file: its path.
        dtype, shape: as the header says.
        start, end: bytes in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """Return a copy of the tensor."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.end - self.start))
        if not data:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


class Checkpoint:
    """The safetensors files of a model folder.

    Args:
        folder: one that ``save_pretrained`` wrote.
    Raises:
        ModelError: it has no safetensors files, or its configuration names others.
        CorruptFileError: one of them is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelError(f"there is no model folder {self.folder}. Check the path.")
        config = self.folder / "config.json"
        other = read_json(config, "Get it anew.").get(_OTHER_FILE) if config.is_file() else None
        if other is not None:
            raise ModelError(
                f"{config} names {other!r} as its weights, which transformers loads in place of {_SINGLE}. Save the "
                "model again with save_pretrained."
            )
        # transformers takes the single file where there are both.
        self.is_sharded = not (self.folder / _SINGLE).is_file()
        if self.is_sharded and not (self.folder / INDEX).is_file():
            raise ModelError(
                f"{self.folder} has no {_SINGLE}: only safetensors can be read tensor by tensor."
            )

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """By name, in the order of the files and of the bytes in them."""
        found: dict[str, Stored] = {}
        for file in self.files:
            found |= _read_header(file)
        return found

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files, in order."""
        if not self.is_sharded:
            return [self.folder / _SINGLE]
        try:
            index = read_json(self.folder / INDEX, "Get it anew.")
            names = sorted(set(index["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as fault:
            raise CorruptFileError(
                f"{self.folder / INDEX} cannot be read ({fault!r}). Get it anew."
            ) from None
        for name in names:
            if (
                not isinstance(name, str)
                or os.path.basename(name) != name
                or not (self.folder / name).is_file()
            ):
                raise CorruptFileError(
                    f"{self.folder / INDEX} names {name!r}, which is no file there. Get it anew."
                )
        return [self.folder / name for name in names]


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(str(path), framework="pt"):  # checks offsets, shapes and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        begin = 8 + length
        found = {
            name: Stored(path, _DTYPES[about["dtype"]], tuple(about["shape"]), begin + about["data_offsets"][0],
                         begin + about["data_offsets"][1])
            for name, about in header.items() if name != "__metadata__"
        }  # fmt: skip
    except KeyError as fault:
        raise ModelError(f"{path} holds a dtype that is not supported ({fault}). Merge the model.") from None
    except (SafetensorError, OSError, ValueError) as fault:
        raise CorruptFileError(f"{path} cannot be read ({fault}). Get it anew.") from None
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def write_tensors(
    path: Path,
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    read: Iterable[Tensor],
    like: Path | None = None,
) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        path: the file.
        tensors: name, dtype and shape of each.
        read: yields them, in this order.
        like: a file that this one replaces: the data begin at the same place in a cache line. Models are mapped from
            their files, and products on a CPU round by alignment.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dtype, shape in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, ensure_ascii=False).encode()
    begin = 0 if like is None else min((s.start for s in _read_header(like).values()), default=0)
    text += b" " * ((begin - 8 - len(text)) % _LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in read:
            if tensor.numel():
                file.write(bytes_of(tensor))


@dataclass(frozen=True)
class Group:
    """Tensors on disk that become parameters of the model together.

    Args:
        sources: names on disk.
        targets: names in the model, each once: tied parameters have their first.
        positions: of a conversion, by target: where each of its entries lies in the sources, laid end to end. Without
            one, the one source is the one target, as it is.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    positions: Mapping[str, Tensor] | None = None


class Layout:
    """Where a model's parameters and buffers lie in a checkpoint.

    Args:
        model: of transformers, perhaps on the ``meta`` device.
        checkpoint: that it is loaded from.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model, self._checkpoint = model, checkpoint
        self._state = model.state_dict(keep_vars=True)
        first = {id(tensor): canonical_name(name) for name, tensor in model.named_parameters()}
        self._first = {
            name: first.get(id(tensor), canonical_name(name)) for name, tensor in self._state.items()
        }
        prefix = model.base_model_prefix
        self.prefix = f"{prefix}." if prefix else ""
        self._converters: dict[str, WeightConverter] = {}
        self._plain: dict[str, str] = {}
        self._joined: dict[str, list[tuple[str, str]]] = {}
        self.lacks_prefix = False
        self._find()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """By first name in the model, the shapes on disk; of what is joined or split, the model's own."""
        plain = {
            self._first[to]: torch.Size(self._checkpoint.tensors[n].shape) for n, to in self._plain.items()
        }
        return plain | {self._first[name]: self._state[name].shape for name in self._joined}

    def _find(self) -> None:
        transforms = get_model_conversion_mapping(self._model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        for name in sorted(self._checkpoint.tensors, key=dot_natural_key):
            base = self._model.base_model_prefix
            found, pattern = rename_source_key(name, renamings, converters, base, self._state)
            if found not in self._state and name in self._state:
                found, pattern = rename_source_key(
                    name, [], [], base_model_prefix=base, meta_state_dict=self._state
                )
            if found not in self._state:
                continue
            if pattern is not None:
                self._joined.setdefault(found, []).append((pattern, name))
            else:
                self._plain[name] = found
                self.lacks_prefix |= found == f"{self.prefix}{name}" != name

    @property
    def used(self) -> set[str]:
        """Names on disk that the model takes; it leaves the others alone."""
        return {*self._plain, *(name for some in self._joined.values() for _, name in some)}

    def groups(self, wanted: Iterable[str]) -> Iterator[Group]:
        """Yield what the wanted parameters and buffers are made of; those that the checkpoint lacks are left out."""
        wanted = set(wanted)
        for name, target in self._plain.items():
            if self._first[target] in wanted:
                yield Group((name,), (self._first[target],))
        for target, parts in self._joined.items():
            if len(self._converters[parts[0][0]].target_patterns) == 1 and self._first[target] not in wanted:
                continue
            ends = [0]
            for _, name in parts:
                ends.append(ends[-1] + torch.Size(self._checkpoint.tensors[name].shape).numel())
            positions = [
                torch.arange(start, end, device="cpu").view(self._checkpoint.tensors[name].shape)
                for (_, name), start, end in zip(parts, ends[:-1], ends[1:], strict=True)
            ]
            found = {
                self._first[name]: where for name, where in self._convert(target, parts, positions).items()
            }
            if wanted.isdisjoint(found):
                continue
            _check_places(target, found, ends[-1])
            yield Group(tuple(name for _, name in parts), tuple(found), found)

    def _convert(
        self, target: str, parts: Sequence[tuple[str, str]], tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Convert tensors of a checkpoint as loading it does."""
        converter = copy.deepcopy(self._converters[parts[0][0]])
        for (pattern, name), tensor in zip(parts, tensors, strict=True):
            converter.add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        made = converter.convert(target, model=self._model, config=self._model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def stored_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return by name the shapes of a model's parameters in the files that it was loaded from; {} without any.

    The files are a folder's, or the copy on this machine of a model from the hub.
    """
    name = getattr(model, "name_or_path", None)
    if not isinstance(model, PreTrainedModel) or not name:
        return {}
    try:
        folder = name if Path(name).is_dir() else _kept_from_hub(name, model)
        return Layout(model, Checkpoint(folder)).shapes
    except Exception:  # no copy, no safetensors, or a layout that transformers alone can read
        return {}


def _kept_from_hub(name: str, model: PreTrainedModel) -> str:
    from huggingface_hub import snapshot_download

    revision = getattr(model.config, "_commit_hash", None)
    patterns = ["config.json", "*.safetensors", INDEX]
    return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)


def _check_places(target: str, places: Mapping[str, Tensor], count: int) -> None:
    """Raise a ModelError if a conversion does more than move entries."""
    flat = torch.cat([where.reshape(-1) for where in places.values()])
    moved = not flat.is_floating_point() and len(flat) == count
    if not moved or not bool((torch.bincount(flat, minlength=count) == 1).all()):
        raise ModelError(
            f"{target!r} is computed from the checkpoint as it is loaded, not only moved. Merge the model."
        )
