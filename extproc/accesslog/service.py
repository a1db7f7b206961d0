"""The gRPC access log service: Envoy tells each ending, we hand it to whoever decided.

An entry may reach another worker than the one that decided: Envoy keeps one log stream per thread of its own.
`Dispatcher` looks at the owner tag and hands over what is not ours. An entry without an owner belongs to a
request that nobody decided, or whose decision came too late for Envoy: every worker is told, so that a late
charge finds its release.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2

from extproc.accesslog.entries import ended_unix_s, translate
from extproc.observing.recorder import Recorder
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.exchange import NO_OWNER

_log = logging.getLogger("tokenway.accesslog")

SERVICE = "envoy.service.accesslog.v3.AccessLogService"


class EntryKind(StrEnum):
    """Kinds of entries; a metric label."""

    REQUEST_END = "request_end"
    REQUEST_ALIVE = "request_alive"
    ATTEMPT_STARTED = "attempt_started"
    ATTEMPT_FAILED = "attempt_failed"


_KINDS: dict[type[RequestEvent], EntryKind] = {
    RequestEnd: EntryKind.REQUEST_END,
    RequestAlive: EntryKind.REQUEST_ALIVE,
    AttemptStarted: EntryKind.ATTEMPT_STARTED,
    AttemptFailed: EntryKind.ATTEMPT_FAILED,
}


class Dispatcher:
    """Hands each entry to its owner.

    Args:
        owner: This worker's name in `OWNER_HEADER`.
        take: Applies an entry here.
        hand_over: Sends the entry to another worker, named as in the tag; False if there is no such worker.
        tell_all: Sends the entry to every other worker.
        metrics: Counters.
    """

    def __init__(
        self,
        owner: str,
        take: Callable[[RequestEvent], None],
        hand_over: Callable[[str, RequestEvent], bool],
        tell_all: Callable[[RequestEvent], None],
        metrics: Recorder,
    ) -> None:
        self._owner = owner
        self._take = take
        self._hand_over = hand_over
        self._tell_all = tell_all
        self._metrics = metrics

    def dispatch(self, entry: RequestEvent) -> None:
        """Apply the entry here, or hand it over."""
        owner = entry.owner
        if owner == self._owner:
            self._take(entry)
        elif owner == NO_OWNER:
            return
        elif owner is None:
            self._take(entry)
            self._tell_all(entry)
        elif self._hand_over(owner, entry):
            self._metrics.handed_over()
        else:
            self._metrics.access_log_unmatched()


class AccessLog:
    """`envoy.service.accesslog.v3.AccessLogService`.

    Args:
        dispatch: Receives each entry.
        metrics: Counters.
        wall_clock: Unix seconds, to tell how late entries are.
    """

    def __init__(
        self,
        dispatch: Callable[[RequestEvent], None],
        metrics: Recorder,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._dispatch = dispatch
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._reads: set[asyncio.Task[Any]] = set()
        self._is_closing = False

    def close(self) -> None:
        """End all streams: Envoy never does, and would hold up a stop for as long as it may take."""
        self._is_closing = True
        for read in self._reads:
            read.cancel()

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "StreamAccessLogs": grpc.stream_unary_rpc_method_handler(
                    self.stream,
                    request_deserializer=als_pb2.StreamAccessLogsMessage.FromString,
                    response_serializer=als_pb2.StreamAccessLogsResponse.SerializeToString,
                )
            },
        )

    async def stream(
        self, _: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> als_pb2.StreamAccessLogsResponse:
        """Serve one thread of Envoy for as long as it lives."""
        while not self._is_closing:
            # A task of its own: gRPC leaves a stream open whose handler is cancelled.
            read: asyncio.Task[Any] = asyncio.ensure_future(context.read())
            self._reads.add(read)
            read.add_done_callback(self._reads.discard)
            try:
                message = await read
            except asyncio.CancelledError:
                if not self._is_closing:
                    raise
                break
            if message is grpc.aio.EOF:
                break
            lag_s: float | None = None
            for logged in message.http_logs.log_entry:
                entry = translate(logged)
                if entry is None:
                    continue
                if lag_s is None and type(entry) is RequestEnd:  # the oldest of the batch
                    lag_s = self._wall_clock() - ended_unix_s(logged)
                    self._metrics.access_log_lag(lag_s)
                self._metrics.access_log_entry(_KINDS[type(entry)])
                try:
                    self._dispatch(entry)
                except Exception:  # a bug with one request must not lose the endings of all others
                    _log.exception("access log entry failed")
        return als_pb2.StreamAccessLogsResponse()
