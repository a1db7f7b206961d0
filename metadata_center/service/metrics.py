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

from metadata_center.service.followers import Followers
from metadata_center.service.state import ServiceState


class Metrics(Collector):
    """Counts answers, and shows what the state holds.

    Args:
        registry: Where the series appear.
        state: Read at every scrape.
        followers: Likewise.
    """

    def __init__(self, registry: CollectorRegistry, state: ServiceState, followers: Followers) -> None:
        self._state = state
        self._followers = followers
        self._answers: Counter[tuple[str, str, str]] = Counter()
        registry.register(self)

    def count(self, method: str, path: str, status: int) -> None:
        """One more answer; `method` and `path` as `api.route` gives them."""
        self._answers[method, path, str(status)] += 1

    def collect(self) -> Iterator[Metric]:
        """The series as they are now."""
        loads, caches, shares = self._state.loads, self._state.caches, self._state.rendezvous.shares
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
        yield GaugeMetricFamily(
            "tokenway_metadata_members", "Workers of gateways whose share is live.", shares.live_members
        )
        yield CounterMetricFamily(
            "tokenway_metadata_shares_refused", "Members and rows that found no room.", shares.refused
        )
        yield GaugeMetricFamily(
            "tokenway_metadata_followers", "Open streams of shares.", len(self._followers)
        )
        yield CounterMetricFamily(
            "tokenway_metadata_followers_cut_off",
            "Streams of shares ended because their reader was too slow.",
            self._followers.cut_off,
        )
