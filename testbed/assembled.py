"""What `tokenway render istio` prints, put on a static Envoy by hand, so that it runs without istiod.

It is for tests and benchmarks of what Envoy makes of the fragments; that istiod applies them where they say
is shown with istiod itself.

Rules:
    1. The base is what istiod makes of a Gateway, a VirtualService and services, as far as patches touch it.
    2. Patches are merged as istiod merges: lists are appended, a member of a oneof replaces another.
    3. A patch that finds nothing to change is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Fragment = dict[str, Any]
Manifest = dict[str, Any]

ONE_OF = (
    frozenset({"cluster", "cluster_header", "weighted_clusters"}),
    frozenset({"route", "direct_response", "redirect"}),
)
"""Fields of a protobuf oneof that patches set."""

MANAGER = "envoy.filters.network.http_connection_manager"
ROUTER = "envoy.filters.http.router"


def assembled(
    manifests: Iterable[Manifest],
    *,
    port: int,
    admin_port: int,
    endpoints: Mapping[str, Iterable[tuple[str, int]]],
    sockets: Iterable[str],
) -> Fragment:
    """A static bootstrap for Envoy.

    Args:
        manifests: All that is rendered.
        port: For clients, on loopback.
        admin_port: Envoy's own admin surface, on loopback.
        endpoints: Of engines, by cluster.
        sockets: Paths of Tokenway's sockets.
    """
    by_kind: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        by_kind.setdefault(manifest["kind"], []).append(manifest)
    (service,) = [
        f"outbound|{each['spec']['ports'][0]['number']}||{each['spec']['hosts'][0]}"
        for each in by_kind["ServiceEntry"]
        if each["metadata"]["name"] == "tokenway"
    ]
    clusters = [_cluster(name, [_tcp(*each) for each in places]) for name, places in endpoints.items()]
    clusters.append(_cluster(service, [{"pipe": {"path": path}} for path in sockets], http2=True))
    (virtual,) = by_kind["VirtualService"]
    document: Fragment = {
        "admin": {"address": _tcp("127.0.0.1", admin_port)},
        "static_resources": {"listeners": [_listener(port, virtual)], "clusters": clusters},
    }
    for each in by_kind["EnvoyFilter"]:
        for patch in each["spec"]["configPatches"]:
            _apply(document, patch)
    return document


def _tcp(host: str, port: int) -> Fragment:
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster(name: str, addresses: list[Fragment], *, http2: bool = False) -> Fragment:
    options: Fragment = {"http2_protocol_options": {}} if http2 else {"http_protocol_options": {}}
    return {
        "name": name,
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "connect_timeout": "10s",
        "circuit_breakers": {"thresholds": [{"max_requests": 4294967295, "max_retries": 4294967295}]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": options,
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": each}} for each in addresses]}],
        },
    }


def _listener(port: int, virtual: Manifest) -> Fragment:
    router = {
        "name": ROUTER,
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
    }
    manager = {
        "@type": "type.googleapis.com/" + "envoy.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": f"outbound_0.0.0.0_{port}",
        "use_remote_address": True,
        "normalize_path": True,
        "http_filters": [router],
        "route_config": {
            "name": f"http.{port}",
            "validate_clusters": False,
            "virtual_hosts": [
                {"name": f"*:{port}", "domains": ["*"], "routes": list(_routes(virtual["spec"]["http"]))}
            ],
        },
    }
    return {
        "name": f"0.0.0.0_{port}",
        "address": _tcp("127.0.0.1", port),
        "filter_chains": [{"filters": [{"name": MANAGER, "typed_config": manager}]}],
    }


def _routes(http: Iterable[Manifest]) -> Iterable[Fragment]:
    for each in http:
        for match in each.get("match", [{}]):
            headers = [
                {"name": name, "string_match": {"exact": value["exact"]}}
                if value
                else {"name": name, "present_match": True}
                for name, value in match.get("headers", {}).items()
            ]
            if "method" in match:
                headers.append({"name": ":method", "string_match": match["method"]})
            route: Fragment = {"name": each["name"], "match": {"prefix": "/", "headers": headers}}
            if "directResponse" in each:
                route["direct_response"] = dict(each["directResponse"])
            else:
                route["route"] = _action(each)
                route["request_headers_to_remove"] = list(each["headers"]["request"]["remove"])
            yield route


def _action(http: Manifest) -> Fragment:
    (to,) = [each["destination"] for each in http["route"]]
    conditions = http["retries"]["retryOn"].split(",")
    return {
        "cluster": f"outbound|{to['port']['number']}|{to.get('subset', '')}|{to['host']}",
        "timeout": "0s",
        "retry_policy": {
            "retry_on": ",".join(each for each in conditions if not each.isdecimal()),
            "retriable_status_codes": [int(each) for each in conditions if each.isdecimal()],
            "num_retries": http["retries"]["attempts"],
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": "type.googleapis.com/"
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
            "host_selection_retry_max_attempts": 5,
        },
    }


def _apply(document: Fragment, patch: Manifest) -> None:
    (listener,) = document["static_resources"]["listeners"]
    (network,) = listener["filter_chains"][0]["filters"]
    manager = network["typed_config"]
    value, match = patch["patch"]["value"], patch["match"]
    assert match["context"] == "GATEWAY"
    match patch["applyTo"], patch["patch"]["operation"]:
        case "LISTENER", "MERGE":
            merge(listener, value)
        case "LISTENER_FILTER", "ADD":
            listener.setdefault("listener_filters", []).append(value)
        case "NETWORK_FILTER", "MERGE":
            assert match["listener"]["filterChain"]["filter"]["name"] == network["name"]
            merge(network, value)
        case "HTTP_FILTER", "INSERT_BEFORE":
            names = [each["name"] for each in manager["http_filters"]]
            before = match["listener"]["filterChain"]["filter"]["subFilter"]["name"]
            manager["http_filters"].insert(names.index(before), value)
        case "HTTP_FILTER", "MERGE":
            (router,) = [each for each in manager["http_filters"] if each["name"] == ROUTER]
            merge(router, value)
        case "VIRTUAL_HOST", "MERGE":
            for host in manager["route_config"]["virtual_hosts"]:
                merge(host, value)
        case "HTTP_ROUTE", "MERGE":
            wanted = match["routeConfiguration"]["vhost"]["route"]["name"]
            (host,) = manager["route_config"]["virtual_hosts"]
            found = [route for route in host["routes"] if route["name"] == wanted]
            assert found, wanted
            for route in found:
                merge(route, value)
        case "CLUSTER", "MERGE":
            of = match["cluster"]
            for cluster in document["static_resources"]["clusters"]:
                _, port, _, host = cluster["name"].split("|")  # direction|port|subset|host
                if (host, int(port)) == (of["service"], of["portNumber"]):
                    merge(cluster, value)
        case other:
            raise AssertionError(f"no such patch: {other}")


def merge(into: Fragment, value: Mapping[str, Any]) -> None:
    """As istiod merges a message into another."""
    for name, new in value.items():
        for group in ONE_OF:
            if name in group:
                for other in group - {name}:
                    into.pop(other, None)
        old = into.get(name)
        if isinstance(old, dict) and isinstance(new, Mapping):
            merge(old, new)
        elif isinstance(old, list) and isinstance(new, list):
            old.extend(new)
        else:
            into[name] = new
