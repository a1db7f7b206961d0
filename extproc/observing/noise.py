"""Lines that libraries log and that say nothing about this process: for handlers of logs, as a filter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

_UNDELIVERED: Final = "Exception not handled by _handle_exceptions"

_OF_WHO_ASKS: Final = frozenset({"aiohttp.http_exceptions", "aiohttp.web_protocol"})
"""Where the errors are defined that aiohttp's server raises of requests that are no HTTP, or cut short."""


_NOT_ACCEPTED: Final = "socket.accept() out of system resource"

QUIET_S: Final = 60.0
"""Between two lines about connections that cannot be accepted."""


class AcceptFaults:
    """Lets one line a minute pass of those that asyncio writes where this process has no files left.

    It is a hundred at once, with a stack each, for every second of it and each socket that listens.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quiet_until_s = float("-inf")

    def __call__(self, record: logging.LogRecord) -> bool:
        """A filter of a handler: False for a line that is one too many."""
        if record.name != "asyncio" or not str(record.msg).startswith(_NOT_ACCEPTED):
            return True
        now_s = self._clock()
        if now_s < self._quiet_until_s:
            return False
        self._quiet_until_s = now_s + QUIET_S
        return True


def is_news(record: logging.LogRecord) -> bool:
    """False for what only tells of the peer.

    - gRPC could not deliver an answer because the peer had just left. Envoy resets a stream whose client is
      gone; if our answer is on its way at that moment, gRPC logs an error of its own. What our handlers raise
      it logs with other words ("Unexpected ... raised by servicer method").
    - aiohttp's server was sent what is no HTTP (a port scan, TLS where there is none), or a body that is not
      what its headers say. Whoever sent it is told by 400; the line would be an error with its stack, as
      often as anybody likes.
    """
    if record.name == "grpc._cython.cygrpc":
        return not str(record.msg).startswith(_UNDELIVERED)
    if record.name == "aiohttp.server" and record.exc_info and record.exc_info[0] is not None:
        return record.exc_info[0].__module__ not in _OF_WHO_ASKS
    return True
