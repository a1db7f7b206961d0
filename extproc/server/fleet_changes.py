"""Re-applies what changed of the fleet wherever something is kept per endpoint, and nothing else.

Rules:
    1. One change of the fleet is re-applied at once, without an await: nobody sees half of it.
    2. Told is what each endpoint concerned is now. What is kept of all others is not touched; a set of label
       values or of slots is told of the whole, but only if an endpoint or a cluster came or went.
    3. An endpoint at another address is another engine: what was learned of the one before is forgotten. Its
       requests stay charged until they end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from extproc.config.schema import Config
from extproc.discovery.fleet import Difference, Fleet
from extproc.health.prober import Prober
from extproc.routing.state import State
from extproc.server.announcements import Announcements
from extproc.server.engine_tls import request_tls
from extproc.xds.publications import Publications, Resources
from metadata_center.types import EndpointKey

_log = logging.getLogger("tokenway.fleet")


class FleetChanges:
    """Follows the fleet of one worker.

    Args:
        state: Its books; among them the fleet.
        prober: Probes endpoints, and tells the health tracker of them.
        announcements: Follows their KV events.
        publications: What Envoy is to have.
        publish: Tells Envoy.
    """

    def __init__(
        self,
        state: State,
        prober: Prober,
        announcements: Announcements,
        publications: Publications,
        publish: Callable[[Resources], None],
    ) -> None:
        self._state = state
        self._prober = prober
        self._announcements = announcements
        self._publications = publications
        self._publish = publish
        self._config: Config | None = None
        self._models: frozenset[str] = frozenset()
        self._named: frozenset[str] = frozenset()
        self._tls_of: Mapping[str, Mapping[str, Any]] = {}
        self._tls: dict[EndpointKey, Mapping[str, Any]] = {}
        prober.tls = announcements.tls = self._tls
        self.missing: tuple[str, ...] = ()
        """Clusters that the configuration names and no source has, sorted."""

    def configure(self, config: Config) -> None:
        """Another configuration, or the same read anew: files of TLS may differ all the same."""
        fleet = self._fleet
        self._tls_of = request_tls(config.engine_tls)
        self._set_tls(fleet.keys)
        if config == self._config:
            return
        self._config = config
        self._models, self._named = frozenset(config.models), config.clusters_named()
        self._label()
        self._find_missing()
        self._publish(self._publications.configure(config))

    def apply(self, difference: Difference) -> None:
        """Re-apply this."""
        if not difference:
            return
        fleet, state = self._fleet, self._state
        changed = {key: fleet.of(key) for key in difference.keys}
        left = [key for key, endpoints in changed.items() if not endpoints]
        for key in (*left, *difference.moved):
            state.caches.history.remove(key)
            state.caches.running.forget(key)
            state.engines.forget(key)
        self._set_tls(changed)
        if difference.moved:
            self._prober.update(dict.fromkeys(difference.moved, ()))
        self._prober.update(changed)
        if difference.added or left:
            state.load.retain(fleet.keys)
            state.endpoints.retain(fleet.keys)
        self._announcements.update(changed)
        came_or_went = bool(difference.new_clusters or difference.gone_clusters)
        if difference.added or difference.removed or came_or_went:
            self._label()
        if came_or_went:
            self._find_missing()
        self._publish(self._publications.update(difference.clusters, came_or_went=came_or_went))

    def health_changed(self, key: EndpointKey) -> None:
        """An endpoint's health is another: Envoy is told."""
        clusters = [endpoint.cluster for endpoint in self._fleet.of(key)]
        self._publish(self._publications.update(clusters, came_or_went=False))

    @property
    def _fleet(self) -> Fleet:
        return self._state.fleet

    def _set_tls(self, keys: Iterable[EndpointKey]) -> None:
        for key in keys:
            clusters = [endpoint.cluster for endpoint in self._fleet.of(key)]
            tls = next((self._tls_of[name] for name in clusters if name in self._tls_of), None)
            if tls is None:
                self._tls.pop(key, None)
            else:
                self._tls[key] = tls

    def _label(self) -> None:
        """Name the label values in use."""
        fleet = self._fleet
        self._state.metrics.configure(models=self._models, clusters=fleet.clusters, endpoints=fleet.keys)

    def _find_missing(self) -> None:
        missing = self._named - self._fleet.clusters.keys()
        before, self.missing = self.missing, tuple(sorted(missing))
        for name in sorted(missing.difference(before)):
            _log.warning("no source has a cluster that is named", extra={"cluster": name})
        for name in sorted(set(before).difference(missing) & self._fleet.clusters.keys()):
            _log.info("a source has the cluster now", extra={"cluster": name})
