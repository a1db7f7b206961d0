"""What was last said of the own share, and the rows that say what has changed since.

What is to be said is found by comparing the counters with what was last said: no path that charges or
releases can be forgotten, and equal counters cost no message.
"""

from __future__ import annotations

import numpy as np

from metadata_center.load.counters import IntArray
from metadata_center.load.kinds import NUM_KINDS, Amounts
from metadata_center.sharing.messages import Row
from metadata_center.types import EndpointKey


class Published:
    """The own share as others know it.

    Args:
        capacity: Slots of the counters.
    """

    def __init__(self, capacity: int) -> None:
        self._said: IntArray = np.zeros((NUM_KINDS, capacity), np.int64)
        self._names: dict[int, EndpointKey] = {}
        self._slots: dict[EndpointKey, int] = {}  # of each that has one in `_names`
        self._gone: list[EndpointKey] = []

    def claimed(self, key: EndpointKey, slot: int) -> None:
        """An endpoint got a slot: one that was another's, or its own, when something was last said of it."""
        former = self._slots.get(key, slot)
        for each in {former, slot}:
            name = self._names.pop(each, key)
            if self._said[:, each].any():
                self._gone.append(name)
                self._said[:, each] = 0
            self._slots.pop(name, None)
        self._names[slot] = key
        self._slots[key] = slot

    def add(self, slot: int, amounts: Amounts) -> None:
        """The rendezvous has added this to the share by itself."""
        self._said[:, slot] += amounts

    def all(self, own: IntArray) -> tuple[Row, ...]:
        """Every row that is not zero; shape of `own`: (`NUM_KINDS`, u), as all these calls have it."""
        self._gone.clear()
        self._said[:, : own.shape[1]] = own
        return self._rows(own, np.flatnonzero(own.any(axis=0)).tolist())

    def changed(self, own: IntArray) -> tuple[Row, ...]:
        """Every row that was last said to be otherwise."""
        said = self._said[:, : own.shape[1]]
        rows = self._rows(own, np.flatnonzero((own != said).any(axis=0)).tolist())
        said[:] = own
        if not self._gone:
            return rows
        present = {row.endpoint for row in rows}
        gone = [key for key in dict.fromkeys(self._gone) if key not in present]
        self._gone.clear()
        return (*(Row(key) for key in gone), *rows)

    def _rows(self, own: IntArray, slots: list[int]) -> tuple[Row, ...]:
        return tuple(Row(self._names[slot], *own[:, slot].tolist()) for slot in slots)
