"""Counts in memory: numbers and histograms by family and label values.

One event loop writes them, so they need no lock, and a bisect into a list costs a third of
prometheus_client's `Histogram.observe` (which walks the buckets one by one under a lock).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping

from extproc.observing.metrics.family import Family, MetricType

OTHER = "other"
"""The label value of whatever the configuration does not name."""


class Histogram:
    """Counts per bucket and their sum, for one set of label values."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' form: (bound, observations up to it) ascending with +Inf last, and the sum."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(repr, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets, self._sum


class Histograms(dict[tuple[str, ...], Histogram]):
    """The histograms of one family by label values, made when first used."""

    __slots__ = ("_bounds",)

    def __init__(self, bounds: tuple[float, ...]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, labels: tuple[str, ...]) -> Histogram:
        made = self[labels] = Histogram(self._bounds)
        return made


class Series:
    """The series of a table of families, each at zero from the start where its labels are known by then.

    Args:
        families: The table.

    Attributes:
        values: Counters and gauges: label values to the number.
        histograms: The same of histograms.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self.values: dict[Family, defaultdict[tuple[str, ...], float]] = {}
        self.histograms: dict[Family, Histograms] = {}
        for family in families:
            if family.kind is MetricType.HISTOGRAM:
                histograms = self.histograms[family] = Histograms(family.buckets)
                if not family.labels:
                    histograms[()]  # an unlabelled series exists, at zero, from the start
            else:
                start = family.start if family.labels else ((),)
                self.values[family] = defaultdict(float, dict.fromkeys(start, 0.0))

    def keep(self, bounded: Mapping[str, frozenset[str]]) -> None:
        """Drop the series with a label value that is neither `OTHER` nor allowed; other labels are free."""
        stores: list[tuple[Family, dict[tuple[str, ...], float] | Histograms]] = [
            *self.values.items(),
            *self.histograms.items(),
        ]
        for family, series in stores:
            known = [bounded.get(label) for label in family.labels]
            for labels in list(series):
                if any(
                    allowed is not None and value != OTHER and value not in allowed
                    for value, allowed in zip(labels, known, strict=True)
                ):
                    del series[labels]
