"""Noticing that a configuration file changed, without inotify.

Polling survives what watches on an inode miss: an atomic rename, the symlink swap of a Kubernetes
ConfigMap, a file that is gone for a moment, a network file system.

Rules:
    1. What counts is what a path leads to: a file's identity, times and content, or why it cannot be read. A
       file that vanishes, comes back, or is closed to us is a change like any other.
    2. Nothing but a regular file is ever opened: a pipe would stop the event loop.
    3. Two edits within one tick of a file's clock differ in nothing but the content, so the content is read
       again until the last edit is `_YOUNG_S` old.
    4. The event loop waits for no file: looks are taken in a thread, where a large file is read and digested,
       and a file system that hangs stops no request.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from extproc.config.loading import MAX_FILE_BYTES
from metadata_center.files import NOT_REGULAR, open_regular

_log = logging.getLogger(__name__)

_YOUNG_S = 2.0
"""FAT's clock, the coarsest in use, ticks every 2 s; ext4's and XFS's with the kernel's timer, 1 to 10 ms."""

_MAX_RESTLESS_LOOKS = 8
"""A file edited faster than it is looked at never looks the same twice: after 2 s it is read all the same."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a path led to.

    Attributes:
        fingerprint: Time of last change and of last modification in ns, size in bytes, inode, device.
        digest: Of the content.
        problem: Why there is no content, in the system's words; None if there is.
    """

    fingerprint: tuple[int, ...] = ()
    digest: bytes = b""
    problem: str | None = None


def look(path: Path, before: Look | None = None) -> Look:
    """What a path leads to now; `before`, an earlier look, saves reading an old file again."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return Look((found.st_mode, found.st_ino, found.st_dev), problem=NOT_REGULAR)
        times = found.st_ctime_ns, found.st_mtime_ns
        fingerprint = (*times, found.st_size, found.st_ino, found.st_dev)
        is_old = time.time() - found.st_ctime_ns / 1e9 >= _YOUNG_S
        if before is not None and before.fingerprint == fingerprint and is_old:
            return before
        with open_regular(path) as file:
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        return Look(problem=error.strerror or str(error))
    except ValueError as error:  # a NUL in the name
        return Look(problem=str(error))
    return Look(fingerprint, hashlib.blake2b(content, digest_size=16).digest())


def _looks(previous: Mapping[Path, Look]) -> dict[Path, Look]:
    """What these paths lead to now."""
    return {path: look(path, before) for path, before in previous.items()}


class FileWatcher:
    """Calls back when what any of a few paths leads to has changed.

    A change is reported once the files looked the same twice in a row, so a file being written is not read
    half-way. Costs one `stat` per file and interval.

    Args:
        files: Paths, symlinks followed, and what they led to when they were last read: take the looks before
            reading, and no change is lost. They need not exist.
        on_change: Called on the event loop, must not block; may call `watch`. What it raises is logged, and
            watching goes on.
        interval_s: Between looks; a change is reported one to two intervals after it happened.
    """

    def __init__(
        self,
        files: Iterable[Path] | Mapping[Path, Look],
        on_change: Callable[[], None],
        interval_s: float = 0.25,
    ) -> None:
        self._on_change = on_change
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self.watch(files if isinstance(files, Mapping) else {path: look(path) for path in files})

    def watch(self, files: Mapping[Path, Look]) -> None:
        """Watch these files from now on, and no others; what they led to when read is known already."""
        self._reported = dict(files)
        self._previous = dict(files)
        self._restless = 0

    def start(self) -> None:
        """Begin to watch on the running event loop.

        Raises:
            RuntimeError: Already started.
        """
        if self._task is not None:
            raise RuntimeError("the watcher is already started")
        self._task = asyncio.create_task(self._watch(), name="config-watcher")

    async def stop(self) -> None:
        """End watching; no call-back after it returned. Harmless if never started."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            previous = self._previous
            current = await asyncio.to_thread(_looks, previous)
            if self._previous is not previous:
                continue  # others are watched since
            self._restless = 0 if current == self._previous else self._restless + 1
            settled = not self._restless or self._restless >= _MAX_RESTLESS_LOOKS
            self._previous = current
            if settled and current != self._reported:
                self._reported = current
                self._restless = 0
                try:
                    self._on_change()
                except Exception:
                    _log.exception("config change call-back failed")
