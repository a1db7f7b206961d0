"""Which resources Envoy is to have, and which of them a change concerns.

Rules:
    1. Pure: what is to be published, or taken away, is the answer.
    2. A change of endpoints or of their health concerns the assignments of their clusters, and of the models
       that have a part of one; the clusters themselves only if one comes or goes.
    3. A model whose cluster no source has yet has no alias: Envoy would wait for its assignment. Where Envoy
       may serve `*`, it has one without endpoints, as have the names that Envoy may not serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from extproc.config.schema import Config
from extproc.health.states import HealthState
from extproc.values.endpoints import Endpoint
from extproc.xds.open_models import (
    MODEL_ALIAS_PREFIX,
    OpenModels,
    closed_names,
    open_models_and_any,
    subset_pools,
)
from extproc.xds.resources import (
    UpstreamTls,
    cluster_resources,
    load_assignments,
)
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.types import EndpointKey

Resources = dict[str, dict[str, bytes | None]]
"""Type URL to (name to serialised message, or None for a resource that is there no more)."""


class Publications:
    """What one worker publishes.

    Args:
        clusters: The fleet, by cluster; a view that follows it.
        state_of: Health of an endpoint; None counts as healthy.
    """

    def __init__(
        self,
        clusters: Mapping[str, Sequence[Endpoint]],
        state_of: Callable[[EndpointKey], HealthState | None],
    ) -> None:
        self._clusters = clusters
        self._state_of = state_of
        self._config = Config()
        self._models: OpenModels = {}
        self._published: dict[str, frozenset[str]] = {CLUSTER_TYPE: frozenset(), ASSIGNMENT_TYPE: frozenset()}

    def configure(self, config: Config) -> Resources:
        """Another configuration: everything, as it is now."""
        self._config, self._models = config, open_models_and_any(config)
        return self._everything()

    def update(self, changed: Iterable[str], *, came_or_went: bool) -> Resources:
        """Endpoints of clusters changed, or their health.

        Args:
            changed: Names of the clusters; those that are gone too.
            came_or_went: A cluster is new or gone.
        """
        if came_or_went:
            return self._everything()
        return {ASSIGNMENT_TYPE: dict(self._assignments(changed))}

    def _everything(self) -> Resources:
        config = self._config
        models = {name: rule.cluster for name, rule in self._models.items() if rule.cluster in self._clusters}
        closed = [MODEL_ALIAS_PREFIX + name for name in closed_names(config, models)]
        clusters = cluster_resources(
            {**dict.fromkeys(closed), **subset_pools(self._models, self._clusters), **self._clusters},
            models,
            tls={name: UpstreamTls(**tls.model_dump()) for name, tls in config.engine_tls.items()},
            max_open_requests=config.away.max_requests_per_endpoint,
        )
        no_endpoints = load_assignments(dict.fromkeys(closed, ()), self._state_of)
        return self._differing(clusters, {**no_endpoints, **self._assignments(self._clusters)})

    def _assignments(self, names: Iterable[str]) -> dict[str, bytes]:
        """Assignments of clusters, and of models that have a part of one of them."""
        here = {name: self._clusters[name] for name in names if name in self._clusters}
        partial = {name: rule for name, rule in self._models.items() if rule.cluster in here}
        return load_assignments({**subset_pools(partial, here), **here}, self._state_of)

    def _differing(self, clusters: Mapping[str, bytes], assignments: Mapping[str, bytes]) -> Resources:
        """These, and an end to all others that were published."""
        found: Resources = {}
        for type_url, bodies in ((CLUSTER_TYPE, clusters), (ASSIGNMENT_TYPE, assignments)):
            gone = self._published[type_url] - bodies.keys()
            self._published[type_url] = frozenset(bodies)
            found[type_url] = {**dict.fromkeys(gone), **bodies}
        return found
