"""A checkpoint of a sharded model and its optimizer, which any number of processes can go on from.

Every process writes one safetensors file. A tensor that lies in pieces is stored as flat runs of its entries: those of
a weight by its rows, those of an optimizer's state in the order of the child's entries, which no layout changes. The
index, JSON, is written last: a folder without one holds no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from childtuning.child.eligible import bare_model, canonical_name, named
from childtuning.child.files import file_hash, write_atomically
from childtuning.child.pieces import is_sharded, local_of, piece_of, reshard
from childtuning.errors import ChildTuningError, CorruptFileError, ParameterError
from childtuning.optim.child_optimizer import ChildOptimizer
from childtuning.ranks import Ranks, of_main_process

_INDEX, _VERSION = "checkpoint.json", 1
_WEIGHTS, _STATE, _MASTERS = "weights", "state", "masters"


def save(folder: str | Path, model: nn.Module, optimizer: ChildOptimizer, *, weights: bool = True) -> None:
    """Write the weights, buffers and optimizer state; every process calls it.

    Args:
        folder: made where it is missing; an earlier checkpoint there is whole until this one is, and then removed.
        model: sharded by ``fully_shard``, or whole.
        optimizer: of its parameters.
        weights: ``False`` leaves weights and buffers out: a delta may hold them.
    """
    folder = Path(folder)
    reshard(model)
    ranks = _ranks(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = optimizer.state_dict()
    token = of_main_process(
        secrets.token_hex(4)
    )  # another save at the same step leaves this one's files alone
    files = [
        f"step-{state['child']['num_steps']}-{token}-rank-{rank}-of-{ranks.size}.safetensors"
        for rank in range(ranks.size)
    ]
    pieces, wholes = _tensors(model, optimizer, state, ranks.rank)
    pieces = {key: piece for key, piece in pieces.items() if weights or not key.startswith(_WEIGHTS)}
    counts = ranks.gather({key: piece.numel() for key, piece in pieces.items()})
    mine = {key: piece.reshape(-1) for key, piece in pieces.items()} | wholes
    on_cpu = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in mine.items()}
    with ranks.agreed():
        write_atomically(folder / files[ranks.rank], lambda partial: save_file(on_cpu, partial))
    sums = ranks.gather(file_hash(folder / files[ranks.rank]))
    keys = dict.fromkeys(key for count in counts for key in count)
    index = {
        "version": _VERSION,
        "files": files,
        "sums": sums,
        "optimizer": {"param_groups": state["param_groups"], "child": _of_any_layout(state["child"])},
        "weights": _kinds(model) if weights else {},
        "pieces": {key: [count.get(key, 0) for count in counts] for key in keys},
        "wholes": sorted(wholes),
    }
    with ranks.agreed():
        if ranks.rank == 0:
            text = json.dumps({**index, "sha256": _digest(index)}, indent=1)
            write_atomically(folder / _INDEX, lambda partial: partial.write_text(text, encoding="utf-8"))
            for old in folder.glob("step-*-rank-*-of-*.safetensors"):
                if old.name not in files:
                    old.unlink()


@torch.no_grad()
def load(folder: str | Path, model: nn.Module, optimizer: ChildOptimizer) -> None:
    """Go on from what ``save`` wrote, with any number of processes, sharded or not; every process calls it.

    Args:
        folder: that ``save`` wrote.
        model: of the same architecture.
        optimizer: of its parameters, with the child that it was saved with.
    Raises:
        CorruptFileError: the folder holds no whole checkpoint.
        ParameterError: it is that of another child, or of another model.
    """
    reshard(model)
    ranks, tensors, shapes = (
        _ranks(model),
        named(model, sharded=True) | _buffers(model),
        optimizer.local_shapes(),
    )
    counts = ranks.gather({name: shape.numel() for name, shape in shapes.items()})
    before = counts[: ranks.rank]
    starts = {n: sum(count[n] for count in before) if is_sharded(tensors[n]) else 0 for n in shapes}
    weights: dict[str, Tensor] = {}
    found: dict[str, Any] = {"state": {}, "masters": {}}
    with ranks.agreed():
        try:
            saved = _Saved(Path(folder))
            saved.check(model, tensors, optimizer)
            saved.check_files(ranks)
            for key in saved.keys:
                kind, _, name = key.partition("/")
                if kind == _WEIGHTS:
                    start, local = piece_of(name, tensors[name]).offset, local_of(tensors[name])
                    weights[name] = saved.read(key, start, local.shape)
                    continue
                name, _, field = name.rpartition("/") if kind == _STATE else (name, "", "")
                value = saved.read(key, starts[name], shapes[name])
                if kind == _STATE:
                    found["state"].setdefault(name, {})[field] = value
                else:
                    found["masters"][name] = value
        except ChildTuningError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as fault:
            raise CorruptFileError(
                f"{folder} is damaged ({fault}). Resume from another checkpoint."
            ) from None
    for name, value in weights.items():
        local_of(tensors[name]).copy_(value)
    about = {**saved.optimizer["child"], "pieces": optimizer.state_dict()["child"].get("pieces")}
    optimizer.load_state_dict({**found, "param_groups": saved.optimizer["param_groups"], "child": about})


def _tensors(
    model: nn.Module, optimizer: ChildOptimizer, state: Mapping[str, Any], rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return by key what this process writes: tensors by entry, or its pieces of them, and what has no entries.

    The first process writes all of what is not sharded, the others an empty piece.
    """
    parameters, shapes = named(model, sharded=True), optimizer.local_shapes()
    pieces = {f"{_WEIGHTS}/{name}": tensor for name, tensor in (parameters | _buffers(model)).items()}
    wholes: dict[str, Tensor] = {}
    held = {key: is_sharded(tensor) or rank == 0 for key, tensor in pieces.items()}

    def add(key: str, name: str, value: Tensor) -> None:
        if value.dim() and value.shape == shapes[name]:
            pieces[key], held[key] = value, held[f"{_WEIGHTS}/{name}"]
        elif rank == 0:
            wholes[key] = value

    for name, fields in state["state"].items():
        for field, value in fields.items():
            add(
                f"{_STATE}/{name}/{field}",
                name,
                value if isinstance(value, Tensor) else torch.tensor(value, device="cpu"),
            )
    for name, value in state["masters"].items():
        add(f"{_MASTERS}/{name}", name, value)
    return {key: local_of(t) if held[key] else t.new_empty(0) for key, t in pieces.items()}, wholes


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: f"{p.dtype} {list(p.shape)}" for name, p in named(model, sharded=True).items()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    model = bare_model(model)
    kept = {canonical_name(name) for name in model.state_dict(keep_vars=True)}
    return {n: buffer for name, buffer in model.named_buffers() if (n := canonical_name(name)) in kept}


def _ranks(model: nn.Module) -> Ranks:
    sharded = [piece_of(n, p) for n, p in named(model, sharded=True).items() if is_sharded(p)]
    return sharded[0].ranks if sharded else Ranks.everyone()


def _of_any_layout(about: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is of this layout."""
    return {key: value for key, value in about.items() if key not in ("frozen_bits", "pieces")}


class _Saved:
    """What a folder holds."""

    def __init__(self, folder: Path) -> None:
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            if index.pop("sha256") != _digest(index):
                raise ValueError(f"{_INDEX} was changed")
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as fault:
            raise CorruptFileError(
                f"{folder} holds no whole checkpoint ({fault}). Resume from another one."
            ) from None
        if index["version"] > _VERSION:
            raise CorruptFileError(
                f"{folder} is of version {index['version']}, this library reads {_VERSION}. Update it."
            )
        self.pieces: dict[str, list[int]] = index["pieces"]
        self.keys = [*self.pieces, *index["wholes"]]
        self.weights: dict[str, str] = index["weights"]
        self.optimizer: dict[str, Any] = index["optimizer"]
        self._files = [folder / Path(file).name for file in index["files"]]
        self._sums: list[str] = index.get("sums") or []  # earlier versions wrote none

    def check_files(self, ranks: Ranks) -> None:
        """Raise a CorruptFileError if a file was changed; each process looks at its share of them."""
        for file, known in list(zip(self._files, self._sums, strict=False))[ranks.rank :: ranks.size]:
            try:
                fault = "" if file_hash(file) == known else "its content was changed"
            except OSError as error:
                fault = str(error)
            if fault:
                raise CorruptFileError(f"{file} cannot be read ({fault}). Resume from another checkpoint.")

    def check(self, model: nn.Module, tensors: Mapping[str, Tensor], optimizer: ChildOptimizer) -> None:
        """Raise a ParameterError if it is that of another child or model."""
        if self.optimizer["child"]["identity"] != optimizer.child.fingerprint():
            raise ParameterError(
                "the checkpoint is that of another child. Build the optimizer with the child saved with it."
            )
        kinds = _kinds(model)
        found = {key.removeprefix(f"{_WEIGHTS}/") for key in self.keys if key.startswith(f"{_WEIGHTS}/")}
        if found and (differing := found ^ tensors.keys()):
            raise ParameterError(
                f"the checkpoint and the model differ in {min(differing)!r} ({len(differing)} such). "
                "Build the model that it was saved from."
            )
        for name, kind in self.weights.items():
            if kinds[name] != kind:
                raise ParameterError(
                    f"{name!r} is {kinds[name]}, and {kind} in the checkpoint. Build the model that it was saved from."
                )

    def read(self, key: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read what lies in pieces from entry ``start`` on, in a shape; else all of it, as it is."""
        if key not in self.pieces:
            return self._read(self._files[0], key, None)
        found, first, end = [], 0, start + math.prod(shape)
        for file, size in zip(self._files, self.pieces[key], strict=True):
            low, high = max(start, first), min(end, first + size)
            if low < high or (size and not math.prod(shape) and not found):
                found.append(self._read(file, key, slice(low - first, max(low, high) - first)))
            first += size
        return (torch.cat(found) if found else torch.empty(0, device="cpu")).view(tuple(shape))

    @staticmethod
    def _read(path: Path, key: str, some: slice | None) -> Tensor:
        try:
            with safe_open(str(path), framework="pt") as file:
                return file.get_tensor(key) if some is None else file.get_slice(key)[some]
        except (SafetensorError, OSError) as fault:
            raise CorruptFileError(
                f"{path} cannot be read ({fault}). Resume from another checkpoint."
            ) from None
