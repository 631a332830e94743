"""Which processes are alive that work on a store: each holds the lock of a file of its own, which ends with it."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout


class Owner:
    """This process as one that works on a store; a context manager.

    However the process ends, the system releases its lock, so that the others can tell. Two processes can never take
    each other for the same, as they could by number.

    Args:
        folder: the store's folder of locks.
    """

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self._folder = folder
        self._lock = FileLock(folder / f"{self.name}.lock")

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def is_alive(self, name: str) -> bool:
        """Tell whether the process of that name still works."""
        if name == self.name:
            return True
        return is_alive(self._folder, name)


def is_alive(folder: Path, name: str) -> bool:
    """Tell whether the process of that name still holds its lock in a store's folder."""
    path = folder / f"{name}.lock"
    if not path.is_file():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    path.unlink(missing_ok=True)
    return False
