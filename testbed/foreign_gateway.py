"""The configuration of a gateway that is not ours: Envoy's, as Istio writes it for an InferencePool.

The filter is Istio's, with nothing in it but a cluster that is not there, and what counts is said per route
(FULL_DUPLEX_STREAMED in both directions, all headers and trailers, 1,000 s, metadata of `envoy.lb` alone),
but for the hint of a subset, which Istio does not forward; the cluster by the metadata is its too
(override_host with the endpoint that served). Other listeners differ as `LISTENERS` says.

Source: istio pilot/pkg/networking/core (filters, route, cluster_builder); llm-d-router deploy/environments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HTTP2 = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
}

HTTP1_WITH_TRAILERS = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http_protocol_options": {"enable_trailers": True}},
    }
}

RETRIES = {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2}
"""Istio's default. With it Envoy 1.40 sends a body that comes back in chunks twice if the request has
trailers (its pull request 46095)."""

NO_LIMITS = {
    "thresholds": [
        {
            "max_connections": 40_000,
            "max_pending_requests": 40_000,
            "max_requests": 40_000,
            "max_retries": 40_000,
        }
    ]
}

PROCESSOR = "envoy.filters.http.ext_proc"

HINT = "envoy.lb.subset_hint"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a listener differs from Istio's.

    Attributes:
        cluster: Where its requests go: `pool` goes by metadata, `original` by the header.
        answer: `response_body_mode`.
        answer_headers: `response_header_mode`; of trailers, too.
        picker: Which cluster it asks: `picker`, `dead` (where nothing listens), `gone` (it has no endpoint).
        opens: failureMode FailOpen.
        retries: The route's.
        is_logged: The picker is sent the access log.
        is_asked: It has the filter at all.
    """

    cluster: str = "pool"
    answer: str = "FULL_DUPLEX_STREAMED"
    answer_headers: str = "SEND"
    picker: str = "picker"
    opens: bool = False
    retries: bool = True
    is_logged: bool = False
    is_asked: bool = True


LISTENERS = {
    "metadata": Kind(),
    "unretried": Kind(retries=False),
    "alone": Kind(is_asked=False),
    "header": Kind(cluster="original", retries=False),
    "none": Kind(answer="NONE"),
    "streamed": Kind(answer="STREAMED"),
    "none_logged": Kind(answer="NONE", answer_headers="SKIP", is_logged=True),
    "streamed_logged": Kind(answer="STREAMED", answer_headers="SKIP", is_logged=True),
    "dead": Kind(picker="dead"),
    "dead_open": Kind(picker="dead", opens=True),
    "gone": Kind(picker="gone"),
    "gone_open": Kind(picker="gone", opens=True),
}
"""By name: Istio's own, the same without its retries, llm-d's own way (ORIGINAL_DST), those whose answers
are not wanted back, and those whose picker is not there."""


def _mode(kind: Kind) -> dict[str, str]:
    return {
        "request_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_header_mode": kind.answer_headers,
        "response_body_mode": kind.answer,
        "response_trailer_mode": kind.answer_headers,
    }


def _listener(name: str, port: int, kind: Kind) -> dict[str, Any]:
    processor = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "dummy"}, "timeout": "10s"},
        "message_timeout": "1000s",
        "failure_mode_allow": True,
        "processing_mode": {"request_header_mode": "SKIP", "response_header_mode": "SKIP"},
        "metadata_options": {
            "forwarding_namespaces": {"untyped": ["envoy.lb", HINT]},
            "receiving_namespaces": {"untyped": ["envoy.lb"]},
        },
    }
    of_route = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute",
        "overrides": {
            "grpc_service": {"envoy_grpc": {"cluster_name": kind.picker}, "timeout": "10s"},
            "failure_mode_allow": kind.opens,
            "processing_mode": _mode(kind),
        },
    }
    # Whoever gives hints makes them of what it knows; here of headers, so that a test can say them.
    hint = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
        "request_rules": [
            {
                "header": "x-test-subset",
                "on_header_present": {
                    "metadata_namespace": HINT,
                    "key": "x-gateway-destination-endpoint-subset",
                    "type": "STRING",
                },
                "remove": True,
            }
        ],
    }
    asked = [(PROCESSOR, processor)] if kind.is_asked else []
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    filters = [
        {"name": each, "typed_config": config}
        for each, config in (("hint", hint), *asked, ("router", router))
    ]
    route = {"cluster": kind.cluster, "timeout": "0s"} | ({"retry_policy": RETRIES} if kind.retries else {})
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "http_protocol_options": {"enable_trailers": True},
        "http_filters": filters,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": route,
                            "typed_per_filter_config": {PROCESSOR: of_route} if kind.is_asked else {},
                        }
                    ],
                }
            ]
        },
    }
    if kind.is_logged:
        manager["access_log"] = [_access_log()]
    return {
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _access_log() -> dict[str, Any]:
    """What an operator adds where streams are left early; docs/endpoint-picker.md shows it."""
    tags = [
        {"tag": "rid", "request_header": {"name": "x-tokenway-request-id"}},
        {"tag": "owner", "request_header": {"name": "x-tokenway-owner"}},
        {"tag": "ttft_us", "value": "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%"},
    ]
    common = {
        "log_name": "tokenway",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
        "buffer_flush_interval": "0.01s",
        "custom_tags": tags,
    }
    return {
        "name": "envoy.access_loggers.http_grpc",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": common,
            "additional_response_headers_to_log": ["content-type"],
        },
    }


def _endpoint(port: int) -> dict[str, Any]:
    return {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}


def _pool(ports: Sequence[int]) -> dict[str, Any]:
    """The cluster that Istio makes of an InferencePool."""
    round_robin = {
        "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
    }
    override = {
        "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [
            {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
        ],
        "selected_host_key": {
            "key": "envoy.lb",
            "path": [{"key": "x-gateway-destination-endpoint-served"}],
        },
        "fallback_policy": {
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "envoy.load_balancing_policies.round_robin",
                        "typed_config": round_robin,
                    }
                }
            ]
        },
    }
    policy = {"name": "envoy.load_balancing_policies.override_host", "typed_config": override}
    return {
        "name": "pool",
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": NO_LIMITS,
        "typed_extension_protocol_options": HTTP1_WITH_TRAILERS,
        "load_assignment": {
            "cluster_name": "pool",
            "endpoints": [{"lb_endpoints": [_endpoint(port) for port in ports]}],
        },
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
    }


def _picker(name: str, ports: Sequence[int], *, is_tls: bool = False) -> dict[str, Any]:
    """A cluster that is asked; TLS as a DestinationRule of mode SIMPLE with insecureSkipVerify has it."""
    made: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": NO_LIMITS,
        "typed_extension_protocol_options": HTTP2,
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [_endpoint(port) for port in ports]}],
        },
    }
    if is_tls:
        made["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": {"alpn_protocols": ["h2"]},
            },
        }
    return made


def bootstrap(
    listeners: Mapping[str, int],
    admin_port: int,
    picker_port: int,
    dead_port: int,
    ports: Sequence[int],
    *,
    is_tls: bool,
) -> str:
    """The foreign Envoy's configuration."""
    by_header = {
        "name": "original",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "circuit_breakers": NO_LIMITS,
        "typed_extension_protocol_options": HTTP1_WITH_TRAILERS,
        "original_dst_lb_config": {
            "use_http_header": True,
            "http_header_name": "x-gateway-destination-endpoint",
        },
    }
    return json.dumps(
        {
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
            "static_resources": {
                "listeners": [_listener(name, port, LISTENERS[name]) for name, port in listeners.items()],
                "clusters": [
                    _pool(ports),
                    by_header,
                    _picker("picker", [picker_port], is_tls=is_tls),
                    _picker("dead", [dead_port]),
                    _picker("gone", []),
                    _picker("dummy", []),
                ],
            },
        }
    )
