"""Listings that bring endpoints to a cluster and take others away: they are brought first.

Rules:
    1. Pure. What a source lists comes in, what of it is taken now goes out. The rest is due once no endpoint
       of the cluster is hidden (`routable`), which is at once where no Envoy has to be told.
    2. What requests see of a cluster and could use stays as it was until then: an endpoint that is no more
       listed, that drains, whose labels differ. One that moves does not: Envoy may have another there.
    3. The latest word on a cluster counts: what is due of an earlier one is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from extproc.discovery.listed import Clusters, Listed
from extproc.discovery.routable import RoutableClusters

Word = dict[str, Sequence[Listed] | None]
"""What a source lists of clusters; None for one that it lists no more."""


class Swaps:
    """What is taken in two steps.

    Args:
        routable: What requests see.
    """

    def __init__(self, routable: RoutableClusters) -> None:
        self._routable = routable
        self._after: dict[str, dict[str, Sequence[Listed]]] = {}

    def first(self, source: str, before: Clusters, word: Mapping[str, Sequence[Listed] | None]) -> Word:
        """What of the word of a source is taken now.

        Args:
            source: Its name.
            before: What is in force of it.
            word: What it says.
        """
        due, now = self._after.setdefault(source, {}), Word()
        for name, listed in word.items():
            due.pop(name, None)
            now[name] = listed
            if listed is not None and (kept := self._kept(name, before.get(name, ()), listed)):
                due[name] = listed
                stay = [one for one in listed if one.key not in kept]
                now[name] = (*stay, *kept.values())
        return now

    def due(self) -> dict[str, Word]:
        """What of earlier words is to be taken now, by source."""
        found = {}
        for source, after in self._after.items():
            names = after.keys() - self._routable.hidden.keys()
            if names:
                found[source] = Word({name: after.pop(name) for name in sorted(names)})
        return found

    def _kept(self, name: str, before: Sequence[Listed], after: Sequence[Listed]) -> dict[str, Listed]:
        """Those of a cluster that stay as they were, by their keys, as long as others are hidden."""
        if not self._routable.hides(name):
            return {}
        seen = {endpoint.address for endpoint in self._routable.clusters.get(name, ())}
        if all(one.address in seen for one in after):
            return {}
        later = {one.key: one for one in after}
        return {
            one.key: one
            for one in before
            if one.usable
            and one.address in seen
            and (other := later.get(one.key, one)).address == one.address
            and (one.key not in later or other != one)
        }
