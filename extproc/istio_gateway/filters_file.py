"""envoyfilters.yaml: what Istio's own resources cannot say, patched into what istiod makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from extproc.config.schema import Config
from extproc.config.sections.istio import IstioGateway
from extproc.istio_gateway.profile import Fragment, Profile
from extproc.istio_gateway.resources import (
    DECIDED,
    GATEWAY,
    NOWHERE,
    PINNED,
    Open,
    fallback_name,
    manifest,
)
from extproc.istio_gateway.text import Manifest
from extproc.values.headers import CLUSTER_HEADER
from extproc.values.mesh_names import MeshName
from extproc.values.requests import ANY_MODEL

FILTERS: Final = "networking.istio.io/v1alpha3"
"""EnvoyFilter has no later version."""

PRIORITY: Final = 10
"""Of the EnvoyFilters: behind those that have none."""

SCRIPT: Final = "tokenway.fallback"
"""The filter that reads requests without Tokenway."""

_MANAGER: Final = "envoy.filters.network.http_connection_manager"

_ROUTER: Final = "envoy.filters.http.router"


def filters(
    config: Config,
    gateway: IstioGateway,
    profile: Profile,
    opened: Sequence[Open],
    clusters: Sequence[MeshName],
) -> list[Manifest]:
    """The resources of the file.

    Args:
        config: Whose names of models a script knows.
        gateway: Which pods.
        profile: What is patched in.
        opened: Models that Envoy may serve alone.
        clusters: Of engines; the last is Tokenway.
    """
    *hosts, service = clusters
    return [
        _listener_filter(
            gateway, profile, is_tls=gateway.credential is not None or config.edge.tls is not None
        ),
        _routes_filter(config, gateway, profile, opened),
        _clusters_filter(gateway, profile, hosts, service),
    ]


def _filter(name: str, gateway: IstioGateway, patches: list[Manifest]) -> Manifest:
    spec = {
        "workloadSelector": {"labels": dict(gateway.selector)},
        "priority": PRIORITY,
        "configPatches": patches,
    }
    return manifest("EnvoyFilter", name, gateway, spec, FILTERS)


def _patch(applies_to: str, match: Manifest, operation: str, value: Manifest) -> Manifest:
    return {
        "applyTo": applies_to,
        "match": {"context": "GATEWAY", **match},
        "patch": {"operation": operation, "value": value},
    }


def _listener_filter(gateway: IstioGateway, profile: Profile, *, is_tls: bool) -> Manifest:
    """What our listener has: bounds, headers stripped early, ext_proc, scripts, access logs."""
    port = gateway.pod_port or gateway.port
    listener = {"listener": {"portNumber": port}}
    manager = {"listener": {"portNumber": port, "filterChain": {"filter": {"name": _MANAGER}}}}
    router = {
        "listener": {
            "portNumber": port,
            "filterChain": {"filter": {"name": _MANAGER, "subFilter": {"name": _ROUTER}}},
        }
    }
    return _filter(
        f"{GATEWAY}-listener",
        gateway,
        [
            _patch("LISTENER", listener, "MERGE", profile.listener),
            _first_bytes(listener, profile, is_tls=is_tls),
            _patch("NETWORK_FILTER", manager, "MERGE", {"name": _MANAGER, "typed_config": profile.manager}),
            *(_patch("HTTP_FILTER", router, "INSERT_BEFORE", each) for each in profile.filters),
            _patch("HTTP_FILTER", router, "MERGE", {"name": _ROUTER, "typed_config": profile.router}),
        ],
    )


def _first_bytes(listener: Manifest, profile: Profile, *, is_tls: bool) -> Manifest:
    """What has the listener's time-out hold for a connection that says nothing, and for a TLS handshake.

    A port for TLS has the filter by istiod, one for clear text has none.
    """
    if is_tls:
        timeout = {"transport_socket_connect_timeout": profile.listener["listener_filters_timeout"]}
        return _patch("FILTER_CHAIN", listener, "MERGE", timeout)
    return _patch("LISTENER_FILTER", listener, "ADD", profile.inspector)


def _with_names(fallback: Fragment, config: Config, opened: Sequence[Open]) -> Fragment:
    """What the script knows without Tokenway: where `*` is served, also which names are not its."""
    if all(ANY_MODEL not in model.names for model in opened):
        return fallback
    names = {name for key, model in config.models.items() for name in (key, *model.aliases)} - {ANY_MODEL}
    of_script = fallback["filter_metadata"][SCRIPT]
    settings = {**of_script["settings"], "names": sorted(names)}
    return {"filter_metadata": {SCRIPT: {**of_script, "settings": settings}}}


def _routes_filter(
    config: Config, gateway: IstioGateway, profile: Profile, opened: Sequence[Open]
) -> Manifest:
    """Routes that go where a header says, and one that goes nowhere.

    Found by names that are ours alone: istiod knows which Gateway a route is of only where that has TLS.
    """
    backoff = profile.retries["retry_back_off"]
    decided = {
        "route": {
            "cluster_header": CLUSTER_HEADER,
            "idle_timeout": profile.idle_timeout,
            "retry_policy": {"retry_back_off": backoff},
        }
    }
    nowhere = {"route": profile.nowhere, "metadata": _with_names(profile.fallback, config, opened)}
    fallbacks = [fallback_name(number) for number in range(len(opened))]
    counted = {"include_request_attempt_count": True}
    served = {"route": {"idle_timeout": profile.idle_timeout}}
    return _filter(
        f"{GATEWAY}-routes",
        gateway,
        [
            *(_patch("HTTP_ROUTE", _route(name), "MERGE", decided) for name in (PINNED, DECIDED)),
            *(_patch("HTTP_ROUTE", _route(name), "MERGE", served) for name in fallbacks),
            _patch("HTTP_ROUTE", _route(NOWHERE), "MERGE", nowhere),
            *(_patch("VIRTUAL_HOST", _host(name), "MERGE", counted) for name in gateway.hosts),
        ],
    )


def _route(name: str) -> Manifest:
    return {"routeConfiguration": {"vhost": {"route": {"name": name}}}}


def _host(name: str) -> Manifest:
    return {"routeConfiguration": {"vhost": {"domainName": name}}}


def _clusters_filter(
    gateway: IstioGateway, profile: Profile, hosts: Iterable[MeshName], service: MeshName
) -> Manifest:
    """Engines by the endpoint that a request names, and Tokenway by its health."""
    return _filter(
        f"{GATEWAY}-clusters",
        gateway,
        [
            *(_patch("CLUSTER", _cluster(host), "MERGE", profile.engines) for host in hosts),
            _patch("CLUSTER", _cluster(service), "MERGE", profile.service),
        ],
    )


def _cluster(destination: MeshName) -> Manifest:
    return {"cluster": {"service": destination.host, "portNumber": destination.port}}
