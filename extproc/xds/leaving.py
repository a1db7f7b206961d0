"""Clusters and endpoints that are gone stay in Envoy a while: what was decided for them is still on its way.

Rules:
    1. Pure: publications come in, those that are due go out.
    2. A cluster and its assignment leave `linger_s` after they were to go, as they were last published. One
       that comes back meanwhile has not been away.
    3. Bound: `MAX_LEAVING` clusters; what goes beyond that leaves at once.
    4. An alias of a model leaves at once: Envoy alone would serve by it what nobody may be served.
    5. An endpoint that leaves a cluster stays in the cluster's assignment, draining, for `FORMER_S`: Envoy
       sends there what names it and nothing else. Bound: `MOST_FORMER` of a cluster; the oldest leave first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from extproc.config.sections.fields import MODEL_ALIAS_PREFIX
from extproc.xds.publications import Resources
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.addresses import Address

MAX_LEAVING: Final = 10_000
"""Twice the clusters of the largest control plane that was tried (`make bench-large-pushes`)."""

FORMER_S: Final = 5.0
"""Other workers decide for an endpoint until they have read the same files (0.25 s, 1.2 s more for names) and
Envoys have acknowledged what takes its place (3 s). A later attempt goes to another one when it has left."""

MOST_FORMER: Final = 64
"""Envoy takes any host, draining or not, where less than 1 % are healthy: one endpoint that stays is more."""


class Leaving:
    """The clusters that are to go.

    Args:
        linger_s: How long each stays.
    """

    def __init__(self, linger_s: float) -> None:
        self._linger_s = linger_s
        self._until_s: dict[str, float] = {}

    def configure(self, linger_s: float) -> None:
        """Those that are to go from now on stay so long."""
        self._linger_s = linger_s

    def held_back(self, resources: Resources, now_s: float) -> Resources:
        """These without the clusters that stay for now."""
        clusters = resources.get(CLUSTER_TYPE, {})
        for name, body in clusters.items():
            if body is not None:
                self._until_s.pop(name, None)
            elif not name.startswith(MODEL_ALIAS_PREFIX) and len(self._until_s) < MAX_LEAVING:
                self._until_s.setdefault(name, now_s + self._linger_s)
        return {
            type_url: {n: body for n, body in bodies.items() if body is not None or n not in self._until_s}
            for type_url, bodies in resources.items()
        }

    def hurried(self, names: Iterable[str]) -> Resources:
        """An end to those of these that stay: nothing was ever decided for them."""
        return _ends([name for name in names if self._until_s.pop(name, None) is not None])

    def due(self, now_s: float) -> Resources:
        """An end to those whose time is over."""
        over = [name for name, until_s in self._until_s.items() if until_s <= now_s]
        for name in over:
            del self._until_s[name]
        return _ends(over)

    def next_s(self) -> float | None:
        """When one is due next; None if none stays."""
        return min(self._until_s.values(), default=None)


class FormerEndpoints:
    """Where endpoints were that left."""

    def __init__(self) -> None:
        self._until_s: dict[str, dict[Address, float]] = {}

    def add(self, cluster: str, address: Address, now_s: float) -> None:
        """One left."""
        here = self._until_s.setdefault(cluster, {})
        here.pop(address, None)
        here[address] = now_s + FORMER_S
        if len(here) > MOST_FORMER:
            del here[next(iter(here))]

    def of(self, cluster: str) -> Collection[Address]:
        """Those of a cluster that stay."""
        return self._until_s.get(cluster, {}).keys()

    def due(self, now_s: float) -> list[str]:
        """Clusters of those whose time is over; they do not stay any more."""
        changed = []
        for name, here in list(self._until_s.items()):
            over = [address for address, until_s in here.items() if until_s <= now_s]
            for address in over:
                del here[address]
            if over:
                changed.append(name)
            if not here:
                del self._until_s[name]
        return changed

    def next_s(self) -> float | None:
        """When one is due next; None if none stays."""
        return min((min(here.values()) for here in self._until_s.values()), default=None)


def _ends(names: list[str]) -> Resources:
    return {CLUSTER_TYPE: dict.fromkeys(names), ASSIGNMENT_TYPE: dict.fromkeys(names)} if names else {}
