"""The written contract of the metadata center: what a router may rely on, whoever keeps the state.

Rules:
    1. No call waits. State that lives elsewhere is read from a local replica and written behind the
       call, so its staleness is the store's business and is bounded by the store's own documentation.
    2. `now_s` is monotonic seconds of the caller; lifetimes are the store's settings.
    3. Nothing here is needed for correctness of an answer: a router that gets a `MetadataError` routes
       without that piece of knowledge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.table import Expired, LoadTable, LoadView
from metadata_center.types import Charge, EndpointKey, RequestId


class LoadStore(Protocol):
    """Load in flight. Any order and number of these calls ends with every counter at exactly zero.

    A request is in flight from a `charge` that returned True until its `release` or the end of its
    lease. `LoadTable` states each call in full.
    """

    @property
    def in_flight(self) -> int:
        """Requests charged through this store object."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Within it, no other worker's charge falls between a `view` and the `charge` made from it."""
        ...

    def slots(self, keys: Iterable[EndpointKey]) -> tuple[int, ...]:
        """Handles of `keys` for `view`, shape (n,), good while each key is in every `retain`."""
        ...

    def retain(self, keys: frozenset[EndpointKey]) -> None:
        """The endpoints that exist; others are forgotten once nothing is in flight there."""
        ...

    def view(self, slots: tuple[int, ...]) -> LoadView:
        """Load over all workers and gateways that share it; an endpoint nobody charged counts zero."""
        ...

    def get(self, request_id: RequestId) -> Charge | None:
        """The present charge of a request in flight, else None."""
        ...

    def charge(self, charge: Charge, now_s: float, prefill_due_s: float | None) -> bool:
        """Once per request; False for a duplicate or when the release came first."""
        ...

    def move(
        self, request_id: RequestId, to: EndpointKey, now_s: float, *, prefill_tokens: int | None = None
    ) -> bool:
        """Carry the charge to the endpoint that serves; False when not in flight."""
        ...

    def refresh(self, request_id: RequestId, now_s: float, generated_tokens: int | None = None) -> bool:
        """Start the lease anew, and note how much was generated; False when not in flight."""
        ...

    def release_prefill(self, request_id: RequestId) -> bool:
        """Take the prefill off; True exactly once, and never after `advance` did it."""
        ...

    def release(self, request_id: RequestId, now_s: float) -> Charge | None:
        """Take everything off; None, and a tombstone for a late charge, when not in flight."""
        ...

    def advance(self, now_s: float) -> Expired:
        """Perform and report what became due by `now_s`."""
        ...


class PrefixStore(Protocol):
    """Predicted KV-cache contents per endpoint. `PrefixIndex` states each call in full."""

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int]:
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
        """Tell other gateways what was just recorded in `prefixes`, as seen by this process itself."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedStore:
    """The store of a gateway that shares nothing beyond its own host.

    Attributes:
        load: Books of this process, over counters that its siblings may share.
        prefixes: What this gateway believes cached.
    """

    load: LoadTable
    prefixes: PrefixIndex

    def share(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """Nobody else is to be told."""
