"""Tokenised texts kept on disk, so that the next run over the same texts reads their tokens.

A file is named by a hash of all that decides its content: what the tokenizer is, what it is told, the texts, and the
versions of the libraries. It is a safetensors file: one flat array a column, and the rows' lengths. A file that is
damaged or of something else is ignored and written anew; where nothing can be written, texts are tokenised each time.

Environment:
    CHILDTUNING_CACHE: the folder; tokens are in its ``tokens/``. By default ``$XDG_CACHE_HOME/childtuning``, else
        ``~/.cache/childtuning``.
    CHILDTUNING_CACHE_BYTES: the most that all files of tokens may take, 2,000,000,000 by default; the least recently
        used ones go first. 0 turns the cache off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from childtuning.errors import ConfigError
from childtuning.tasks.tokenizer_content import tokenizer_content

FORMAT = "childtuning-tokens-1"
MIN_CHARACTERS = 500_000  # fewer are tokenised in about half a second
DEFAULT_BYTES = 2_000_000_000
_FILE, _PARTIAL = ".safetensors", ".partial"
_ROWS_AT_ONCE = 4096
_PACKAGES = ("childtuning", "transformers", "tokenizers")


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows.

    Args:
        columns: name -> by row a list of whole numbers; the columns of a row are of one length.
        num_cut: how many rows or words the length limit has cut.
    """

    columns: dict[str, list[list[int]]]
    num_cut: int = 0


def cached_tokens(
    tokenizer: Any, way: Sequence[str | int], texts: Sequence[Any], make_fn: Callable[[], Tokens]
) -> Tokens:
    """Return what ``make_fn`` makes, from the cache where it has been made before.

    Texts of fewer than about half a million characters are not kept, nor what a tokenizer makes that cannot be told
    apart from others by its content.

    Args:
        tokenizer: a Hugging Face tokenizer.
        way: what is done with the texts: a word, and the numbers that decide the result beside tokenizer and texts.
        texts: columns of rows of strings, in lists and dicts as they come; or None.
        make_fn: tokenises them.
    Raises:
        ConfigError: an environment variable is no number of bytes.
    """
    most_bytes, folder = _most_bytes(), _folder()
    if not most_bytes or folder is None:
        return make_fn()
    key = _key(tokenizer, way, texts)
    if key is None:
        return make_fn()
    path = folder / (key + _FILE)
    tokens = _read(path, key)
    if tokens is None:
        tokens = make_fn()
        _write(path, key, tokens, most_bytes)
    return tokens


def _most_bytes() -> int:
    given = os.environ.get("CHILDTUNING_CACHE_BYTES") or str(DEFAULT_BYTES)
    if not given.isascii() or not given.isdigit():
        raise ConfigError(
            f"CHILDTUNING_CACHE_BYTES must be a whole number of bytes, got {given!r}. "
            f"Set {DEFAULT_BYTES}, or 0 for none."
        )
    return int(given)


def _folder() -> Path | None:
    """Where tokens are kept; None where there is no home."""
    named, by_platform = os.environ.get("CHILDTUNING_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if named:
            return Path(named).expanduser() / "tokens"
        return (Path(by_platform) if by_platform else Path.home() / ".cache") / "childtuning" / "tokens"
    except RuntimeError:
        return None


def _key(tokenizer: Any, way: Sequence[str | int], texts: Sequence[Any]) -> str | None:
    """Hash what decides the tokens; None where that is not known, or not worth a file."""
    digest = blake2b(digest_size=32)
    num_characters = 0
    try:
        for column in texts:
            rows = column if isinstance(column, (list, tuple)) else [column]
            digest.update(f"{type(column).__name__} {len(rows)}\n".encode())
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                text = json.dumps(rows[start : start + _ROWS_AT_ONCE], ensure_ascii=False)
                num_characters += len(text)
                digest.update(text.encode("utf-8", "surrogatepass"))
        if num_characters < MIN_CHARACTERS:
            return None
        content = tokenizer_content(tokenizer)
        if content is None:
            return None
        about = [FORMAT, *map(_version, _PACKAGES), *way]
        digest.update(json.dumps([about, content]).encode())
    except (TypeError, ValueError):  # not data
        return None
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _read(path: Path, key: str) -> Tokens | None:
    """Read a file's tokens; None if it is missing, damaged, or of something else."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = file.metadata() or {}
            names = json.loads(about["columns"])
            arrays = {name: file.get_tensor(name) for name in ("lengths", *map(_array_name, names))}
        if about["digest"] != _digest(key, about, arrays):
            return None
        ends = arrays["lengths"].cumsum().tolist()
        starts = [0, *ends][:-1]
        columns = {}
        for name in names:
            flat = arrays[_array_name(name)].tolist()
            columns[name] = [flat[start:end] for start, end in zip(starts, ends, strict=True)]
        tokens = Tokens(columns, int(about["num_cut"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    with suppress(OSError):
        os.utime(path)  # used now
    return tokens


def _write(path: Path, key: str, tokens: Tokens, most_bytes: int) -> None:
    """Write tokens, complete or not at all, in place of the files that were not used for longest."""
    partial = None
    try:
        content = _packed(key, tokens)
        if len(content) > most_bytes:
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # tokens are texts
        _make_room(path.parent, most_bytes - len(content))
        with NamedTemporaryFile(dir=path.parent, suffix=_PARTIAL, delete=False) as file:
            partial = file.name
            file.write(content)
        os.replace(partial, path)
    except (OSError, OverflowError, ValueError):  # nowhere to write, or columns that the format has not
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)


def _packed(key: str, tokens: Tokens) -> bytes:
    lengths = [[len(row) for row in column] for column in tokens.columns.values()]
    if any(others != lengths[0] for others in lengths):
        raise ValueError("the columns of a row differ in length")
    arrays: dict[str, NDArray] = {"lengths": np.array(lengths[0], np.int32)}
    for name, column in tokens.columns.items():
        flat = np.fromiter(chain.from_iterable(column), np.int32, sum(lengths[0]))
        small = len(flat) > 0 and flat.min() >= 0 and flat.max() < 256
        arrays[_array_name(name)] = flat.astype(np.uint8) if small else flat
    about = {"columns": json.dumps(list(tokens.columns)), "num_cut": str(tokens.num_cut)}
    return save(arrays, metadata={**about, "digest": _digest(key, about, arrays)})


def _array_name(column: str) -> str:
    return "column " + column


def _digest(key: str, about: Mapping[str, str], arrays: Mapping[str, NDArray]) -> str:
    """Hash a file's content under its key."""
    digest = blake2b(f"{key} {about['columns']} {about['num_cut']}\n".encode(), digest_size=32)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _make_room(folder: Path, most_bytes: int) -> None:
    """Remove the files that were not used for longest until what is left is of ``most_bytes`` at most."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.endswith((_FILE, _PARTIAL)):
            with suppress(FileNotFoundError):  # another process removes files too
                about = entry.stat(follow_symlinks=False)
                found.append((about.st_mtime_ns, about.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            break
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
