"""The load counters of one gateway's worker processes on one host, in a mapped file.

Rules:
    1. `create` runs once, in the parent, before any worker attaches; it replaces the file atomically, so
       workers of an older gateway keep their own.
    2. A worker attaches after it was forked: `flock` belongs to the open file, and a shared open file
       would not exclude its sharers.
    3. The kernel drops the locks of a killed holder. What such a worker charged stays counted until a
       worker attaches to its row again, which zeroes it.
    4. Nobody waits longer than `PATIENCE_S` or `SLOTS_PATIENCE_S` for a holder that is stopped. A decision
       then goes on without the lock, on the view as it is, which another worker may change meanwhile: each
       charge is still counted once, because a worker adds to its own row alone; such decisions are counted,
       and told in the log once in `QUIET_S`. Slots are never given out
       without a lock: an endpoint that needs a new one has none for the moment.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from metadata_center.errors import CapacityError, LayoutError
from metadata_center.load.counters import MAX_SLOTS, Counters, num_bytes

_HEADER: Final = struct.Struct("<8sqq40x")  # magic, workers, capacity; padded to one 64-byte cache line
_MAGIC: Final = b"TWLOAD03"

PATIENCE_S: Final = 0.05
"""Five hundred decisions, and more than a holder waits for a processor where all are busy."""

SLOTS_PATIENCE_S: Final = 1.0
"""Longer, because without a slot an endpoint serves nobody, and seldom waited for: it takes a worker that is
stopped within the 0.2 ms in which it takes slots."""

QUIET_S: Final = 60.0
"""Between two lines of the log about decisions without the lock."""

_PAUSE_S: Final = 0.00005
"""Between two looks at a lock that another has: half a decision."""

_DESCRIPTORS: Final = Path("/proc/self/fd")
_LOGGER: Final = logging.getLogger("tokenway.counters")
_LOCKED: Final = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_UNLOCKED: Final = struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)


def create(path: Path, workers: int, capacity: int = MAX_SLOTS) -> None:
    """Make a fresh counter file for `workers` workers, readable by this user only.

    Args:
        path: The file, best in a run directory on tmpfs; an older one is replaced.
        workers: Rows, one per worker process, >= 1.
        capacity: Slots, see `Counters`.

    Raises:
        OSError: The file cannot be written.
    """
    # A name that cannot be guessed, and never through a link: it may be a folder that others write to.
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, _HEADER.pack(_MAGIC, workers, capacity), 0)
        # All of it now: a page without space behind it ends the process that first writes it (SIGBUS).
        os.posix_fallocate(fd, 0, _HEADER.size + num_bytes(workers, capacity))
        fresh.replace(path)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    finally:
        os.close(fd)


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """Keeps a file of `create` for as long as the block lasts, whatever becomes of its name.

    Yields:
        A descriptor, which a process that is started may get to find the file by `path_of`.

    Raises:
        OSError: It cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def path_of(fd: int) -> Path:
    """Where a process finds a file by its own descriptor; opened there, its locks are its own."""
    return _DESCRIPTORS / str(fd)


def _is_open(path: Path) -> bool:
    return path.parent == _DESCRIPTORS


class SharedCounters(Counters):
    """`Counters` over a file that every worker of the gateway maps.

    Args:
        path: A file made by `create`, or where /proc has a descriptor of it that is open (`open_file`).
        worker: This process's row, which no other living process uses; it is zeroed now.

    Raises:
        LayoutError: The file is missing, is not a counter file, is cut short, or has no such row.
    """

    def __init__(self, path: Path, worker: int) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (0 if _is_open(path) else os.O_NOFOLLOW))
        except OSError as exc:
            raise LayoutError(f"{path}: {exc.strerror}") from exc
        try:
            workers, capacity, memory = _map(path, fd, worker)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._lock, self._slots_lock = _DecisionLock(fd), _SlotsLock(fd)
        super().__init__(workers=workers, worker=worker, capacity=capacity, buffer=memory)

    def lock(self) -> AbstractContextManager[None]:
        """Exclude the other workers until the block ends; re-entrant; never hold it across an await.

        Waits while another worker decides, which takes tens of microseconds, and at most `PATIENCE_S`; not
        at all for one that was waited for in vain, until it has gone on.
        """
        return self._lock

    def slots_lock(self) -> AbstractContextManager[None]:
        """See `Counters.slots_lock`; waits as `lock` does, but at most `SLOTS_PATIENCE_S`."""
        return self._slots_lock

    @property
    def unlocked(self) -> int:
        """See `Counters.unlocked`."""
        return self._lock.unlocked

    def close(self) -> None:
        """Close the file; the counters stay mapped and counted, the locks are gone."""
        os.close(self._fd)


def _map(path: Path, fd: int, worker: int) -> tuple[int, int, memoryview]:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise LayoutError(f"{path}: not a counter file")
    _, workers, capacity = _HEADER.unpack(header)
    size = _HEADER.size + num_bytes(workers, capacity)
    if os.fstat(fd).st_size != size:
        raise LayoutError(f"{path}: {os.fstat(fd).st_size} bytes; expected {size}")
    if not 0 <= worker < workers:
        raise LayoutError(f"{path}: made for {workers} workers; there is no worker {worker}")
    return workers, capacity, memoryview(mmap.mmap(fd, size))[_HEADER.size :]


class _DecisionLock:
    """A re-entrant exclusive `flock`, or none where its holder does not go on.

    A class, because a generator-based one costs four times as much.

    Attributes:
        unlocked: Times that it was entered without being held.
    """

    __slots__ = ("_depth", "_fd", "_is_held", "_is_stuck", "_quiet_until_s", "unlocked")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._depth = 0
        self._is_held = False
        self._is_stuck = False
        self._quiet_until_s = float("-inf")
        self.unlocked = 0

    def __enter__(self) -> None:
        if not self._depth:
            self._is_held = self._take() or (not self._is_stuck and self._wait())
            if not self._is_held:
                self._miss()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth and self._is_held:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _take(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._is_stuck = False
        return True

    def _wait(self) -> bool:
        if _in_time(self._take, PATIENCE_S):
            return True
        self._is_stuck = True
        return False

    def _miss(self) -> None:
        """Count a decision without the lock, and tell of it unless one was told of lately."""
        self.unlocked += 1
        now_s = time.monotonic()
        if now_s < self._quiet_until_s:
            return
        self._quiet_until_s = now_s + QUIET_S
        _LOGGER.warning(
            "another worker does not go on: deciding beside it, not one after the other",
            extra={"decisions": self.unlocked},
        )


class _SlotsLock:
    """A lock of the open file's own (OFD) on its bytes, which `flock` knows nothing of; not re-entrant."""

    __slots__ = ("_fd", "_is_stuck")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_stuck = False

    def __enter__(self) -> None:
        if self._take() or (not self._is_stuck and _in_time(self._take, SLOTS_PATIENCE_S)):
            return
        self._is_stuck = True
        raise CapacityError("another worker does not go on: no slots are given out")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _UNLOCKED)

    def _take(self) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _LOCKED)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: POSIX leaves it open
            return False
        self._is_stuck = False
        return True


def _in_time(take: Callable[[], bool], patience_s: float) -> bool:
    """Whether a lock that another worker has can be taken within that time."""
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s:
        time.sleep(_PAUSE_S)
        if take():
            return True
    return False
