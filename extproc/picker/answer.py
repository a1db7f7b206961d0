"""What is remembered of an answer that passes: how much of it there was, its beginning and its end.

Rules:
    1. A chunk costs the same however long the answer is: nothing of it is decoded before the end.
    2. What is kept is bounded by `HEAD_BYTES`, twice `TAIL_BYTES` and one chunk.
"""

from __future__ import annotations

from typing import Final

from extproc.picker.reading import Told, read_answer

TAIL_BYTES: Final = 16_384
"""Of an answer's end, where its usage is: the last event of a stream, the last field of a whole answer."""

HEAD_BYTES: Final = 16_384
"""Of its beginning: the prompt's tokens in a stream of the Messages API, usage before a long answer."""


class PassingAnswer:
    """One answer on its way.

    Attributes:
        num_bytes: Of its body so far.
    """

    __slots__ = ("_head", "_tail", "num_bytes")

    def __init__(self) -> None:
        self.num_bytes = 0
        self._head = b""
        self._tail = bytearray()

    def add(self, chunk: bytes) -> None:
        """The next chunk passes."""
        size, tail = len(chunk), self._tail
        self.num_bytes += size
        if not self._head and (size > TAIL_BYTES or len(tail) + size > 2 * TAIL_BYTES):
            self._head = bytes(tail[:HEAD_BYTES]) + chunk[: max(0, HEAD_BYTES - len(tail))]
        tail += chunk[-TAIL_BYTES:]
        if len(tail) > 2 * TAIL_BYTES:
            del tail[:-TAIL_BYTES]

    def told(self, content_type: str | None) -> Told:
        """What it says of itself; asked once, at the end.

        Args:
            content_type: Its header, or None.
        """
        tail = self._tail.decode("utf-8", "replace")
        head = self._head.decode("utf-8", "replace") if self._head else tail
        return read_answer(content_type, head, tail, is_cut=self.num_bytes > len(self._tail))
