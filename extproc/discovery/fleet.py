"""The one fleet: what all sources list, merged; what of it changed; which identity is at which address.

Rules:
    1. Pure. A source's words come in, the difference they make goes out; what follows the fleet re-applies
       that and nothing else.
    2. Identities are made here and only here. Equal keys of sources are one replica, whichever sources list
       it. No package takes an identity apart: an address is asked of the fleet or of an `Endpoint`.
    3. Each source owns what it lists. Where two list the same replica, or the same address and rank, in one
       cluster, the source that came to the fleet first counts; the other takes over when it goes.
    4. A cluster exists as long as a source lists it, with or without endpoints.
    5. What Envoy reports is an address. It is the identity that was sent there, if one was; else the one that
       is there now, or was last. An address where none ever was gets an identity that no ledger has.
    6. Bounds: `max_endpoints` replicas, as many as the load of is counted, and `MAX_FORMER` addresses that
       endpoints had. What sources list beyond is left out until there is space: those that are there stay.
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
from metadata_center.load.counters import KEY_BYTES, MAX_ENDPOINTS
from metadata_center.types import EndpointKey

MAX_FORMER: Final = MAX_ENDPOINTS
"""Addresses remembered of endpoints that left or moved, for requests that still run there."""


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
        left_out: How many replicas are left out now for want of space; None if as many as before.
    """

    added: tuple[Endpoint, ...] = ()
    removed: tuple[Endpoint, ...] = ()
    changed: tuple[Change, ...] = ()
    new_clusters: frozenset[str] = frozenset()
    gone_clusters: frozenset[str] = frozenset()
    left_out: int | None = None

    def __bool__(self) -> bool:
        return self.left_out is not None or bool(
            self.added or self.removed or self.changed or self.new_clusters or self.gone_clusters
        )

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

    @property
    def departed(self) -> tuple[Endpoint, ...]:
        """Endpoints that are not in their clusters any more, or at another address, as they were."""
        moved = (one.before for one in self.changed if one.before.address != one.after.address)
        return (*self.removed, *moved)


class Fleet:
    """All endpoints; owned by one event loop.

    Args:
        max_endpoints: Bound on replicas, >= 1.

    Attributes:
        clusters: Cluster name to its endpoints, in the order of the sources: a view that follows the fleet.
    """

    def __init__(self, max_endpoints: int = MAX_ENDPOINTS) -> None:
        self._max_endpoints = max_endpoints
        self._left_out: dict[str, frozenset[EndpointKey]] = {}
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

    @property
    def left_out(self) -> int:
        """Replicas that sources list and that are not here, for want of space."""
        return len(frozenset[EndpointKey]().union(*self._left_out.values()))

    def of(self, key: EndpointKey) -> tuple[Endpoint, ...]:
        """What a replica is, once per cluster it serves; empty if it is not there."""
        return tuple(self._members.get(key, {}).values())

    def listed(self, source: str) -> Clusters:
        """What a source listed last: a view."""
        return MappingProxyType(self._listed.get(source, {}))

    def replace(self, source: str, clusters: Clusters) -> Difference:
        """A source lists all that it has."""
        gone = self._listed.get(source, {}).keys() - clusters.keys()
        return self.update(source, {**clusters, **dict.fromkeys(gone)})

    def withdraw(self, source: str) -> Difference:
        """A source is a source no more."""
        difference = self.replace(source, {})
        self._listed.pop(source, None)
        return difference

    def update(self, source: str, clusters: Mapping[str, Sequence[Listed] | None]) -> Difference:
        """A source lists what some of its clusters have now.

        Args:
            source: Its name; a new one comes after those that are known.
            clusters: All endpoints of each cluster that is listed; None takes the cluster away.
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
        left_out = self.left_out
        if touched:
            self._merge(dict.fromkeys((*touched, *self._left_out)), added, removed, changed)
        are = {name for name in touched if name in self._clusters}
        return Difference(
            tuple(added),
            tuple(removed),
            tuple(changed),
            frozenset(are - were),
            frozenset(were - are),
            None if self.left_out == left_out else self.left_out,
        )

    def foreseen(self, source: str, clusters: Clusters) -> dict[str, tuple[Endpoint, ...]]:
        """What clusters that are not there would have if this source listed them, without bounds."""
        return {
            name: tuple(_endpoint(_identity(one.key), name, source, one) for one in listed)
            for name, listed in clusters.items()
            if name not in self._clusters
        }

    def address(self, key: EndpointKey) -> Address | None:
        """Where a replica is reached; None if it is not there."""
        members = self._members.get(key)
        return next(iter(members.values())).address if members else None

    def at(self, address: Address, expected: Iterable[EndpointKey] = ()) -> EndpointKey:
        """The identity that is, or was, at an address.

        Args:
            address: As Envoy reports it.
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
        self,
        names: Iterable[str],
        added: list[Endpoint],
        removed: list[Endpoint],
        changed: list[Change],
    ) -> None:
        """Work out what these clusters have now."""
        wanted = {name: self._wanted(name) for name in names}
        staying = {key for endpoints in wanted.values() for key in endpoints if key in self._members}
        for name, endpoints in wanted.items():
            for endpoint in self._clusters.get(name, ()):
                if endpoint.key not in endpoints:
                    removed.append(endpoint)
                    self._remove(endpoint)
        coming = staying - self._members.keys()  # replicas that go from one of these clusters to another
        for name, endpoints in wanted.items():
            self._admit(name, endpoints, coming, added, changed)

    def _wanted(self, name: str) -> dict[EndpointKey, Endpoint]:
        """What sources list of a cluster."""
        endpoints: dict[EndpointKey, Endpoint] = {}
        places: set[tuple[Address, int]] = set()
        for source, clusters in self._listed.items():
            for listed in clusters.get(name, ()):
                key, place = _identity(listed.key), (listed.address, listed.rank)
                if key not in endpoints and place not in places:
                    places.add(place)
                    endpoints[key] = _endpoint(key, name, source, listed)
        return endpoints

    def _admit(
        self,
        name: str,
        wanted: Mapping[EndpointKey, Endpoint],
        coming: set[EndpointKey],
        added: list[Endpoint],
        changed: list[Change],
    ) -> None:
        """Let a cluster have its endpoints, as far as there is space beside those of `coming`."""
        before = {endpoint.key: endpoint for endpoint in self._clusters.get(name, ())}
        here: list[Endpoint] = []
        for key, endpoint in wanted.items():
            former = before.get(key)
            if former == endpoint:
                here.append(former)
                continue
            if former is not None:
                changed.append(Change(former, endpoint))
                self._remove(former)
            elif self._has_space_for(key, coming):
                coming.discard(key)
                added.append(endpoint)
            else:
                continue
            here.append(endpoint)
            self._add(endpoint)
        left_out = wanted.keys() - {endpoint.key for endpoint in here}
        if left_out:
            self._left_out[name] = frozenset(left_out)
        else:
            self._left_out.pop(name, None)
        if any(name in clusters for clusters in self._listed.values()):
            self._clusters[name] = tuple(here)
        else:
            self._clusters.pop(name, None)

    def _has_space_for(self, key: EndpointKey, coming: set[EndpointKey]) -> bool:
        """`coming` replicas were here before and have none yet."""
        return key in self._members or key in coming or len(self._members) + len(coming) < self._max_endpoints

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
