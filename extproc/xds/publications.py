"""Which resources Envoy is to have, and which of them a change concerns.

Rules:
    1. Pure: what is to be published, or taken away, is the answer.
    2. A change of endpoints or of their health concerns the assignments of their clusters, and of the models
       that have a part of one; the clusters themselves only if one comes or goes.
    3. A model whose cluster no source has yet has no alias: Envoy would wait for its assignment. Where Envoy
       may serve `*`, it has one without endpoints, as have the names that Envoy may not serve.
    4. Clusters of a configuration that is to come are introduced beside all others, and no model by them. One
       that is named like a model's alias comes with its configuration: the name may be the model's till then.
       Other TLS for a cluster that is there is introduced by a cluster without endpoints, its trial: what
       Envoy refuses of a cluster that it has leaves that as it was, perhaps in clear text.
    5. Once every model that Envoy may serve has an alias there is one of no name as well, `ALL_NAMES`: what
       Envoy does not find then is unknown. Where it is missing, nobody can know yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from extproc.config.schema import Config
from extproc.config.sections.fields import MODEL_ALIAS_PREFIX, TRIAL_PREFIX
from extproc.config.sections.models import RuleSection
from extproc.health.states import HealthState
from extproc.values.endpoints import Endpoint
from extproc.values.requests import ANY_MODEL
from extproc.xds.cluster_kinds import ClusterKind, ClusterKinds, UpstreamTls
from extproc.xds.open_models import (
    OpenModels,
    closed_names,
    open_models_and_any,
    subset_pools,
)
from extproc.xds.resources import cluster_resources, load_assignments, static_cluster
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

Resources = dict[str, dict[str, bytes | None]]
"""Type URL to (name to serialised message, or None for a resource that is there no more)."""

ALL_NAMES: Final = MODEL_ALIAS_PREFIX
"""The alias of no name: no model has it, and no cluster may. The bootstrap's script looks for it."""


def trial_of(cluster: str) -> str:
    """The name of the cluster by which Envoy is asked whether it takes other TLS for this one."""
    return TRIAL_PREFIX + cluster


def tried_by(name: str) -> str:
    """The cluster that one of this name is a trial of; itself, if it is none."""
    return name.removeprefix(TRIAL_PREFIX)


def kinds_of(config: Config) -> frozenset[ClusterKind]:
    """All kinds of cluster that Envoy may be told of by a configuration."""
    bounds = None, config.away.max_requests_per_endpoint
    return frozenset(ClusterKind(tls, bound) for tls in (None, *_tls(config).values()) for bound in bounds)


def _tls(config: Config) -> dict[str, UpstreamTls]:
    return {
        name: UpstreamTls(**tls.model_dump(), contents=tls.contents)
        for name, tls in config.engine_tls.items()
    }


class Publications:
    """What one worker publishes.

    Args:
        clusters: The fleet, by cluster; a view that follows it.
        state_of: Health of an endpoint; None counts as healthy.
        kinds: The bytes of kinds of cluster.
        former: Where endpoints of a cluster were that left a moment ago.
    """

    def __init__(
        self,
        clusters: Mapping[str, Sequence[Endpoint]],
        state_of: Callable[[EndpointKey], HealthState | None],
        kinds: ClusterKinds,
        former: Callable[[str], Iterable[Address]] = lambda _: (),
    ) -> None:
        self._clusters = clusters
        self._state_of = state_of
        self._kinds = kinds
        self._former = former
        self._config = Config()
        self._models: OpenModels = {}
        self._models_of: dict[str, dict[str, RuleSection]] = {}
        self._tls: Mapping[str, UpstreamTls] = {}
        self._published: dict[str, set[str]] = {CLUSTER_TYPE: set(), ASSIGNMENT_TYPE: set()}
        self._introduced: set[str] = set()
        self._trials: AbstractSet[str] = frozenset()

    def introduce(
        self, config: Config, clusters: Mapping[str, Sequence[Endpoint]], tried: Iterable[str] = ()
    ) -> Resources:
        """Clusters before the configuration that brings them; in place of those introduced before.

        Args:
            config: Says how their engines are reached.
            clusters: Those that are published already are left as they are, and stay until then; see Rule 4.
            tried: Those whose TLS is another than what is published.
        """
        former = self._introduced & self._published[CLUSTER_TYPE] - self._clusters.keys()
        tls = _tls(config)
        trials = {trial_of(name): tls[name] for name in tried if name in tls}
        self._trials = trials.keys() - self._clusters.keys() - clusters.keys()
        brought: dict[str, Sequence[Endpoint]] = {**clusters, **dict.fromkeys(self._trials, ())}
        self._introduced = {name for name in brought if not name.startswith(MODEL_ALIAS_PREFIX)}
        new = {
            name: endpoints
            for name, endpoints in brought.items()
            if name in self._introduced and (name in former or name not in self._published[CLUSTER_TYPE])
        }
        bodies = cluster_resources(new, {}, self._kinds.encoded, tls={**trials, **tls})
        concerned = {CLUSTER_TYPE: former, ASSIGNMENT_TYPE: former}
        return self._differing(bodies, load_assignments(new, self._state_of), concerned)

    def configure(self, config: Config) -> Resources:
        """Another configuration: everything, as it is now."""
        self._config, self._models = config, open_models_and_any(config)
        self._models_of = {}
        for name, rule in self._models.items():
            self._models_of.setdefault(rule.cluster, {})[name] = rule
        self._tls = _tls(config)
        self._introduced -= self._trials
        return self._everything()

    def update(self, changed: Iterable[str], *, came_or_went: bool) -> Resources:
        """Endpoints of clusters changed, or their health.

        Args:
            changed: Names of the clusters; those that are gone too.
            came_or_went: A cluster is new or gone.
        """
        if not came_or_went:
            return {ASSIGNMENT_TYPE: self._assignments(changed)}
        names = set(changed)
        aliases = {MODEL_ALIAS_PREFIX + name for name in self._of(names)}
        hides_alias = any(name.startswith(MODEL_ALIAS_PREFIX) for name in names)
        if ANY_MODEL in self._models or hides_alias or not aliases.isdisjoint(self._clusters):
            return self._everything()  # which names are closed may be another
        concerned = {CLUSTER_TYPE: names | aliases | {ALL_NAMES}, ASSIGNMENT_TYPE: names | aliases}
        clusters = {**self._cluster_resources(names), **self._all_names()}
        return self._differing(clusters, self._assignments(names), concerned)

    def _everything(self) -> Resources:
        closed = self._closed()
        clusters = {**self._cluster_resources(self._clusters, closed), **self._all_names()}
        no_endpoints = load_assignments(dict.fromkeys(closed, ()), self._state_of)
        assignments = {**no_endpoints, **self._assignments(self._clusters)}
        return self._differing(clusters, assignments, {name: set(of) for name, of in self._published.items()})

    def _closed(self) -> list[str]:
        here = {name for name, rule in self._models.items() if rule.cluster in self._clusters}
        return [MODEL_ALIAS_PREFIX + name for name in closed_names(self._config, here)]

    def _all_names(self) -> dict[str, bytes]:
        listed = {name for name, rule in self._models.items() if rule.cluster in self._clusters}
        if listed != self._models.keys() and ANY_MODEL not in listed:
            return {}
        return {ALL_NAMES: static_cluster(ALL_NAMES)}

    def _cluster_resources(self, names: Iterable[str], closed: Iterable[str] = ()) -> dict[str, bytes]:
        """Clusters, those of them that are there, and the aliases of their models."""
        here = {name: self._clusters[name] for name in names if name in self._clusters}
        models = self._of(here)
        return cluster_resources(
            {**dict.fromkeys(closed), **subset_pools(models, here), **here},
            {name: rule.cluster for name, rule in models.items()},
            self._kinds.encoded,
            tls=self._tls,
            max_open_requests=self._config.away.max_requests_per_endpoint,
        )

    def _of(self, clusters: Iterable[str]) -> OpenModels:
        """The models whose default rule names one of these."""
        return {name: rule for cluster in clusters for name, rule in self._models_of.get(cluster, {}).items()}

    def _assignments(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """Assignments of clusters, and of models that have a part of one of them."""
        here = {name: self._clusters[name] for name in names if name in self._clusters}
        subsets = load_assignments(subset_pools(self._of(here), here), self._state_of)
        return {**subsets, **load_assignments(here, self._state_of, self._former)}

    def _differing(
        self,
        clusters: Mapping[str, bytes | None],
        assignments: Mapping[str, bytes | None],
        concerned: Mapping[str, set[str]],
    ) -> Resources:
        """These, and an end to all others among `concerned` that were published."""
        found: Resources = {}
        for type_url, bodies in ((CLUSTER_TYPE, clusters), (ASSIGNMENT_TYPE, assignments)):
            published = self._published[type_url]
            gone = (concerned[type_url] & published) - bodies.keys() - self._introduced
            published.difference_update(gone)
            published.update(bodies)
            found[type_url] = {**dict.fromkeys(gone), **bodies}
        return found
