"""Where a store may lie: SQLite's write-ahead log needs memory that all its processes share, so one machine's disk."""

from __future__ import annotations

from pathlib import Path

from childtuning.errors import ConfigError

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
    import psutil

    resolved = path.expanduser().absolute()
    while not resolved.exists():
        resolved = resolved.parent
    resolved = resolved.resolve()
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:
        return None
    holding = [mount for mount in mounts if resolved.is_relative_to(mount.mountpoint)]
    # Of several on one point the last was mounted over the others.
    best = max(enumerate(holding), key=lambda item: (len(item[1].mountpoint), item[0]), default=None)
    return None if best is None else best[1].fstype
