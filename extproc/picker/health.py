"""gRPC health for clients that ask whether the picker takes requests, by whatever name they ask.

Rules:
    1. Every service name has an answer: deployments ask for `liveness`, `readiness`, `inference-extension`,
       the service's own name or none.
    2. `liveness` is SERVING as long as the process answers: one that drains is not to be killed.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md. Both messages have one field, so they
are written here by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from extproc.transport.seam import Call, Received, Rpc, Status

SERVICE: Final = "grpc.health.v1.Health"

SERVING: Final = b"\x08\x01"
NOT_SERVING: Final = b"\x08\x02"
"""`HealthCheckResponse`, field 1: status."""

_LIVENESS: Final = b"\x0a\x08liveness"
"""`HealthCheckRequest`, field 1: service."""

MAX_WATCHERS: Final = 1_024
"""Calls of `Watch` at a time."""


class Health:
    """`grpc.health.v1.Health`.

    Args:
        is_ready: True while new requests are taken.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready
        self._watchers: dict[HealthWatch, None] = {}

    @property
    def rpcs(self) -> tuple[Rpc, Rpc]:
        """To be served."""
        return Rpc(SERVICE, "Check", self._check, has_last=True), Rpc(SERVICE, "Watch", self._watch)

    def review(self) -> None:
        """It may have changed: each `Watch` call gets the status if it did."""
        for watcher in list(self._watchers):
            watcher.review()

    def close(self) -> None:
        """End all watching: a stop would wait for it."""
        for watcher in list(self._watchers):
            watcher.end()

    def status(self, request: bytes) -> bytes:
        """The answer to a serialised request."""
        return SERVING if request == _LIVENESS or self._is_ready() else NOT_SERVING

    def gone(self, watcher: HealthWatch) -> None:
        """One watches no more."""
        self._watchers.pop(watcher, None)

    def _check(self, call: Call) -> HealthCheck:
        return HealthCheck(self, call)

    def _watch(self, call: Call) -> HealthWatch:
        watcher = HealthWatch(self, call)
        if len(self._watchers) >= MAX_WATCHERS:
            call.abort(Status.RESOURCE_EXHAUSTED, "too many watch")
        else:
            self._watchers[watcher] = None
        return watcher


class HealthCheck:
    """One question; a `Receiver`."""

    __slots__ = ("_call", "_health")

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self._call.finish(self._health.status(bytes(message)))

    def on_half_close(self) -> None:
        """See `Receiver`."""

    def on_reset(self) -> None:
        """See `Receiver`."""


class HealthWatch:
    """A call that gets each change; a `Receiver`."""

    __slots__ = ("_asked", "_call", "_health", "_said")

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call
        self._asked: bytes | None = None
        self._said = b""

    def review(self) -> None:
        """Say how it is, if that is news."""
        if self._asked is None:
            return
        status = self._health.status(self._asked)
        if status != self._said:
            self._said = status
            self._call.send(status)

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self._asked = bytes(message)
        self.review()

    def on_half_close(self) -> None:
        """See `Receiver`; a unary request is half-closed at once, and watching goes on."""

    def on_reset(self) -> None:
        """See `Receiver`."""
        self._health.gone(self)

    def end(self) -> None:
        """Nothing more is said."""
        self._health.gone(self)
        self._call.abort(Status.UNAVAILABLE, "stopping")
