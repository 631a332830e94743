"""The folders of deltas and what is made of them, and the hashes that tell one base model from another.

``delta.json`` says what is trained and on what base, ``delta.safetensors`` holds the values. The formats are described
in docs/delta-format.md. Both files are data: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from childtuning.child.eligible import named
from childtuning.child.files import bytes_of, file_hash, write_atomically
from childtuning.child.pieces import whole_of
from childtuning.errors import CorruptFileError

INDEX_SUFFIX = "::index"


@dataclass(frozen=True)
class Format:
    """A folder with two files: a JSON object that says what is there, and tensors.

    Args:
        noun: what it is called.
        version: a reader of another one would misread it.
    """

    noun: str
    version: int = 1

    @property
    def about(self) -> str:
        """The JSON file's name."""
        return f"{self.noun}.json"

    @property
    def values(self) -> str:
        """The safetensors file's name."""
        return f"{self.noun}.safetensors"

    def write(self, folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write both files, each complete or not at all."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        waiting = folder / f"{self.values}.new"
        write_atomically(waiting, lambda partial: save_file(contiguous, partial))
        body: dict[str, Any] = {
            "format": f"childtuning-{self.noun}",
            "version": self.version,
            **about,
            "values_sha256": file_hash(waiting),
        }
        body["sha256"] = _body_hash(body)
        text = json.dumps(body, indent=1) + "\n"
        # The new values lie beside the old ones until the new JSON names them: whenever this ends, one pair fits.
        write_atomically(folder / self.about, lambda partial: partial.write_text(text, encoding="utf-8"))
        os.replace(waiting, folder / self.values)

    def read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read and verify both files.

        Raises:
            CorruptFileError: one is missing, truncated, changed, or of another format.
        """
        remedy = "Copy the whole folder anew from where it was saved."
        path, values = folder / self.about, folder / self.values
        waiting = folder / f"{self.values}.new"
        if not folder.exists():
            raise CorruptFileError(f"there is no {self.noun} at {folder}. Check the path.")
        if folder.is_file():
            raise CorruptFileError(f"a {self.noun} is a folder, got the file {folder}. Pass {folder.parent}.")
        for file in (path, values):
            if not file.is_file() and not (file == values and waiting.is_file()):
                raise CorruptFileError(f"{folder} is not a {self.noun}: it has no {file.name}. {remedy}")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            stated = about.pop("sha256")
            if about["format"] != f"childtuning-{self.noun}":
                raise CorruptFileError(f"{path} is of format {about['format']!r}. {remedy}")
            if about["version"] != self.version:
                raise CorruptFileError(
                    f"{path} is of version {about['version']}, this library reads {self.version}. Update the library."
                )
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
            raise CorruptFileError(f"{path} cannot be read ({fault}). {remedy}") from None
        if _body_hash(about) != stated:
            raise CorruptFileError(f"{path} was changed after it was saved. {remedy}")
        whole = next((file for file in (values, waiting) if _fits(file, about)), None)
        if whole is None:
            raise CorruptFileError(f"{values} is truncated or was changed after it was saved. {remedy}")
        try:
            with safe_open(str(whole), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as fault:
            raise CorruptFileError(f"{whole} cannot be read ({fault}). {remedy}") from None
        return about, tensors


def stream_tensor(stream: np.ndarray) -> Tensor:
    """Return a byte stream as a uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(stream))


def _body_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _fits(path: Path, about: Mapping[str, Any]) -> bool:
    return path.is_file() and file_hash(path) == about.get("values_sha256")


def _absorb(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))


def frozen_hash(tensor: Tensor, trained: Tensor | None) -> str:
    """Return the sha256 of a tensor's frozen content: dtype, shape, and the bits outside the child.

    Training does not change it, so it is the same before and after, with the delta applied or removed.

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
    for name, parameter in named(model, sharded=True).items():
        if name not in without:
            digest.update(name.encode())
            _absorb(digest, whole_of(parameter))
    return digest.hexdigest()


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of each entry of a tensor, uint8 [entries, bytes], for bitwise comparison."""
    return tensor.detach().contiguous().view(-1, 1).view(torch.uint8)
