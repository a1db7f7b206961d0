"""Running totals per endpoint, for `tokenway top` and the metrics."""

from __future__ import annotations

from collections.abc import Iterable

from extproc.values.endings import Ending
from metadata_center.types import EndpointKey

_TTFT_WEIGHT = 0.1
"""Weight of the newest TTFT in the moving average, as AIGW's (old weight 0.9)."""


class EndpointStats:
    """What one endpoint did since it was configured.

    Attributes:
        served: Requests it answered to their end.
        failures: Attempts that failed there.
        ttft_ewma_s: Moving average of its TTFT in seconds, or None.
    """

    __slots__ = ("failures", "served", "ttft_ewma_s")

    def __init__(self) -> None:
        self.served = 0
        self.failures = 0
        self.ttft_ewma_s: float | None = None

    def answered(self, ttft_s: float | None) -> None:
        """One more answer."""
        self.served += 1
        if ttft_s is not None:
            before = self.ttft_ewma_s
            self.ttft_ewma_s = ttft_s if before is None else before + _TTFT_WEIGHT * (ttft_s - before)


class EndpointStatsTable:
    """Totals of every configured endpoint; others are ignored. Listens to endings."""

    def __init__(self) -> None:
        self._by_key: dict[EndpointKey, EndpointStats] = {}
        self._other = EndpointStats()

    def __getitem__(self, key: EndpointKey) -> EndpointStats:
        return self._by_key.get(key, self._other)

    def ended(self, ending: Ending) -> None:
        """One more answer of its endpoint, if that is what it was."""
        if ending.request is not None and ending.is_answered:
            self[ending.request.endpoint].answered(ending.outcome.ttft_s)

    def failed(self, key: EndpointKey) -> None:
        """One more failure there."""
        self[key].failures += 1

    def retain(self, keys: Iterable[EndpointKey]) -> None:
        """Keep these endpoints, forget the others."""
        self._by_key = {key: self._by_key.get(key) or EndpointStats() for key in keys}
