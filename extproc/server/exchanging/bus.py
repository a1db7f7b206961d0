"""Workers of one gateway over Unix sockets: log entries, cached blocks, Envoys, who waits, who is reached.

Rules:
    1. Each worker listens on `bus<i>.sock` and connects to every other one; a peer that is away is tried
       again every `RECONNECT_S`.
    2. A peer's queue is bounded by `MAX_QUEUED_BYTES`; what does not fit is dropped and counted: a lost
       ending is made good by its lease, a lost block by the next request that records it, a lost
       line by the next.
    3. Frames are length-prefixed MessagePack of the types below and no others, on a socket that only this
       user may ever open; a peer that sends anything else is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from extproc.listeners import Listeners
from extproc.server.listening.run_dir import bus_path, closed_to_others
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from metadata_center.sharing.lines import heard, told
from metadata_center.sharing.messages import Line
from metadata_center.types import EndpointKey, Waiter

_log = logging.getLogger("tokenway.bus")

RECONNECT_S = 0.2
MAX_QUEUED_BYTES = 16 * 1024 * 1024
"""About 39,000 entries of 430 bytes, far more than a worker that restarts within a second misses."""

MAX_FRAME_BYTES = 4 * 1024 * 1024

_LENGTH = struct.Struct("<I")


class _Ended(msgspec.Struct, tag="end", array_like=True, frozen=True):
    entry: RequestEnd


class _Alive(msgspec.Struct, tag="alive", array_like=True, frozen=True):
    entry: RequestAlive


class _Started(msgspec.Struct, tag="started", array_like=True, frozen=True):
    entry: AttemptStarted


class _Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    entry: AttemptFailed


class _Question(msgspec.Struct, tag="question", array_like=True, frozen=True):
    asker: int
    number: int
    clusters: list[str]
    served: dict[str, list[str]]


class _Answer(msgspec.Struct, tag="answer", array_like=True, frozen=True):
    answerer: int
    number: int
    refused: dict[str, str]


class _Envoys(msgspec.Struct, tag="envoys", array_like=True, frozen=True):
    number: int


class _Reached(msgspec.Struct, tag="reached", array_like=True, frozen=True):
    where: str
    is_reached: bool


class _Cached(msgspec.Struct, tag="cached", array_like=True, frozen=True):
    endpoint: EndpointKey
    blocks: list[int]


class _Waits(msgspec.Struct, tag="waits", array_like=True, frozen=True):
    worker: int
    lines: tuple[Line, ...]


EntryFrame = _Ended | _Alive | _Started | _Failed
Frame = EntryFrame | _Cached | _Question | _Answer | _Envoys | _Reached | _Waits

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Frame)


def frame_of(entry: RequestEvent) -> EntryFrame:
    """An entry as it travels."""
    match entry:
        case RequestEnd():
            return _Ended(entry)
        case RequestAlive():
            return _Alive(entry)
        case AttemptStarted():
            return _Started(entry)
        case AttemptFailed():
            return _Failed(entry)


def _hear_nobody(_worker: str, _line: list[Waiter]) -> None:
    """No request waits here, whoever waits elsewhere."""


class Bus:
    """The workers' wire.

    Args:
        run_dir: Where the sockets lie.
        index: This worker.
        workers: How many there are.
        on_entry: Receives entries that other workers received.
        on_cached: Receives what other workers saw cached.
        known: What a worker that connects is to learn of what others learned before; the first of the others
            sends it.
        on_line: Receives who waits at another worker, named by its index.
        clock: Monotonic seconds, of the ranks of those that wait.

    Attributes:
        questions: Notified of who asks, under which number, whether Envoys have these clusters, and which of
            them with endpoints, and where.
        answers: Notified of who answers, which number, and of what an Envoy refused.
        came: Notified of a worker that can be reached from now on.
        away: Notified of one that cannot any more.
        found: Notified of how many more Envoys another worker has.
        lost: Notified of how many were at a worker that is gone.
    """

    def __init__(
        self,
        run_dir: Path,
        index: int,
        workers: int,
        on_entry: Callable[[RequestEvent], None],
        on_cached: Callable[[EndpointKey, Sequence[int]], None],
        known: Callable[[], Mapping[EndpointKey, Sequence[int]]] = dict,
        on_line: Callable[[str, list[Waiter]], None] = _hear_nobody,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = run_dir
        self._index = index
        self._peers = [i for i in range(workers) if i != index]
        self._on_entry = on_entry
        self._on_cached = on_cached
        self._known = known
        self._on_line = on_line
        self._clock = clock
        self.questions: Listeners[[int, int, list[str], dict[str, list[str]]]] = Listeners()
        self.answers: Listeners[[int, int, dict[str, str]]] = Listeners()
        self.came: Listeners[[int]] = Listeners()
        self.away: Listeners[[int]] = Listeners()
        self.found: Listeners[[int]] = Listeners()
        self.lost: Listeners[[int]] = Listeners()
        self._num_envoys = 0
        self._unreached: set[str] = set()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._served: dict[asyncio.StreamWriter, set[str]] = {}  # where nobody is connected to that worker
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._tried = {peer: asyncio.Event() for peer in self._peers}
        self.dropped = 0

    def _path(self, index: int) -> Path:
        return bus_path(self._run_dir, index)

    async def start(self) -> None:
        """Listen, and keep connecting to the others."""
        self.path.unlink(missing_ok=True)
        await self._listen()
        self._tasks = [asyncio.create_task(self._keep_connected(peer)) for peer in self._peers]

    @property
    def path(self) -> Path:
        """Where it listens."""
        return self._path(self._index)

    async def renew(self) -> None:
        """Listen anew where the name leads nowhere. Raises OSError if that cannot be."""
        before = self._server
        await self._listen()
        if before is not None:
            before.close()

    async def _listen(self) -> None:
        listening = socket.socket(socket.AF_UNIX)
        try:
            with closed_to_others():
                listening.bind(str(self.path))
        except OSError:
            listening.close()
            raise
        self._server = await asyncio.start_unix_server(self._serve, sock=listening)

    async def stop(self) -> None:
        """Close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in (*self._writers.values(), *self._served):
            writer.transport.abort()  # what a peer has not read by now it will not miss: it drains as well
        if self._server is not None:
            self._server.close()
            await asyncio.sleep(0)  # an aborted transport closes its socket one turn later
            self.path.unlink(missing_ok=True)

    def hand_over(self, owner: str, entry: RequestEvent) -> bool:
        """Send the entry to the worker named `owner` (`index.incarnation`); False if there is none such."""
        index, _, _ = owner.partition(".")
        return index.isdigit() and int(index) in self._peers and self._send(int(index), frame_of(entry))

    def broadcast(self, entry: RequestEvent) -> None:
        """Send the entry to every other worker."""
        frame = frame_of(entry)
        for peer in self._peers:
            self._send(peer, frame)

    def share(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """Inform every other worker that `endpoint` has `blocks` cached."""
        frame = _Cached(endpoint, list(blocks))
        for peer in self._peers:
            self._send(peer, frame)

    def tell_line(self, line: Sequence[Waiter]) -> None:
        """Tell every other worker who waits here, first in line first."""
        frame = _Waits(self._index, told(line, self._clock()))
        for peer in self._peers:
            self._send(peer, frame)

    def tell_envoys(self, number: int) -> None:
        """Tell every other worker how many Envoys take clusters from here, if they do not know."""
        if number != self._num_envoys:
            self._num_envoys = number
            for peer in self._writers:
                self._send(peer, _Envoys(number))

    def is_reached(self, where: str, is_here: Callable[[], bool]) -> bool:
        """Whether somebody is connected to any worker; whether to this one is told to those that do not know.

        One that never said that nobody is connected to it is taken to be reached; one that is gone is not.

        Args:
            where: Which of a worker's servers, by a name.
            is_here: True while somebody is connected to this worker there.
        """
        is_reached = is_here()
        if is_reached is (where in self._unreached):
            self._unreached ^= {where}
            for peer in self._writers:
                self._send(peer, _Reached(where, is_reached))
        return is_reached or any(where not in unreached for unreached in self._served.values())

    async def met(self) -> frozenset[int]:
        """Those of the other workers that are there: each was tried once since the start."""
        for tried in self._tried.values():
            await tried.wait()
        return frozenset(self._writers)

    def ask(
        self,
        number: int,
        clusters: Sequence[str],
        served: Mapping[str, list[str]] = MappingProxyType({}),
        worker: int | None = None,
    ) -> frozenset[int]:
        """Ask every other worker that is there whether its Envoys have these clusters; who that is.

        Args:
            number: Of the question.
            clusters: Which.
            served: Those of them that must have endpoints, too, and the addresses of these.
            worker: Ask this one alone.
        """
        question = _Question(self._index, number, list(clusters), dict(served))
        asked = [peer for peer in self._writers if worker in (peer, None)]
        return frozenset(peer for peer in asked if self._send(peer, question))

    def answer(self, asker: int, number: int, refused: Mapping[str, str]) -> bool:
        """Answer a question: Envoys here have all the clusters, or refused these with these words.

        Returns:
            Whether it is on its way: a worker that has just started is connected to a moment later, and
            nothing is dropped when it is answered again then.
        """
        return asker in self._writers and self._send(asker, _Answer(self._index, number, dict(refused)))

    def _greet(self, peer: int) -> None:
        """Tell a worker that starts anew of the Envoys here and, unless another one does, what it missed."""
        self._send(peer, _Envoys(self._num_envoys))
        for where in self._unreached:
            self._send(peer, _Reached(where, False))
        if self._index == (0 if peer else 1):
            for endpoint, blocks in self._known().items():
                self._send(peer, _Cached(endpoint, list(blocks)))

    def _send(self, peer: int, frame: Frame) -> bool:
        writer = self._writers.get(peer)
        payload = _ENCODER.encode(frame)
        if (
            writer is None
            or len(payload) > MAX_FRAME_BYTES
            or writer.transport.get_write_buffer_size() > MAX_QUEUED_BYTES
        ):
            self.dropped += 1
            return False
        writer.write(_LENGTH.pack(len(payload)) + payload)
        return True

    async def _keep_connected(self, peer: int) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path(peer))
            except OSError:
                self._tried[peer].set()
                await asyncio.sleep(RECONNECT_S)
                continue
            self._writers[peer] = writer
            self._tried[peer].set()
            self._greet(peer)
            self.came.notify(peer)
            with contextlib.suppress(OSError):
                await reader.read()  # nothing is ever sent back: this returns when the peer is gone
            self._writers.pop(peer).close()
            self.away.notify(peer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unreached = self._served[writer] = set()
        num_envoys = 0
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > MAX_FRAME_BYTES:
                    return
                frame = _DECODER.decode(await reader.readexactly(length))
                if isinstance(frame, _Envoys):
                    more, num_envoys = frame.number - num_envoys, frame.number
                    if more > 0:
                        self.found.notify(more)
                elif isinstance(frame, _Reached):
                    (unreached.discard if frame.is_reached else unreached.add)(frame.where)
                else:
                    self._take(frame)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            return
        finally:
            del self._served[writer]
            writer.close()
            if num_envoys:
                self.lost.notify(num_envoys)

    def _take(self, frame: EntryFrame | _Cached | _Question | _Answer | _Waits) -> None:
        try:
            match frame:
                case _Cached():
                    self._on_cached(frame.endpoint, frame.blocks)
                case _Question():
                    self.questions.notify(frame.asker, frame.number, frame.clusters, frame.served)
                case _Answer():
                    self.answers.notify(frame.answerer, frame.number, frame.refused)
                case _Waits():
                    self._on_line(str(frame.worker), heard(frame.lines, self._clock()))
                case _:
                    self._on_entry(frame.entry)
        except Exception:  # a bug with one request must not lose the endings of all others
            _log.exception("what another worker sent failed")
