"""Noticing that a configuration file changed, without inotify.

Polling survives what watches on an inode miss: an atomic rename, the symlink swap of a Kubernetes
ConfigMap, a file that is gone for a moment, a network file system.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

_log = logging.getLogger(__name__)

_Fingerprint = tuple[int, int, int, int]
"""Modification time in ns, size in bytes, inode, device of the file a path leads to."""


class FileWatcher:
    """Calls back when the content of any of a few files may have changed.

    The state to compare with is taken by the constructor: construct it before reading the files, and no
    change is lost. A change is reported once the files looked the same twice in a row, so a file being
    written is not read half-way; while one is missing nothing is reported. Costs one `stat` per file
    and interval.

    Args:
        paths: Files, symlinks followed; they need not exist.
        on_change: Called on the event loop, must not block. What it raises is logged, and watching goes on.
        interval_s: Between looks; a change is reported one to two intervals after it happened.
    """

    def __init__(
        self, paths: Sequence[Path], on_change: Callable[[], None], interval_s: float = 0.25
    ) -> None:
        self._paths = tuple(paths)
        self._on_change = on_change
        self._interval_s = interval_s
        self._reported = self._previous = self._look()
        self._task: asyncio.Task[None] | None = None

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
            current = self._look()
            if None not in current and current == self._previous != self._reported:
                self._reported = current
                try:
                    self._on_change()
                except Exception:
                    _log.exception("config change call-back failed")
            self._previous = current

    def _look(self) -> tuple[_Fingerprint | None, ...]:
        return tuple(_fingerprint(path) for path in self._paths)


def _fingerprint(path: Path) -> _Fingerprint | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
