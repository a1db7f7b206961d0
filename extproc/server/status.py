"""What a worker shows of itself: gauges for a scrape, the body of `/endpoints`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry

from extproc.discovery.fleet import Fleet
from extproc.discovery.live import SourceStatus
from extproc.observing.metrics.discovery import discovery_values
from extproc.observing.metrics.endpoints import EndpointGauges
from extproc.observing.metrics.exposition import in_pieces
from extproc.observing.metrics.family import Values
from extproc.observing.metrics.live import LiveGauges
from extproc.observing.records import RecordRing
from extproc.routing.state import RoutingState
from extproc.values.decisions import HoldReason
from metadata_center.load.kinds import KINDS
from metadata_center.sharing.store_watch import StoreStatus
from metadata_center.types import EndpointKey


class Status:
    """Reads the state; what `extproc.admin.page.Source` asks for.

    Args:
        state: The worker's.
        registry: Where its metrics are registered.
        fleet: All endpoints.
        streams_active: Open ext_proc streams.
        bus_dropped: Messages to other workers dropped so far.
        clusters_kept: That Envoys have as they were, for they refused what came since.
        shared: Series about the process, other gateways and KV events.
        is_announcing: Does an endpoint publish what it has cached?
        held: Requests that wait here, by reason.
        workers: Processes of this gateway.
        files: Configuration files that are needed: is each good?
        host_names: Host names in use: has each an address?
        clusters: Clusters that the configuration names: does a source list each?
        sources: Sources of endpoints with connections: how each stands.
        store: How the store stands where gateways meet; None where this one meets no other.
        is_ready: Are new requests taken?
    """

    def __init__(
        self,
        state: RoutingState,
        registry: CollectorRegistry,
        fleet: Fleet,
        streams_active: Callable[[], int],
        bus_dropped: Callable[[], int],
        clusters_kept: Callable[[], int],
        shared: Callable[[], Values],
        is_announcing: Callable[[EndpointKey], bool],
        held: Callable[[], Mapping[HoldReason, int]],
        workers: int,
        files: Callable[[], Mapping[str, bool]],
        host_names: Callable[[], Mapping[str, bool]],
        clusters: Callable[[], Mapping[str, bool]],
        sources: Callable[[], Mapping[str, SourceStatus]],
        store: Callable[[], StoreStatus | None],
        is_ready: Callable[[], bool],
    ) -> None:
        self._scheduling = state.scheduling
        self._endpoint_stats = state.ending.endpoints
        self._registry = registry
        self._fleet = fleet
        self._streams_active = streams_active
        self._bus_dropped = bus_dropped
        self._clusters_kept = clusters_kept
        self._shared = shared
        self._is_announcing = is_announcing
        self._held = held
        self._workers = workers
        self._files = files
        self._host_names = host_names
        self._clusters = clusters
        self._sources = sources
        self._store = store
        self._is_ready = is_ready
        self._started_s = time.monotonic()

    @property
    def records(self) -> RecordRing:
        """Recent decisions."""
        return self._scheduling.records

    def is_ready(self) -> bool:
        """True while new requests are taken."""
        return self._is_ready()

    def metrics_pieces(self) -> Iterator[bytes]:
        """The Prometheus exposition, some samples at a time."""
        return in_pieces(self._registry)

    def gauges(self) -> LiveGauges:
        """What a scrape reads."""
        predictor = self._scheduling.predictor
        return LiveGauges(
            endpoints=self._endpoint_gauges(),
            streams_active=self._streams_active(),
            explain_records=len(self._scheduling.records),
            held=self._held(),
            tokens_per_byte=dict(predictor.token_ratios()),
            calibrations=list(predictor.calibrations()),
            bus_dropped=self._bus_dropped(),
            clusters_kept=self._clusters_kept(),
            shared={**self._shared(), **discovery_values(self._sources())},
            files=self._files(),
            host_names=self._host_names(),
            clusters=self._clusters(),
            endpoints_left_out=self._fleet.left_out,
            unlocked_decisions=self._scheduling.load.unlocked,
            ejections_withheld=self._scheduling.health.withheld,
        )

    def endpoints_json(self) -> dict[str, Any]:
        """The body of `/endpoints`, as `tokenway top` reads it."""
        scheduling, stats = self._scheduling, self._endpoint_stats
        limit = scheduling.engines.sequence_limit
        return {
            "endpoints": [
                {
                    "key": row.key,
                    "cluster": row.cluster,
                    "source": row.source,
                    "weight": row.weight,
                    "labels": dict(row.labels),
                    "state": scheduling.health.state(row.key),
                    "reason": scheduling.health.reason(row.key),
                    "doubted_for": scheduling.health.doubts_of(row.key),
                    **{kind.name: row.load[index] for index, kind in enumerate(KINDS) if kind.metric},
                    "cached_blocks": row.cached_blocks,
                    "capacity_blocks": row.capacity_blocks,
                    "announcing": row.announcing,
                    "served_total": stats[row.key].served,
                    "failures_total": stats[row.key].failures,
                    "ttft_ewma_s": row.ttft_ewma_s,
                    **dict(zip(("max_num_seqs", "max_num_seqs_from"), limit(row.key), strict=True)),
                }
                for row in self._endpoint_gauges()
            ],
            "clusters_not_listed": [name for name, is_listed in self._clusters().items() if not is_listed],
            "sources": {
                name: {"connected": source.is_connected, "age_s": source.age_s}
                for name, source in self._sources().items()
            },
            "store": None if (store := self._store()) is None else asdict(store),
            "in_flight": scheduling.load.in_flight,
            "held": sum(self._held().values()),
            "workers": self._workers,
            "uptime_s": time.monotonic() - self._started_s,
        }

    def _endpoint_gauges(self) -> list[EndpointGauges]:
        scheduling, stats, endpoints = self._scheduling, self._endpoint_stats, self._fleet.endpoints
        load = scheduling.load.view(scheduling.load.slots([endpoint.key for endpoint in endpoints]))
        return [
            EndpointGauges(
                key=endpoint.key,
                cluster=endpoint.cluster,
                source=endpoint.source,
                weight=endpoint.weight,
                labels=endpoint.labels,
                available=scheduling.health.is_available(endpoint.key),
                load=load.amounts(i),
                cached_blocks=scheduling.caches.history.size(endpoint.key),
                capacity_blocks=scheduling.caches.history.capacity(endpoint.key),
                ttft_ewma_s=stats[endpoint.key].ttft_ewma_s,
                announcing=self._is_announcing(endpoint.key),
                doubted=len(scheduling.health.doubts_of(endpoint.key)),
            )
            for i, endpoint in enumerate(endpoints)
        ]
