"""A gateway's load in flight: the ledger of this worker, over the counters that all workers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Final

from metadata_center.load.counters import Counters
from metadata_center.load.kinds import NAMES, Amounts
from metadata_center.load.ledger import Expired, Ledger, LedgerBounds
from metadata_center.types import Charge, EndpointKey, RequestId, value

_DEFAULTS: Final = LedgerBounds()


@value
class LoadView:
    """Load per endpoint, all workers and sharing gateways together; one value per endpoint asked for, copied.

    One attribute per kind of `metadata_center.load.kinds`, in that order, of which each says what it means.
    """

    requests: Sequence[int]
    prefill_requests: Sequence[int]
    prefill_tokens: Sequence[int]
    context_tokens: Sequence[int]
    generated_tokens: Sequence[int]

    def amounts(self, index: int) -> Amounts:
        """All kinds of one endpoint."""
        return tuple(getattr(self, name)[index] for name in NAMES)


class LoadTable:
    """Charges of this worker's requests, kept in step with the counters all workers share.

    Calls that charge and release are those of `Ledger`, which states each in full.

    Args:
        counters: Where the load is counted.
        bounds: Lifetimes and bounds of the ledger.
    """

    def __init__(self, counters: Counters, bounds: LedgerBounds = _DEFAULTS) -> None:
        self._counters = counters
        self._ledger: Ledger[RequestId, EndpointKey, int] = Ledger(counters, bounds)

    @property
    def in_flight(self) -> int:
        """Legs of requests charged in this table."""
        return len(self._ledger)

    @property
    def in_flight_of_all_workers(self) -> int:
        """See `LoadStore`."""
        return self._counters.of_all_workers()

    @property
    def unlocked(self) -> int:
        """See `LoadStore`."""
        return self._counters.unlocked

    def get(self, request_id: RequestId, leg: int = 0) -> Charge | None:
        """What a leg is charged now; None when it is not in flight."""
        entry = self._ledger.get(request_id, leg)
        if entry is None:
            return None
        prefill_tokens = entry.prefill_tokens if entry.prefill_held else 0
        return Charge(request_id, entry.endpoint, prefill_tokens, entry.context_tokens, leg, entry.legs)

    def lock(self) -> AbstractContextManager[None]:
        """Keep other workers from deciding between this one's `view` and `charge`."""
        return self._counters.lock()

    def slots(self, keys: Iterable[EndpointKey]) -> tuple[int, ...]:
        """Where `keys` are counted: the argument of `view`.

        Valid as long as each of them is in every `retain`.
        """
        return self._counters.slots(keys)

    def retain(self, keys: frozenset[EndpointKey]) -> None:
        """Forget all other endpoints; requests still on one of them release it as usual."""
        self._counters.retain(keys)

    def view(self, slots: tuple[int, ...]) -> LoadView:
        """The load of `slots`, as every worker has it now."""
        return LoadView(*self._counters.totals(slots))

    def decoding(self, key: EndpointKey) -> int:
        """Requests of one endpoint that are known to be prefilled, as every worker has them now."""
        return self._counters.decoding(key)

    def prefill_turned(self, key: EndpointKey, now_s: float) -> None:
        """A prefill ended at an endpoint, or came where there was none: the next one begins."""
        self._counters.prefill_turned(key, now_s)

    def prefill_since_s(self, slots: tuple[int, ...]) -> Sequence[float]:
        """When that last was at `slots`, by any worker or gateway; 0 where it never was."""
        return self._counters.prefill_since_s(slots)

    def charge(self, charge: Charge, now_s: float, prefill_due_s: float | None) -> bool:
        """Put one leg of a request on its endpoint; False if it is there already, or its end came first.

        Raises:
            CapacityError: `max_legs` are in flight or the endpoint finds no slot; nothing was changed.
            ValueError: See `Ledger.charge`.
        """
        return self._ledger.charge(
            charge.request_id,
            charge.endpoint,
            charge.prefill_tokens,
            charge.context_tokens,
            now_s,
            prefill_due_s,
            charge.leg,
            charge.legs,
        )

    def move(
        self,
        request_id: RequestId,
        to: EndpointKey,
        now_s: float,
        *,
        prefill_tokens: int | None = None,
        leg: int = 0,
    ) -> bool:
        """Another endpoint serves after all; False if the leg is not in flight.

        Raises:
            CapacityError: The endpoint finds no slot; nothing was changed.
        """
        return self._ledger.move(request_id, to, now_s, prefill_tokens, leg)

    def refresh(
        self, request_id: RequestId, now_s: float, generated_tokens: int | None = None, *, leg: int = 0
    ) -> bool:
        """The leg is alive, and has generated so much; False if it is not in flight.

        Raises:
            ValueError: `generated_tokens` is negative; nothing was changed.
        """
        return self._ledger.refresh(request_id, now_s, generated_tokens, None, leg)

    def release_prefill(self, request_id: RequestId, leg: int = 0) -> bool:
        """The leg's prompt is computed: take its prefill off. True only the first time."""
        return self._ledger.release_prefill(request_id, leg)

    def release(self, request_id: RequestId, now_s: float) -> bool:
        """The request is over, all its legs are; False if none was in flight."""
        return self._ledger.release(request_id, now_s)

    def release_leg(self, request_id: RequestId, leg: int, now_s: float) -> bool:
        """One leg is over, whatever the others do; False if it was not in flight."""
        return self._ledger.release_leg(request_id, leg, now_s)

    def advance(self, now_s: float) -> Expired[RequestId]:
        """Release what is due at `now_s`; call before each decision. O(1) when nothing is due."""
        return self._ledger.advance(now_s)
