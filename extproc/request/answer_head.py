"""How an answer begins: its first event that names a response, or as much of it as matters.

Rules:
    1. Server-sent events are read as they may be written: lines end by CR, LF or both, comments and other
       events (a ping) come before, data stand on several lines, and a byte order mark stands before it all.
    2. What says nothing takes no room: keep-alives of minutes do not fill the head.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from typing import Final

from extproc.request.first_token import may_begin_events

HEAD_BYTES: Final = 4096
"""Of an answer, to find its id in: vLLM and SGLang write it within the first 100 bytes."""

_LINE_END: Final = re.compile(rb"\r\n?")
_DATA: Final = re.compile(rb"^data: ?(.*)$", re.MULTILINE)
_EVENT_END: Final = b"\n\n"
_NAMES_RESPONSE: Final = b'"response"'
"""The key under which an event of a stream has its response."""


class HeadCollector:
    """Collects the head of one answer, at most `HEAD_BYTES`."""

    __slots__ = ("_head",)

    def __init__(self) -> None:
        self._head = b""

    @property
    def head(self) -> bytes:
        """What there is of it."""
        return self._head[:HEAD_BYTES]

    def add(self, chunk: bytes) -> bool:
        """Take the next chunk; True if the head is whole: `HEAD_BYTES`, or an event that names a response."""
        head = self._head = self._head + chunk
        if begins_events(head):
            half = head[-1:] if head.endswith(b"\r") else b""  # of a line end, perhaps
            *events, rest = events_of(head.removesuffix(half))
            for event in events:
                if _NAMES_RESPONSE in event:
                    self._head = event + _EVENT_END
                    return True
            self._head = rest + half
        return len(self._head) >= HEAD_BYTES


def begins_events(head: bytes) -> bool:
    """True unless an answer that begins so is no stream of events."""
    return may_begin_events(head.removeprefix(BOM_UTF8).lstrip()[:1])


def events_of(head: bytes) -> list[bytes]:
    """The events of a stream's beginning, their lines ended by LF; the last one is not over yet, or empty."""
    return _LINE_END.sub(b"\n", head.removeprefix(BOM_UTF8)).split(_EVENT_END)


def data_of(event: bytes) -> bytes:
    """What the `data:` lines of one of `events_of` say together."""
    return b"\n".join(_DATA.findall(event))
