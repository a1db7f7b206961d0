"""A foreign gateway on loopback: the real Envoy, configured as Istio configures it for an InferencePool.

The filter is Istio's (FULL_DUPLEX_STREAMED in both directions, all headers and trailers, 1,000 s, metadata
of `envoy.lb` alone) but for the hint of a subset, which Istio does not forward; the cluster by the metadata
is its too (override_host with the endpoint that served). A second listener goes by the header (ORIGINAL_DST),
as llm-d's own Envoy does, and never tries again.

Source: istio pilot/pkg/networking/core (filters, route, cluster_builder); llm-d-router deploy/environments.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import yaml

from testbed.processes import Subprocess, free_port
from tests.e2e.harness import Stack, answers, envoy_binary

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
"""Istio's default. With it Envoy 1.40 sends the body of a request with trailers twice (its pull
request 46095)."""

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

_HINT = "envoy.lb.subset_hint"


@dataclass(slots=True)
class PickerStack:
    """A gateway of ours as picker, and an Envoy that is not ours.

    Attributes:
        tokenway: The process, its files and its admin port.
        picker_port: Where it picks.
        by_metadata: URL of the listener whose cluster goes by metadata.
        by_header: URL of the one that goes by the header.
    """

    tokenway: Stack
    picker_port: int
    by_metadata: str
    by_header: str
    envoy: Subprocess | None = None

    def client(self) -> openai.AsyncOpenAI:
        """The official client, which must not hide failures by retrying."""
        return openai.AsyncOpenAI(
            base_url=f"{self.by_metadata}/v1", api_key="sk-test", max_retries=0, timeout=60
        )


def _listener(port: int, cluster: str, retries: Mapping[str, Any]) -> dict[str, Any]:
    processor = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"},
        "message_timeout": "1000s",
        "failure_mode_allow": False,
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND",
            "response_header_mode": "SEND",
            "response_body_mode": "FULL_DUPLEX_STREAMED",
            "response_trailer_mode": "SEND",
        },
        "metadata_options": {
            "forwarding_namespaces": {"untyped": ["envoy.lb", _HINT]},
            "receiving_namespaces": {"untyped": ["envoy.lb"]},
        },
    }
    # A gateway makes hints of what it knows; here of headers, so that a test can say them.
    hint = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
        "request_rules": [
            {
                "header": "x-test-subset",
                "on_header_present": {
                    "metadata_namespace": _HINT,
                    "key": "x-gateway-destination-endpoint-subset",
                    "type": "STRING",
                },
                "remove": True,
            }
        ],
    }
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    filters = [
        {"name": name, "typed_config": config}
        for name, config in (("hint", hint), ("picker", processor), ("router", router))
    ]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": cluster,
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
                            "route": {
                                "cluster": cluster,
                                "timeout": "0s",
                                **retries,
                            },
                        }
                    ],
                }
            ]
        },
    }
    return {
        "name": cluster,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
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


def bootstrap(
    metadata_port: int, header_port: int, admin_port: int, picker_port: int, ports: Sequence[int]
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
    picker = {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": NO_LIMITS,
        "typed_extension_protocol_options": HTTP2,
        "load_assignment": {
            "cluster_name": "picker",
            "endpoints": [{"lb_endpoints": [_endpoint(picker_port)]}],
        },
    }
    return json.dumps(
        {
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
            "static_resources": {
                "listeners": [
                    _listener(metadata_port, "pool", {"retry_policy": RETRIES}),
                    _listener(header_port, "original", {}),
                ],
                "clusters": [_pool(ports), by_header, picker],
            },
        }
    )


@asynccontextmanager
async def running_picker(
    clusters: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None = None, **settings: Any
) -> AsyncIterator[PickerStack]:
    """Picker first, then the foreign Envoy; everything is killed at the end.

    Args:
        clusters: As clusters.json has them; all their endpoints are in one cluster of the foreign Envoy.
        config: Of tokenway.yaml.
        settings: Of `endpoint_picker`.
    """
    folder = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))
    stack = Stack(folder, workers=1)
    picker_port, metadata_port, header_port, envoy_admin = (free_port() for _ in range(4))
    picker = PickerStack(
        stack, picker_port, f"http://127.0.0.1:{metadata_port}", f"http://127.0.0.1:{header_port}"
    )
    try:
        listen = [f"127.0.0.1:{picker_port}"]
        stack.write_config({**(config or {}), "endpoint_picker": {"listen": listen, **settings}})
        stack.write_clusters(*clusters)
        await stack.start_gateway()
        ports = [endpoint["port"] for each in clusters for endpoint in each["endpoints"]]
        path = folder / "envoy.yaml"
        path.write_text(
            yaml.safe_dump(json.loads(bootstrap(metadata_port, header_port, envoy_admin, picker_port, ports)))
        )
        picker.envoy = await Subprocess.start(
            [str(envoy_binary()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart"],
            folder / "envoy.log",
        )
        await answers(picker.envoy, f"http://127.0.0.1:{envoy_admin}/ready")
        yield picker
    finally:
        if picker.envoy is not None:
            await picker.envoy.kill()
        await stack.stop()
        shutil.rmtree(folder, ignore_errors=True)
