"""The text of all metrics in pieces, each quickly made: other work goes on between two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SAMPLES_AT_ONCE: Final = 200
"""Their lines are made in a millisecond or two."""


class _One(Collector):
    """A metric by itself."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        """It."""
        return (self._metric,)


def in_pieces(registry: CollectorRegistry) -> Iterator[bytes]:
    """What `generate_latest` gives, `SAMPLES_AT_ONCE` samples of one family at a time."""
    for metric in registry.collect():
        samples = metric.samples
        for start in range(0, max(1, len(samples)), SAMPLES_AT_ONCE):
            metric.samples = samples[start : start + SAMPLES_AT_ONCE]
            text = generate_latest(_One(metric))
            yield text.split(b"\n", 2)[2] if start else text  # a family is headed once, by HELP and TYPE
