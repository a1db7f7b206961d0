"""Endpoints of the fleet that requests may be sent to: not those that Envoy is only now told of.

Rules:
    1. Pure. What of the fleet differs comes in; requests see a view, which is changed then and not for them.
    2. An endpoint that comes to a cluster that the configuration names is hidden until it is shown. A cluster
       all of whose endpoints are hidden is what it was before: none such, or one without usable ones.
    3. Nothing is hidden before `hide`, nor what was introduced before it is there.
    4. Nor is one whose hiding would leave a cluster that had usable endpoints without: Envoy serves what it
       gets for it by those that it has. `swaps` sees to it that this is rare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from extproc.discovery.fleet import Difference
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address

Places = Mapping[str, AbstractSet[Address]]
"""Cluster name to addresses of endpoints of it."""


class RoutableClusters:
    """What requests see of the fleet.

    Args:
        fleet: Cluster name to its endpoints: a view that follows the fleet.

    Attributes:
        clusters: The same without what is hidden; a view.
        hidden: Where endpoints are that requests do not see; a view, no cluster of which is empty.
    """

    def __init__(self, fleet: Mapping[str, Sequence[Endpoint]]) -> None:
        self._fleet = fleet
        self._clusters: dict[str, Sequence[Endpoint]] = {}
        self._hidden: dict[str, frozenset[Address]] = {}
        self._named: AbstractSet[str] = frozenset()
        self._hides = False
        self.clusters: Mapping[str, Sequence[Endpoint]] = MappingProxyType(self._clusters)
        self.hidden: Mapping[str, frozenset[Address]] = MappingProxyType(self._hidden)

    def hide(self) -> None:
        """From now on Envoy has to be told first."""
        self._hides = True

    def hides(self, cluster: str) -> bool:
        """Whether endpoints that come to this cluster are hidden."""
        return self._hides and cluster in self._named

    def configure(self, named: AbstractSet[str]) -> None:
        """Rules in force lead to these clusters, and to no others."""
        self._named = named

    def follow(self, difference: Difference, *, introduced: bool) -> None:
        """The fleet differs.

        Args:
            difference: In what.
            introduced: Clusters that are new were introduced to Envoy before.
        """
        exempt = difference.new_clusters if introduced else frozenset[str]()
        for name in difference.clusters:
            endpoints = self._fleet.get(name)
            if endpoints is None:
                self._hidden.pop(name, None)
                self._clusters.pop(name, None)
            else:
                is_hiding = self.hides(name) and name not in exempt
                self._see(name, self._new(name, endpoints) if is_hiding else frozenset())

    def show(self, places: Places) -> None:
        """Envoy has these, or had its time: they are hidden no more."""
        for name, addresses in places.items():
            hidden = self._hidden.get(name)
            if hidden is not None and not hidden.isdisjoint(addresses):
                self._see(name, hidden - addresses)

    def _new(self, name: str, endpoints: Sequence[Endpoint]) -> frozenset[Address]:
        """Where those of these are that are to be hidden."""
        before = self._clusters.get(name, ())
        seen = {endpoint.address for endpoint in before}
        is_left = any(endpoint.usable for endpoint in endpoints if endpoint.address in seen)
        if not is_left and any(endpoint.usable for endpoint in before):
            return frozenset()
        return frozenset(endpoint.address for endpoint in endpoints) - seen

    def _see(self, name: str, hidden: frozenset[Address]) -> None:
        """Let requests see a cluster without what is at these addresses."""
        if not hidden:
            self._hidden.pop(name, None)
            self._clusters[name] = self._fleet[name]
            return
        self._hidden[name] = hidden
        here = tuple(endpoint for endpoint in self._fleet[name] if endpoint.address not in hidden)
        if here or name in self._clusters:
            self._clusters[name] = here


def within(places: Places, others: Places) -> dict[str, frozenset[Address]]:
    """What is in both, without clusters of which nothing is."""
    both = {name: frozenset(places[name] & others[name]) for name in places.keys() & others.keys()}
    return {name: addresses for name, addresses in both.items() if addresses}


def without(places: Places, others: Iterable[Places]) -> dict[str, frozenset[Address]]:
    """These but for what is in one of the others, without clusters of which nothing is left."""
    left = {name: frozenset(addresses) for name, addresses in places.items()}
    for other in others:
        for name in left.keys() & other.keys():
            left[name] -= other[name]
    return {name: addresses for name, addresses in left.items() if addresses}
