"""Which request loads which endpoint, exactly once, whatever order the news arrives in.

Rules:
    1. The counters equal the sum over the requests in this table: each way out (release, lease) takes out
       exactly what is still charged, so they return to zero and never go below it.
    2. A prefill ends once: at the first token, at its predicted end, or with its request.
    3. A release that comes before its charge leaves a tombstone, and the late charge is void.
    4. `now_s` never goes back and both lifetimes are constant, so insertion order is expiry order; only
       predicted prefill ends need a heap, whose dead entries are swept when they outnumber the living.
    5. Memory is bounded by `max_requests` and `max_tombstones`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import isfinite
from typing import Final

from metadata_center.errors import CapacityError
from metadata_center.load.counters import Counters
from metadata_center.types import Charge, EndpointKey, RequestId, value

_SWEEP_FLOOR: Final = 1024  # heap entries below which sweeping saves less memory than it costs time


@value
class LoadView:
    """Load per endpoint, all workers and sharing gateways together; one value per endpoint asked for, copied.

    Attributes:
        requests: In flight.
        prefill_requests: Of these, not yet known to be prefilled.
        prefill_tokens: Charged and not yet known to be prefilled.
        context_tokens: Prompt tokens of all in-flight requests.
        generated_tokens: Generated so far by all in-flight requests, as far as their refreshes told.
    """

    requests: list[int]
    prefill_requests: list[int]
    prefill_tokens: list[int]
    context_tokens: list[int]
    generated_tokens: list[int]


@dataclass(frozen=True, slots=True)
class Expired:
    """What time alone has released.

    Attributes:
        prefills: Requests whose predicted prefill end has passed; they stay in flight.
        requests: Requests whose lease ran out; they are gone.
    """

    prefills: tuple[RequestId, ...]
    requests: tuple[RequestId, ...]


_NOTHING: Final = Expired((), ())


@dataclass(slots=True)
class _Entry:
    """One request in flight; `slot` is kept, so its release finds the counters it was charged to."""

    endpoint: EndpointKey
    slot: int
    prefill_tokens: int
    context_tokens: int
    prefill_held: bool
    prefill_due_s: float | None
    lease_until_s: float
    generated_tokens: int = 0


class LoadTable:
    """Charges of this worker's requests, kept in step with the counters all workers share.

    Args:
        counters: Where the load is counted.
        lease_s: A request nobody refreshed or moved for this long is taken for lost.
        tombstone_s: How late a charge may come after its release.
        max_tombstones: The oldest makes room for the next; its late charge would then last one lease.
        max_requests: Most requests in flight.
    """

    def __init__(
        self,
        counters: Counters,
        *,
        lease_s: float = 180.0,
        tombstone_s: float = 60.0,
        max_tombstones: int = 100_000,
        max_requests: int = 200_000,
    ) -> None:
        self._counters = counters
        self._lease_s = lease_s
        self._tombstone_s = tombstone_s
        self._max_tombstones = max_tombstones
        self._max_requests = max_requests
        self._entries: OrderedDict[RequestId, _Entry] = OrderedDict()
        self._tombstones: OrderedDict[RequestId, float] = OrderedDict()
        self._due: list[tuple[float, RequestId]] = []

    @property
    def in_flight(self) -> int:
        """Requests charged in this table."""
        return len(self._entries)

    def get(self, request_id: RequestId) -> Charge | None:
        """What `request_id` is charged now; None when it is not in flight."""
        entry = self._entries.get(request_id)
        return None if entry is None else _charge(request_id, entry)

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

    def charge(self, charge: Charge, now_s: float, prefill_due_s: float | None) -> bool:
        """Put one request on its endpoint.

        Args:
            charge: Who, where and how much; amounts >= 0.
            now_s: Monotonic seconds.
            prefill_due_s: When the prefill is predicted to end, or None to wait for the first token.

        Returns:
            False if nothing was charged: the request is in flight already, or its release came first
            (the tombstone is then used up).

        Raises:
            CapacityError: `max_requests` are in flight or the endpoint finds no slot.
            ValueError: An amount is negative or the due time is not finite.
                In each case nothing was changed.
        """
        request_id = charge.request_id
        if request_id in self._entries:
            return False
        if charge.prefill_tokens < 0 or charge.context_tokens < 0:
            raise ValueError("a charge is negative")
        if prefill_due_s is not None and not isfinite(prefill_due_s):
            raise ValueError("prefill_due_s is not finite")
        if self._tombstones and self._tombstones.pop(request_id, now_s) > now_s:
            return False
        if len(self._entries) >= self._max_requests:
            raise CapacityError(f"{self._max_requests} requests are in flight")
        slot = self._counters.slot(charge.endpoint)
        self._counters.add(slot, 1, 1, charge.prefill_tokens, charge.context_tokens)
        self._entries[request_id] = _Entry(
            charge.endpoint,
            slot,
            charge.prefill_tokens,
            charge.context_tokens,
            True,
            prefill_due_s,
            now_s + self._lease_s,
        )
        if prefill_due_s is not None:
            if len(self._due) > 2 * len(self._entries) + _SWEEP_FLOOR:
                self._due = [item for item in self._due if self._is_due(*item)]
                heapify(self._due)
            heappush(self._due, (prefill_due_s, request_id))
        return True

    def move(
        self, request_id: RequestId, to: EndpointKey, now_s: float, *, prefill_tokens: int | None = None
    ) -> bool:
        """Another endpoint serves after all: what is still charged goes there, and the lease starts anew.

        Args:
            request_id: Who.
            to: Where.
            now_s: Monotonic seconds.
            prefill_tokens: What of its prompt is not cached there, >= 0, if that is known and the prefill
                is still held; None carries what is charged.

        Returns:
            False if the request is not in flight.

        Raises:
            CapacityError: The endpoint finds no slot; nothing was changed.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if to != entry.endpoint:
            slot = self._counters.slot(to)
            self._subtract(entry)
            if prefill_tokens is not None and entry.prefill_held:
                entry.prefill_tokens = prefill_tokens
            entry.endpoint, entry.slot = to, slot
            self._counters.add(slot, 1, entry.prefill_held, entry.prefill_tokens, entry.context_tokens)
            if entry.generated_tokens:
                self._counters.add_generated(slot, entry.generated_tokens)
        return self.refresh(request_id, now_s)

    def refresh(self, request_id: RequestId, now_s: float, generated_tokens: int | None = None) -> bool:
        """The request is alive: start its lease anew.

        Args:
            request_id: Who.
            now_s: Monotonic seconds.
            generated_tokens: How many it has generated so far, >= 0; None if that is not known.

        Returns:
            False if it is not in flight.

        Raises:
            ValueError: `generated_tokens` is negative; nothing was changed.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if generated_tokens is not None and generated_tokens < 0:
            raise ValueError("generated_tokens is negative")
        if generated_tokens is not None and generated_tokens != entry.generated_tokens:
            self._counters.add_generated(entry.slot, generated_tokens - entry.generated_tokens)
            entry.generated_tokens = generated_tokens
        entry.lease_until_s = now_s + self._lease_s
        self._entries.move_to_end(request_id)
        return True

    def release_prefill(self, request_id: RequestId) -> bool:
        """The prompt is computed: take its prefill off. True only the first time."""
        entry = self._entries.get(request_id)
        if entry is None or not entry.prefill_held:
            return False
        self._counters.add_prefill(entry.slot, -1, -entry.prefill_tokens)
        entry.prefill_tokens = 0
        entry.prefill_held = False
        return True

    def release(self, request_id: RequestId, now_s: float) -> Charge | None:
        """The request is over: take off all it is still charged.

        Returns:
            What was taken off; None if the request is not in flight, in which case a charge for it that
            comes within `tombstone_s` is void.
        """
        entry = self._entries.get(request_id)
        if entry is not None:
            return self._take_out(request_id, entry)
        self._tombstones[request_id] = now_s + self._tombstone_s
        self._tombstones.move_to_end(request_id)
        if len(self._tombstones) > self._max_tombstones:
            self._tombstones.popitem(last=False)
        return None

    def advance(self, now_s: float) -> Expired:
        """Release what is due at `now_s`; call before each decision.

        O(1) when nothing is due, else O(log n) for each thing that is.
        """
        while self._tombstones and next(iter(self._tombstones.values())) <= now_s:
            self._tombstones.popitem(last=False)
        if not (self._due and self._due[0][0] <= now_s) and not (
            self._entries and next(iter(self._entries.values())).lease_until_s <= now_s
        ):
            return _NOTHING
        prefills = []
        while self._due and self._due[0][0] <= now_s:
            due_s, request_id = heappop(self._due)
            if self._is_due(due_s, request_id):
                self.release_prefill(request_id)
                prefills.append(request_id)
        requests = []
        while self._entries:
            request_id, entry = next(iter(self._entries.items()))
            if entry.lease_until_s > now_s:
                break
            self._take_out(request_id, entry)
            requests.append(request_id)
        return Expired(tuple(prefills), tuple(requests))

    def _take_out(self, request_id: RequestId, entry: _Entry) -> Charge:
        del self._entries[request_id]
        self._subtract(entry)
        return _charge(request_id, entry)

    def _subtract(self, entry: _Entry) -> None:
        self._counters.add(entry.slot, -1, -entry.prefill_held, -entry.prefill_tokens, -entry.context_tokens)
        if entry.generated_tokens:
            self._counters.add_generated(entry.slot, -entry.generated_tokens)

    def _is_due(self, due_s: float, request_id: RequestId) -> bool:
        entry = self._entries.get(request_id)
        return entry is not None and entry.prefill_held and entry.prefill_due_s == due_s


def _charge(request_id: RequestId, entry: _Entry) -> Charge:
    return Charge(request_id, entry.endpoint, entry.prefill_tokens, entry.context_tokens)
