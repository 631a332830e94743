"""Save states of optimizers, schedulers and random generators as safetensors files, without pickle.

Tensors and numpy arrays are stored as tensors; everything else is stored as JSON in the header.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from childtuning.child.files import bytes_of, write_atomically
from childtuning.errors import CorruptFileError

_HEADER, _SUM = "childtuning-state", "sha256"


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, numbers, strings, tensors and arrays, atomically.

    Raises:
        TypeError: when the state contains anything else.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_pack(state, tensors))
    about = {_HEADER: header, _SUM: _sum(header, tensors)}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=about))


def load_state(path: Path) -> Any:
    """Read what ``save_state`` wrote, tensors on the CPU.

    Raises:
        CorruptFileError: when the file is missing, truncated, or of another kind.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get(_SUM, found := _sum(about[_HEADER], tensors)) != found:
            raise ValueError("its content was changed")
        return _unpack(json.loads(about[_HEADER]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as fault:
        raise CorruptFileError(f"{path} cannot be read ({fault}). Resume from another checkpoint.") from None


def _sum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of what a file holds."""
    digest = sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray)):
        tensor = (
            value.detach().to("cpu", copy=True)
            if isinstance(value, Tensor)
            else torch.from_numpy(value.copy())
        )
        name = str(len(tensors))
        tensors[name] = tensor.contiguous()
        return {"tensor": name, "array": isinstance(value, np.ndarray)}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, tensors) for item in value]}
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.numpy() if value["array"] else tensor
    if "dict" in value:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["dict"]}
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    return [_unpack(item, tensors) for item in value["list"]]


def random_state() -> dict[str, Any]:
    """Return the state of every global random generator."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states returned by ``random_state``."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
