"""`envoy.config.cluster.v3.Cluster` as all clusters have it, encoded by hand.

By the library that has all of Envoy's messages it took 9 MiB of memory and a third of a second to be ready
(docs/adr/0004). `tests/unit/test_cluster_message.py` holds it to that library, byte by byte. Numbers are
those of the fields in Envoy's API, whose names stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from extproc.xds.encoding import double, duration, embedded, number, text, wrapped

_DESTINATION_NAMESPACE = "envoy.lb"
_DESTINATION_KEY = "x-gateway-destination-endpoint"
"""Where the choice travels: Gateway API Inference Extension proposal 004, endpoint picker protocol."""

_CONNECT_TIMEOUT_NS = 500_000_000
"""A replica in the same network answers a SYN in milliseconds; Envoy retries the next one after this."""

_IDLE_TIMEOUT_S = 4
"""vLLM (uvicorn) closes idle connections after 5.0 s; Envoy must be first or requests race the close."""

_NO_LIMIT = 100_000
"""Envoy's defaults (1,024 requests, 3 retries) would shed load that the router means to place."""

_EDS, _V3, _TLS_1_2, _DNS = 3, 2, 3, 2
"""`Cluster.DiscoveryType`, `ApiVersion`, `TlsParameters.TlsProtocol`, `SubjectAltNameMatcher.SanType`."""


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


def cluster_message(tls: UpstreamTls | None, max_open_requests: int | None) -> bytes:
    """A cluster without its name and its service's.

    Args:
        tls: As its engines speak it.
        max_open_requests: At one endpoint; None for no bound.
    """
    config_source = (embedded(3), number(6, _V3))  # ads, resource_api_version
    return b"".join(
        (
            number(2, _EDS),  # type
            embedded(3, embedded(1, *config_source)),  # eds_cluster_config.eds_config
            duration(4, 0, _CONNECT_TIMEOUT_NS),  # connect_timeout
            embedded(10, *_circuit_breakers(max_open_requests)),
            embedded(36, *_http1()),  # typed_extension_protocol_options
            embedded(19, *_outlier_detection()),
            embedded(27, *_common_lb_config()),
            b"" if tls is None else embedded(24, *_transport_socket(tls)),
            embedded(41, *_override_host()),  # load_balancing_policy
        )
    )


def _circuit_breakers(max_open_requests: int | None) -> tuple[bytes, ...]:
    # One request on a connection (HTTP/1), so per_host_thresholds bounds requests; as many again may wait for
    # one in all, beyond that Envoy answers 503 at once.
    thresholds = embedded(
        1,
        wrapped(2, _NO_LIMIT),  # max_connections
        wrapped(3, max_open_requests or _NO_LIMIT),  # max_pending_requests
        wrapped(4, _NO_LIMIT),  # max_requests
        wrapped(5, _NO_LIMIT),  # max_retries
    )
    if max_open_requests is None:
        return (thresholds,)
    return thresholds, embedded(2, wrapped(2, max_open_requests))


def _http1() -> tuple[bytes, ...]:
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    # common_http_protocol_options.idle_timeout, explicit_http_config.http_protocol_options
    options = embedded(1, duration(1, _IDLE_TIMEOUT_S)), embedded(3, embedded(1))
    return text(1, name), embedded(2, *_any(name, *options))


def _outlier_detection() -> tuple[bytes, ...]:
    """For the fallback alone, and only for what cannot be load: connections that fail locally.

    Engines answer overload with 503, so ejecting on statuses would remove replicas when they are
    needed; half of the hosts always stay. Five in a row is Envoy's default.
    """
    return (
        duration(2, 1),  # interval
        duration(3, 5),  # base_ejection_time
        wrapped(4, 50),  # max_ejection_percent
        wrapped(5, 0),  # enforcing_consecutive_5xx
        wrapped(6, 0),  # enforcing_success_rate
        wrapped(11, 0),  # enforcing_consecutive_gateway_failure
        number(12, 1),  # split_external_local_origin_errors
        wrapped(13, 5),  # consecutive_local_origin_failure
        wrapped(15, 0),  # enforcing_local_origin_success_rate
        duration(21, 60),  # max_ejection_time
    )


def _common_lb_config() -> tuple[bytes, ...]:
    return (
        # healthy_panic_threshold: use endpoints marked bad only when (nearly) all are; then the marks may be
        # stale.
        embedded(1, double(1, 1.0)),
        # update_merge_window: health reaches the fallback at once, not after Envoy's window of 1 s.
        duration(4, 0),
    )


def _transport_socket(tls: UpstreamTls) -> tuple[bytes, ...]:
    certificates = b""
    if tls.cert_file is not None and tls.key_file is not None:
        # tls_certificates: certificate_chain.filename, private_key.filename
        certificates = embedded(2, embedded(1, text(1, tls.cert_file)), embedded(2, text(1, tls.key_file)))
    # match_typed_subject_alt_names: san_type, matcher.exact
    san = embedded(15, number(1, _DNS), embedded(2, text(1, tls.server_name)))
    common = embedded(
        1,
        embedded(1, number(1, _TLS_1_2)),  # tls_params.tls_minimum_protocol_version
        certificates,
        embedded(3, embedded(1, text(1, tls.ca_file)), san),  # validation_context.trusted_ca.filename
    )
    name = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    sni = text(2, tls.server_name)
    return text(1, "envoy.transport_sockets.tls"), embedded(3, *_any(name, common, sni))


def _override_host() -> tuple[bytes, ...]:
    policies = "envoy.extensions.load_balancing_policies"
    choice_of_two = wrapped(1, 2)
    least_request = _policy(
        "envoy.load_balancing_policies.least_request",
        f"{policies}.least_request.v3.LeastRequest",
        choice_of_two,
    )
    # override_host_sources.metadata: key, path.key
    source = embedded(1, embedded(2, text(1, _DESTINATION_NAMESPACE), embedded(2, text(1, _DESTINATION_KEY))))
    fallback = embedded(3, least_request)
    return (
        _policy(
            "envoy.load_balancing_policies.override_host",
            f"{policies}.override_host.v3.OverrideHost",
            source,
            fallback,
        ),
    )


def _policy(name: str, message: str, *fields: bytes) -> bytes:
    """`LoadBalancingPolicy.policies.typed_extension_config`."""
    return embedded(1, embedded(4, text(1, name), embedded(2, *_any(message, *fields))))


def _any(name: str, *fields: bytes) -> tuple[bytes, bytes]:
    """`google.protobuf.Any`."""
    return text(1, f"type.googleapis.com/{name}"), embedded(2, *fields)
