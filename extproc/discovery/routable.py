"""Clusters of the fleet that requests may be sent to: not those that Envoy is only now told of.

Rules:
    1. Pure. What of the fleet differs comes in; requests see a view, which is changed then and not for them.
    2. A cluster that the configuration names and that had no endpoint is hidden with its first one: requests
       see what they saw before, no such cluster or one without endpoints, until it is shown or has none.
    3. Nothing is hidden before `hide`, nor what was introduced before it is there.
    4. Endpoints that join others are not hidden: Envoy serves by those that it has what it gets for one that
       it does not have yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from extproc.discovery.fleet import Difference
from extproc.values.endpoints import Endpoint


class RoutableClusters:
    """What requests see of the fleet.

    Args:
        fleet: Cluster name to its endpoints: a view that follows the fleet.

    Attributes:
        clusters: The same without what is hidden; a view.
    """

    def __init__(self, fleet: Mapping[str, Sequence[Endpoint]]) -> None:
        self._fleet = fleet
        self._clusters: dict[str, Sequence[Endpoint]] = {}
        self._hidden: set[str] = set()
        self._named: AbstractSet[str] = frozenset()
        self._hides = False
        self.clusters: Mapping[str, Sequence[Endpoint]] = MappingProxyType(self._clusters)

    @property
    def hidden(self) -> AbstractSet[str]:
        """Clusters that requests do not see as they are; a view."""
        return self._hidden

    def hide(self) -> None:
        """From now on Envoy has to be told first."""
        self._hides = True

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
                self._hidden.discard(name)
                self._clusters.pop(name, None)
            elif name in self._hidden and endpoints:
                continue
            elif self._hides and name in self._named - exempt and endpoints and not self._clusters.get(name):
                self._hidden.add(name)
            else:
                self._hidden.discard(name)
                self._clusters[name] = endpoints

    def show(self, names: Iterable[str]) -> None:
        """Envoy has these, or had its time: they are hidden no more."""
        for name in self._hidden.intersection(names):
            self._hidden.discard(name)
            self._clusters[name] = self._fleet[name]
