"""Where in the bytes of a streamed answer its first token is, by the API that was asked.

Rules:
    1. Streams are server-sent events: a token is in a `data:` line, never in a comment or another field,
       wherever chunks are cut, whether lines end by CR, LF or both, and behind a byte order mark.
    2. What is no stream of events, and what begins with an error event, has no token.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from typing import Final

from extproc.values.exchange import Sight
from extproc.values.requests import Operation

LINE_START: Final = b"\n"
DATA: Final = b"\ndata:"

_BEGINS_WITH_ERROR: Final = re.compile(
    rb"\n(?:event: ?error\b|error: *\{|"
    rb'data: *\{ ?"(?:error":(?! ?(?:null|""|\{ ?\}))|(?:type|object)": ?"error"))'
)
"""An error event: OpenAI's and vLLM's `{"error": …}`, vLLM's older `{"object": "error", …}`, Anthropic's
`event: error`, llama.cpp's `error: {…}`; null or empty it is none. It is the first that matters here: an
engine that fails at once has computed nothing."""

_MARK: Final = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which may stand before the first line."""

_MARKERS: Final = {Operation.RESPONSES: b"response.output_"}
"""What announces a token where not every event does: the Responses API sends `response.created` and
`response.in_progress` before any token exists."""


class FirstTokenDetector:
    """Looks for the first token of one answer.

    Args:
        operation: The API that was asked.
    """

    __slots__ = ("_carry", "_is_events", "_marker")

    def __init__(self, operation: Operation) -> None:
        self._carry = LINE_START
        self._marker = _MARKERS.get(operation, DATA)
        self._is_events = False

    def look(self, chunk: bytes, *, end_of_stream: bool) -> Sight:
        """What the next chunk says; nothing is to be looked at after any answer but `NOT_YET`."""
        is_first = self._carry == LINE_START
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r", b"\n")
        if is_first:
            chunk = chunk.removeprefix(_MARK)
        chunk = self._carry + chunk
        if self._marker in chunk:
            if _BEGINS_WITH_ERROR.search(chunk) is not None:
                return Sight.NEVER
            return Sight.PASSES if is_first else Sight.PASSES_LATE
        begins = chunk.lstrip()[:1]
        if end_of_stream or not (self._is_events or may_begin_events(begins)):
            return Sight.NEVER
        self._is_events = self._is_events or begins != b""
        self._carry = chunk[1 - len(self._marker) :]
        return Sight.NOT_YET


def may_begin_events(begins: bytes) -> bool:
    """A line of server-sent events starts with a field name or a colon, JSON and HTML with a bracket."""
    return begins not in (b"{", b"[", b"<")
