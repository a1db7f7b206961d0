"""Clusters and endpoints → the Envoy resources that describe them, as bytes.

Rules:
    1. Pure and deterministic: equal input gives equal bytes in every worker, so a version (the hash
       of the bytes) means the same everywhere and a reconnecting Envoy is sent nothing it has.
    2. Health and drain appear in the assignment, not in the cluster: an endpoint change never
       rebuilds a cluster. Envoy's override_host ignores them; its fallback policy does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from extproc.config.sections.fields import MODEL_ALIAS_PREFIX
from extproc.health.states import HealthState
from extproc.values.endpoints import Endpoint
from extproc.xds.cluster_kinds import ClusterKind, UpstreamTls
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

_CLUSTER_NAME_FIELD = 1
_EDS_FIELD = 3
_SERVICE_NAME_FIELD = 2
"""`Cluster.name`, `Cluster.eds_cluster_config` and its `service_name`."""

_ASSIGNMENT_NAME_FIELD = 1
_LOCALITIES_FIELD = 2
"""`ClusterLoadAssignment.endpoints`."""

_LB_ENDPOINTS_FIELD = 2
"""`LocalityLbEndpoints.lb_endpoints`."""

_MAX_OPEN_REQUESTS = 1_024
"""Four times vLLM's default `max_num_seqs` of most GPUs: what is beyond it would only queue at the engine."""

_HEALTHY, _UNHEALTHY, _DRAINING = 1, 2, 3
"""`envoy.config.core.v3.HealthStatus`."""

_STATUS = {
    HealthState.HEALTHY: _HEALTHY,
    HealthState.EJECTED: _UNHEALTHY,
    HealthState.DRAINING: _DRAINING,
    HealthState.NOT_READY: _UNHEALTHY,
}


def cluster_resources(
    clusters: Iterable[str],
    models: Mapping[str, str],
    encoded: Callable[[ClusterKind], bytes],
    *,
    tls: Mapping[str, UpstreamTls] | None = None,
    max_open_requests: int = _MAX_OPEN_REQUESTS,
) -> dict[str, bytes]:
    """One `Cluster` per cluster, and one alias per model for Envoy's own routing without ext_proc.

    Args:
        clusters: Cluster names, each also the name of its assignment; a mapping by name will do.
        models: Model name to cluster name.
        encoded: The bytes of a kind of cluster.
        tls: Of the clusters whose engines speak it, by cluster name.
        max_open_requests: Bound on what an alias sends to one endpoint at a time; a cluster has none,
            for what goes there was admitted by Tokenway.

    Returns:
        Resource name to serialised `envoy.config.cluster.v3.Cluster`, by sorted name. A cluster
        that is itself named like an alias takes its place.
    """
    aliases = {MODEL_ALIAS_PREFIX + model: cluster for model, cluster in models.items()}
    services = {**aliases, **{name: name for name in clusters}}
    tls = tls or {}
    return {
        name: _cluster(
            name,
            services[name],
            encoded(
                ClusterKind(tls.get(aliases.get(name, name)), max_open_requests if name in aliases else None)
            ),
        )
        for name in sorted(services)
    }


def static_cluster(name: str) -> bytes:
    """A serialised `envoy.config.cluster.v3.Cluster` without endpoints, which waits for no assignment."""
    return _embedded(_CLUSTER_NAME_FIELD, name.encode())


def load_assignments(
    clusters: Mapping[str, Sequence[Endpoint]],
    state_of: Callable[[EndpointKey], HealthState | None],
    former: Callable[[str], Iterable[Address]] = lambda _: (),
) -> dict[str, bytes]:
    """One `ClusterLoadAssignment` per cluster, with weights and health.

    Args:
        clusters: Cluster name to endpoints, keys distinct within a cluster. Those at one address are one host
            to Envoy, with their weights together, and as well as the best of them.
        state_of: `HealthTracker.state`; None (not tracked yet) counts as healthy.
        former: Where endpoints of a cluster were that left; where none is now, a host that drains is.

    Returns:
        Resource name to serialised `envoy.config.endpoint.v3.ClusterLoadAssignment`, by sorted name.
        Unchanged clusters come from a cache: one endpoint's ejection costs one cluster's encoding.
    """
    return {
        name: _assignment(name, _hosts(clusters[name], state_of, former(name))) for name in sorted(clusters)
    }


_Host = tuple[Address, int, HealthState]

_BEST_FIRST = (HealthState.HEALTHY, HealthState.DRAINING, HealthState.EJECTED, HealthState.NOT_READY)


def _hosts(
    endpoints: Iterable[Endpoint],
    state_of: Callable[[EndpointKey], HealthState | None],
    former: Iterable[Address],
) -> tuple[_Host, ...]:
    """Address, weight and health of each host, sorted."""
    hosts: dict[Address, _Host] = {address: (address, 1, HealthState.DRAINING) for address in former}
    left = set(hosts)
    for endpoint in endpoints:
        state = _state(endpoint, state_of(endpoint.key))
        weight, other = endpoint.weight, hosts.get(endpoint.address)
        if other is not None and endpoint.address not in left:
            weight, state = weight + other[1], min(state, other[2], key=_BEST_FIRST.index)
        left.discard(endpoint.address)
        hosts[endpoint.address] = endpoint.address, weight, state
    return tuple(sorted(hosts.values()))


def _state(endpoint: Endpoint, state: HealthState | None) -> HealthState:
    """What a source says of an endpoint in this cluster goes first."""
    if endpoint.draining:
        return HealthState.DRAINING
    return (state or HealthState.HEALTHY) if endpoint.ready else HealthState.NOT_READY


@lru_cache(maxsize=16_384)
def _cluster(name: str, service_name: str, kind: bytes) -> bytes:
    """Put together: encoding five thousand anew stalls the event loop for seconds.

    A field of one message that comes twice is merged. Source: protobuf's encoding, "Last One Wins".
    """
    service = _embedded(_SERVICE_NAME_FIELD, service_name.encode())
    return _embedded(_CLUSTER_NAME_FIELD, name.encode()) + kind + _embedded(_EDS_FIELD, service)


@lru_cache(maxsize=16_384)
def _assignment(name: str, hosts: tuple[_Host, ...]) -> bytes:
    """Put together from encoded endpoints: encoding a thousand anew stalls the event loop for 170 ms."""
    locality = b"".join(_lb_endpoint(address, weight, state) for address, weight, state in hosts)
    return _embedded(_ASSIGNMENT_NAME_FIELD, name.encode()) + _embedded(_LOCALITIES_FIELD, locality)


@lru_cache(maxsize=16_384)
def _lb_endpoint(address: Address, weight: int, state: HealthState) -> bytes:
    """`lb_endpoints { endpoint { address { socket_address { address, port_value } } }, … }`, by hand."""
    place = _embedded(2, address.host.encode()) + b"\x18" + _varint(address.port)
    health = b"\x10" + _varint(_STATUS[state])
    rated = _embedded(4, b"\x08" + _varint(weight) if weight else b"")
    return _embedded(_LB_ENDPOINTS_FIELD, _embedded(1, _embedded(1, _embedded(1, place))) + health + rated)


def _embedded(field: int, message: bytes) -> bytes:
    """An encoded message, or text, as a field of another; fields up to 15."""
    return bytes((field << 3 | 2,)) + _varint(len(message)) + message


def _varint(number: int) -> bytes:
    if number < 128:
        return bytes((number,))
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
