"""The endpoint with the fewest requests in flight, by the router's own count.

Source: AIBrix `pkg/plugins/gateway/algorithms/least_request.go` at e3e10f9: gateway-tracked running requests,
ties at random. Relative to the endpoint's weight, which AIBrix does not know: equal to it on an even fleet.
"""

from __future__ import annotations

from operator import truediv

from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, StatefulPolicy


class LeastRequest(StatefulPolicy):
    """argmin requests / weight."""

    __slots__ = ()

    def choose(self, view: FleetView) -> int:
        """The least loaded row; one draw if tied."""
        return least(list(map(truediv, view.requests, view.weights)), view.rng)
