"""The files beside a store: locks that tell which processes are at work, and where a store may lie."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from childtuning.errors import ConfigError


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
    """Refuse a store on a file system that is shared over a network.

    Raises:
        ConfigError: naming it and the remedy.
    """
    kind = file_system(path)
    if kind in _OVER_A_NETWORK:
        raise ConfigError(
            f"store {str(path)!r} lies on a network file system ({kind}), where several processes would damage it. "
            "Pass a --store on a local disk; with --executor ray, the driver's."
        )


def file_system(path: Path) -> str | None:
    """Return the type of the file system that a path is or would be on; ``None`` where it cannot be told."""
    resolved = path.expanduser().absolute()
    while not resolved.exists():
        resolved = resolved.parent
    resolved = resolved.resolve()
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return None
    mounts = [(line.split()[1].replace("\\040", " "), line.split()[2]) for line in lines]
    holding = [
        (len(point), place, kind)
        for place, (point, kind) in enumerate(mounts)
        if resolved.is_relative_to(point)
    ]
    # Of several on one point the last was mounted over the others.
    return max(holding)[2] if holding else None
