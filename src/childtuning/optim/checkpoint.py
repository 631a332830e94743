"""A checkpoint of a sharded model and its optimizer, which any number of processes can go on from.

Every process writes one safetensors file. A tensor that lies in pieces is stored as flat runs of its entries: those of
a weight by its rows, those of an optimizer's state in the order of the child's entries, which no layout changes. The
index, JSON, is written last: a folder without one holds no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from childtuning.child.eligible import bare_model, canonical_name, named
from childtuning.child.files import write_atomically
from childtuning.child.pieces import is_sharded, local_of, piece_of, reshard
from childtuning.errors import CorruptFileError, ParameterError
from childtuning.optim.child_optimizer import ChildOptimizer
from childtuning.ranks import Ranks, wait_for_all

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
    files = [
        f"step-{state['child']['num_steps']}-rank-{rank}-of-{ranks.size}.safetensors"
        for rank in range(ranks.size)
    ]
    pieces, wholes = _tensors(model, optimizer, state, ranks.rank)
    pieces = {key: piece for key, piece in pieces.items() if weights or not key.startswith(_WEIGHTS)}
    counts = ranks.gather({key: piece.numel() for key, piece in pieces.items()})
    mine = {key: piece.reshape(-1) for key, piece in pieces.items()} | wholes
    on_cpu = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in mine.items()}
    write_atomically(folder / files[ranks.rank], lambda partial: save_file(on_cpu, partial))
    wait_for_all()
    if ranks.rank == 0:
        index = {
            "version": _VERSION,
            "files": files,
            "optimizer": {"param_groups": state["param_groups"], "child": _of_any_layout(state["child"])},
            "pieces": {key: [count[key] for count in counts] for key in pieces},
            "wholes": sorted(wholes),
        }
        text = json.dumps(index, indent=1)
        write_atomically(folder / _INDEX, lambda partial: partial.write_text(text, encoding="utf-8"))
        for old in folder.glob("step-*-rank-*-of-*.safetensors"):
            if old.name not in files:
                old.unlink()
    wait_for_all()


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
    saved = _Saved(Path(folder))
    if saved.optimizer["child"]["identity"] != optimizer.child.fingerprint():
        raise ParameterError(
            "the checkpoint is that of another child. Build the optimizer with the child saved with it."
        )
    reshard(model)
    ranks = _ranks(model)
    parameters, buffers = named(model, sharded=True), _buffers(model)
    found = {key.removeprefix(f"{_WEIGHTS}/") for key in saved.keys if key.startswith(f"{_WEIGHTS}/")}
    if found and (differing := found ^ (parameters.keys() | buffers.keys())):
        raise ParameterError(
            f"the checkpoint and the model differ in {min(differing)!r} ({len(differing)} such). "
            "Build the model that it was saved from."
        )
    for name, tensor in (parameters | buffers).items() if found else ():
        local = local_of(tensor)
        start = piece_of(name, tensor).offset
        local.copy_(saved.read(f"{_WEIGHTS}/{name}", start, local.numel()).view_as(local))
    shapes = optimizer.local_shapes()
    counts = ranks.gather({name: shape.numel() for name, shape in shapes.items()})
    before = counts[: ranks.rank]
    starts = {n: sum(count[n] for count in before) if is_sharded(parameters[n]) else 0 for n in shapes}
    state: dict[str, dict[str, Tensor]] = {}
    masters: dict[str, Tensor] = {}
    for key in saved.keys:
        kind, _, rest = key.partition("/")
        if kind == _WEIGHTS:
            continue
        name, _, field = rest.rpartition("/") if kind == _STATE else (rest, "", "")
        value = saved.read(key, starts[name], shapes[name].numel())
        value = value.view(shapes[name]) if key in saved.pieces else value
        if kind == _STATE:
            state.setdefault(name, {})[field] = value
        else:
            masters[name] = value
    about = {**saved.optimizer["child"], "pieces": optimizer.state_dict()["child"].get("pieces")}
    groups = saved.optimizer["param_groups"]
    optimizer.load_state_dict({"state": state, "masters": masters, "param_groups": groups, "child": about})


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
            add(f"{_STATE}/{name}/{field}", name, torch.as_tensor(value))
    for name, value in state["masters"].items():
        add(f"{_MASTERS}/{name}", name, value)
    return {key: local_of(t) if held[key] else t.new_empty(0) for key, t in pieces.items()}, wholes


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    model = bare_model(model)
    kept = {canonical_name(name) for name in model.state_dict(keep_vars=True)}
    return {n: buffer for name, buffer in model.named_buffers() if (n := canonical_name(name)) in kept}


def _ranks(model: nn.Module) -> Ranks:
    sharded = [piece_of(n, p) for n, p in named(model, sharded=True).items() if is_sharded(p)]
    return sharded[0].ranks if sharded else Ranks.everyone()


def _of_any_layout(about: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is of this layout."""
    return {key: value for key, value in about.items() if key not in ("frozen", "pieces")}


class _Saved:
    """What a folder holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.pieces: dict[str, list[int]] = index["pieces"]
            self.keys = [*self.pieces, *index["wholes"]]
            self.optimizer: dict[str, Any] = index["optimizer"]
            self._files = [folder / Path(file).name for file in index["files"]]
            version = index["version"]
        except (OSError, KeyError, ValueError, TypeError) as fault:
            raise CorruptFileError(
                f"{folder} holds no whole checkpoint ({fault}). Resume from another one."
            ) from None
        if version > _VERSION:
            raise CorruptFileError(
                f"{folder} is of version {version}, this library reads {_VERSION}. Update it."
            )

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Read entries start … start + count − 1 of what lies in pieces, flat; else all of it, as it is."""
        if key not in self.pieces:
            return next(self._read([(self._files[0], key, None)]))
        wanted: list[tuple[Path, str, slice | None]] = []
        first = 0
        for file, size in zip(self._files, self.pieces[key], strict=True):
            low, high = max(start, first), min(start + count, first + size)
            if low < high or (not wanted and not count):
                wanted.append((file, key, slice(low - first, max(low, high) - first)))
            first += size
        return torch.cat(list(self._read(wanted)))

    def _read(self, wanted: Iterable[tuple[Path, str, slice | None]]) -> Any:
        for path, key, some in wanted:
            try:
                with safe_open(str(path), framework="pt") as file:
                    yield file.get_tensor(key) if some is None else file.get_slice(key)[some]
            except (SafetensorError, OSError) as fault:
                raise CorruptFileError(f"{path} cannot be read ({fault}). Resume from another one.") from None
