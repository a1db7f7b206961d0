"""Large bodies, read by processes of their own, so that only their own requests wait for their decoding.

Rules:
    1. No process is started before it is needed; one that dies or hangs is replaced with the next order.
    2. What waits is bounded in number, bytes and time; beyond that it is refused at once, with 503.
    3. The cheapest waits the shortest: a client with the largest bodies cannot make others' wait for them.
    4. A client that leaves takes its body with it, unless it is being read: then its process finishes first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Final

from extproc.errors import Reason, RouterError
from extproc.request.reading import BodyRead, ReadOrder
from extproc.server.bodies import reading_process
from extproc.server.process.modules import python_module
from extproc.values.exchange import Body
from extproc.values.pending import Pending
from metadata_center import signals

_log = logging.getLogger("tokenway.body_readers")

MAX_WAITING: Final = 256
MAX_WAITING_BYTES: Final = 256 * 1024 * 1024
"""Of bodies that wait, as `routing.waiting.MAX_HELD_BYTES`."""

MAX_WAIT_S: Final = 15.0
"""Longest wait for a process."""

MAX_READ_S: Final = 10.0
"""Longest reading; the worst 32 MiB take some two seconds of an idle core."""

OWN_SHARE: Final = 0.5
"""Of `MAX_READ_S`, what a process that was given a body too large for it has worked at least: one that shares
its core with another gets so much."""

_CPU_CLOCK: Final = 2
"""Linux's number for the clock of a process (`clock_getcpuclockid`), whose owner is in the bits above."""

MAX_START_S: Final = 10.0
"""Longest start of a process, 0.4 s of an idle core: one that takes longer says nothing of the body."""

_QUICK_BYTES: Final = 8 * 1024 * 1024
_ROOMS: Final = (None, _QUICK_BYTES)
"""Most bytes of a body per process: one takes all, one is kept for what is read within a second."""


def _busy_error(retry_after_s: int = 1) -> RouterError:
    text = "Too many large request bodies are being read."
    return RouterError(Reason.READERS_BUSY, text, param="body", retry_after_s=retry_after_s)


@dataclass(order=True, slots=True)
class _Job:
    num_bytes: int
    ticket: int
    order: ReadOrder = field(compare=False)
    body: Body = field(compare=False)
    read: Pending[BodyRead] = field(compare=False)
    timer: asyncio.TimerHandle | None = field(default=None, compare=False)


class _Reader:
    """One process, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    def read(self, order: ReadOrder, body: Body) -> BodyRead:
        """Have a body read; blocks. Raises RouterError if it is refused."""
        try:
            channel = self._channel or self._start()
        except TimeoutError:
            self.stop()
            _log.warning("a process that reads bodies does not start", extra={"waited_s": MAX_START_S})
            raise _busy_error() from None
        began_s = self._worked_s()
        try:
            return reading_process.ask(channel, order, body)
        except RouterError:
            raise
        except TimeoutError:
            worked_s = self._worked_s() - began_s
            self.stop()
            if worked_s < OWN_SHARE * MAX_READ_S:  # no processor, or it hangs: not the body's fault
                said = {"body_bytes": len(body), "worked_s": round(worked_s, 3), "waited_s": MAX_READ_S}
                _log.warning("a process that reads bodies does not get on", extra=said)
                raise _busy_error() from None
            raise RouterError(
                Reason.BODY_TOO_LARGE, "The request body takes too long to read.", param="body"
            ) from None
        except (OSError, EOFError):
            self.stop()
            _log.warning("a process that reads bodies died", extra={"body_bytes": len(body)})
            raise RouterError(Reason.INTERNAL, "The request body could not be read.", param="body") from None

    def _worked_s(self) -> float:
        """Processor time of the process since it was started."""
        assert self._process is not None
        try:
            return time.clock_gettime(~self._process.pid << 3 | _CPU_CLOCK)
        except OSError:  # it is gone
            return 0.0

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs, signals.kept_from_helper():
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                python_module("extproc.server.bodies.reading_process", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._channel = ours
        ours.settimeout(MAX_START_S)
        reading_process.await_ready(ours)
        ours.settimeout(MAX_READ_S)
        return ours


class BodyReaders:
    """Reads bodies off the event loop.

    Args:
        retry_after_s: For refusals, whole seconds.
    """

    def __init__(self, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        self._retry_after_s = retry_after_s
        self._waiting: list[_Job] = []
        self._num_waiting = 0
        self._num_bytes = 0
        self._tickets = 0
        self._readers = [_Reader() for _ in _ROOMS]
        self._busy = [False] * len(_ROOMS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(len(_ROOMS), thread_name_prefix="body-reader")
        self._is_open = True

    patience_s = MAX_WAIT_S + MAX_READ_S
    """A body is read, or refused, after this long at the latest."""

    def __len__(self) -> int:
        """Bodies that wait."""
        return self._num_waiting

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [reader.pid for reader in self._readers if reader.pid is not None]

    def read(self, order: ReadOrder, body: Body) -> Pending[BodyRead]:
        """Have a body read.

        Returns:
            Fails with `RouterError` if the body is refused, or with READERS_BUSY if it waits too long.

        Raises:
            RouterError: READERS_BUSY, too many wait already; SHUTTING_DOWN.
        """
        if not self._is_open:
            raise self._stopping_error()
        if self._num_waiting >= MAX_WAITING or self._num_bytes + len(body) > MAX_WAITING_BYTES:
            raise _busy_error(self._retry_after_s())
        self._tickets += 1
        read: Pending[BodyRead] = Pending(lambda: self._left(job))
        job = _Job(len(body), self._tickets, order, body, read)
        if len(self._waiting) > 2 * MAX_WAITING:  # whose clients left, most of them
            self._waiting = [waits for waits in self._waiting if not waits.read.is_over]
            heapify(self._waiting)
        heappush(self._waiting, job)
        self._num_waiting += 1
        self._num_bytes += job.num_bytes
        job.timer = asyncio.get_running_loop().call_later(self.patience_s, self._time_up, job)
        self._assign()
        return read

    async def close(self) -> None:
        """Refuse the requests that wait, and end the processes."""
        self._is_open = False
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            self._left(job)
            job.read.fail(self._stopping_error())
        if self._tasks:
            await asyncio.wait(self._tasks)
        for reader in self._readers:
            reader.stop()
        self._threads.shutdown()

    @staticmethod
    def _stopping_error() -> RouterError:
        return RouterError(Reason.SHUTTING_DOWN, "Tokenway is stopping.", retry_after_s=1)

    def _time_up(self, job: _Job) -> None:
        self._left(job)
        job.read.fail(_busy_error(self._retry_after_s()))

    def _left(self, job: _Job) -> None:
        """A job waits no more: it is being read, or is not wanted any more."""
        if job.body:
            self._num_waiting -= 1
            self._num_bytes -= job.num_bytes
            job.body = b""
        if job.read.is_over and job.timer is not None:
            job.timer.cancel()

    def _assign(self) -> None:
        """Give idle processes the cheapest jobs; the one for all of them comes last."""
        while self._waiting and self._waiting[0].read.is_over:
            heappop(self._waiting)
        for index in reversed(range(len(_ROOMS))):
            room = _ROOMS[index]
            if self._busy[index] or not self._waiting:
                continue
            if room is not None and self._waiting[0].num_bytes > room:
                continue
            job = heappop(self._waiting)
            body = job.body
            self._left(job)
            self._busy[index] = True
            task = asyncio.get_running_loop().create_task(self._run(index, job, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            while self._waiting and self._waiting[0].read.is_over:
                heappop(self._waiting)

    async def _run(self, index: int, job: _Job, body: Body) -> None:
        loop = asyncio.get_running_loop()
        try:
            read = await loop.run_in_executor(self._threads, self._readers[index].read, job.order, body)
        except Exception as error:
            job.read.fail(error)
        else:
            job.read.give(read)
        finally:
            self._left(job)
            self._busy[index] = False
            if self._is_open:
                self._assign()
