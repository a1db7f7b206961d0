"""A cluster encoded by hand, held to the library that has all of Envoy's messages."""

from __future__ import annotations

from datetime import timedelta

import betterproto2
import pytest
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

from extproc.xds.cluster_message import UpstreamTls, cluster_message
from extproc.xds.encoding import varint

CONNECT_TIMEOUT = timedelta(seconds=0.5)
IDLE_TIMEOUT = timedelta(seconds=4)
NO_LIMIT = 100_000


def by_the_library(tls: UpstreamTls | None, max_open_requests: int | None) -> bytes:
    """The same cluster."""
    destination = metadata_v3.MetadataKey(
        key="envoy.lb", path=[metadata_v3.MetadataKeyPathSegment(key="x-gateway-destination-endpoint")]
    )
    override_host = override_host_v3.OverrideHost(
        override_host_sources=[override_host_v3.OverrideHostOverrideHostSource(metadata=destination)],
        fallback_policy=policy(
            "envoy.load_balancing_policies.least_request", least_request_v3.LeastRequest(choice_count=2)
        ),
    )
    http1 = http_v3.HttpProtocolOptions(
        common_http_protocol_options=core_v3.HttpProtocolOptions(idle_timeout=IDLE_TIMEOUT),
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
            connect_timeout=CONNECT_TIMEOUT,
            load_balancing_policy=policy("envoy.load_balancing_policies.override_host", override_host),
            circuit_breakers=cluster_v3.CircuitBreakers(
                thresholds=[
                    cluster_v3.CircuitBreakersThresholds(
                        max_connections=NO_LIMIT,
                        max_pending_requests=max_open_requests or NO_LIMIT,
                        max_requests=NO_LIMIT,
                        max_retries=NO_LIMIT,
                    )
                ],
                # One request on a connection (HTTP/1), so this bounds requests; as many again may wait for
                # one in all, beyond that Envoy answers 503 at once.
                per_host_thresholds=[]
                if max_open_requests is None
                else [cluster_v3.CircuitBreakersThresholds(max_connections=max_open_requests)],
            ),
            transport_socket=None if tls is None else transport_socket(tls),
            typed_extension_protocol_options={
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": any_of(http1)
            },
            common_lb_config=cluster_v3.ClusterCommonLbConfig(
                # Health reaches the fallback at once, not after Envoy's 1 s merge window.
                update_merge_window=timedelta(0),
                # Use endpoints marked bad only when (nearly) all are: then the marks may be stale.
                healthy_panic_threshold=type_v3.Percent(value=1.0),
            ),
            outlier_detection=outlier_detection(),
        )
    )


def transport_socket(tls: UpstreamTls) -> core_v3.TransportSocket:
    """TLS to engines."""
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
    return core_v3.TransportSocket(name="envoy.transport_sockets.tls", typed_config=any_of(context))


def outlier_detection() -> cluster_v3.OutlierDetection:
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


def policy(name: str, policy: betterproto2.Message) -> cluster_v3.LoadBalancingPolicy:
    """A policy by its extension."""
    extension = core_v3.TypedExtensionConfig(name=name, typed_config=any_of(policy))
    return cluster_v3.LoadBalancingPolicy(
        policies=[cluster_v3.LoadBalancingPolicyPolicy(typed_extension_config=extension)]
    )


def any_of(message: betterproto2.Message) -> protobuf.Any:
    """A message of any type."""
    return protobuf.Any.pack(message)


@pytest.mark.parametrize("max_open_requests", [None, 0, 77, 100_000])
@pytest.mark.parametrize(
    "tls",
    [
        None,
        UpstreamTls("/ca.pem", "engines"),
        UpstreamTls("/ca.pem", "engines", "/cert.pem", "/" + "k" * 200),
    ],
)
def test_the_bytes_are_those_of_the_library(tls: UpstreamTls | None, max_open_requests: int | None) -> None:
    """So no version of a resource changes, and Envoy reads what it always did."""
    assert cluster_message(tls, max_open_requests) == by_the_library(tls, max_open_requests)


@pytest.mark.parametrize(
    ("value", "encoded"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (2**32, b"\x80\x80\x80\x80\x10")]
)
def test_integers_are_varints(value: int, encoded: bytes) -> None:
    """Seven bits to a byte, the least first."""
    assert varint(value) == encoded
