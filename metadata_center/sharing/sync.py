"""Keeps a `SharedStore` in step with the others over a `Transport`: one task, and no decision waits for it.

Rules:
    1. Subscribe, then take the snapshot, then publish the full share: in this order nothing is missed. The
       same after every fault, after a pause that grows to `backoff_s`, shortened by up to half at random. It
       begins anew once a connection has stood for that long: one that can be read and not written does not.
    2. One message is under way at a time; what changes meanwhile goes with the next one. An idle member's
       first change leaves at once. Between two messages lies a pause in proportion to the live members, so
       that what all of them receive is bounded by `MESSAGES_PER_S` at any number of them.
    3. A member that does not hear itself for a lease was cut off, whatever its connections say.
    4. Every wait has a bound. A stop that meets a fault is a stop: a `TaskGroup` that has an error of a child
       to raise does not raise the cancellation that came with it (up to Python 3.12), so `_run` looks itself.
    5. A joined member has been heard: the first accepted message makes it so. Until then each reason is
       logged once, so a fault that lasts is a line and not a line for each attempt.
    6. A store that has lost the share of a member which it knew a moment ago is told all of it at once, but
       not oftener than by heartbeats: what evicts it may do so again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from metadata_center.backoff import Backoff, Rng
from metadata_center.sharing.messages import Candidate, Update
from metadata_center.sharing.store import HEARTBEATS_PER_LEASE, SharedStore
from metadata_center.sharing.store_watch import StoreStatus, StoreWatch
from metadata_center.sharing.tickets import Outgoing
from metadata_center.sharing.transport import Transport, TransportError
from metadata_center.types import EndpointKey, RequestId

_LOGGER: Final = logging.getLogger("tokenway.sharing")

MESSAGES_PER_S: Final = 4_000.0
"""That a member receives from all others: about 50 us of CPU each, so a fifth of a core at the most."""

_EWMA: Final = 0.1  # weight of the last round trip: the last twenty count
_FIRST_BACKOFF_S: Final = 0.05

_MAX_LOGGED: Final = 8
"""Reasons logged between two times of being joined; texts of faults may hold numbers that change."""


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """Bounds on waits.

    Attributes:
        timeout_s: For one round trip, to connect and subscribe included.
        reserve_timeout_s: How long a decision waits for compare and set.
        backoff_s: Longest pause before another attempt.
    """

    timeout_s: float = 2.0
    reserve_timeout_s: float = 0.05
    backoff_s: float = 1.0


@dataclass(frozen=True, slots=True)
class SyncStats:
    """Counts since the start, for metrics.

    Attributes:
        connected: The subscription stands, the snapshot was taken, and a message was accepted.
        writable: False while what others say is read, and nothing is accepted of this member.
        emptied: Times that the store had lost this member's share under a connection that stood.
        published: Messages accepted.
        received: Messages heard, own ones included.
        refused: Messages received that were none.
        failures: Faults of the transport.
        reconnects: Connections made after the first.
        namesakes: Messages of another process with this gateway name and worker number; growing, two gateways
            have one name and do not count each other.
        dropped: Rows, members and block hashes that found no room.
        round_trip_s: Of a message, moving average; 0 before the first.
        reserved: Charges placed by compare and set.
        reserve_timeouts: Charges that were to be but stayed local, for want of an answer in time.
    """

    connected: bool
    writable: bool
    emptied: int
    published: int
    received: int
    refused: int
    failures: int
    reconnects: int
    namesakes: int
    dropped: int
    round_trip_s: float
    reserved: int
    reserve_timeouts: int


class Sync:
    """One member's connection to the others.

    Args:
        store: What is kept in step.
        transport: Closed by `stop`.
        clock: Monotonic seconds.
        rng: For pauses.
        settings: Bounds.
    """

    def __init__(
        self,
        store: SharedStore,
        transport: Transport,
        clock: Callable[[], float],
        rng: Rng,
        settings: SyncSettings | None = None,
    ) -> None:
        self._store = store
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._settings = settings or SyncSettings()
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._connected = False
        self._has_read = False
        self._writable = True
        self._connected_s = 0.0
        self._logged: set[str] = set()
        self._watch = StoreWatch()
        self._told_s = self._told_all_s = -math.inf
        self._sent_s = 0.0
        self._under_way_s: float | None = None
        self._published = self._received = self._failures = self._connects = self._emptied = 0
        self._reserved = self._reserve_timeouts = 0
        self._heard_self_s = 0.0
        self._last_received_s: float | None = None
        self._round_trip_s = 0.0
        store.listen(self._news.set)

    def start(self) -> None:
        """Begin; returns at once, whether or not there is anybody to talk to."""
        self._task = asyncio.create_task(self._run(), name="metadata-sync")

    async def stop(self) -> None:
        """Say goodbye if that is possible in `timeout_s`, and close the transport."""
        self._is_stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(self._settings.timeout_s):
                await self._transport.publish(self._store.leave())
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(self._settings.timeout_s):
                await self._transport.close()

    def age_s(self, now_s: float) -> float:
        """How long ago anything was heard of other members or of oneself; infinite before the first word."""
        return math.inf if self._last_received_s is None else now_s - self._last_received_s

    @property
    def stats(self) -> SyncStats:
        """What happened so far."""
        store = self._store
        return SyncStats(
            connected=self._connected,
            writable=self._writable,
            emptied=self._emptied,
            published=self._published,
            received=self._received,
            refused=self._transport.refused,
            failures=self._failures,
            reconnects=max(0, self._connects - 1),
            namesakes=store.namesakes,
            dropped=store.peers.refused + store.dropped_blocks,
            round_trip_s=self._round_trip_s,
            reserved=self._reserved,
            reserve_timeouts=self._reserve_timeouts,
        )

    def store_status(self, now_s: float) -> StoreStatus:
        """What is wrong with the store, and since when; `now_s` on the clock of this object."""
        return self._watch.status(now_s)

    async def reserve(self, request_id: RequestId, candidates: Sequence[Candidate]) -> EndpointKey | None:
        """Put a charge just made on the first of `candidates` to the rendezvous, and charge as it says.

        Args:
            request_id: Charged in the store's load table, in the same turn of the event loop.
            candidates: Best first, each with what the member's view said before the charge.

        Returns:
            Where it is charged now; None if no place was confirmed within `reserve_timeout_s`: it stays
            on the first candidate.
        """
        now_s = self._clock()
        timeout_s = self._settings.reserve_timeout_s
        is_stuck = self._under_way_s is not None and now_s - self._under_way_s > timeout_s
        answered = asyncio.Event()
        ticket = None
        if self._connected and not is_stuck:  # else a fault would add its timeout to every request
            ticket = self._store.reserve(request_id, candidates, answered.set)
        if ticket is None:
            self._reserve_timeouts += 1
            return None
        self._urgent.set()
        try:
            async with asyncio.timeout(timeout_s):
                await answered.wait()
        except TimeoutError:
            pass
        finally:
            self._store.withdraw(ticket)
        if ticket.place is None:
            self._reserve_timeouts += 1
        else:
            self._reserved += 1
        return ticket.place

    async def _run(self) -> None:
        most_s = self._settings.backoff_s
        backoff = Backoff(self._rng, first_s=_FIRST_BACKOFF_S, most_s=most_s, steady_s=most_s)
        while not self._is_stopping:
            self._has_read = False
            reason = ""
            try:
                await self._follow()
            except* (TransportError, TimeoutError) as group:
                self._failures += 1
                reason = _reason(group)
                if self._is_news(reason):
                    extra = {"reason": reason, "writable": self._writable}
                    _LOGGER.warning("metadata center lost", extra=extra)
            except* Exception as group:  # a fault of ours must not end the sharing for good
                self._failures += 1
                reason = _reason(group)
                if self._is_news(reason):
                    _LOGGER.exception("sharing failed")
            self._writable |= not self._has_read
            self._watch.failed(reason, self._clock(), is_writable=self._writable)
            stood_s = self._clock() - self._connected_s if self._connected else 0.0
            self._connected = False
            if not self._is_stopping:
                await asyncio.sleep(backoff.after(stood_s))

    def _is_news(self, reason: str) -> bool:
        """Whether a fault is to be logged: once each until the next time of being joined."""
        if reason in self._logged or len(self._logged) >= _MAX_LOGGED:
            return False
        self._logged.add(reason)
        return True

    async def _follow(self) -> None:
        """Rule 1; returns only by an exception."""
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(self._settings.timeout_s):
                messages = await stack.enter_async_context(self._transport.subscribe())
            async with asyncio.timeout(self._settings.timeout_s):
                updates = await self._transport.snapshot()
            self._store.snapshot(updates, self._clock())
            self._heard_self_s = self._last_received_s = self._clock()
            self._has_read = True
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(messages))
                tasks.create_task(self._send())

    async def _receive(self, messages: AsyncIterator[Update]) -> None:
        member = self._store.member
        async for update in messages:
            now_s = self._clock()
            self._received += 1
            self._last_received_s = now_s
            if update.member == member:
                self._heard_self_s = now_s
            self._store.incoming(update, now_s)
        raise TransportError("the subscription ended")

    async def _send(self) -> None:
        store = self._store
        while True:
            await _wait(self._news, store.heartbeat_s - self._clock())
            if not store.is_reserving:
                gap_s = (1 + store.peers.live_members) / MESSAGES_PER_S
                await _wait(self._urgent, self._sent_s + gap_s - self._clock())
            self._news.clear()
            self._urgent.clear()
            now_s = self._clock()
            if now_s - self._heard_self_s > store.share_lease_s:
                raise TransportError("nothing was heard for a lease")
            store.advance(now_s)
            outgoing = store.outgoing(now_s)
            if outgoing is not None:
                await self._exchange(outgoing, now_s)

    async def _exchange(self, outgoing: Outgoing, now_s: float) -> None:
        self._sent_s = self._under_way_s = now_s
        settled = False
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                if outgoing.tickets:
                    reserved = await self._transport.reserve(outgoing.update, outgoing.reservations())
                    if len(reserved) != len(outgoing.tickets):
                        raise TransportError("an answer of another length than the question")
                else:
                    reserved = []
                    await self._transport.publish(outgoing.update)
            after_s = self._clock()
            self._store.accepted(outgoing, reserved, after_s)
            settled = True
        except TransportError:
            self._writable = self._connected
            raise
        finally:
            self._under_way_s = None
            if not settled:
                self._store.failed(outgoing, self._clock())
        if self._connected and not self._transport.had_share:
            self._tell_all(outgoing, after_s)
        self._told_s = now_s
        if not self._connected:
            self._connected = self._writable = True
            self._watch.joined()
            self._connected_s = after_s
            self._connects += 1
            self._logged.clear()
            extra = {"gateways": self._store.live_gateways, "refused": self._transport.refused}
            _LOGGER.info("metadata center joined", extra=extra)
        self._published += 1
        took_s = after_s - now_s
        self._round_trip_s += (_EWMA if self._round_trip_s else 1.0) * (took_s - self._round_trip_s)

    def _tell_all(self, outgoing: Outgoing, now_s: float) -> None:
        """Rule 6; a share whose lease may be over by `now_s` was not lost."""
        lease_s = self._store.share_lease_s
        if now_s - self._told_s >= lease_s:
            return
        self._emptied += 1
        if self._watch.emptied(now_s):
            _LOGGER.warning("the metadata center has lost its data")
        if not outgoing.update.full and now_s - self._told_all_s > lease_s / HEARTBEATS_PER_LEASE:
            self._told_all_s = now_s
            self._store.tell_all(now_s)


async def _wait(event: asyncio.Event, most_s: float) -> None:
    """Until the event is set, or `most_s` are over."""
    if event.is_set() or most_s <= 0.0:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(most_s):
            await event.wait()


def _reason(group: BaseExceptionGroup[BaseException]) -> str:
    """What the first of a group of exceptions says."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, TimeoutError) and not str(first):
        hints = getattr(first.__cause__, "__notes__", ())
        return " ".join(["no answer within metadata_center.timeout_s", *(f"({hint})" for hint in hints)])
    return str(first) or type(first).__name__
