"""vLLM's own balancer between data-parallel engines: 4·waiting + running, counts published at intervals.

Source: vLLM `vllm/v1/engine/core_client.py`, `DPLBAsyncMPClient.get_core_engine_for_request`, and
`vllm/v1/engine/coordinator.py` (counts every 100 ms); unchanged from 0.10 to 0.32.

Between two publications a client counts what it sent itself, as `gateways` waiting requests each, because the
others are likely to be sending as much. Ties go to the first engine after a start that differs per client;
which client this is a view does not say, so the start is drawn once.

It is as good as its counts are fresh: run it with metrics of 100 ms to meet it as shipped.
"""

from __future__ import annotations

from typing import Final

from extproc.choosing.stateful import FleetView, Sent, StatefulPolicy

_WAITING_WEIGHT: Final = 4
"""A waiting request counts as much as four running ones (source)."""


class VllmDp(StatefulPolicy):
    """4·waiting + running over counts as published, plus what was sent since."""

    __slots__ = ("_gateways", "_scraped_s", "_since", "_start")

    def __init__(self) -> None:
        self._start: int | None = None
        self._gateways = 1
        self._scraped_s: list[float] = []
        self._since: list[int] = []

    def choose(self, view: FleetView) -> int:
        """The first least loaded row in rotated order; one draw at the very first."""
        rows = len(view.keys)
        if self._start is None:
            self._start = int(view.rng.random() * rows)
            self._scraped_s = list(view.scraped_s)
            self._since = [0] * rows
        self._gateways = view.gateways
        for row, scraped_s in enumerate(view.scraped_s):
            if scraped_s != self._scraped_s[row]:
                self._scraped_s[row] = scraped_s
                self._since[row] = 0
        order = [(self._start + step) % rows for step in range(rows)]
        return min(
            order,
            key=lambda row: _WAITING_WEIGHT * (view.waiting[row] + self._since[row]) + view.running[row],
        )

    def on_sent(self, sent: Sent) -> None:
        """Count it until the engine's own counts come."""
        self._since[sent.row] += self._gateways
