"""Receives cache events from all engines over ZeroMQ and hands them on in order.

Rules:
    1. Events of a source reach the callbacks exactly as its `Sequencer` orders them. Nothing is delivered for
       a source after it was removed, and its removal is itself a clear.
    2. One task at a time works, for `TURN_S` at most before the event loop gets its turn: a flood of events
       delays other events, never requests for longer. A large message is taken in `pieces`, with nothing else
       of any source between them. What does not fit into ZeroMQ's queues by then is lost, shows as a gap, and
       is replayed.
    3. Each replay has a socket of its own, so a late answer to an abandoned request goes nowhere; each source
       asks at most once in `MIN_REPLAY_INTERVAL_S`.
    4. While there is no connection to an engine its view counts as behind. A new connection may mean a new
       engine: the sequencer verifies it. Where engines connect
       to us (bind), connections say nothing, so what learns of a restart calls `verify`.
    5. Nothing an engine sends raises: a message without the frames of one is counted; so is an event or a
       batch that cannot be decoded, which clears its source where it may have removed blocks, and is logged
       once for each endpoint.

A bound socket takes events from every host that can reach it: bind it to a private network.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import fields
from typing import Final, TypeVarTuple, Unpack

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from metadata_center.kv_events.claims import MAX_SOURCES
from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import Batch
from metadata_center.kv_events.feeds import Feed, Inlet, name_of
from metadata_center.kv_events.pieces import SMALL_BYTES, Unreadable, pieces
from metadata_center.kv_events.sequencing import (
    REPLAY_TIMEOUT_S,
    RETRY_S,
    Clear,
    Deliver,
    Effect,
    Sequencer,
    SequenceStats,
    SyncState,
)
from metadata_center.kv_events.sockets import limit, open_live, sequence_of
from metadata_center.kv_events.sources import Source
from metadata_center.kv_events.statistics import SubscriberStats
from metadata_center.types import EndpointKey

_Args = TypeVarTuple("_Args")

logger = logging.getLogger("tokenway.kv_events")

TURN_S: Final = 0.002
"""Work before other tasks get their turn; some 100 batches of 64 blocks are decoded in it."""

MIN_REPLAY_INTERVAL_S: Final = 0.25
"""Two engines that share a topic look like endless restarts; this bounds what that costs."""

LIVE_QUEUE: Final = 1_000
"""Messages queued for one SUB connection: ten seconds of an engine with 10 ms steps."""

REPLAY_QUEUE: Final = 4_096
"""Messages queued during a replay, on top of the 1,000 of vLLM's ROUTER; more arrive in a second request."""

_TICK_S: Final = 0.25  # how late a time-out may be noticed
_REOPEN_S: Final = 1.0  # between attempts to open an address that is in use or malformed
_REPLAY_END: Final = b"\xff" * 8


class KvEventSubscriber:
    """All sources of one gateway worker. `start`, `stop` and the rest belong to one event loop.

    Args:
        on_batch: Called with each batch in order, a large one in parts. The source is the authority on
            the rank.
        on_clear: Called when all that was delivered for a source no longer counts.
        on_state: Called when what a source's view is worth has changed, after the batches that changed it.
        clock: Monotonic seconds.
        replay_timeout_s: See `Sequencer`.
        retry_s: See `Sequencer`.
        live_queue: Messages queued for one SUB connection.
    """

    def __init__(
        self,
        *,
        on_batch: Callable[[Source, Batch], None],
        on_clear: Callable[[Source], None],
        on_state: Callable[[Source, SyncState], None],
        clock: Callable[[], float] = time.monotonic,
        replay_timeout_s: float = REPLAY_TIMEOUT_S,
        retry_s: float = RETRY_S,
        live_queue: int = LIVE_QUEUE,
    ) -> None:
        self._on_batch = on_batch
        self._on_clear = on_clear
        self._on_state = on_state
        self._clock = clock
        self._replay_timeout_s = replay_timeout_s
        self._retry_s = retry_s
        self._live_queue = live_queue
        self._feeds: dict[Source, Feed] = {}
        self._inlets: dict[tuple[str, bool], Inlet] = {}
        self._turn = asyncio.Lock()
        self._yield_at_s = 0.0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context: zmq.asyncio.Context | None = None
        self._counts = SubscriberStats()
        self._warned: set[EndpointKey] = set()
        self._is_stopping = False

    def start(self) -> None:
        """Begin receiving; sources may be set before or after.

        Raises:
            RuntimeError: Already started.
        """
        if self._context is not None:
            raise RuntimeError("the subscriber is already started")
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, 4 * MAX_SOURCES)  # SUB, monitor and its peer, DEALER
        self._spawn(self._tick(), "kv-events-tick")
        for inlet in self._inlets.values():
            inlet.task = self._spawn(self._read(self._context, inlet), "kv-events-read")

    async def stop(self) -> None:
        """End all tasks and close all sockets. Idempotent; cannot be started again."""
        self._is_stopping = True
        for feed in self._feeds.values():
            feed.closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._context is not None and not self._context.closed:
            self._context.destroy(linger=0)

    def set_sources(self, sources: Iterable[Source]) -> None:
        """Replace the sources; those that stay are not touched, those that go are cleared.

        Raises:
            ValueError: More than `MAX_SOURCES`, or two that nothing distinguishes. Nothing was changed.
        """
        wanted = dict.fromkeys(sources)
        names = {(source.events_address, source.bind, name_of(source)) for source in wanted}
        if len(wanted) > MAX_SOURCES or len(names) < len(wanted):
            raise ValueError("too many sources, or two with the same address and topic")
        for source in self._feeds.keys() - wanted.keys():
            self._remove(source)
        for source in wanted:
            if source not in self._feeds:
                self._add(source)
        # Only now: a socket that goes on being used must not be closed and bound again.
        for address, inlet in tuple(self._inlets.items()):
            if not inlet.feeds:
                del self._inlets[address]
                if inlet.task is not None:
                    inlet.task.cancel()

    def verify(self, endpoint: EndpointKey) -> None:
        """The engine may have been restarted: have its sources found out, soon."""
        for source, feed in self._feeds.items():
            if source.endpoint == endpoint:
                self._suspect(feed)

    def state(self, source: Source) -> SyncState | None:
        """What the view of `source` is worth; None if it is not a source."""
        feed = self._feeds.get(source)
        return None if feed is None else feed.said

    @property
    def stats(self) -> SubscriberStats:
        """A copy of the counts."""
        counts = self._counts
        states = dict.fromkeys(SyncState, 0)
        sequence = SequenceStats()
        for feed in self._feeds.values():
            states[feed.said] += 1
            for item in fields(SequenceStats):
                total = getattr(sequence, item.name) + getattr(feed.sequencer.stats, item.name)
                setattr(sequence, item.name, total)
        return SubscriberStats(
            counts.batches,
            counts.malformed_messages,
            counts.malformed_batches,
            counts.unreadable_events,
            counts.unknown_topics,
            counts.callback_errors,
            states,
            sequence,
        )

    def _add(self, source: Source) -> None:
        sequencer = Sequencer(
            can_replay=source.replay_address is not None,
            replay_timeout_s=self._replay_timeout_s,
            retry_s=self._retry_s,
        )
        self._feeds[source] = feed = Feed(source, sequencer)
        self._wake.set()
        key = (source.events_address, source.bind)
        inlet = self._inlets.get(key)
        if inlet is None:
            self._inlets[key] = inlet = Inlet(source.events_address, bind=source.bind)
            if self._context is not None:
                inlet.task = self._spawn(self._read(self._context, inlet), "kv-events-read")
        inlet.feeds[name_of(source)] = feed

    def _remove(self, source: Source) -> None:
        feed = self._feeds.pop(source)
        feed.closed = True
        if feed.replay is not None:
            feed.replay.cancel()
        del self._inlets[source.events_address, source.bind].feeds[name_of(source)]
        self._call(self._on_clear, source)
        if all(other.endpoint != source.endpoint for other in self._feeds):
            self._warned.discard(source.endpoint)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _suspect(self, feed: Feed) -> None:
        feed.unverified = True
        self._wake.set()

    async def _tick(self) -> None:
        """Notice time-outs, and what is to be verified."""
        while True:
            self._wake.clear()
            for feed in tuple(self._feeds.values()):
                async with self._turn:
                    self._begin_turn()
                    now_s = self._clock()
                    effects = feed.sequencer.advance(now_s)
                    if feed.unverified and not effects:
                        feed.unverified = False
                        effects = feed.sequencer.verify(now_s)
                    await self._apply(feed, effects)
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()

    async def _read(self, context: zmq.asyncio.Context, inlet: Inlet) -> None:
        """Keep one SUB socket open, until the inlet is none of ours any more.

        A `TaskGroup` that has an error of a child to raise does not raise the cancellation that came with it.
        """
        while not self._is_stopping and self._inlets.get((inlet.address, inlet.bind)) is inlet:
            try:
                with context.socket(zmq.SUB) as socket:
                    open_live(socket, inlet.address, bind=inlet.bind, messages=self._live_queue)
                    async with asyncio.TaskGroup() as tasks:
                        if not inlet.bind:
                            tasks.create_task(self._watch(socket, inlet))
                        tasks.create_task(self._receive(socket, inlet))
            except* zmq.ZMQError as errors:
                logger.warning(
                    "cannot subscribe to cache events",
                    extra={"address": inlet.address, "error": str(errors.exceptions[0])},
                )
            except* Exception:  # a bug here must not end the subscription
                logger.exception("receiving cache events failed", extra={"address": inlet.address})
            if not self._is_stopping:
                await asyncio.sleep(_REOPEN_S)

    async def _watch(self, socket: zmq.asyncio.Socket, inlet: Inlet) -> None:
        """Have the source verified after each handshake with its publisher; behind while there is none."""
        with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED) as monitor:
            try:
                while True:
                    event = parse_monitor_message(await monitor.recv_multipart())["event"]
                    for feed in inlet.feeds.values():
                        feed.cut = event == zmq.EVENT_DISCONNECTED
                        if feed.cut:
                            self._report(feed)
                        else:
                            self._suspect(feed)
            finally:
                socket.disable_monitor()

    async def _receive(self, socket: zmq.asyncio.Socket, inlet: Inlet) -> None:
        # A future per message would cost more than the message: wait once, then take what is there.
        direct: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        while True:
            await socket.poll()
            async with self._turn:
                self._begin_turn()
                while not self._is_turn_over():
                    try:
                        frames = direct.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    await self._take_live(inlet, frames)

    async def _take_live(self, inlet: Inlet, frames: list[bytes]) -> None:
        sequence = sequence_of(frames[1]) if len(frames) == 3 else None
        if sequence is None:
            self._counts.malformed_messages += 1
            return
        feed = inlet.feed(frames[0])
        if feed is None:
            self._counts.unknown_topics += 1
            return
        await self._apply(feed, feed.sequencer.receive(sequence, frames[2], self._clock()))

    def _ask(self, feed: Feed, start: int) -> None:
        """Begin a replay instead of the one that runs."""
        if self._context is None or feed.source.replay_address is None:
            return
        self._end_replay(feed)
        replay = self._replay(self._context, feed, feed.source.replay_address, start)
        feed.replay = self._spawn(replay, "kv-events-replay")

    def _end_replay(self, feed: Feed) -> None:
        replay, feed.replay = feed.replay, None
        if replay is not None and replay is not asyncio.current_task():
            replay.cancel()

    async def _replay(self, context: zmq.asyncio.Context, feed: Feed, address: str, start: int) -> None:
        loop = asyncio.get_running_loop()
        delay_s = feed.asked_s + MIN_REPLAY_INTERVAL_S - loop.time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        feed.asked_s = loop.time()
        try:
            with context.socket(zmq.DEALER) as socket:
                limit(socket, REPLAY_QUEUE)
                socket.connect(address)
                await socket.send_multipart((b"", start.to_bytes(8, "big")))
                direct: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
                while feed.replay is asyncio.current_task():
                    await socket.poll()
                    async with self._turn:
                        self._begin_turn()
                        while feed.replay is asyncio.current_task() and not self._is_turn_over():
                            try:
                                frames = direct.recv_multipart(zmq.NOBLOCK)
                            except zmq.Again:
                                break
                            await self._take_replayed(feed, frames)
        except zmq.ZMQError as error:  # no answer will come: the sequencer's time-out sees to it
            logger.warning(
                "cannot ask for a replay of cache events", extra={"address": address, "error": str(error)}
            )

    async def _take_replayed(self, feed: Feed, frames: list[bytes]) -> None:
        """`["", topic, number, payload]` from vLLM, without a topic from SGLang."""
        now_s = self._clock()
        if len(frames) in (3, 4):
            if frames[-2] == _REPLAY_END:
                await self._apply(feed, feed.sequencer.replay_ended(now_s))
                return
            sequence = sequence_of(frames[-2])
            if sequence is not None:
                await self._apply(feed, feed.sequencer.replayed(sequence, frames[-1], now_s))
                return
        self._counts.malformed_messages += 1

    async def _apply(self, feed: Feed, effects: list[Effect]) -> None:
        """Do what the sequencer says; `_turn` is held, so that nothing gets in between."""
        for effect in effects:
            if feed.closed:
                return
            if isinstance(effect, Deliver):
                await self._deliver(feed, effect.payload)
            elif isinstance(effect, Clear):
                self._call(self._on_clear, feed.source)
            else:
                self._ask(feed, effect.start)
            if self._is_turn_over():
                await asyncio.sleep(0)
                self._begin_turn()
        state = feed.sequencer.state
        if feed.closed:
            return
        if state is not SyncState.REPLAYING:
            self._end_replay(feed)
        self._report(feed)

    def _report(self, feed: Feed) -> None:
        """Say what a source's view is worth, if that has changed: behind, while its publisher is away."""
        state = feed.sequencer.state
        if feed.cut and state in (SyncState.IN_SYNC, SyncState.INCOMPLETE):
            state = SyncState.REPLAYING
        if state is not feed.said and not feed.closed:
            feed.said = state
            self._call(self._on_state, feed.source, state)

    async def _deliver(self, feed: Feed, payload: bytes) -> None:
        try:
            for batch in pieces(payload):
                if isinstance(batch, Unreadable):
                    self._counts.unreadable_events += batch.count
                    self._leave_out(feed, batch.why, voids=batch.voids)
                elif batch is not None:
                    self._call(self._on_batch, feed.source, batch)
                if self._is_turn_over() and len(payload) > SMALL_BYTES:
                    await asyncio.sleep(0)
                    self._begin_turn()
                    if feed.closed:
                        return
        except DecodeError as error:
            self._counts.malformed_batches += 1
            self._leave_out(feed, str(error), voids=True)
            return
        self._counts.batches += 1

    def _leave_out(self, feed: Feed, why: str, *, voids: bool) -> None:
        """Something of a feed cannot be read; `voids` if it may have removed what is known."""
        endpoint = feed.source.endpoint
        if endpoint not in self._warned:
            self._warned.add(endpoint)
            logger.warning("cache events that cannot be decoded", extra={"endpoint": endpoint, "error": why})
        if not voids:
            feed.sequencer.lacking()
            return
        feed.sequencer.spoiled()
        self._call(self._on_clear, feed.source)

    def _call(self, callback: Callable[[Unpack[_Args]], None], *args: *_Args) -> None:
        try:
            callback(*args)
        except Exception:  # what applies events must not end receiving them
            self._counts.callback_errors += 1
            logger.exception("a callback of cache events raised")

    def _begin_turn(self) -> None:
        self._yield_at_s = asyncio.get_running_loop().time() + TURN_S

    def _is_turn_over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._yield_at_s
