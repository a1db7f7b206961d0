"""What of our own bootstrap an Istio gateway takes, as fragments of Envoy configuration.

Rules:
    1. Pure: the bootstrap, filled in, and what replaces parts of it go in; fragments come out.
    2. A fragment has no extension that the oldest istio-proxy was built without (`ExtensionWithMatcher`,
       priority groups), and no field that is younger than its Envoy.
    3. What is said twice is a mistake: scripts, headers, log, bounds and replies are the bootstrap's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from extproc.values.headers import CLUSTER_HEADER

Fragment = dict[str, Any]

MANAGER_TYPE: Final = (
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
)

WORKER_CLUSTERS: Final = ("tokenway-extproc", "tokenway-als")
"""Clusters of the bootstrap that are one service of Istio's."""

_MATCHED: Final = "type.googleapis.com/envoy.extensions.common.matching.v3.ExtensionWithMatcher"

_LEAST_WINDOW_BYTES: Final = 65_535
"""Of HTTP/2, by Envoy."""

_OF_ISTIO: Final = frozenset({"@type", "stat_prefix", "use_remote_address", "http_filters", "route_config"})
"""What istiod fills in of a connection manager, or what is no scalar and patched by itself."""

_OF_LISTENER: Final = ("per_connection_buffer_limit_bytes", "listener_filters_timeout")
"""What is merged into istiod's listener."""

_NAMESPACES: Final = ["envoy.lb", "tokenway"]

_LB: Final = "type.googleapis.com/envoy.extensions.load_balancing_policies"


@dataclass(frozen=True, slots=True)
class Profile:
    """Fragments by where Istio puts them.

    Attributes:
        listener: Of the listener: largest request body, and how long a connection may say nothing.
        inspector: Its filter that waits for a connection's first bytes; without one that has no bound.
        manager: Of the HTTP connection manager.
        filters: HTTP filters, in the order in which a request passes them.
        router: Of the router's filter.
        nowhere: The action of the route that a request has before it is decided, and for good if nobody
            decides: how long its body may stop, and a cluster that there is not.
        fallback: That route's metadata.
        idle_timeout: Of all other routes, as `600s`: without it a request keeps that of `nowhere`.
        service: Of the cluster that is Tokenway.
        engines: Of the clusters of engines.
        removed: Request headers that end at the gateway.
        retries: The retry policy of routes.
        pinned_retries: That of requests which one endpoint alone can answer.
    """

    listener: Fragment
    inspector: Fragment
    manager: Fragment
    filters: tuple[Fragment, ...]
    router: Fragment
    nowhere: Fragment
    fallback: Fragment
    idle_timeout: str
    service: Fragment
    engines: Fragment
    removed: tuple[str, ...]
    retries: Fragment
    pinned_retries: Fragment


def profile_of(bootstrap: Mapping[str, Any], replaced: Mapping[str, Any], service: str) -> Profile:
    """What an Istio gateway takes.

    Args:
        bootstrap: Filled in; not changed.
        replaced: HTTP filters in place of the bootstrap's, by name (envoy/istio-proxy.yaml).
        service: The cluster that is Tokenway.
    """
    document = deepcopy(dict(bootstrap))
    static = document["static_resources"]
    (listener,) = static["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    pinned, nowhere = host["routes"][0], host["routes"][-1]
    (inspector,) = listener["listener_filters"]
    _adapt(manager, service)
    # What its Envoy buffers of an HTTP/2 request is a window of the stream: it has no limit of virtual hosts.
    window = max(_LEAST_WINDOW_BYTES, listener["per_connection_buffer_limit_bytes"])
    manager["http2_protocol_options"]["initial_stream_window_size"] = window
    filters = [_of_istio_proxy(each, replaced) for each in manager["http_filters"]]
    router = filters.pop()
    (worker,) = [each for each in static["clusters"] if each["name"] == WORKER_CLUSTERS[0]]
    return Profile(
        listener={name: listener[name] for name in _OF_LISTENER},
        inspector=inspector,
        manager=_manager(manager),
        filters=tuple(each for each in filters if each["name"] != "envoy.filters.http.cors"),
        router=router["typed_config"],
        nowhere={
            name: nowhere["route"][name]
            for name in ("cluster", "cluster_not_found_response_code", "idle_timeout")
        },
        fallback=nowhere["metadata"],
        idle_timeout=pinned["route"]["idle_timeout"],
        service={name: worker[name] for name in ("connect_timeout", "common_lb_config", "health_checks")},
        engines=ENGINES,
        removed=(*host["request_headers_to_remove"], CLUSTER_HEADER),
        retries=host["retry_policy"],
        pinned_retries=pinned["route"]["retry_policy"],
    )


def _manager(manager: Fragment) -> Fragment:
    """What is merged into istiod's: what clients may do, what is logged, how errors look."""
    (early,) = manager["early_header_mutation_extensions"]
    early["typed_config"]["mutations"].insert(0, {"remove": CLUSTER_HEADER})
    kept = {name: value for name, value in manager.items() if name not in _OF_ISTIO}
    if not kept["xff_num_trusted_hops"]:
        del kept["xff_num_trusted_hops"]  # the mesh's own setting stays
    return {"@type": MANAGER_TYPE, **kept}


def _of_istio_proxy(each: Fragment, replaced: Mapping[str, Any]) -> Fragment:
    """An HTTP filter that istio-proxy has."""
    if each["name"] in replaced:
        return dict(replaced[each["name"]])
    typed = each["typed_config"]
    if typed["@type"] == _MATCHED:  # the script itself looks for what the matcher matches
        return {"name": each["name"], "typed_config": typed["extension_config"]["typed_config"]}
    if "metadata_options" in typed:
        typed["metadata_options"] = {"receiving_namespaces": {"untyped": _NAMESPACES}}
    return each


def _adapt(node: Any, service: str) -> None:
    """Calls of Tokenway go to its service; a tag of the log that is a formatter is too young."""
    if isinstance(node, dict):
        if "custom_tags" in node:
            node["custom_tags"] = [tag for tag in node["custom_tags"] if "value" not in tag]
        if node.get("cluster_name") in WORKER_CLUSTERS:
            node["cluster_name"] = service
        for inner in node.values():
            _adapt(inner, service)
    elif isinstance(node, list):
        for inner in node:
            _adapt(inner, service)


def _policy(name: str, **settings: Any) -> Fragment:
    kind = "".join(word.capitalize() for word in name.split("_"))
    return {
        "policies": [
            {
                "typed_extension_config": {
                    "name": f"envoy.load_balancing_policies.{name}",
                    "typed_config": {"@type": f"{_LB}.{name}.v3.{kind}", **settings},
                }
            }
        ]
    }


ENGINES: Final[Fragment] = {
    "load_balancing_policy": _policy(
        "override_host",
        override_host_sources=[
            {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
        ],
        fallback_policy=_policy("least_request", choice_count=2),
    ),
    "common_lb_config": {"update_merge_window": "0s", "healthy_panic_threshold": {"value": 1}},
    "outlier_detection": {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 5,
        "enforcing_consecutive_5xx": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "5s",
        "max_ejection_time": "60s",
        "max_ejection_percent": 50,
    },
}
"""As `extproc.xds.resources` has it: the endpoint by metadata alone; health for Envoy's own choice."""
