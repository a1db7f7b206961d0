"""What is remembered of an answer that passes: how much of it there was, and what its tail says.

Rules:
    1. A chunk costs the same however long the answer is: nothing of it is decoded before the end.
    2. What is kept is bounded by `TAIL_BYTES` and one chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from extproc.accesslog.usage import UNKNOWN, Usage, joined, read_usage

TAIL_BYTES: Final = 16_384
"""Of an answer, to find its usage in: the last event of a stream, the last field of a whole answer."""

_KEY: Final = '"usage"'
_MAX_TRIES: Final = 8
"""Places looked at, from the end; engines that count as they go name it in each event, some with null."""

_DECODER: Final = json.JSONDecoder()


class PassingAnswer:
    """One answer on its way.

    Attributes:
        num_bytes: Of its body so far.
    """

    __slots__ = ("_tail", "num_bytes")

    def __init__(self) -> None:
        self.num_bytes = 0
        self._tail = bytearray()

    def add(self, chunk: bytes) -> None:
        """The next chunk passes."""
        self.num_bytes += len(chunk)
        tail = self._tail
        tail += chunk[-TAIL_BYTES:]
        if len(tail) > 2 * TAIL_BYTES:
            del tail[:-TAIL_BYTES]

    def usage(self) -> Usage:
        """The tokens that the engine counted; asked once, at the end."""
        text = joined(self._tail[-TAIL_BYTES:].decode("utf-8", "replace"))
        for fields in _objects(text):
            usage = read_usage(fields)
            if usage != UNKNOWN:
                return usage
        return UNKNOWN


def _objects(text: str) -> Iterator[str]:
    """What stands under `"usage"`, the last first. In a string of JSON its quotes would be escaped."""
    end = len(text)
    for _ in range(_MAX_TRIES):
        at = text.rfind(_KEY, 0, end)
        if at < 0:
            return
        begins = text.find("{", at, at + len(_KEY) + 8)
        end = at
        if begins < 0:
            continue
        try:
            _, stop = _DECODER.raw_decode(text, begins)
        except (ValueError, RecursionError):
            continue
        yield text[begins:stop]
