"""Where in the bytes of a streamed answer its first token is, by the API that was asked.

Rules:
    1. Streams are server-sent events: a token is in a `data:` line, never in a comment or another field,
       wherever chunks are cut, whether lines end by CR, LF or both, and behind a byte order mark.
    2. What is no stream of events, and what begins with an error event, has no token.
    3. What engines and proxies say before there is a token is none: a ping, data without anything or without
       a choice, the beginning of a response or a message. What such an event quotes of the request decides
       nothing.
    4. The chunk of a chat that says the role alone is taken for the first token: vLLM (0.32, measured) and
       SGLang (by its source) send it with the first result of the engine. To wait for the next would cost
       each stream of theirs another message, and be late where a parser holds tokens back.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from typing import Final

from extproc.values.exchange import Sight
from extproc.values.requests import Operation

_LINE_START: Final = b"\n"

_BEGINS_WITH_ERROR: Final = re.compile(
    rb"\n(?:event: ?error\b|error: *\{|"
    rb'data: *\{ ?"(?:errors?":(?! ?(?:null|""|\{ ?\}|\[ ?\]))|(?:type|object|status)": ?"error"))'
)
"""An error event: OpenAI's and vLLM's `{"error": …}`, vLLM's older `{"object": "error", …}`, Anthropic's
`event: error`, llama.cpp's `error: {…}`, `{"errors": …}`, `{"status": "error", …}`; null or empty it is none.
It is the first that matters here: an engine that fails at once has computed nothing."""

_MARK: Final = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which may stand before the first line."""

_TOKEN: Final = re.compile(
    rb"(?<!\nevent: ping)(?<!\nevent:ping)(?<!\nevent: ping\n)(?<!\nevent:ping\n)"
    rb'\ndata:[ \t]*(?!\{\s*"type"\s*:\s*"ping")(?![^\n]{0,400}"choices"\s*:\s*\[\s*\])'
    rb"[^\s\[](?:[^\n]{18}|[^\n]*\n)"
)
"""Data that say something, with as much of them, or their line's end, as shows that they are no ping. Neither
are they the end, nor without a choice: usage alone, or what Azure's filter thinks of the prompt."""

_RESPONSES_TOKEN: Final = re.compile(
    rb'\n(?:event: ?|data: ?\{[^\n{]*"type": ?")response\.(?:output_|reasoning)'
)
"""The Responses API sends `response.created` and `response.in_progress` before any token exists. Each has the
request's instructions and metadata in it, which may say anything: the type alone counts, where it stands."""

_MESSAGES_TOKEN: Final = re.compile(
    rb'\n(?:event: ?|data:[ \t]*\{[^\n{]*"type"\s*:\s*")'
    rb"(?:content_block_(?:delta|stop)|message_delta|error)\b"
)
"""Of the Messages API some servers send `message_start`, or the start of a block as well, as soon as they
have the request (Dynamo, LiteLLM), others with the first token (vLLM, SGLang)."""

_TOKENS: Final = {Operation.RESPONSES: _RESPONSES_TOKEN, Operation.MESSAGES: _MESSAGES_TOKEN}

_MAX_CARRY: Final = 512
"""Of an event that has not said what it is; types stand at the beginning."""


class FirstTokenDetector:
    """Looks for the first token of one answer.

    Args:
        operation: The API that was asked.
    """

    __slots__ = ("_carry", "_is_events", "_is_late", "_token")

    def __init__(self, operation: Operation) -> None:
        self._carry = _LINE_START
        self._token = _TOKENS.get(operation, _TOKEN)
        self._is_events = False
        self._is_late = False

    def look(self, chunk: bytes, *, end_of_stream: bool) -> Sight:
        """What the next chunk says; nothing is to be looked at after any answer but `NOT_YET`."""
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        is_late = self._is_late
        if not is_late:
            self._is_late = chunk != b""
            chunk = chunk.removeprefix(_MARK)
        chunk = self._carry + chunk
        if self._token.search(chunk) is not None:
            if _BEGINS_WITH_ERROR.search(chunk) is not None:
                return Sight.NEVER
            return Sight.PASSES_LATE if is_late else Sight.PASSES
        begins = chunk.lstrip()[:1]
        if end_of_stream or not (self._is_events or may_begin_events(begins)):
            return Sight.NEVER
        self._is_events = self._is_events or begins != b""
        self._carry = _unfinished(chunk)
        return Sight.NOT_YET


def _unfinished(text: bytes) -> bytes:
    """The end of `text` that with what follows may yet be a token: an event's beginning, or a line's."""
    for end in (b"\n\n", b"\n"):
        rest = text[text.rfind(end) + len(end) - 1 :] if end in text else text
        if len(rest) <= _MAX_CARRY:
            return rest
    return b""  # amid a long line


def may_begin_events(begins: bytes) -> bool:
    """A line of server-sent events starts with a field name or a colon, JSON and HTML with a bracket."""
    return begins not in (b"{", b"[", b"<")
