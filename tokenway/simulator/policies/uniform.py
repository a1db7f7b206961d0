"""Any endpoint, each as likely: the floor that every rule has to beat."""

from __future__ import annotations

from tokenway.simulator.policies.ties import draw
from tokenway.simulator.policies.view import Policy, View


class Random(Policy):
    """Uniformly random over endpoints, whatever their weight."""

    __slots__ = ()

    def choose(self, view: View) -> int:
        """One draw."""
        return draw(view.rng, range(len(view.keys)))
