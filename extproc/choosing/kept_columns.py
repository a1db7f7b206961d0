"""Columns of what is known of endpoints, kept until something else is known.

Most decisions look at the same endpoints, of which little changes: over a thousand of them a look at each
takes longer than the choice.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

from metadata_center.types import MANY_ROWS, EndpointKey

MAX_COLUMNS: Final = 64
"""Sets of endpoints with a column; a new one beyond that takes the place of all."""


class KeptColumns:
    """Columns of one fact.

    Args:
        known: The fact of one endpoint, of at most 64 bits.
    """

    __slots__ = ("_columns", "_known")

    def __init__(self, known: Callable[[EndpointKey], int]) -> None:
        self._known = known
        self._columns: dict[int, tuple[tuple[EndpointKey, ...], tuple[int, ...] | array[int]]] = {}

    def of(self, keys: tuple[EndpointKey, ...]) -> tuple[int, ...] | array[int]:
        """One value per key; the same object as long as `keys` is, not to be changed."""
        kept = self._columns.get(id(keys))
        if kept is not None:  # it holds its keys, so that their id stays theirs
            return kept[1]
        found: tuple[int, ...] | array[int] = tuple(map(self._known, keys))
        if len(keys) >= MANY_ROWS:
            found = array("q", found)
        if len(self._columns) >= MAX_COLUMNS:
            self._columns.clear()
        self._columns[id(keys)] = keys, found
        return found

    def changed(self) -> None:
        """Something else is known of some endpoint."""
        self._columns.clear()
