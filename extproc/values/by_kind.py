"""One value per row where few values differ: rows are of kinds, and a kind has one value."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class ByKind(Sequence[T]):
    """A sequence that is read by row and made by kind; over a thousand rows of two kinds of two values.

    Args:
        each: The value of each kind.
        rows: The kind of each row, an index of `each`; shared with others and not to be changed.
    """

    __slots__ = ("each", "rows")

    def __init__(self, each: Sequence[T], rows: array[int]) -> None:
        self.each = each
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> T: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[T]: ...

    def __getitem__(self, row: int | slice) -> T | Sequence[T]:
        if isinstance(row, slice):
            return ByKind(self.each, self.rows[row])
        return self.each[self.rows[row]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as other sequences that compare by what is in them


class Kinds:
    """Which kind each row is of; of tuples that were asked for it is remembered.

    Args:
        most: Tuples remembered; one more takes the place of all.
    """

    __slots__ = ("_kept", "_most")

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._kept: dict[int, tuple[Sequence[str], tuple[str, ...], array[int]]] = {}

    def of(self, names: Sequence[str]) -> tuple[tuple[str, ...], array[int]]:
        """The distinct names, and for each name which of them it is."""
        kept = self._kept.get(id(names))
        if kept is not None:  # it holds its tuple, so that the id stays its own
            return kept[1], kept[2]
        number = {name: index for index, name in enumerate(dict.fromkeys(names))}
        kinds, rows = tuple(number), array("q", [number[name] for name in names])
        if isinstance(names, tuple):
            if len(self._kept) >= self._most:
                self._kept.clear()
            self._kept[id(names)] = names, kinds, rows
        return kinds, rows
