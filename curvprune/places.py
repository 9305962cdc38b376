"""What lies at a path, before it is opened; and one process at a time in a folder."""

from __future__ import annotations

import errno
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def other_kind(path: Path) -> str:
    """What lies at a path, in words, if it is no ordinary file; else an empty text. Raises
    `OSError` where nothing lies."""
    mode = path.stat().st_mode
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


def check_regular(path: Path) -> None:
    """Refuse what is no ordinary file: a pipe would be waited for, a device read without end.

    Raises ``ValueError`` naming the path and what lies there, `OSError` where nothing does.
    """
    kind = other_kind(path)
    if kind:
        raise ValueError(f"{path} is {kind}; expected an ordinary file")


def check_regular_below(folder: Path) -> None:
    """`check_regular` for every file of a model's folder, which libraries open without a look."""
    for path in sorted(folder.iterdir()):
        # Links to nothing are not opened either.
        if path.exists() and not path.is_dir():
            check_regular(path)


# ------------------------------------------------------------ one process in a folder

RUNNING = ".curvprune.lock"


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder for as long as this one works in it.

    The system gives the lock back when the process ends, however it ends. Where a file system has
    no locks, there is none.

    Raises:
        ValueError: another process works there.
    """
    # 1. The file of the lock, in a folder that may be new.
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUNNING
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno == errno.EROFS:
            yield  # nothing can be written there, by nobody
            return
        raise
    # 2. The lock itself, and who has it.
    try:
        if not _lock(handle):
            owner = os.read(handle, 200).decode(errors="replace").strip()
            raise ValueError(
                f"another process{f' ({owner})' if owner else ''} is at work in {folder}; wait for "
                "it to end, or give --out another folder"
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Take the lock of an open file without waiting; False if another process has it."""
    try:
        if os.name == "nt":  # pragma: no cover
            import msvcrt

            # Far behind the text: Windows lets nobody read what is locked.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
    return True
