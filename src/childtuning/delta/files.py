"""A delta's folder: ``delta.json`` says what is trained and on what base, ``delta.safetensors`` holds the values.

The format is described in docs/delta-format.md. Both files are data: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from childtuning.errors import CorruptFileError

ABOUT, VALUES = "delta.json", "delta.safetensors"
FORMAT, VERSION = "childtuning-delta", 1
INDEX_SUFFIX = "::index"


def write_folder(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (VALUES + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    body = {"format": FORMAT, "version": VERSION, **about, "values_sha256": _file_hash(partial)}
    body["sha256"] = _body_hash(body)
    about_partial = folder / (ABOUT + ".partial")
    about_partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / VALUES)
    os.replace(about_partial, folder / ABOUT)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify both files.

    Raises:
        CorruptFileError: one is missing, truncated, changed, or of another format.
    """
    remedy = "Copy the whole folder anew from where it was saved."
    for name in (ABOUT, VALUES):
        if not (folder / name).is_file():
            raise CorruptFileError(f"{folder} is not a delta: it has no {name}. {remedy}")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        stated = about.pop("sha256")
        if about["format"] != FORMAT:
            raise CorruptFileError(f"{folder / ABOUT} is of format {about['format']!r}. {remedy}")
        if about["version"] != VERSION:
            raise CorruptFileError(
                f"{folder / ABOUT} is of version {about['version']}, this library reads {VERSION}. Update the library."
            )
    except (ValueError, KeyError, AttributeError, TypeError) as fault:
        raise CorruptFileError(f"{folder / ABOUT} cannot be read ({fault}). {remedy}") from None
    if _body_hash(about) != stated:
        raise CorruptFileError(f"{folder / ABOUT} was changed after it was saved. {remedy}")
    if _file_hash(folder / VALUES) != about["values_sha256"]:
        raise CorruptFileError(f"{folder / VALUES} is truncated or was changed after it was saved. {remedy}")
    try:
        with safe_open(str(folder / VALUES), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as fault:
        raise CorruptFileError(f"{folder / VALUES} cannot be read ({fault}). {remedy}") from None
    return about, tensors


def stream_tensor(stream: np.ndarray) -> Tensor:
    """Return a byte stream as a uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(stream))


def _body_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
