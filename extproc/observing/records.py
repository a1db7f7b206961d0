"""The most recent decisions, for explain: what was decided, and what became of it."""

from __future__ import annotations

from extproc.values.decisions import DecisionRecord
from extproc.values.endings import Ending
from metadata_center.types import RequestId


class RecordRing:
    """The most recent `size` records, found by request id or by age; every operation O(1), `last` O(n).

    A second record with an id already held (a client retry through the gateway) takes over the id;
    the older one stays until its turn to be overwritten.

    Args:
        size: Bound on records held; 0 holds none.

    Raises:
        ValueError: `size` is negative.
    """

    __slots__ = ("_by_id", "_next", "_slots")

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError("size must be >= 0")
        self._slots: list[DecisionRecord | None] = [None] * size
        self._by_id: dict[RequestId, DecisionRecord] = {}
        self._next = 0

    def __len__(self) -> int:
        return min(self._next, len(self._slots))

    def add(self, record: DecisionRecord) -> None:
        """Hold `record`, letting go of the oldest one when full."""
        if not self._slots:
            return
        index = self._next % len(self._slots)
        oldest = self._slots[index]
        if oldest is not None and self._by_id.get(oldest.request_id) is oldest:
            del self._by_id[oldest.request_id]
        self._slots[index] = record
        self._by_id[record.request_id] = record
        self._next += 1

    def ended(self, ending: Ending) -> None:
        """Give the newest record of an ended request its outcome, if it is still held; hold a refusal."""
        if ending.request is None:
            self.add(ending.record)
            return
        record = self._by_id.get(ending.record.request_id)
        if record is not None:
            record.outcome = ending.outcome

    def get(self, request_id: RequestId) -> DecisionRecord | None:
        """The newest record of `request_id`, or None."""
        return self._by_id.get(request_id)

    def last(self, count: int) -> list[DecisionRecord]:
        """Up to `count` records, newest first."""
        first = self._next - min(count, len(self))
        held = (self._slots[index % len(self._slots)] for index in range(self._next - 1, first - 1, -1))
        return [record for record in held if record is not None]
