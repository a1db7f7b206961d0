"""How an answer begins: its first event, or as much of it as matters."""

from __future__ import annotations

from typing import Final

from extproc.request.first_token import DATA, LINE_START, may_begin_events

HEAD_BYTES: Final = 4096
"""Of an answer, to find its id in: vLLM and SGLang write it within the first 100 bytes."""


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
        """Take the next chunk; True if the head is whole: `HEAD_BYTES`, or the first event with data."""
        self._head += chunk
        if len(self._head) >= HEAD_BYTES:
            return True
        lines = LINE_START + self._head
        data = lines.find(DATA)
        return data >= 0 and may_begin_events(self._head.lstrip()[:1]) and lines.find(b"\n\n", data) >= 0
