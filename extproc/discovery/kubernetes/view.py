"""What is to be watched for the clusters that are wanted, and what of the objects becomes which endpoint.

Rules:
    1. Pure. Objects that changed come in; which collections are wanted, what clusters have now, and what is
       said of the pool's requests go out.
    2. A cluster is reported once all that it is made of has been listed, and never taken away again: a pool
       that is deleted has no endpoints.
    3. A pod that is not ready is reported as such if it was ready before, so that what is known of it is
       kept; one that never was is left out. One that terminates drains until it is gone, if it was known.
    4. If a pool's selector changes, pods known that match the new one stay, all others go at once; the pods
       of the former selector are forgotten when those of the new one are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from extproc.config.sections.kubernetes import AddressFamily, KubernetesDiscovery, ServiceSource
from extproc.discovery.kubernetes import pods as of_pods
from extproc.discovery.kubernetes import slices as of_slices
from extproc.discovery.kubernetes.fields import Object
from extproc.discovery.kubernetes.kinds import (
    OBJECTIVES,
    PODS,
    POOLS,
    REWRITES,
    SLICES,
    Collection,
    Kind,
    collection_of_labels,
)
from extproc.discovery.kubernetes.pods import Pod, read_pod
from extproc.discovery.kubernetes.policies import policies_of, read_objective, read_rewrite
from extproc.discovery.kubernetes.pools import InferencePool, read_pool
from extproc.discovery.kubernetes.slices import read_slice
from extproc.discovery.listed import Listed
from extproc.values.pool_policies import PoolPolicies

_SERVICE_NAME: Final = "kubernetes.io/service-name"

_READERS: Final[Mapping[str, Callable[[Object], Any]]] = {
    PODS.plural: read_pod,
    SLICES.plural: read_slice,
    "inferencepools": read_pool,
    "inferenceobjectives": read_objective,
    "inferencemodelrewrites": read_rewrite,
}


def reader_of(kind: Kind) -> Callable[[Object], Any]:
    """What makes of an object of this kind what is kept of it."""
    return _READERS[kind.plural]


@dataclass(slots=True)
class _Pool:
    """The pool as it is followed.

    Attributes:
        source: Its own collection, of one object at most.
        name: Its name.
        cluster: That it makes.
        namespace: Its own, and that of its pods.
        spec: What it says now; None if it is not there.
        pods: Where its pods are listed; None if it selects none.
        former: Where they were until the list of `pods` is there.
    """

    source: Collection
    name: str
    cluster: str
    namespace: str
    spec: InferencePool | None = None
    pods: Collection | None = None
    former: Collection | None = None


@dataclass(frozen=True, slots=True)
class _Selector:
    cluster: str
    pods: Collection
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Service:
    cluster: str
    slices: Collection
    port: str | None


@dataclass(slots=True)
class _Known:
    """Objects of a collection.

    Attributes:
        is_listed: All of them are known.
    """

    objects: dict[str, Any] = field(default_factory=dict)
    is_listed: bool = False


class View:
    """What one worker makes of the API.

    Args:
        settings: What is wanted.
        namespace: The gateway's own.

    Attributes:
        policies: What is said of the pool's requests.
    """

    def __init__(self, settings: KubernetesDiscovery, namespace: str) -> None:
        self._is_ipv6 = settings.address_family is AddressFamily.IPV6
        self._known: dict[Collection, _Known] = {}
        self._pool: _Pool | None = None
        self._objectives: tuple[Collection, ...] = ()
        self._rewrites: tuple[Collection, ...] = ()
        pool = settings.pool
        if pool is not None:
            where = pool.namespace or namespace
            source = Collection(POOLS[pool.group], where, name=pool.name)
            self._pool = _Pool(source, pool.name, pool.cluster or pool.name, where)
            self._objectives = tuple(Collection(kind, where) for kind in OBJECTIVES)
            self._rewrites = tuple(Collection(kind, where) for kind in REWRITES)
        self._selectors = tuple(
            _Selector(
                one.cluster,
                collection_of_labels(PODS, one.namespace or namespace, one.match_labels),
                one.target_ports,
            )
            for one in settings.selectors
        )
        self._services = tuple(_service(one, namespace) for one in settings.services)
        self._changed: set[str] = set()
        self._reported: dict[str, list[Listed]] = {}
        self._were_ready: dict[str, frozenset[str]] = {}
        self.policies = PoolPolicies()

    @property
    def is_whole(self) -> bool:
        """What `changes` gave so far has all clusters."""
        return all(name in self._reported for name, _ in self._makers())

    def wanted(self) -> tuple[Collection, ...]:
        """Collections that are to be kept, each once; others are to be dropped."""
        return tuple(dict.fromkeys(self._wanted()))

    def update(self, collection: Collection, delta: Mapping[str, Any], *, is_listed: bool) -> None:
        """Objects of a collection changed; None for those that are gone.

        Args:
            collection: One that is wanted; others change nothing.
            delta: By name.
            is_listed: The collection has been listed.
        """
        if collection not in self.wanted():
            return
        known = self._known.setdefault(collection, _Known())
        if not delta and known.is_listed == is_listed:
            return
        known.is_listed = is_listed
        for name, one in delta.items():
            if one is None:
                known.objects.pop(name, None)
            else:
                known.objects[name] = one
        pool = self._pool
        if pool is not None:
            if collection == pool.source:
                self._follow(pool)
            elif collection == pool.pods and is_listed:
                pool.former = None
            elif collection in (*self._objectives, *self._rewrites):
                self._set_policies(pool)
        self._drop()
        self._changed.update(name for name, makers in self._makers() if collection in makers)

    def changes(self) -> dict[str, list[Listed]]:
        """What the clusters have now that may have changed since the last time and are known whole."""
        found = {}
        for name, makers in self._makers():
            if name not in self._changed or not all(self._is_listed(one) for one in makers):
                continue
            self._changed.discard(name)
            listed = self._kept(name, self._endpoints(name))
            if self._reported.get(name) != listed:
                self._reported[name] = found[name] = listed
        return found

    def _makers(self) -> Iterator[tuple[str, tuple[Collection, ...]]]:
        """Each cluster with what has to be listed before it is reported."""
        pool = self._pool
        if pool is not None:
            pods = pool.former or pool.pods
            yield pool.cluster, (pool.source,) if pods is None else (pool.source, pods)
        for selector in self._selectors:
            yield selector.cluster, (selector.pods,)
        for service in self._services:
            yield service.cluster, (service.slices,)

    def _wanted(self) -> Iterator[Collection]:
        pool = self._pool
        if pool is not None:
            yield pool.source
            for pods in (pool.pods, pool.former):
                if pods is not None:
                    yield pods
        yield from (selector.pods for selector in self._selectors)
        yield from (service.slices for service in self._services)
        yield from self._objectives
        yield from self._rewrites

    def _is_listed(self, collection: Collection) -> bool:
        known = self._known.get(collection)
        return known is not None and known.is_listed

    def _objects(self, collection: Collection) -> Mapping[str, Any]:
        known = self._known.get(collection)
        return {} if known is None else known.objects

    def _follow(self, pool: _Pool) -> None:
        """The pool is another, or gone."""
        before, pool.spec = pool.pods, self._objects(pool.source).get(pool.name)
        spec = pool.spec
        labels = {} if spec is None else spec.labels
        pool.pods = collection_of_labels(PODS, pool.namespace, labels) if labels else None
        if pool.pods == before:
            return
        former = pool.former or before
        was_listed = former is not None and self._is_listed(former)
        is_listed = pool.pods is None or self._is_listed(pool.pods)
        pool.former = former if was_listed and not is_listed and former != pool.pods else None

    def _set_policies(self, pool: _Pool) -> None:
        self.policies = policies_of(
            pool.name,
            [self._objects(one) for one in self._objectives],
            [self._objects(one) for one in self._rewrites],
        )

    def _drop(self) -> None:
        """Forget what is wanted no more."""
        for collection in self._known.keys() - set(self.wanted()):
            del self._known[collection]

    def _endpoints(self, cluster: str) -> list[Listed]:
        pool = self._pool
        if pool is not None and cluster == pool.cluster:
            spec = pool.spec
            if spec is None or pool.pods is None:
                return []
            return self._of_pods(pool.former or pool.pods, pool.pods, spec.ports)
        for selector in self._selectors:
            if selector.cluster == cluster:
                return self._of_pods(selector.pods, selector.pods, selector.ports)
        service = next(one for one in self._services if one.cluster == cluster)
        slices = [one for _, one in sorted(self._objects(service.slices).items())]
        return of_slices.endpoints_of(slices, service.port, is_ipv6=self._is_ipv6)

    def _of_pods(self, listed: Collection, selected: Collection, ports: tuple[int, ...]) -> list[Listed]:
        pods: list[Pod] = [one for _, one in sorted(self._objects(listed).items())]
        return [
            endpoint
            for pod in pods
            if listed == selected or pod.has(selected.labels)
            for endpoint in of_pods.endpoints_of(pod, ports, is_ipv6=self._is_ipv6)
        ]

    def _kept(self, cluster: str, listed: list[Listed]) -> list[Listed]:
        """Without those that never were ready here; those that are, first: of two at one place they count."""
        were = self._were_ready.get(cluster, frozenset())
        kept = [one for one in listed if one.key in were or (one.ready and not one.draining)]
        self._were_ready[cluster] = frozenset(one.key for one in kept)
        return sorted(kept, key=lambda one: not one.ready or one.draining)


def _service(service: ServiceSource, namespace: str) -> _Service:
    labels = {_SERVICE_NAME: service.name}
    collection = collection_of_labels(SLICES, service.namespace or namespace, labels)
    return _Service(service.cluster or service.name, collection, service.port)
