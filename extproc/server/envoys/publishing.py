"""What Envoy gets of clusters and endpoints, whenever configuration, fleet or health changes.

Rules:
    1. Make before break: clusters of a configuration to come are introduced, and those that are there no more
       stay for `LINGER_S`, or as long as a first byte may take if that is longer. Endpoints stay for seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from extproc.config.schema import Config
from extproc.observing.metrics.collector import Metrics
from extproc.values.endpoints import Endpoint
from extproc.xds.ads import AdsServer
from extproc.xds.cluster_kinds import ClusterKind, ClusterKinds
from extproc.xds.leaving import FormerEndpoints, Leaving
from extproc.xds.publications import Publications, Resources, kinds_of
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE

ADS_TYPES = {CLUSTER_TYPE: "CDS", ASSIGNMENT_TYPE: "EDS"}
"""Metric labels of the published resource types."""

LINGER_S = 60.0
"""As long as `signals.first_byte_timeout_s` by default: what was decided for a cluster may try another
endpoint of it so late. Other workers, which decide for it until they read the same files, take seconds."""


Encode = Callable[[Iterable[ClusterKind]], Mapping[ClusterKind, bytes]]
"""The bytes of kinds of cluster; blocks for up to a second."""


class KindsPreparation:
    """Learns the bytes of kinds of cluster before a configuration that has them comes into force.

    A cluster that a control plane lists later would stall the requests that run then.

    Args:
        kinds: What is known.
        encode: For those that are not.
    """

    def __init__(self, kinds: ClusterKinds, encode: Encode) -> None:
        self._kinds = kinds
        self._encode = encode

    def is_needed(self, config: Config) -> bool:
        """Whether a configuration has kinds that are not known."""
        return bool(self._kinds.missing(kinds_of(config)))

    def prepare(self, config: Config) -> None:
        """Learn all kinds of a configuration; blocks, and may run in a thread of its own."""
        wanted = kinds_of(config)
        self._kinds.learn(self._encode(self._kinds.missing(wanted)), wanted)


class Publisher:
    """Publishes.

    Args:
        ads: Envoy's subscriptions.
        publications: What Envoy is to have.
        former: Endpoints that left, as `publications` has them.
        metrics: Count each publication.
    """

    def __init__(
        self, ads: AdsServer, publications: Publications, former: FormerEndpoints, metrics: Metrics
    ) -> None:
        self._ads = ads
        self._publications = publications
        self._former = former
        self._metrics = metrics
        self._leaving = Leaving(LINGER_S)
        self._timer: asyncio.TimerHandle | None = None

    def introduce(
        self, config: Config, clusters: Mapping[str, Sequence[Endpoint]], tried: Iterable[str] = ()
    ) -> None:
        """Send Envoy clusters of a configuration to come, in place of those sent so before."""
        self._publish(self._publications.introduce(config, clusters, tried))

    def configure(self, config: Config) -> None:
        """Send Envoy all that is different by this configuration."""
        self._publish(self._publications.configure(config))
        # What goes with the next configuration has requests that were decided by this one.
        self._leaving.configure(max(LINGER_S, config.signals.first_byte_timeout_s))

    def departed(self, endpoints: Iterable[Endpoint]) -> None:
        """These are not where they were, in their clusters; it is published with what changed of these."""
        now_s = time.monotonic()
        for endpoint in endpoints:
            self._former.add(endpoint.cluster, endpoint.address, now_s)
        self._wake(now_s)

    def update(self, clusters: Iterable[str], *, came_or_went: bool = False) -> None:
        """Send Envoy what is different of these clusters; `came_or_went` if one of them is new or gone."""
        self._publish(self._publications.update(clusters, came_or_went=came_or_went))

    def hurry(self, clusters: Iterable[str]) -> None:
        """Those of these that are to go go now: Envoy would not take them."""
        self._send(self._leaving.hurried(clusters))

    def stop(self) -> None:
        """Publish nothing more by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _publish(self, resources: Resources) -> None:
        now_s = time.monotonic()
        self._send(self._leaving.held_back(resources, now_s))
        self._wake(now_s)

    def _wake(self, now_s: float) -> None:
        ends_s = [end_s for one in (self._leaving, self._former) if (end_s := one.next_s()) is not None]
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if ends_s:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, min(ends_s) - now_s), self._end)

    def _end(self) -> None:
        """Take away what has been there long enough."""
        self._timer, now_s = None, time.monotonic()
        self._send(self._leaving.due(now_s))
        changed = self._former.due(now_s)
        if changed:
            self._send(self._publications.update(changed, came_or_went=False))
        self._wake(now_s)

    def _send(self, resources: Resources) -> None:
        for type_url in self._ads.publish(resources):
            self._metrics.ads_updated(ADS_TYPES[type_url])
