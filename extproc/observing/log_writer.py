"""The log goes where standard error leads, and waits for nobody who reads it.

A collector that stopped, a terminal that was paused or a pipe that nobody reads would hold up the event loop
in a write, and with it every request.

Rules:
    1. A line that can be written at once is written at once. What cannot waits, `MOST_WAITING_BYTES` at most,
       and a thread that ends with it writes it when it can.
    2. Lines are whole and in order. Those that there is no room for are lost and counted; so are those that a
       full disk or a closed pipe refuses. The next line that is written says how many.
    3. What others opened is not changed for them: a pipe is opened once more to be written without waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import sys
import threading
from collections import deque
from typing import Final

MOST_WAITING_BYTES: Final = 1024 * 1024
"""Some two thousand lines of requests."""

_END_S: Final = 1.0
"""Longest that the end of the process waits for the lines that wait."""

_PIECE_BYTES: Final = 4096
"""PIPE_BUF: what is written at once by the thread, so that a reader gets whole lines mostly."""

LOGGER: Final = "tokenway.log"


class LogWriter(logging.Handler):
    """Writes lines to a descriptor.

    Args:
        descriptor: An open one, which stays open for as long as the handler is used.

    Attributes:
        lost: Lines that were lost and not told of yet.
        lost_in_all: Lines that were lost since the start.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._socket: socket.socket | None = None
        self._pipe: int | None = None
        self._may_wait = False
        self._is_cut = False  # a part of a line was written, and the rest not yet
        self._open()
        self._guard = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._telling = 0  # lines that were lost, as the line says that is written now
        self.lost = 0
        self.lost_in_all = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or keep it; waits for nobody."""
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        with self._guard:
            if self._thread is None:
                notice = self._notice() if self.lost else b""
                written = self._written(notice + line)
                if written is None:
                    self._lose(1)
                    return
                if written:
                    line = (notice + line)[written:]
                    self.lost, self._is_cut = 0, bool(line)
            if line:
                self._keep(line)

    def flush(self) -> None:
        """Give the lines that wait a second."""
        self._is_idle.wait(_END_S)

    def close(self) -> None:
        """Write nothing more; what still waits is left to the thread, for as long as the process lasts."""
        super().close()
        with self._guard:
            if self._thread is None:
                self._may_wait, pipe, opened = True, self._pipe, self._socket
                self._pipe = self._socket = None
                if pipe is not None:
                    os.close(pipe)
                if opened is not None:
                    opened.close()

    def _open(self) -> None:
        """Find out how to write there without waiting."""
        mode = os.fstat(self._descriptor).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(self._descriptor))
        elif not stat.S_ISREG(mode):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            # Another description of the same pipe or terminal: the flag is not everybody's then.
            with contextlib.suppress(OSError):
                self._pipe = os.open(f"/proc/self/fd/{self._descriptor}", flags)
            self._may_wait = self._pipe is None

    def _written(self, line: bytes) -> int | None:
        """How much of a line was written; None if it was refused."""
        try:
            if self._socket is not None:
                return self._socket.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            if self._pipe is not None:
                return os.write(self._pipe, line)
            if self._may_wait:
                if not _is_writable(self._descriptor, 0):
                    return 0
                line = line[:_PIECE_BYTES]
            return os.write(self._descriptor, line)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def _keep(self, line: bytes) -> None:
        if self._waiting_bytes + len(line) > MOST_WAITING_BYTES:
            self._lose(1)
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        if self._thread is None:
            self._is_idle.clear()
            self._thread = threading.Thread(target=self._write_waiting, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the system has no more threads
                self._lose(len(self._waiting))
                self._waiting.clear()
                self._waiting_bytes = 0
                self._end()

    def _write_waiting(self) -> None:
        while True:
            with self._guard:
                if not self._waiting and self.lost:
                    self._waiting.append(self._notice())
                    self._waiting_bytes = len(self._waiting[0])
                    self._telling, self.lost = self.lost, 0
                if not self._waiting:
                    self._end()
                    return
                line = self._waiting[0]
            left = self._left_in_time(line)
            with self._guard:
                self._waiting.popleft()
                self._waiting_bytes -= len(line)
                told, self._telling = self._telling, 0
                if left:  # refused: the next line tries again
                    self.lost += told
                    self._lose(0 if told else 1)
                    self._is_cut |= len(left) < len(line)
                    if not self._waiting:
                        self._end()
                        return
                else:
                    self._is_cut = False

    def _left_in_time(self, line: bytes) -> bytes:
        """Write all of a line, however long that takes; what is left of one that is refused."""
        while line:
            written = self._written(line)
            if written is None:
                return line
            line = line[written:]
            if not written:
                _is_writable(self._descriptor, None)
        return line

    def _lose(self, lines: int) -> None:
        self.lost += lines
        self.lost_in_all += lines

    def _end(self) -> None:
        """Nothing waits."""
        self._thread = None
        self._is_idle.set()

    def _notice(self) -> bytes:
        record = logging.LogRecord(LOGGER, logging.WARNING, "", 0, "log lines were lost", (), None)
        record.__dict__["lines"] = self.lost
        return (b"\n" if self._is_cut else b"") + self._line(record)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")


def _is_writable(descriptor: int, wait_ms: int | None) -> bool:
    """Waits for it for so long; None is without end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(wait_ms))


def lines_lost(handler: logging.Handler) -> int:
    """How many a handler of `log_handler` has lost since the start."""
    return handler.lost_in_all if isinstance(handler, LogWriter) else 0


def log_handler() -> logging.Handler:
    """For standard error: lines wait for nobody where it is a descriptor, as it is but in tests."""
    try:
        return LogWriter(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # none, closed, or no descriptor behind it
        return logging.StreamHandler()
