"""Which beginnings of prompts were sent to some engine before, whether or not one still has them cached.

Rules:
    1. Of a chain every fourth block is kept as a mark: a block's hash says all that is before it.
    2. Memory is bounded: of two generations of marks the older one goes when the younger one is full. What is
       asked for again is young again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

BLOCKS_PER_MARK: Final = 4
"""Of 512 bytes each: some 500 tokens of text, and a hundred marks for a prompt of 50,000."""

MAX_MARKS: Final = 65_536
"""Of one generation: 30 million tokens or more, several times what a dozen engines have cached."""


class SeenPrefixes:
    """What was sent.

    Args:
        max_marks: Of each of two generations, > 0.
    """

    __slots__ = ("_max_marks", "_old", "_young")

    def __init__(self, max_marks: int = MAX_MARKS) -> None:
        self._max_marks = max_marks
        self._young: set[int] = set()
        self._old: set[int] = set()

    def __len__(self) -> int:
        """Marks kept, 0..2 * max_marks."""
        return len(self._young) + len(self._old)

    def see(self, blocks: Sequence[int]) -> int:
        """A prompt is sent.

        Args:
            blocks: Of the prompt, head first.

        Returns:
            How many leading blocks were sent before, a multiple of `BLOCKS_PER_MARK`.
        """
        marks = blocks[BLOCKS_PER_MARK - 1 :: BLOCKS_PER_MARK]
        young, old, seen = self._young, self._old, 0
        for mark in marks:
            if mark not in young and mark not in old:
                break
            seen += 1
        if len(young) + len(marks) > self._max_marks:
            self._old, self._young = young, set(marks[: self._max_marks])
        else:
            young.update(marks)
        return seen * BLOCKS_PER_MARK
