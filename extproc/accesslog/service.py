"""The gRPC access log service: Envoy reports each ending, we hand it to the worker that decided.

An entry may reach another worker than the one that decided: Envoy keeps one log stream per thread of its own.
`Dispatcher` looks at the owner tag and hands over what is not ours. An entry without an owner belongs to a
request that no worker decided, or whose decision came too late for Envoy: every worker gets it, so that a
late charge finds its release.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final

from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.message import DecodeError

from extproc.accesslog.entries import ended_unix_s, translate
from extproc.accesslog.meanings import refused_by_envoy
from extproc.accesslog.salvage import salvaged
from extproc.observing.recorder import Recorder
from extproc.transport.seam import Call, Received, Rpc
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.exchange import NO_OWNER

_log = logging.getLogger("tokenway.accesslog")

SERVICE = "envoy.service.accesslog.v3.AccessLogService"

_RECEIVED: Final = als_pb2.StreamAccessLogsResponse().SerializeToString()


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
        broadcast: Sends the entry to every other worker.
        metrics: Counters.
    """

    def __init__(
        self,
        owner: str,
        take: Callable[[RequestEvent], None],
        hand_over: Callable[[str, RequestEvent], bool],
        broadcast: Callable[[RequestEvent], None],
        metrics: Recorder,
    ) -> None:
        self._owner = owner
        self._take = take
        self._hand_over = hand_over
        self._broadcast = broadcast
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
            self._broadcast(entry)
        elif self._hand_over(owner, entry):
            self._metrics.handed_over()
        else:
            self._metrics.access_log_unmatched()


class AccessLog:
    """`envoy.service.accesslog.v3.AccessLogService`.

    Args:
        dispatch: Receives each entry.
        metrics: Counters.
        wall_clock: Unix seconds, to show how late entries are.
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
        self._streams: set[LogStream] = set()
        self._is_closing = False

    @property
    def rpc(self) -> Rpc:
        """To be served."""
        return Rpc(SERVICE, "StreamAccessLogs", self.open, has_last=True, reads_on=True)

    def open(self, call: Call) -> LogStream:
        """One thread of Envoy, for as long as it lives."""
        stream = LogStream(self, call)
        self._streams.add(stream)
        if self._is_closing:
            stream.close()
        return stream

    def closed(self, stream: LogStream) -> None:
        """A stream is over."""
        self._streams.discard(stream)

    def close(self) -> None:
        """End all streams: Envoy never does, and would hold up a stop for as long as it may take.

        What it sent before it knows of that is taken until it ends them as well, or `stop_reading`.
        """
        self._is_closing = True
        for stream in list(self._streams):
            stream.close()

    def stop_reading(self) -> None:
        """Take nothing more of streams that Envoy has not ended since `close`."""
        for stream in list(self._streams):
            stream.stop_reading()

    def take(self, entries: Iterable[accesslog_pb2.HTTPAccessLogEntry]) -> None:
        """Some entries came."""
        lag_s: float | None = None
        for logged in entries:
            entry = translate(logged)
            if entry is None:
                continue
            if lag_s is None and type(entry) is RequestEnd:  # the oldest of the batch
                lag_s = self._wall_clock() - ended_unix_s(logged)
                self._metrics.access_log_lag(lag_s)
            if type(entry) is RequestEnd:
                refusal = refused_by_envoy(entry.owner, entry.status, entry.details)
                if refusal is not None:
                    self._metrics.rejected(refusal, "", entry.status)
            self._metrics.access_log_entry(_KINDS[type(entry)])
            try:
                self._dispatch(entry)
            except Exception:  # a bug with one request must not lose the endings of all others
                _log.exception("access log entry failed")


class LogStream:
    """What one thread of Envoy logs; a `Receiver`."""

    __slots__ = ("_call", "_log")

    def __init__(self, log: AccessLog, call: Call) -> None:
        self._log = log
        self._call = call

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        try:
            entries = als_pb2.StreamAccessLogsMessage.FromString(message).http_logs.log_entry
        except DecodeError:  # one answer had something in it that is no text
            entries = salvaged(message)
        self._log.take(entries)

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self.stop_reading()

    def on_reset(self) -> None:
        """See `Receiver`."""
        self._log.closed(self)

    def close(self) -> None:
        """End our side."""
        self._call.finish(_RECEIVED)

    def stop_reading(self) -> None:
        """End it."""
        self._log.closed(self)
        self._call.finish(_RECEIVED)
