"""What is remembered of an answer that passes: how much of it there was, its beginning and its end.

Rules:
    1. A chunk costs the same however long the answer is: nothing of it is decoded before the end, but what of
       a stream is let go and has a word of an error in it. That is looked for once per `TAIL_BYTES`.
    2. What is kept is bounded by `HEAD_BYTES` and three times `TAIL_BYTES`, one of them for a moment.
    3. Of the errors in a stream the first counts, wherever it stands.
"""

from __future__ import annotations

from typing import Final

from extproc.picker.reading import NOTHING, Told, error_in_part, is_of_events, read_answer

TAIL_BYTES: Final = 16_384
"""Of an answer's end, where its usage is: the last event of a stream, the last field of a whole answer."""

HEAD_BYTES: Final = 16_384
"""Of its beginning: the prompt's tokens in a stream of the Messages API, usage before a long answer."""

_BEGIN_BYTES: Final = 256
"""By which a stream is known that has no type."""

_LONG_BYTES: Final = TAIL_BYTES - 1_024
"""An event of more is judged by its beginning: before it ends that may have been let go."""


class PassingAnswer:
    """One answer on its way.

    Attributes:
        num_bytes: Of its body so far.
    """

    __slots__ = ("_error", "_head", "_is_encoded", "_looks", "_tail", "_type", "num_bytes")

    def __init__(self) -> None:
        self.num_bytes = 0
        self._type: str | None = None
        self._is_encoded = False
        self._head = b""
        self._tail = bytearray()
        self._looks = False
        self._error: str | None = None

    def begins(self, content_type: str | None, *, is_encoded: bool) -> None:
        """Its headers came, before any chunk; they need not come at all.

        Args:
            content_type: Its header, or None.
            is_encoded: It is compressed: nothing is read of it.
        """
        self._type = content_type
        self._is_encoded = is_encoded

    def add(self, chunk: bytes) -> None:
        """The next chunk passes."""
        size, tail = len(chunk), self._tail
        self.num_bytes += size
        if len(tail) + size <= 2 * TAIL_BYTES:
            tail += chunk
            return
        if not self._head:
            self._head = bytes(tail[:HEAD_BYTES]) + chunk[: max(0, HEAD_BYTES - len(tail))]
            begins = self._head[:_BEGIN_BYTES].decode("utf-8", "replace")
            self._looks = not self._is_encoded and is_of_events(self._type, begins)
        if not self._looks:
            tail += chunk[-TAIL_BYTES:]
            del tail[:-TAIL_BYTES]
            return
        before = self.num_bytes - size
        for at in range(0, size, TAIL_BYTES):
            tail += chunk[at : at + TAIL_BYTES]
            if len(tail) > 2 * TAIL_BYTES:
                is_all = len(tail) == before + min(at + TAIL_BYTES, size)
                self._look(is_all=is_all)
                del tail[:-TAIL_BYTES]

    def told(self) -> Told:
        """What it says of itself; asked once, at the end. Nothing, if it is compressed."""
        if self._is_encoded:
            return NOTHING
        tail = self._tail.decode("utf-8", "replace")
        head = self._head.decode("utf-8", "replace") if self._head else tail
        usage, error = read_answer(self._type, head, tail, is_cut=self.num_bytes > len(self._tail))
        return Told(usage, self._error or error)

    def _look(self, *, is_all: bool) -> None:
        """Before the most of it is let go: each event but the longest is whole in one of these looks."""
        tail = self._tail
        if self._error is None and (b"rror" in tail or b"failed" in tail or b'"abort"' in tail):
            text = tail.decode("utf-8", "replace")
            self._error = error_in_part(text, begins=is_all, long=_LONG_BYTES)
