"""What other workers and gateways saw, taken into this worker's own state."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from extproc.choosing.lines import OtherLines
from extproc.health.tracker import HealthTracker
from extproc.routing.homes import Homes
from metadata_center.store import PrefixStore
from metadata_center.types import EndpointKey, Waiter


class Hearsay:
    """Takes it in.

    Args:
        homes: Where stored responses live.
        history: Blocks by routing history.
        health: Knows which endpoints there are; of others nothing is recorded.
        lines: Who waits elsewhere.
        clock: Monotonic seconds.
        freed: Called when others may have their turn.
    """

    def __init__(
        self,
        homes: Homes,
        history: PrefixStore,
        health: HealthTracker,
        lines: OtherLines,
        clock: Callable[[], float],
        freed: Callable[[], None],
    ) -> None:
        self._homes = homes
        self._history = history
        self._health = health
        self._lines = lines
        self._clock = clock
        self._freed = freed

    def cached(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """Another worker saw blocks cached, or says where responses live."""
        if self._homes.hear(endpoint, blocks, self._clock()):
            return
        if self._health.state(endpoint) is not None:
            self._history.record(endpoint, array("Q", blocks))

    def responses(self, endpoint: EndpointKey, chain: Sequence[int]) -> None:
        """Another gateway says where responses live."""
        self._homes.hear(endpoint, chain, self._clock())

    def line(self, process: str, line: Sequence[Waiter]) -> None:
        """Another worker, or one of another gateway, says who waits there."""
        if self._lines.hear(process, line, self._clock()):
            self._freed()
