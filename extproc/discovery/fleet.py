"""The one fleet: what all sources list, merged; what of it changed; which identity is at which address.

Rules:
    1. Pure. A source's words come in, the difference they make goes out; who follows the fleet re-applies
       that and nothing else.
    2. Identities are made here and only here. Equal keys of sources are one replica, whichever sources list
       it. No room takes an identity apart: an address is asked of the fleet or of an `Endpoint`.
    3. Each source owns what it lists. Where two list the same replica, or the same address and rank, in one
       cluster, the source that came to the fleet first counts; the other takes over when it goes.
    4. A cluster exists as long as a source lists it, with or without endpoints.
    5. What Envoy tells is an address. It is the identity that was sent there, if one was; else the one that
       is there now, or was last. An address where none ever was gets an identity that no ledger has.
    6. Bound: what sources list, and `MAX_FORMER` addresses that endpoints had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Final

from xxhash import xxh3_128_hexdigest

from extproc.discovery.listed import Clusters, Listed
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address
from metadata_center.load.counters import KEY_BYTES
from metadata_center.types import EndpointKey

MAX_FORMER: Final = 4096
"""Addresses remembered of endpoints that left or moved, for requests that still run there: as many as a
gateway may have endpoints."""


@dataclass(frozen=True, slots=True)
class Change:
    """An endpoint of a cluster is not what it was."""

    before: Endpoint
    after: Endpoint

    @property
    def what(self) -> frozenset[str]:
        """Names of the attributes of `Endpoint` that differ."""
        return frozenset(
            one.name
            for one in fields(Endpoint)
            if getattr(self.before, one.name) != getattr(self.after, one.name)
        )


@dataclass(frozen=True)
class Difference:
    """What one word of a source changed.

    Attributes:
        added: Endpoints of clusters that had them not.
        removed: Endpoints of clusters that have them no more.
        changed: Endpoints that stay and differ.
        new_clusters: Clusters that were not there.
        gone_clusters: Clusters that are there no more.
    """

    added: tuple[Endpoint, ...] = ()
    removed: tuple[Endpoint, ...] = ()
    changed: tuple[Change, ...] = ()
    new_clusters: frozenset[str] = frozenset()
    gone_clusters: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.new_clusters or self.gone_clusters)

    @cached_property
    def keys(self) -> tuple[EndpointKey, ...]:
        """Replicas that are concerned, each once."""
        touched = (*self.removed, *(change.after for change in self.changed), *self.added)
        return tuple(dict.fromkeys(endpoint.key for endpoint in touched))

    @cached_property
    def clusters(self) -> frozenset[str]:
        """Clusters that are concerned."""
        touched = (*self.added, *self.removed, *(change.after for change in self.changed))
        return frozenset(endpoint.cluster for endpoint in touched) | self.new_clusters | self.gone_clusters

    @cached_property
    def moved(self) -> frozenset[EndpointKey]:
        """Replicas that have another address: what is known of the engine at the old one says nothing."""
        return frozenset(one.after.key for one in self.changed if one.before.address != one.after.address)


class Fleet:
    """All endpoints; owned by one event loop.

    Attributes:
        clusters: Cluster name to its endpoints, in the order of the sources: a view that follows the fleet.
    """

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, tuple[Listed, ...]]] = {}
        self._clusters: dict[str, tuple[Endpoint, ...]] = {}
        self._members: dict[EndpointKey, dict[str, Endpoint]] = {}
        self._places: dict[Address, dict[EndpointKey, None]] = {}
        self._former: OrderedDict[tuple[EndpointKey, Address], None] = OrderedDict()
        self._last: dict[Address, EndpointKey] = {}
        self.clusters: Mapping[str, Sequence[Endpoint]] = MappingProxyType(self._clusters)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints of all clusters; one that serves two clusters occurs twice."""
        return tuple(endpoint for endpoints in self._clusters.values() for endpoint in endpoints)

    @property
    def keys(self) -> frozenset[EndpointKey]:
        """All replicas."""
        return frozenset(self._members)

    def of(self, key: EndpointKey) -> tuple[Endpoint, ...]:
        """What a replica is, once per cluster it serves; empty if it is not there."""
        return tuple(self._members.get(key, {}).values())

    def replace(self, source: str, clusters: Clusters) -> Difference:
        """A source tells all that it has."""
        gone = self._listed.get(source, {}).keys() - clusters.keys()
        return self.update(source, {**clusters, **dict.fromkeys(gone)})

    def withdraw(self, source: str) -> Difference:
        """A source is a source no more."""
        difference = self.replace(source, {})
        self._listed.pop(source, None)
        return difference

    def update(self, source: str, clusters: Mapping[str, Sequence[Listed] | None]) -> Difference:
        """A source tells what some of its clusters have now.

        Args:
            source: Its name; a new one comes after those that are known.
            clusters: All endpoints of each cluster that is told of; None takes the cluster away.
        """
        own = self._listed.setdefault(source, {})
        touched = []
        for name, listed in clusters.items():
            after = None if listed is None else tuple(listed)
            if own.get(name) != after:
                touched.append(name)
                if after is None:
                    del own[name]
                else:
                    own[name] = after
        added: list[Endpoint] = []
        removed: list[Endpoint] = []
        changed: list[Change] = []
        were = {name for name in touched if name in self._clusters}
        for name in touched:
            self._merge(name, added, removed, changed)
        are = {name for name in touched if name in self._clusters}
        return Difference(
            tuple(added), tuple(removed), tuple(changed), frozenset(are - were), frozenset(were - are)
        )

    def address(self, key: EndpointKey) -> Address | None:
        """Where a replica is reached; None if it is not there."""
        members = self._members.get(key)
        return next(iter(members.values())).address if members else None

    def at(self, address: Address, expected: Iterable[EndpointKey] = ()) -> EndpointKey:
        """Who is, or was, at an address.

        Args:
            address: As Envoy tells it.
            expected: Replicas that a request was to be sent to, the likeliest first.
        """
        for key in expected:
            members = self._members.get(key, {}).values()
            if any(one.address == address for one in members) or (key, address) in self._former:
                return key
        here = self._places.get(address)
        if here:
            return next(iter(here))
        return self._last.get(address) or _identity(str(address))

    def _merge(
        self, name: str, added: list[Endpoint], removed: list[Endpoint], changed: list[Change]
    ) -> None:
        """Work out what a cluster has now."""
        before = {endpoint.key: endpoint for endpoint in self._clusters.get(name, ())}
        after: dict[EndpointKey, Endpoint] = {}
        places: set[tuple[Address, int]] = set()
        for source, clusters in self._listed.items():
            for listed in clusters.get(name, ()):
                key, place = _identity(listed.key), (listed.address, listed.rank)
                if key in after or place in places:
                    continue
                places.add(place)
                endpoint = _endpoint(key, name, source, listed)
                former = before.get(key)
                after[key] = former if former is not None and former == endpoint else endpoint
        for key, endpoint in before.items():
            if key not in after:
                removed.append(endpoint)
                self._remove(endpoint)
        for key, endpoint in after.items():
            former = before.get(key)
            if former is endpoint:
                continue
            if former is None:
                added.append(endpoint)
            else:
                changed.append(Change(former, endpoint))
                self._remove(former)
            self._add(endpoint)
        if any(name in clusters for clusters in self._listed.values()):
            self._clusters[name] = tuple(after.values())
        else:
            self._clusters.pop(name, None)

    def _add(self, endpoint: Endpoint) -> None:
        self._members.setdefault(endpoint.key, {})[endpoint.cluster] = endpoint
        self._places.setdefault(endpoint.address, {})[endpoint.key] = None
        self._former.pop((endpoint.key, endpoint.address), None)
        if self._last.get(endpoint.address) == endpoint.key:
            del self._last[endpoint.address]

    def _remove(self, endpoint: Endpoint) -> None:
        members = self._members[endpoint.key]
        del members[endpoint.cluster]
        if not members:
            del self._members[endpoint.key]
        if any(other.address == endpoint.address for other in members.values()):
            return
        here = self._places[endpoint.address]
        del here[endpoint.key]
        if not here:
            del self._places[endpoint.address]
        self._former[endpoint.key, endpoint.address] = None
        self._last[endpoint.address] = endpoint.key
        if len(self._former) > MAX_FORMER:
            (key, address), _ = self._former.popitem(last=False)
            if self._last.get(address) == key:
                del self._last[address]


def _identity(key: str) -> EndpointKey:
    """The identity of the replica that sources know by `key`: the same where it fits: people read it."""
    if 0 < len(key) <= KEY_BYTES and key.isascii() and key.isprintable():
        return EndpointKey(key)
    return EndpointKey(f"~{xxh3_128_hexdigest(key.encode())}")


def _endpoint(key: EndpointKey, cluster: str, source: str, listed: Listed) -> Endpoint:
    return Endpoint(
        key,
        cluster,
        listed.address,
        listed.weight,
        listed.labels,
        listed.metadata,
        listed.draining,
        listed.rank,
        listed.locality,
        source,
        listed.ready,
    )
