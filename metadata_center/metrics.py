"""Prometheus series of the metadata-center service; read from its state when scraped.

Label values are closed sets: methods and paths of the API, HTTP statuses, and the kinds named here. Clusters
and addresses are what callers make up, so none of them is a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metadata_center.service_state import ServiceState


class Metrics(Collector):
    """Counts answers, and shows what the state holds.

    Args:
        registry: Where the series appear.
        state: Read at every scrape.
    """

    def __init__(self, registry: CollectorRegistry, state: ServiceState) -> None:
        self._state = state
        self._answers: Counter[tuple[str, str, str]] = Counter()
        registry.register(self)

    def count(self, method: str, path: str, status: int) -> None:
        """One more answer; `method` and `path` as `api.route` gives them."""
        self._answers[method, path, str(status)] += 1

    def collect(self) -> Iterator[Metric]:
        """The series as they are now."""
        loads, caches = self._state.loads, self._state.caches
        answers = CounterMetricFamily(
            "tokenway_metadata_http_requests",
            "HTTP requests answered.",
            labels=["method", "path", "status"],
        )
        for labels, number in self._answers.items():
            answers.add_metric(labels, number)
        yield answers
        yield GaugeMetricFamily(
            "tokenway_metadata_requests_in_flight", "Inference requests counted now.", loads.in_flight
        )
        endpoints = GaugeMetricFamily(
            "tokenway_metadata_endpoints", "Engines known, by what is known of them.", labels=["kind"]
        )
        endpoints.add_metric(["load"], loads.endpoints)
        endpoints.add_metric(["cache"], caches.endpoints)
        yield endpoints
        yield GaugeMetricFamily(
            "tokenway_metadata_cached_blocks", "Prompt prefixes held, summed over engines.", caches.blocks
        )
        expired = CounterMetricFamily(
            "tokenway_metadata_expired",
            "What time has ended: requests never deleted, prefixes.",
            labels=["kind"],
        )
        expired.add_metric(["request"], loads.expired_requests)
        expired.add_metric(["block"], caches.expired_blocks)
        yield expired
