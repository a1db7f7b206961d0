"""Files that a user names: opened only if they are regular ones, written whole or not at all.

Rules:
    1. Opening a FIFO waits for a writer, reading a device may never end: either stops the event loop. What
       a path leads to is looked at before it is opened, and again once it is open.
    2. Symlinks are followed: Kubernetes mounts files as links to regular ones.
    3. What is written takes its place in one step: a full disk leaves what was there before, and says where.
    4. A pipe that the caller opened, such as a shell's `<(...)`, may be read by who reads once and may wait.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

NOT_REGULAR: Final = "not a regular file"


def open_regular(path: Path | str) -> BinaryIO:
    """A regular file, opened for reading; the caller closes it.

    Raises:
        OSError: It cannot be opened, or is a FIFO, a device, a socket or a folder; its `strerror` says which.
    """
    _refuse(Path(path).stat(), path)
    return open(path, "rb", opener=_without_waiting)


def read_regular(path: Path | str) -> bytes:
    """The whole of a regular file.

    Raises:
        OSError: As `open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def write_whole(path: Path, content: str | bytes) -> None:
    """Put a file in place in one step; who reads it has all of it, or what was there before.

    A link, and what is no regular file (`/dev/stdout` for example), is written to as it is.

    Raises:
        OSError: It cannot be; names the file.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)
        else:
            _replace(path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(data)
        if path.exists():
            fresh.chmod(stat.S_IMODE(path.stat().st_mode))
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def is_descriptor(path: Path | str) -> bool:
    """True for the name of what is open already, as `<(...)` and standard input are: it is in no folder."""
    return str(path) == "/dev/stdin" or str(Path(path).parent) in ("/dev/fd", "/proc/self/fd")


def open_piped(path: Path | str) -> BinaryIO:
    """A regular file or, of those that are open already, a pipe; the caller closes it.

    Raises:
        OSError: As `open_regular`, for all else.
    """
    if is_descriptor(path) and Path(path).is_fifo():
        return Path(path).open("rb")
    return open_regular(path)


def require_regular(*paths: Path | str | None) -> None:
    """For files that a library opens by their paths, as OpenSSL does; None is no file.

    Raises:
        OSError: As `open_regular`, for the first of them.
    """
    for path in paths:
        if path is not None:
            open_regular(path).close()


def _without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _refuse(os.fstat(descriptor), path)  # it may have been replaced since it was looked at
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse(found: os.stat_result, path: Path | str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
