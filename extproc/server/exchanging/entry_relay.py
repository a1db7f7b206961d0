"""Access-log entries that reach another replica than the one that decided, sent on by the metadata center.

A gateway that several replicas serve has one log stream per thread, to any of them. Each entry names the
worker that decided: it is sent to that worker's name, and one without a name to all.

Rules:
    1. Each entry is taken in at most once: messages of a sender are numbered, and what is sent again after an
       answer that did not come is known by its number.
    2. Entries for one worker keep their order. They wait while the center or the worker is away, for
       `KEPT_S`; then they are dropped and counted, and the requests end with their leases.
    3. Bounded: `MAX_QUEUED` entries, `MAX_NAMES` workers that are sent to, and as many that are heard.
    4. Only entries are taken, of the types that the bus between workers has.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Final

import msgspec

from extproc.server.exchanging.bus import EntryFrame, frame_of
from extproc.values.endings import RequestEvent
from metadata_center.sharing.transport import DirectMessages, TransportError

_log = logging.getLogger("tokenway.relay")

EVERYBODY: Final = "all"
"""A name that every worker listens under; no worker has it."""

MAX_QUEUED: Final = 20_000
"""Entries of about 430 bytes: 9 MB."""

MAX_NAMES: Final = 256
BATCH: Final = 512
"""Entries of one message: 220 KB."""

MAX_MESSAGE_BYTES: Final = 1 << 20
KEPT_S: Final = 5.0
"""A subscription that broke is there again within this."""

FLUSH_S: Final = 1.0
SEND_S: Final = 1.0
RETRY_S: Final = (0.05, 0.2)


class _Letter(msgspec.Struct, array_like=True, frozen=True):
    """One message: who sends it, to what name, its number among those, what it brings."""

    sender: str
    to: str
    number: int
    entries: list[EntryFrame]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Letter)


class EntryRelay:
    """What one worker sends to workers of other replicas, and hears from them.

    Args:
        owner: This worker's name in access-log entries.
        messages: The way; closed by `stop`.
        on_entry: Takes in an entry.

    Attributes:
        dropped: Entries that reached nobody, and messages that are none, as of another version.
    """

    def __init__(
        self, owner: str, messages: DirectMessages, on_entry: Callable[[RequestEvent], None]
    ) -> None:
        self._owner = owner
        self._messages = messages
        self._on_entry = on_entry
        self._queues: dict[str, deque[RequestEvent]] = {}
        self._queued = 0
        self._number = 0
        self._heard: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._sending: set[asyncio.Task[None]] = set()
        self._listening: set[asyncio.Task[None]] = set()
        self._is_started = False
        self.dropped = 0

    async def start(self) -> None:
        """Listen. What there is to be sent is sent from now on."""
        self._is_started = True
        _begin(self._listen(), self._listening)

    async def stop(self) -> None:
        """End, once what waits is sent, or `FLUSH_S` is over."""
        self._is_started = False
        if self._sending:
            await asyncio.wait(self._sending, timeout=FLUSH_S)
        tasks = [*self._sending, *self._listening]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._messages.close()

    def take(self, entry: RequestEvent) -> None:
        """An entry from another worker of this replica: it is ours, or goes on."""
        if entry.owner is None or entry.owner == self._owner:
            self._on_entry(entry)
        else:
            self.hand_over(entry.owner, entry)

    def hand_over(self, owner: str, entry: RequestEvent) -> bool:
        """Send an entry to the worker of that name; False if it found no room."""
        queue = self._queues.get(owner)
        if (
            not self._is_started
            or self._queued >= MAX_QUEUED
            or (queue is None and len(self._queues) >= MAX_NAMES)
        ):
            self.dropped += 1
            return False
        self._queued += 1
        if queue is None:
            self._queues[owner] = deque((entry,))
            _begin(self._deliver(owner), self._sending)
        else:
            queue.append(entry)
        return True

    def broadcast(self, entry: RequestEvent) -> None:
        """Send an entry to every other worker of all replicas."""
        self.hand_over(EVERYBODY, entry)

    async def _deliver(self, owner: str) -> None:
        """Send what waits for one worker, until nothing does."""
        queue = self._queues[owner]
        try:
            while queue:
                batch = [queue[i] for i in range(min(BATCH, len(queue)))]
                is_sent = await self._send(owner, batch)
                for _ in batch:
                    queue.popleft()
                self._queued -= len(batch)
                if not is_sent:
                    self.dropped += len(batch)
        finally:
            self._queued -= len(queue)
            del self._queues[owner]

    async def _send(self, owner: str, batch: list[RequestEvent]) -> bool:
        """Whether somebody got it, within `KEPT_S`."""
        self._number += 1
        payload = _ENCODER.encode(_Letter(self._owner, owner, self._number, list(map(frame_of, batch))))
        until_s = time.monotonic() + KEPT_S
        while True:
            try:
                async with asyncio.timeout(SEND_S):
                    if await self._messages.send_to(owner, payload):
                        return True
            except (TransportError, TimeoutError):
                pass
            if owner == EVERYBODY or time.monotonic() >= until_s:
                return owner == EVERYBODY
            await asyncio.sleep(random.uniform(*RETRY_S))

    async def _listen(self) -> None:
        while True:
            try:
                async with self._messages.addressed_to((self._owner, EVERYBODY)) as payloads:
                    await self._hear(payloads)
            except (TransportError, TimeoutError):
                pass
            except Exception:  # a fault of ours must not end the listening for good
                _log.exception("listening for entries of other replicas failed")
            await asyncio.sleep(random.uniform(*RETRY_S))

    async def _hear(self, payloads: AsyncIterator[bytes]) -> None:
        async for payload in payloads:
            try:
                letter = _DECODER.decode(payload) if len(payload) <= MAX_MESSAGE_BYTES else None
            except msgspec.MsgspecError:
                letter = None
            if letter is None:
                self.dropped += 1
                continue
            way = letter.sender, letter.to
            if letter.sender == self._owner or self._heard.get(way, 0) >= letter.number:
                continue
            self._heard[way] = letter.number
            self._heard.move_to_end(way)
            if len(self._heard) > MAX_NAMES:
                self._heard.popitem(last=False)
            for frame in letter.entries:
                try:
                    self._on_entry(frame.entry)
                except Exception:  # a bug with one request must not lose the endings of all others
                    _log.exception("what another replica sent failed")


def _begin(work: Coroutine[None, None, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
