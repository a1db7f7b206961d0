"""Re-applies what changed of the fleet wherever something is kept per endpoint, and nothing else.

Rules:
    1. One change of the fleet is re-applied at once, without an await: no request sees half of it.
    2. An owner gets what each endpoint concerned is now, and leaves the others as they are; a set of label
       values or of slots gets the whole, but only if an endpoint or a cluster came or went.
    3. Envoy gets a configuration once the fleet goes with it: no cluster is changed only to go.
    4. An endpoint at another address is another engine: what was learned of the one before is forgotten. Its
       requests stay charged until they end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from extproc.config.schema import Config
from extproc.discovery.fleet import Difference, Fleet
from extproc.health.prober import Prober
from extproc.health.states import Transition
from extproc.observing.metrics.collector import Metrics
from extproc.routing.state import RoutingState
from extproc.routing.table import HARDWARE_LABEL
from extproc.server.engines.kv_event_follower import KvEventFollower
from extproc.server.envoys.publishing import Publisher
from metadata_center.load.counters import MAX_ENDPOINTS

_log = logging.getLogger("tokenway.fleet")


class FleetChanges:
    """Follows the fleet of one worker.

    Args:
        fleet: All endpoints.
        state: What is known of them.
        prober: Probes endpoints, and informs the health tracker of them.
        kv_event_follower: Follows their KV events.
        publisher: Sends Envoy the resources.
        metrics: Labelled by endpoints and clusters.
        clock: Monotonic seconds.

    Attributes:
        named: Each cluster that the configuration names, sorted: does a source list it?
    """

    def __init__(
        self,
        fleet: Fleet,
        state: RoutingState,
        prober: Prober,
        kv_event_follower: KvEventFollower,
        publisher: Publisher,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._state = state
        self._prober = prober
        self._kv_event_follower = kv_event_follower
        self._publisher = publisher
        self._metrics = metrics
        self._clock = clock
        self._config = Config()
        self._is_published = False
        self._cluster_names: Sequence[str] = ()
        self.named: Mapping[str, bool] = {}

    def configure(self, config: Config) -> None:
        """Another configuration is in force: see `applying.Apply`."""
        self._config, self._is_published = config, False
        self._cluster_names = sorted(config.clusters_named())
        self._state.scheduling.ages.configured(self._clock())
        self._label()

    def apply(self, difference: Difference) -> None:
        """Re-apply this."""
        if difference.left_out is not None:
            log = _log.warning if difference.left_out else _log.info
            log(
                "endpoints beyond the bound are left out",
                extra={"left_out": difference.left_out, "accepted": MAX_ENDPOINTS},
            )
        fleet, scheduling = self._fleet, self._state.scheduling
        changed = {key: fleet.of(key) for key in difference.keys}
        left = [key for key, endpoints in changed.items() if not endpoints]
        came_or_went = bool(difference.new_clusters or difference.gone_clusters)
        gone = (*left, *difference.moved)
        scheduling.caches.forget(gone)
        scheduling.engines.forget(gone)
        for key, endpoints in changed.items():
            for first in endpoints[:1]:  # of several clusters, the one it was listed in first
                alike = f"{first.cluster}/{first.labels.get(HARDWARE_LABEL, '')}"
                scheduling.engines.configure(key, alike, first.max_num_seqs)
        if difference.added or difference.removed:
            scheduling.load.retain(fleet.keys)
            scheduling.engines.retain(fleet.keys)
            scheduling.caches.running.retain(fleet.keys)
            self._state.ending.endpoints.retain(fleet.keys)
        scheduling.ages.configured(self._clock())
        self._prober.update(dict.fromkeys(difference.moved, ()))
        self._prober.update(changed)
        self._kv_event_follower.update(changed)
        if difference.added or difference.removed or came_or_went:
            self._label()
        self._publisher.departed(difference.departed)
        if self._is_published:
            self._publisher.update(difference.clusters, came_or_went=came_or_went)

    def health_changed(self, transition: Transition) -> None:
        """An endpoint's health is another: Envoy gets it."""
        self._publisher.update(endpoint.cluster for endpoint in self._fleet.of(transition.key))

    def publish(self) -> None:
        """Send Envoy a configuration that is new; for when it and its files are applied."""
        if not self._is_published:
            self._is_published = True
            self._publisher.configure(self._config)

    def find_missing(self) -> None:
        """Say which clusters are named and not there; for when a configuration and its files are applied."""
        clusters, before = self._fleet.clusters, self.named
        self.named = {name: name in clusters for name in self._cluster_names}
        for name, is_listed in self.named.items():
            if not is_listed and before.get(name, True):
                _log.warning("no source lists a cluster that is named", extra={"cluster": name})
            elif is_listed and not before.get(name, True):
                _log.info("a source lists a cluster now", extra={"cluster": name})

    def _label(self) -> None:
        """Name the label values in use."""
        fleet = self._fleet
        self._metrics.configure(models=self._config.models, clusters=fleet.clusters, endpoints=fleet.keys)
