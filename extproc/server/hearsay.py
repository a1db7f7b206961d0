"""What other workers and gateways saw, taken into this worker's own state."""

from __future__ import annotations

from collections.abc import Callable

from extproc.health.tracker import HealthTracker
from extproc.routing.homes import Homes
from metadata_center.store import PrefixStore
from metadata_center.types import EndpointKey


class Hearsay:
    """Takes it in.

    Args:
        homes: Where stored responses live.
        history: Blocks by routing history.
        health: Knows which endpoints there are; of others nothing is recorded.
        clock: Monotonic seconds.
    """

    def __init__(
        self, homes: Homes, history: PrefixStore, health: HealthTracker, clock: Callable[[], float]
    ) -> None:
        self._homes = homes
        self._history = history
        self._health = health
        self._clock = clock

    def cached(self, endpoint: EndpointKey, blocks: list[int]) -> None:
        """Another worker saw blocks cached, or says where responses live."""
        if self._homes.hear(endpoint, blocks, self._clock()):
            return
        if self._health.state(endpoint) is not None:
            self._history.record(endpoint, blocks)

    def responses(self, endpoint: EndpointKey, chain: list[int]) -> None:
        """Another gateway says where responses live."""
        self._homes.hear(endpoint, chain, self._clock())
