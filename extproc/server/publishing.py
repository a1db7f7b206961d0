"""What Envoy is told of clusters and endpoints, whenever configuration or health changes."""

from __future__ import annotations

from collections.abc import Callable

from extproc.health.states import HealthState
from extproc.observing.metrics.collector import Metrics
from extproc.server.applying import InForce
from extproc.xds.ads import AdsServer
from extproc.xds.open_models import open_models, subset_pools
from extproc.xds.resources import (
    ASSIGNMENT_TYPE,
    CLUSTER_TYPE,
    UpstreamTls,
    cluster_resources,
    load_assignments,
)
from metadata_center.types import EndpointKey

ADS_TYPES = {CLUSTER_TYPE: "CDS", ASSIGNMENT_TYPE: "EDS"}
"""Metric labels of the published resource types."""


class Publisher:
    """Publishes.

    Args:
        ads: Envoy's subscriptions.
        health: The state of an endpoint, None if it is not known.
        metrics: Told of each publication.
    """

    def __init__(
        self, ads: AdsServer, health: Callable[[EndpointKey], HealthState | None], metrics: Metrics
    ) -> None:
        self._ads = ads
        self._health = health
        self._metrics = metrics
        self._now: InForce | None = None

    def follow(self, now: InForce) -> None:
        """Have the next publications be of this configuration."""
        self._now = now

    def publish(self) -> None:
        """Tell Envoy what is different; nothing before the first configuration."""
        if self._now is None:
            return
        config, by_cluster = self._now.config, self._now.resolution.clusters
        models = open_models(config)
        clusters = {**subset_pools(models, by_cluster), **by_cluster}
        resources = {
            CLUSTER_TYPE: cluster_resources(
                clusters,
                {name: rule.cluster for name, rule in models.items()},
                tls={name: UpstreamTls(**tls.model_dump()) for name, tls in config.engine_tls.items()},
                max_open_requests=config.away.max_requests_per_endpoint,
            ),
            ASSIGNMENT_TYPE: load_assignments(clusters, self._health),
        }
        for type_url in self._ads.publish(resources):
            self._metrics.ads_updated(ADS_TYPES[type_url])
