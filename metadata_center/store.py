"""The written contract of the metadata center: what a router may rely on, whatever keeps the state.

Rules:
    1. No call waits. State that lives elsewhere is read from a local replica and written behind the
       call, so its staleness is the store's business and is bounded by the store's own documentation.
    2. `now_s` is monotonic seconds of the caller; lifetimes are the store's settings.
    3. Nothing here is needed for correctness of an answer: a router that gets a `MetadataError` routes
       without that piece of knowledge.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from metadata_center.load.ledger import Expired
from metadata_center.load.table import LoadView
from metadata_center.types import Charge, EndpointKey, RequestId, Waiter


class LoadStore(Protocol):
    """Load in flight. Any order and number of these calls ends with every counter at exactly zero.

    A placement has one leg or several, each charged and released by itself; a request of one leg needs no
    `leg` anywhere. A leg is in flight from a `charge` that returned True until its release, that of its
    request, or the end of its lease. `Ledger` states each call in full.
    """

    @property
    def in_flight(self) -> int:
        """Legs charged through this store object."""
        ...

    @property
    def in_flight_of_all_workers(self) -> int:
        """The same of all workers of this gateway."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Within it, no other worker's charge falls between a `view` and the `charge` made from it."""
        ...

    @property
    def unlocked(self) -> int:
        """Times that a block of `lock` did without, because the worker that has it does not go on."""
        ...

    def slots(self, keys: Iterable[EndpointKey]) -> tuple[int, ...]:
        """Handles of `keys` for `view`, shape (n,), good while each key is in every `retain`."""
        ...

    def retain(self, keys: frozenset[EndpointKey]) -> None:
        """The endpoints that exist; others are forgotten once nothing is in flight there."""
        ...

    def view(self, slots: tuple[int, ...]) -> LoadView:
        """Load over all workers and gateways that share it; an endpoint that was not charged counts zero."""
        ...

    def decoding(self, key: EndpointKey) -> int:
        """Requests of one endpoint that are known to be prefilled, of all that share it; 0 if unknown."""
        ...

    def prefill_turned(self, key: EndpointKey, now_s: float) -> None:
        """A prefill ended at an endpoint, or came where there was none: the next one begins."""
        ...

    def prefill_since_s(self, slots: tuple[int, ...]) -> Sequence[float]:
        """When that was last, of all that share it, shape (n,), monotonic; 0 where it never was."""
        ...

    def get(self, request_id: RequestId, leg: int = 0) -> Charge | None:
        """The present charge of a leg in flight, else None."""
        ...

    def charge(self, charge: Charge, now_s: float, prefill_due_s: float | None) -> bool:
        """Once per leg; False for a duplicate or when the release came first."""
        ...

    def move(
        self,
        request_id: RequestId,
        to: EndpointKey,
        now_s: float,
        *,
        prefill_tokens: int | None = None,
        leg: int = 0,
    ) -> bool:
        """Carry the charge to the endpoint that serves; False when not in flight."""
        ...

    def refresh(
        self, request_id: RequestId, now_s: float, generated_tokens: int | None = None, *, leg: int = 0
    ) -> bool:
        """Start the lease anew, and note how much was generated; False when not in flight."""
        ...

    def release_prefill(self, request_id: RequestId, leg: int = 0) -> bool:
        """Take the prefill off; True exactly once, and never after `advance` did it."""
        ...

    def release(self, request_id: RequestId, now_s: float) -> bool:
        """Take off all legs; False, and a tombstone for late charges, when none is in flight."""
        ...

    def release_leg(self, request_id: RequestId, leg: int, now_s: float) -> bool:
        """Take off one leg; False, and a tombstone for its late charge, when it is not in flight."""
        ...

    def advance(self, now_s: float) -> Expired[RequestId]:
        """Perform and report what became due by `now_s`."""
        ...


class PrefixStore(Protocol):
    """Predicted KV-cache contents per endpoint. `PrefixIndex` states each call in full."""

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int] | array[int]:
        """Leading blocks held, shape (n,); 0 for an endpoint never recorded."""
        ...

    def record(self, endpoint: EndpointKey, blocks: Sequence[int]) -> int:
        """The chain is held now; returns the last held block's previous use sequence, or 0."""
        ...

    def last_use(self, endpoint: EndpointKey, blocks: Sequence[int]) -> int:
        """Sequence of the last use there of a chain's last block; 0 if it is not held."""
        ...

    def forget_older(self, endpoint: EndpointKey, sequence: int) -> int:
        """Drop what was last used at or before `sequence`; returns how many blocks."""
        ...

    def set_capacity(self, endpoint: EndpointKey, blocks: int) -> None:
        """How many blocks the engine's cache has."""
        ...

    def capacity(self, endpoint: EndpointKey) -> int:
        """How many it is taken to have."""
        ...

    def size(self, endpoint: EndpointKey) -> int:
        """How many are held there."""
        ...

    def clear(self, endpoint: EndpointKey) -> None:
        """The engine lost its cache."""
        ...

    def remove(self, endpoint: EndpointKey) -> None:
        """The endpoint is gone."""
        ...


class MetadataStore(Protocol):
    """Both halves, as one thing to hand to a router."""

    @property
    def load(self) -> LoadStore:
        """Load in flight."""
        ...

    @property
    def prefixes(self) -> PrefixStore:
        """Predicted cache contents."""
        ...

    def share(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """Send other gateways what was just recorded in `prefixes`, as seen by this process itself."""
        ...

    def tell_line(self, line: Sequence[Waiter]) -> None:
        """Tell other gateways who waits in this process now, first in line first."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedStore:
    """The store of a gateway that shares nothing beyond its own host.

    Attributes:
        load: Ledger of this process, over counters that its siblings may share.
        prefixes: What this gateway believes cached.
    """

    load: LoadStore
    prefixes: PrefixStore

    def share(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """No other member is to be informed."""

    def tell_line(self, line: Sequence[Waiter]) -> None:
        """No other member's requests wait for the same room."""
