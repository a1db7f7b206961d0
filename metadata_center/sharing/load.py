"""Load that others share: a load table of this process, and word of each change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from metadata_center.load.ledger import Expired
from metadata_center.load.table import LoadTable, LoadView
from metadata_center.sharing.others import Others
from metadata_center.types import Charge, EndpointKey, RequestId


class SharedLoad:
    """A `LoadStore`: what is charged here is shared with others, what they have is in the views.

    It has a `LoadTable` and is none: of a class that is compiled nothing interpreted may inherit.

    Args:
        table: Charges of this process.
        others: Follow each charge.
        changed: Called after what others are to get.
    """

    def __init__(self, table: LoadTable, others: Others, changed: Callable[[], None]) -> None:
        self.retained: frozenset[EndpointKey] = frozenset()
        """Endpoints that exist, as last retained."""
        self._table = table
        self._others = others
        self._changed = changed

    @property
    def in_flight(self) -> int:
        """See `LoadStore`."""
        return self._table.in_flight

    @property
    def in_flight_of_all_workers(self) -> int:
        """See `LoadStore`."""
        return self._table.in_flight_of_all_workers

    @property
    def unlocked(self) -> int:
        """See `LoadStore`."""
        return self._table.unlocked

    def lock(self) -> AbstractContextManager[None]:
        """See `LoadStore`."""
        return self._table.lock()

    def slots(self, keys: Iterable[EndpointKey]) -> tuple[int, ...]:
        """See `LoadStore`."""
        return self._table.slots(keys)

    def view(self, slots: tuple[int, ...]) -> LoadView:
        """See `LoadStore`."""
        return self._table.view(slots)

    def decoding(self, key: EndpointKey) -> int:
        """See `LoadStore`."""
        return self._table.decoding(key)

    def prefill_turned(self, key: EndpointKey, now_s: float) -> None:
        """See `LoadStore`."""
        self._table.prefill_turned(key, now_s)

    def prefill_since_s(self, slots: tuple[int, ...]) -> Sequence[float]:
        """See `LoadStore`."""
        return self._table.prefill_since_s(slots)

    def get(self, request_id: RequestId, leg: int = 0) -> Charge | None:
        """See `LoadStore`."""
        return self._table.get(request_id, leg)

    def retain(self, keys: frozenset[EndpointKey]) -> None:
        """See `LoadStore`."""
        self._table.retain(keys)
        self.retained = keys

    def charge(self, charge: Charge, now_s: float, prefill_due_s: float | None) -> bool:
        """See `LoadStore`."""
        charged = self._table.charge(charge, now_s, prefill_due_s)
        if charged:
            self._others.charged(charge, now_s)
            self._changed()
        return charged

    def move(
        self,
        request_id: RequestId,
        to: EndpointKey,
        now_s: float,
        *,
        prefill_tokens: int | None = None,
        leg: int = 0,
    ) -> bool:
        """See `LoadStore`."""
        moved = self._table.move(request_id, to, now_s, prefill_tokens=prefill_tokens, leg=leg)
        if moved:
            self._changed()
        return moved

    def refresh(
        self, request_id: RequestId, now_s: float, generated_tokens: int | None = None, *, leg: int = 0
    ) -> bool:
        """See `LoadStore`."""
        refreshed = self._table.refresh(request_id, now_s, generated_tokens, leg=leg)
        if refreshed and generated_tokens is not None:
            self._changed()
        return refreshed

    def release_prefill(self, request_id: RequestId, leg: int = 0) -> bool:
        """See `LoadStore`."""
        released = self._table.release_prefill(request_id, leg)
        if released:
            self._changed()
        return released

    def release(self, request_id: RequestId, now_s: float) -> bool:
        """See `LoadStore`."""
        released = self._table.release(request_id, now_s)
        if released:
            self._changed()
        return released

    def release_leg(self, request_id: RequestId, leg: int, now_s: float) -> bool:
        """See `LoadStore`."""
        released = self._table.release_leg(request_id, leg, now_s)
        if released:
            self._changed()
        return released

    def advance(self, now_s: float) -> Expired[RequestId]:
        """See `LoadStore`."""
        self._others.advance(now_s)
        expired = self._table.advance(now_s)
        if expired.requests or expired.prefills:
            self._changed()
        return expired
