"""Locks that show which processes are working on a store, and the check of a store's file system."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from childtuning.errors import ConfigError


class Owner:
    """This process as a worker on a store; a context manager that holds a lock.

    The system releases the lock however the process ends, so that other processes can tell. Unlike process numbers,
    the names of owners are never reused.

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
        """Return whether the process of that name is still running."""
        if name == self.name:
            return True
        return is_alive(self._folder, name)


def is_alive(folder: Path, name: str) -> bool:
    """Return whether the process of that name still holds its lock in a store's folder."""
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


_OVER_A_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb",
    "smb2",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "afpfs",
    "webdav",
    "beegfs",
    "ceph",
    "glusterfs",
    "gpfs",
    "lustre",
    "pvfs2",
    "fuse.ceph",
    "fuse.gcsfuse",
    "fuse.glusterfs",
    "fuse.s3fs",
    "fuse.sshfs",
}


def check_place(path: Path) -> None:
    """Refuse a store on a network file system.

    Raises:
        ConfigError: when the file system is one.
    """
    kind = file_system(path)
    if kind in _OVER_A_NETWORK:
        raise ConfigError(
            f"store {str(path)!r} is on a network file system ({kind}), where several processes would damage it. "
            "Pass a --store on a local disk; with --executor ray, on the driver's."
        )


def file_system(path: Path) -> str | None:
    """Return the type of the file system of a path, which need not exist; ``None`` if unknown."""
    resolved = path.expanduser().absolute()
    while not resolved.exists():
        resolved = resolved.parent
    resolved = resolved.resolve()
    try:
        text = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux
        return None
    fields = [line.split(" ") for line in text.split("\n") if line]
    mounts = [
        (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point), kind) for _, point, kind, *_ in fields
    ]
    holding = [
        (len(point), place, kind)
        for place, (point, kind) in enumerate(mounts)
        if resolved.is_relative_to(point)
    ]
    # Of several mounts at one point, the last one hides the others.
    return max(holding)[2] if holding else None
