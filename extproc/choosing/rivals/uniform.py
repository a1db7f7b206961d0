"""Any endpoint, each as likely: the floor that every rule has to beat."""

from __future__ import annotations

from extproc.choosing.rivals.ties import draw
from extproc.choosing.stateful import FleetView, StatefulPolicy


class Random(StatefulPolicy):
    """Uniformly random over endpoints, whatever their weight."""

    __slots__ = ()

    def choose(self, view: FleetView) -> int:
        """One draw."""
        return draw(view.rng, range(len(view.keys)))
