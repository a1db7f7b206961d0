"""Which place is charged for what, exactly once, whatever order the news arrives in: the one ledger.

A request's placement has one leg or several, each on an endpoint of its own: here a prefill, there a decode.
Gateway (`table.py`), service (`metadata_center/service/cluster_loads.py`) and replayer
(`tokenway/simulator/replay/ledger.py`) count in their own ways and hand those ways in as `Accounts`.

Rules:
    1. The accounts hold the sum over the legs in this ledger: each way out (release, lease) takes off
       exactly what is still charged, so they return to zero and never go below it.
    2. Each leg is charged, moved and released by itself; `release` ends whatever legs its request has.
    3. A prefill ends once: at the first token, at its predicted end, or with its leg.
    4. What ends before it was charged leaves a tombstone: a leg's voids that leg's charge, a request's those
       of all its legs, a prefill's leaves its charge without a prefill. Tombstones last their time, however
       often they are met.
    5. `now_s` never goes back and both lifetimes are constant, so insertion order is expiry order; only
       predicted ends of prefills need a heap, whose dead entries are swept when they outnumber the living.
    6. Memory is bounded by `LedgerBounds`. What is refused changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import isfinite
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from metadata_center.errors import CapacityError
from metadata_center.types import value

IdT = TypeVar("IdT", bound=Hashable)
"""Names a request; no tuple, which a leg's name is."""

EndpointT = TypeVar("EndpointT", bound=Hashable)
"""Names an endpoint."""

PlaceT = TypeVar("PlaceT")
"""Where an endpoint is counted."""

_EndpointT_contra = TypeVar("_EndpointT_contra", contravariant=True)

_SWEEP_FLOOR: Final = 1024  # heap entries below which sweeping saves less memory than it costs time


@dataclass(slots=True, eq=False)
class Entry(Generic[IdT, EndpointT, PlaceT]):
    """One leg in flight; only the ledger writes it.

    Attributes:
        request_id: Whose.
        leg: Which of its legs, from 0.
        legs: How many its placement has.
        endpoint: Where.
        place: Where that is counted; kept, so that a release finds what was charged.
        prefill_tokens: Uncached prompt tokens, on the accounts while `prefill_held`.
        context_tokens: Prompt tokens held in the KV cache while the leg lives.
        prompt_length: Of the prompt in a unit of the owner's, on the accounts while `prefill_held`.
        lease_until_s: When it is taken for lost.
        prefill_held: Its prefill is not known to have ended.
        generated_tokens: As far as refreshes reported.
    """

    request_id: IdT
    leg: int
    legs: int
    endpoint: EndpointT
    place: PlaceT
    prefill_tokens: int
    context_tokens: int
    prompt_length: int
    lease_until_s: float
    prefill_held: bool = True
    generated_tokens: int = 0


class Accounts(Protocol[_EndpointT_contra, PlaceT]):
    """What a ledger keeps in step with its entries."""

    def place(self, endpoint: _EndpointT_contra) -> PlaceT:
        """Where an endpoint is counted.

        Raises:
            CapacityError: There is no room for one more.
        """
        ...

    def put(self, entry: Entry[Any, Any, PlaceT], /) -> None:
        """Add all that `entry` is charged now."""
        ...

    def take(self, entry: Entry[Any, Any, PlaceT], /) -> None:
        """Take off all that `entry` is charged now."""
        ...

    def take_prefill(self, entry: Entry[Any, Any, PlaceT], /) -> None:
        """Take off the prefill of `entry`, which is held."""
        ...


@value
class Expired(Generic[IdT]):
    """What time alone has released.

    Attributes:
        prefills: Requests with a leg whose predicted prefill end has passed; they stay in flight.
        requests: Requests whose last lease ran out; they are gone.
    """

    prefills: tuple[IdT, ...]
    requests: tuple[IdT, ...]


class _LegName(NamedTuple):
    """Names a leg among the names of requests."""

    request_id: Hashable
    leg: int


class _Tombstone(NamedTuple):
    """What ended before its charge: all of it, or its prefill alone."""

    until_s: float
    wholly: bool


@dataclass(frozen=True, slots=True)
class LedgerBounds:
    """How long a ledger remembers what, and how much.

    Attributes:
        lease_s: A leg not refreshed or moved for this long is taken for lost.
        tombstone_s: How late a charge may come after its end.
        max_tombstones: The oldest makes room for the next; its late charge would then last one lease.
        max_legs: Most legs in flight.
    """

    lease_s: float = 180.0
    tombstone_s: float = 60.0
    max_tombstones: int = 100_000
    max_legs: int = 200_000


class Ledger(Generic[IdT, EndpointT, PlaceT]):
    """Legs in flight, kept in step with the accounts.

    Args:
        accounts: Where the load is counted.
        bounds: Lifetimes and bounds.
    """

    def __init__(self, accounts: Accounts[EndpointT, PlaceT], bounds: LedgerBounds) -> None:
        self._accounts = accounts
        self._bounds = bounds
        self._lease_s = bounds.lease_s
        # The first leg goes by its request's name: a request of one leg pays nothing for there being legs.
        self._entries: OrderedDict[Hashable, Entry[IdT, EndpointT, PlaceT]] = OrderedDict()
        self._further: dict[IdT, set[int]] = {}  # legs in flight other than the first
        self._tombstones: OrderedDict[Hashable, _Tombstone] = OrderedDict()
        self._due: list[tuple[float, int, Entry[IdT, EndpointT, PlaceT]]] = []
        self._serial = count()  # entries are not ordered; this decides between equal due times
        self._nothing: Final[Expired[IdT]] = Expired((), ())

    def __len__(self) -> int:
        """Legs in flight."""
        return len(self._entries)

    def get(self, request_id: IdT, leg: int = 0) -> Entry[IdT, EndpointT, PlaceT] | None:
        """A leg; None when it is not in flight."""
        return self._entries.get(_LegName(request_id, leg) if leg else request_id)

    def legs(self, request_id: IdT) -> tuple[int, ...]:
        """Which legs of a request are in flight, in order."""
        first = (0,) if request_id in self._entries else ()
        return (*first, *sorted(self._further.get(request_id, ())))

    def charge(
        self,
        request_id: IdT,
        endpoint: EndpointT,
        prefill_tokens: int,
        context_tokens: int,
        now_s: float,
        prefill_due_s: float | None = None,
        leg: int = 0,
        legs: int = 1,
        prompt_length: int = 0,
    ) -> bool:
        """Put one leg on its endpoint.

        Args:
            request_id: Whose.
            endpoint: Where.
            prefill_tokens: Uncached prompt tokens, >= 0.
            context_tokens: Prompt tokens, >= 0.
            now_s: Monotonic seconds.
            prefill_due_s: When the prefill is predicted to end, or None to wait for the first token.
            leg: Which leg, 0..legs-1.
            legs: How many legs the request's placement has.
            prompt_length: >= 0; see `Entry`.

        Returns:
            False if nothing was charged: the leg is in flight already, or its end came first.

        Raises:
            CapacityError: `max_legs` are in flight, or the endpoint finds no place.
            ValueError: An amount is negative, there is no such leg, or the due time is not finite.
        """
        name = _LegName(request_id, leg) if leg else request_id
        if name in self._entries:
            return False
        if prefill_tokens < 0 or context_tokens < 0 or prompt_length < 0:
            raise ValueError("a charge is negative")
        if not 0 <= leg < legs:
            raise ValueError(f"leg {leg} of {legs}")
        if prefill_due_s is not None and not isfinite(prefill_due_s):
            raise ValueError("prefill_due_s is not finite")
        tombstone = self._buried(request_id, leg, now_s) if self._tombstones else None
        if tombstone is not None and tombstone.wholly:
            return False
        if len(self._entries) >= self._bounds.max_legs:
            raise CapacityError(f"{self._bounds.max_legs} requests are in flight")
        place, until_s = self._accounts.place(endpoint), now_s + self._lease_s
        entry = Entry(
            request_id, leg, legs, endpoint, place, prefill_tokens, context_tokens, prompt_length, until_s
        )
        entry.prefill_held = tombstone is None
        self._accounts.put(entry)
        self._entries[name] = entry
        if leg:
            self._further.setdefault(request_id, set()).add(leg)
        if prefill_due_s is not None:
            if len(self._due) > 2 * len(self._entries) + _SWEEP_FLOOR:
                self._sweep()
            heappush(self._due, (prefill_due_s, next(self._serial), entry))
        return True

    def move(
        self,
        request_id: IdT,
        to: EndpointT,
        now_s: float,
        prefill_tokens: int | None = None,
        leg: int = 0,
    ) -> bool:
        """Another endpoint serves after all: what is still charged goes there, and the lease starts anew.

        Args:
            request_id: Which request.
            to: Where.
            now_s: Monotonic seconds.
            prefill_tokens: What of its prompt is not cached there, >= 0, if that is known and the prefill
                is still held; None carries what is charged.
            leg: Which leg.

        Returns:
            False if the leg is not in flight.

        Raises:
            CapacityError: The endpoint finds no place; nothing was changed.
        """
        entry = self.get(request_id, leg)
        if entry is None:
            return False
        if to != entry.endpoint:
            place = self._accounts.place(to)
            self._accounts.take(entry)
            if prefill_tokens is not None and entry.prefill_held:
                entry.prefill_tokens = prefill_tokens
            entry.endpoint, entry.place = to, place
            self._accounts.put(entry)
        return self.refresh(request_id, now_s, leg=leg)

    def refresh(
        self,
        request_id: IdT,
        now_s: float,
        generated_tokens: int | None = None,
        context_tokens: int | None = None,
        leg: int = 0,
    ) -> bool:
        """The leg is alive: start its lease anew.

        Args:
            request_id: Which request.
            now_s: Monotonic seconds.
            generated_tokens: How many it has generated so far, >= 0; None if that is not known.
            context_tokens: How many its prompt really has, >= 0, if that is known only now; a prefill
                still held changes by as much, as far as it can.
            leg: Which leg.

        Returns:
            False if it is not in flight.

        Raises:
            ValueError: A number is negative; nothing was changed.
        """
        name = _LegName(request_id, leg) if leg else request_id
        entry = self._entries.get(name)
        if entry is None:
            return False
        if generated_tokens is not None or context_tokens is not None:
            self._recount(entry, generated_tokens, context_tokens)
        entry.lease_until_s = now_s + self._lease_s
        self._entries.move_to_end(name)
        return True

    def release_prefill(self, request_id: IdT, leg: int = 0) -> bool:
        """The prompt is computed: take its prefill off. True only the first time."""
        entry = self.get(request_id, leg)
        if entry is None or not entry.prefill_held:
            return False
        self._accounts.take_prefill(entry)
        entry.prefill_held = False
        return True

    def release(self, request_id: IdT, now_s: float) -> bool:
        """The request is over: take off all its legs are still charged.

        A leg of its placement that was not charged yet is void if it is within `tombstone_s`.

        Returns:
            False if no leg was in flight.
        """
        if self._further and request_id in self._further:
            for leg in self.legs(request_id):
                self._take_out(request_id, leg)
            self.bury(request_id, now_s)
            return True
        entry = self._entries.pop(request_id, None)
        if entry is None:
            self.bury(request_id, now_s)
            return False
        self._accounts.take(entry)
        entry.prefill_held = False
        if entry.legs > 1:
            self.bury(request_id, now_s)
        return True

    def release_leg(self, request_id: IdT, leg: int, now_s: float) -> bool:
        """One leg is over, whatever the others do.

        Returns:
            False if it is not in flight; a charge for it that comes within `tombstone_s` is void then.
        """
        if self._take_out(request_id, leg):
            return True
        self._bury(_LegName(request_id, leg), _Tombstone(now_s + self._bounds.tombstone_s, True))
        return False

    def bury(self, request_id: IdT, now_s: float) -> None:
        """Whatever is charged for this request within `tombstone_s` is void."""
        self._bury(request_id, _Tombstone(now_s + self._bounds.tombstone_s, True))

    def bury_prefill(self, request_id: IdT, now_s: float, leg: int = 0) -> None:
        """A leg's prompt is computed: if it is charged within `tombstone_s`, it is without a prefill.

        For news that may overtake its charge. Does nothing if the leg is in flight or has ended.
        """
        if self.get(request_id, leg) is None and self._buried(request_id, leg, now_s) is None:
            self._bury(_LegName(request_id, leg), _Tombstone(now_s + self._bounds.tombstone_s, False))

    def advance(self, now_s: float) -> Expired[IdT]:
        """Release what is due at `now_s`; call before each decision.

        O(1) when nothing is due, else O(log n) for each thing that is.
        """
        while self._tombstones and next(iter(self._tombstones.values())).until_s <= now_s:
            self._tombstones.popitem(last=False)
        if not (self._due and self._due[0][0] <= now_s) and not (
            self._entries and next(iter(self._entries.values())).lease_until_s <= now_s
        ):
            return self._nothing
        prefills = []
        while self._due and self._due[0][0] <= now_s:
            _, _, entry = heappop(self._due)
            if entry.prefill_held:
                self._accounts.take_prefill(entry)
                entry.prefill_held = False
                prefills.append(entry.request_id)
        return Expired(tuple(prefills), tuple(self._end_leases(now_s)))

    def _sweep(self) -> None:
        self._due = [item for item in self._due if item[2].prefill_held]
        heapify(self._due)

    def _end_leases(self, now_s: float) -> Iterable[IdT]:
        while self._entries:
            entry = next(iter(self._entries.values()))
            if entry.lease_until_s > now_s:
                return
            self._take_out(entry.request_id, entry.leg)
            if not self.legs(entry.request_id):
                yield entry.request_id

    def _recount(
        self, entry: Entry[IdT, EndpointT, PlaceT], generated_tokens: int | None, context_tokens: int | None
    ) -> None:
        generated = entry.generated_tokens if generated_tokens is None else generated_tokens
        context = entry.context_tokens if context_tokens is None else context_tokens
        if generated < 0 or context < 0:
            raise ValueError("a number of tokens is negative")
        if (generated, context) != (entry.generated_tokens, entry.context_tokens):
            self._accounts.take(entry)
            entry.prefill_tokens = max(0, entry.prefill_tokens + context - entry.context_tokens)
            entry.generated_tokens, entry.context_tokens = generated, context
            self._accounts.put(entry)

    def _take_out(self, request_id: IdT, leg: int) -> bool:
        entry = self._entries.pop(_LegName(request_id, leg) if leg else request_id, None)
        if entry is None:
            return False
        self._accounts.take(entry)
        entry.prefill_held = False  # nothing is due of it any more
        if leg:
            further = self._further[request_id]
            further.remove(leg)
            if not further:
                del self._further[request_id]
        return True

    def _buried(self, request_id: IdT, leg: int, now_s: float) -> _Tombstone | None:
        """What is known to have ended of a leg that is not in flight."""
        for name in (request_id, _LegName(request_id, leg)):
            tombstone = self._tombstones.get(name)
            if tombstone is not None and tombstone.until_s > now_s:
                return tombstone
        return None

    def _bury(self, name: Hashable, tombstone: _Tombstone) -> None:
        self._tombstones[name] = tombstone
        self._tombstones.move_to_end(name)
        if len(self._tombstones) > self._bounds.max_tombstones:
            self._tombstones.popitem(last=False)
