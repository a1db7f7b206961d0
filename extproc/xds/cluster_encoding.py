"""A kind of cluster → the bytes of an Envoy cluster without names. What imports this pays for the library.

Rules:
    1. Pure and deterministic: equal input gives equal bytes in every process.
    2. The host comes from request metadata only, which clients cannot set; never from a header.
"""

from __future__ import annotations

from datetime import timedelta

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

from extproc.xds.cluster_kinds import ClusterKind, UpstreamTls

_DESTINATION_NAMESPACE = "envoy.lb"
_DESTINATION_KEY = "x-gateway-destination-endpoint"
"""Where the choice travels: Gateway API Inference Extension proposal 004, endpoint picker protocol."""

_CONNECT_TIMEOUT = timedelta(seconds=0.5)
"""A replica in the same network answers a SYN in milliseconds; Envoy retries the next one after this."""

_IDLE_TIMEOUT = timedelta(seconds=4)
"""vLLM (uvicorn) closes idle connections after 5.0 s; Envoy must be first or requests race the close."""

_NO_LIMIT = 100_000
"""Envoy's defaults (1,024 requests, 3 retries) would shed load that the router means to place."""


def encode(kind: ClusterKind) -> bytes:
    """`envoy.config.cluster.v3.Cluster` without its name and its service's."""
    tls, max_open_requests = kind.tls, kind.max_open_requests
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
            metadata=None if tls is None or not tls.contents else _files(tls.contents),
        )
    )


def _files(contents: str) -> core_v3.Metadata:
    """What makes a cluster another when its files are: Envoy reads them for it, and never again."""
    value = protobuf.Value(string_value=contents)
    return core_v3.Metadata(filter_metadata={"tokenway": protobuf.Struct(fields={"engine_tls": value})})


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


def _policy(name: str, policy: betterproto2.Message) -> cluster_v3.LoadBalancingPolicy:
    extension = core_v3.TypedExtensionConfig(name=name, typed_config=_any(policy))
    return cluster_v3.LoadBalancingPolicy(
        policies=[cluster_v3.LoadBalancingPolicyPolicy(typed_extension_config=extension)]
    )


def _any(message: betterproto2.Message) -> protobuf.Any:
    return protobuf.Any.pack(message)
