"""Clusters that are there no more stay in Envoy a while: what was decided for them is still on its way there.

Rules:
    1. Pure: publications come in, those that are due go out.
    2. A cluster and its assignment leave `linger_s` after they were to go, as they were last published. One
       that comes back meanwhile has not been away.
    3. Bound: `MAX_LEAVING` clusters; what goes beyond that leaves at once.
    4. An alias of a model leaves at once: Envoy alone would serve by it what nobody may be served.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from extproc.config.sections.fields import MODEL_ALIAS_PREFIX
from extproc.xds.publications import Resources
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE

MAX_LEAVING: Final = 10_000
"""Twice the clusters of the largest control plane that was tried (`make bench-large-pushes`)."""


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


def _ends(names: list[str]) -> Resources:
    return {CLUSTER_TYPE: dict.fromkeys(names), ASSIGNMENT_TYPE: dict.fromkeys(names)} if names else {}
