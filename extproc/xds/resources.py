"""Clusters and endpoints → the Envoy resources that describe them, as bytes.

Rules:
    1. Pure and deterministic: equal input gives equal bytes in every worker, so a version (the hash
       of the bytes) means the same everywhere and a reconnecting Envoy is sent nothing it has.
    2. The host comes from request metadata only, which clients cannot set; never from a header.
    3. Health and drain appear in the assignment, not in the cluster: an endpoint change never
       rebuilds a cluster. Envoy's override_host ignores them; its fallback policy does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import betterproto2
from envoy_data_plane.envoy.config.cluster import v3 as cluster_v3
from envoy_data_plane.envoy.config.core import v3 as core_v3
from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request import v3 as least_request_v3
from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import v3 as override_host_v3
from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls_v3
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as http_v3
from envoy_data_plane.envoy.type import v3 as type_v3
from envoy_data_plane.envoy.type.matcher import v3 as matcher_v3
from envoy_data_plane.envoy.type.metadata import v3 as metadata_v3
from envoy_data_plane.google import protobuf

from extproc.health.states import HealthState
from extproc.values.endpoints import Endpoint
from extproc.xds.open_models import MODEL_ALIAS_PREFIX
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

_DESTINATION_NAMESPACE = "envoy.lb"
_DESTINATION_KEY = "x-gateway-destination-endpoint"
"""Where the choice travels: Gateway API Inference Extension proposal 004, endpoint picker protocol."""

_CONNECT_TIMEOUT = timedelta(seconds=0.5)
"""A replica in the same network answers a SYN in milliseconds; Envoy retries the next one after this."""

_IDLE_TIMEOUT = timedelta(seconds=4)
"""vLLM (uvicorn) closes idle connections after 5.0 s; Envoy must be first or requests race the close."""

_CLUSTER_NAME_FIELD = 1
_EDS_FIELD = 3
_SERVICE_NAME_FIELD = 2
"""`Cluster.name`, `Cluster.eds_cluster_config` and its `service_name`."""

_ASSIGNMENT_NAME_FIELD = 1
_LOCALITIES_FIELD = 2
"""`ClusterLoadAssignment.endpoints`."""

_LB_ENDPOINTS_FIELD = 2
"""`LocalityLbEndpoints.lb_endpoints`."""

_NO_LIMIT = 100_000
"""Envoy's defaults (1,024 requests, 3 retries) would shed load that the router means to place."""

_MAX_OPEN_REQUESTS = 1_024
"""Four times vLLM's default `max_num_seqs` of most GPUs: what is beyond it would only queue at the engine."""

_STATUS = {
    HealthState.HEALTHY: core_v3.HealthStatus.HEALTHY,
    HealthState.EJECTED: core_v3.HealthStatus.UNHEALTHY,
    HealthState.DRAINING: core_v3.HealthStatus.DRAINING,
    HealthState.NOT_READY: core_v3.HealthStatus.UNHEALTHY,
}


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS to the engines of a cluster.

    Attributes:
        ca_file: At Envoy: the CA that signed the engines' certificates.
        server_name: In those certificates; also sent as SNI.
        cert_file: To show to the engines, or None.
        key_file: Its private key.
    """

    ca_file: str
    server_name: str
    cert_file: str | None = None
    key_file: str | None = None


def cluster_resources(
    clusters: Iterable[str],
    models: Mapping[str, str],
    *,
    tls: Mapping[str, UpstreamTls] | None = None,
    max_open_requests: int = _MAX_OPEN_REQUESTS,
) -> dict[str, bytes]:
    """One `Cluster` per cluster, and one alias per model for Envoy's own routing without ext_proc.

    Args:
        clusters: Cluster names, each also the name of its assignment; a mapping by name will do.
        models: Model name to cluster name.
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
            tls.get(aliases.get(name, name)),
            max_open_requests if name in aliases else None,
        )
        for name in sorted(services)
    }


def prepare() -> None:
    """Encode one of each once: the first use of the library's classes takes it a third of a second.

    A cluster that a control plane lists later would stall the requests that run then.
    """
    endpoint = Endpoint(EndpointKey("-"), "-", Address("127.0.0.1", 1))
    cluster_resources(["-"], {})
    load_assignments({"-": (endpoint,)}, lambda _key: None)


def load_assignments(
    clusters: Mapping[str, Sequence[Endpoint]],
    state_of: Callable[[EndpointKey], HealthState | None],
) -> dict[str, bytes]:
    """One `ClusterLoadAssignment` per cluster, with weights and health.

    Args:
        clusters: Cluster name to endpoints, keys distinct within a cluster. Those at one address are one host
            to Envoy, with their weights together, and as well as the best of them.
        state_of: `HealthTracker.state`; None (not tracked yet) counts as healthy.

    Returns:
        Resource name to serialised `envoy.config.endpoint.v3.ClusterLoadAssignment`, by sorted name.
        Unchanged clusters come from a cache: one endpoint's ejection costs one cluster's encoding.
    """
    return {name: _assignment(name, _hosts(clusters[name], state_of)) for name in sorted(clusters)}


_Host = tuple[Address, int, HealthState]

_BEST_FIRST = (HealthState.HEALTHY, HealthState.DRAINING, HealthState.EJECTED, HealthState.NOT_READY)


def _hosts(
    endpoints: Iterable[Endpoint], state_of: Callable[[EndpointKey], HealthState | None]
) -> tuple[_Host, ...]:
    """Address, weight and health of each host, sorted."""
    hosts: dict[Address, _Host] = {}
    for endpoint in endpoints:
        state = _state(endpoint, state_of(endpoint.key))
        weight, other = endpoint.weight, hosts.get(endpoint.address)
        if other is not None:
            weight, state = weight + other[1], min(state, other[2], key=_BEST_FIRST.index)
        hosts[endpoint.address] = endpoint.address, weight, state
    return tuple(sorted(hosts.values()))


def _state(endpoint: Endpoint, state: HealthState | None) -> HealthState:
    """What a source says of an endpoint in this cluster goes first."""
    if endpoint.draining:
        return HealthState.DRAINING
    return (state or HealthState.HEALTHY) if endpoint.ready else HealthState.NOT_READY


@lru_cache(maxsize=16_384)
def _cluster(name: str, service_name: str, tls: UpstreamTls | None, max_open_requests: int | None) -> bytes:
    """Put together: encoding five thousand anew stalls the event loop for seconds.

    A field of one message that comes twice is merged. Source: protobuf's encoding, "Last One Wins".
    """
    service = _embedded(_SERVICE_NAME_FIELD, service_name.encode())
    return (
        _embedded(_CLUSTER_NAME_FIELD, name.encode())
        + _nameless(tls, max_open_requests)
        + _embedded(_EDS_FIELD, service)
    )


@lru_cache(maxsize=1024)
def _nameless(tls: UpstreamTls | None, max_open_requests: int | None) -> bytes:
    """A cluster without its name and its service's."""
    destination = metadata_v3.MetadataKey(
        key=_DESTINATION_NAMESPACE, path=[metadata_v3.MetadataKeyPathSegment(key=_DESTINATION_KEY)]
    )
    override_host = override_host_v3.OverrideHost(
        override_host_sources=[override_host_v3.OverrideHostOverrideHostSource(metadata=destination)],
        fallback_policy=_policy(
            "envoy.load_balancing_policies.least_request", least_request_v3.LeastRequest(choice_count=2)
        ),
    )
    http1 = http_v3.HttpProtocolOptions(
        common_http_protocol_options=core_v3.HttpProtocolOptions(idle_timeout=_IDLE_TIMEOUT),
        explicit_http_config=http_v3.HttpProtocolOptionsExplicitHttpConfig(
            http_protocol_options=core_v3.Http1ProtocolOptions()
        ),
    )
    return bytes(
        cluster_v3.Cluster(
            type=cluster_v3.ClusterDiscoveryType.EDS,
            eds_cluster_config=cluster_v3.ClusterEdsClusterConfig(
                eds_config=core_v3.ConfigSource(
                    ads=core_v3.AggregatedConfigSource(), resource_api_version=core_v3.ApiVersion.V3
                )
            ),
            connect_timeout=_CONNECT_TIMEOUT,
            load_balancing_policy=_policy("envoy.load_balancing_policies.override_host", override_host),
            circuit_breakers=cluster_v3.CircuitBreakers(
                thresholds=[
                    cluster_v3.CircuitBreakersThresholds(
                        max_connections=_NO_LIMIT,
                        max_pending_requests=max_open_requests or _NO_LIMIT,
                        max_requests=_NO_LIMIT,
                        max_retries=_NO_LIMIT,
                    )
                ],
                # One request on a connection (HTTP/1), so this bounds requests; as many again may wait for
                # one in all, beyond that Envoy answers 503 at once.
                per_host_thresholds=[]
                if max_open_requests is None
                else [cluster_v3.CircuitBreakersThresholds(max_connections=max_open_requests)],
            ),
            transport_socket=None if tls is None else _transport_socket(tls),
            typed_extension_protocol_options={
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _any(http1)
            },
            common_lb_config=cluster_v3.ClusterCommonLbConfig(
                # Health reaches the fallback at once, not after Envoy's 1 s merge window.
                update_merge_window=timedelta(0),
                # Use endpoints marked bad only when (nearly) all are: then the marks may be stale.
                healthy_panic_threshold=type_v3.Percent(value=1.0),
            ),
            outlier_detection=_outlier_detection(),
        )
    )


def _transport_socket(tls: UpstreamTls) -> core_v3.TransportSocket:
    common = tls_v3.CommonTlsContext(
        tls_params=tls_v3.TlsParameters(tls_minimum_protocol_version=tls_v3.TlsParametersTlsProtocol.TLSv1_2),
        validation_context=tls_v3.CertificateValidationContext(
            trusted_ca=core_v3.DataSource(filename=tls.ca_file),
            match_typed_subject_alt_names=[
                tls_v3.SubjectAltNameMatcher(
                    san_type=tls_v3.SubjectAltNameMatcherSanType.DNS,
                    matcher=matcher_v3.StringMatcher(exact=tls.server_name),
                )
            ],
        ),
        tls_certificates=[]
        if tls.cert_file is None
        else [
            tls_v3.TlsCertificate(
                certificate_chain=core_v3.DataSource(filename=tls.cert_file),
                private_key=core_v3.DataSource(filename=tls.key_file),
            )
        ],
    )
    context = tls_v3.UpstreamTlsContext(common_tls_context=common, sni=tls.server_name)
    return core_v3.TransportSocket(name="envoy.transport_sockets.tls", typed_config=_any(context))


def _outlier_detection() -> cluster_v3.OutlierDetection:
    """For the fallback alone, and only for what cannot be load: connections that fail locally.

    Engines answer overload with 503, so ejecting on statuses would remove replicas when they are
    needed; half of the hosts always stay. Five in a row is Envoy's default.
    """
    return cluster_v3.OutlierDetection(
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=5,
        enforcing_consecutive_5xx=0,
        enforcing_consecutive_gateway_failure=0,
        enforcing_success_rate=0,
        enforcing_local_origin_success_rate=0,
        interval=timedelta(seconds=1),
        base_ejection_time=timedelta(seconds=5),
        max_ejection_time=timedelta(seconds=60),
        max_ejection_percent=50,
    )


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


def _policy(name: str, policy: betterproto2.Message) -> cluster_v3.LoadBalancingPolicy:
    extension = core_v3.TypedExtensionConfig(name=name, typed_config=_any(policy))
    return cluster_v3.LoadBalancingPolicy(
        policies=[cluster_v3.LoadBalancingPolicyPolicy(typed_extension_config=extension)]
    )


def _any(message: betterproto2.Message) -> protobuf.Any:
    return protobuf.Any.pack(message)
