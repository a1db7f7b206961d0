"""A configuration → the resources that an Istio gateway needs, as Kubernetes has them.

Rules:
    1. Pure and deterministic: equal input gives equal text.
    2. Istio's own resources say what they can (hosts, ports, routes, retries, connections, TLS); EnvoyFilters
       say the rest.
    3. A request that Tokenway did not answer goes where its model's default rule says, or nowhere: never
       further than with Tokenway.
    4. What our own clusters.json lists of a host of Istio's becomes its ServiceEntry; a host without is
       somebody else's to declare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from extproc.config.clusters import ClusterSpec, EndpointSpec
from extproc.config.schema import Config
from extproc.config.sections.edge import Cors, EdgeTls
from extproc.config.sections.engines import EngineTls
from extproc.config.sections.fields import MODEL_ALIAS_PREFIX
from extproc.config.sections.istio import IstioGateway
from extproc.config.sections.models import RuleSection
from extproc.istio_gateway.profile import Fragment, Profile, profile_of
from extproc.istio_gateway.text import Manifest
from extproc.istio_gateway.tls import client_tls, engine_tls
from extproc.values.endpoints import SUBSET_LABEL
from extproc.values.headers import CLUSTER_HEADER, OWNER_HEADER
from extproc.values.mesh_names import MeshName
from extproc.values.requests import ANY_MODEL
from extproc.xds.open_models import open_models_and_any
from metadata_center.addresses import Address

NETWORKING: Final = "networking.istio.io/v1"

FILTERS: Final = "networking.istio.io/v1alpha3"
"""EnvoyFilter has no later version."""

GATEWAY: Final = "tokenway"
"""Name of the Gateway and of what belongs to it."""

OWN_HOST: Final = "tokenway.internal"
"""Tokenway, where no Kubernetes Service is it."""

OWN_PORT: Final = 9000

PINNED: Final = "tokenway-pinned"
DECIDED: Final = "tokenway-decided"
NOWHERE: Final = "tokenway-nowhere"
FALLBACK: Final = "tokenway-fallback"
"""Names of routes; those of fallbacks have a number behind."""

ACCEPTED: Final = "`host:port`, with a dot in the host, or Istio's own `outbound|port||host`"

MODEL_HEADER: Final = "x-tokenway-model"

RETRY_HEADER: Final = "x-envoy-retry-on"

PRIORITY: Final = 10
"""Of the EnvoyFilters: behind those that have none."""

SCRIPT: Final = "tokenway.fallback"
"""The filter that reads requests without Tokenway."""

_MANAGER: Final = "envoy.filters.network.http_connection_manager"

_ROUTER: Final = "envoy.filters.http.router"

_CONNECT_TIMEOUT: Final = "0.5s"

_IDLE_TIMEOUT: Final = "4s"
"""vLLM closes idle connections after 5.0 s; Envoy must be first or requests race the close."""


class RenderingError(ValueError):
    """What a configuration says has no form in Istio.

    Attributes:
        problems: One sentence each, with the setting.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class _Open:
    """A model that Envoy may serve alone.

    Attributes:
        names: Of the model, as clients know it.
        destination: Where its default rule goes.
    """

    names: tuple[str, ...]
    destination: MeshName


def files(
    config: Config,
    clusters: Iterable[ClusterSpec],
    bootstrap: Mapping[str, Any],
    replaced: Mapping[str, Any],
    sockets: Sequence[str],
) -> dict[str, list[Manifest]]:
    """The resources, by the file that each is in.

    Args:
        config: With `istio_gateway`.
        clusters: Of clusters.json.
        bootstrap: Our own Envoy's, filled in for this configuration.
        replaced: See `profile_of`.
        sockets: Of Tokenway's workers, `/path`.

    Raises:
        RenderingError: A setting has no form in Istio.
    """
    gateway = config.istio_gateway
    if gateway is None:
        raise RenderingError(["istio_gateway: not given; accepted: {} for an ingress gateway on port 80"])
    destinations, default, opened = _destinations(config)
    service = _service(gateway.service or f"{OWN_HOST}:{OWN_PORT}")
    if service is None:
        raise RenderingError([f"istio_gateway.service: `{gateway.service}` is no host name and port"])
    profile = profile_of(bootstrap, replaced, str(service))
    hosts = sorted({destination.service for destination in destinations}, key=str)
    first = hosts[0] if hosts else default or service
    return {
        "gateway.yaml": [
            _gateway(gateway, config.edge.tls),
            _routes(config, gateway, profile, opened, first),
        ],
        "engines.yaml": _engines(config, gateway, destinations, clusters),
        "service.yaml": _own_service(config, gateway, service, sockets),
        "envoyfilters.yaml": [
            _listener_filter(gateway, profile),
            _routes_filter(gateway, _with_names(profile.fallback, config, opened), profile),
            _clusters_filter(gateway, profile, hosts, service),
        ],
    }


def _destinations(config: Config) -> tuple[set[MeshName], MeshName | None, list[_Open]]:
    """Where rules go, where what is no inference goes, and which models Envoy may serve alone."""
    problems: list[str] = []
    found: set[MeshName] = set()
    for model_name, model in config.models.items():
        for i, rule in enumerate(model.rules):
            destination = _destination(rule)
            if destination is None:
                place = f"models.{model_name}.rules[{i}].cluster"
                problems.append(f"{place}: `{rule.cluster}` is no service of Istio's; accepted: {ACCEPTED}")
            else:
                found.add(destination)
    default = None if config.default_cluster is None else _service(config.default_cluster)
    if config.default_cluster is not None and default is None:
        problems.append(
            f"default_cluster: `{config.default_cluster}` is no service of Istio's; accepted: {ACCEPTED}"
        )
    if problems:
        raise RenderingError(problems)
    names: dict[MeshName, list[str]] = {}
    for name, rule in open_models_and_any(config).items():
        destination = _destination(rule)
        if destination is not None and (not rule.subset or destination.subset):
            names.setdefault(destination, []).append(name)
    return found, default, [_Open(tuple(of_it), destination) for destination, of_it in names.items()]


def _service(name: str) -> MeshName | None:
    """A cluster's name as Istio has it; None for another: Istio takes a host without a dot for another."""
    found = MeshName.of(name)
    return found if found is not None and "." in found.host else None


def _destination(rule: RuleSection) -> MeshName | None:
    """Where a rule goes; its subset if that is the only label it asks for."""
    destination = _service(rule.cluster)
    if destination is None or destination.subset or set(rule.subset) != {SUBSET_LABEL}:
        return destination
    return replace(destination, subset=rule.subset[SUBSET_LABEL])


def _manifest(
    kind: str, name: str, gateway: IstioGateway, spec: Manifest, version: str = NETWORKING
) -> Manifest:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "namespace": gateway.namespace},
        "spec": spec,
    }


def _gateway(gateway: IstioGateway, tls: EdgeTls | None) -> Manifest:
    server: Manifest = {
        "port": {"number": gateway.port, "name": "http-tokenway", "protocol": "HTTP"},
        "hosts": list(gateway.hosts),
    }
    if gateway.credential is not None or tls is not None:
        server["port"] = {"number": gateway.port, "name": "https-tokenway", "protocol": "HTTPS"}
        server["tls"] = client_tls(gateway.credential, tls)
    return _manifest("Gateway", GATEWAY, gateway, {"selector": dict(gateway.selector), "servers": [server]})


def _routes(
    config: Config, gateway: IstioGateway, profile: Profile, opened: Sequence[_Open], first: MeshName
) -> Manifest:
    """Routes in the order of our bootstrap's; an EnvoyFilter has the first two read the cluster's name."""
    removed = {"headers": {"request": {"remove": list(profile.removed)}}}
    placeholder = {"route": [_to(first)]}
    http: list[Manifest] = [
        {
            "name": PINNED,
            "match": [{"headers": {OWNER_HEADER: {}, RETRY_HEADER: {}}}],
            **placeholder,
            "retries": _retries(profile.pinned_retries),
            **removed,
        },
        {
            "name": DECIDED,
            "match": [{"headers": {OWNER_HEADER: {}}}],
            **placeholder,
            "retries": _retries(profile.retries),
            **removed,
        },
        *(
            {
                "name": f"{FALLBACK}-{number}",
                "match": [
                    {
                        "method": {"exact": "POST"},
                        "headers": {MODEL_HEADER: {"exact": MODEL_ALIAS_PREFIX + name}},
                    }
                    for name in model.names
                ],
                "route": [_to(model.destination)],
                "retries": _retries(profile.retries),
                **removed,
            }
            for number, model in enumerate(opened)
        ),
        {"name": NOWHERE, "directResponse": {"status": 404}},
    ]
    if config.edge.cors is not None:
        http = [{**route, "corsPolicy": _cors(config.edge.cors)} for route in http]
    spec = {"hosts": list(gateway.hosts), "gateways": [f"{gateway.namespace}/{GATEWAY}"], "http": http}
    return _manifest("VirtualService", GATEWAY, gateway, spec)


def _to(destination: MeshName) -> Manifest:
    target: Manifest = {"host": destination.host, "port": {"number": destination.port}}
    return {"destination": target | ({"subset": destination.subset} if destination.subset else {})}


def _retries(policy: Fragment) -> Manifest:
    """Envoy's retry policy in a VirtualService's words, where statuses are conditions like others."""
    on = [*policy["retry_on"].split(","), *map(str, policy.get("retriable_status_codes", ()))]
    return {"attempts": policy["num_retries"], "retryOn": ",".join(on)}


def _cors(cors: Cors) -> Manifest:
    origins = [{"regex": ".*"}] if "*" in cors.origins else [{"exact": origin} for origin in cors.origins]
    return {
        "allowOrigins": origins,
        "allowMethods": ["GET", "HEAD", "POST", "DELETE"],
        "allowHeaders": list(cors.headers),
        "exposeHeaders": list(cors.expose_headers),
        "maxAge": f"{cors.max_age_s}s",
        "unmatchedPreflights": "IGNORE",
    }


def _engines(
    config: Config,
    gateway: IstioGateway,
    destinations: Iterable[MeshName],
    clusters: Iterable[ClusterSpec],
) -> list[Manifest]:
    """A DestinationRule for each host, and a ServiceEntry for each that clusters.json lists."""
    found: list[Manifest] = []
    listed = {_service(cluster.name): cluster.endpoints for cluster in clusters}
    for host in sorted({destination.host for destination in destinations}):
        of_host = [destination for destination in destinations if destination.host == host]
        name = host.replace(".", "-")
        ports = {each.port: listed[each.service] for each in of_host if each.service in listed}
        if ports:
            found.append(_manifest("ServiceEntry", name, gateway, _entry(host, ports)))
        tls = {each.port: _engine_tls(config, each) for each in of_host}
        found.append(_manifest("DestinationRule", name, gateway, _rule(host, of_host, tls)))
    return found


def _entry(host: str, ports: Mapping[int, Sequence[EndpointSpec]]) -> Manifest:
    """One ServiceEntry.

    Raises:
        RenderingError: An endpoint is a host name, or is listed for one port of several: a ServiceEntry has
            each of its addresses at each of its ports.
    """
    names = {port: f"http-{port}" for port in sorted(ports)}
    rows: dict[tuple[str, int], Manifest] = {}
    for port, name in names.items():
        for i, spec in enumerate(ports[port]):
            if spec.is_host_name:
                raise RenderingError(
                    [f"clusters_file: `{spec.address}` of {host}:{port} is a host name; accepted: addresses"]
                )
            row = rows.setdefault(
                (spec.address, i if len(names) == 1 else 0),
                {
                    "address": spec.address,
                    "ports": {},
                    **({"weight": spec.weight} if spec.weight != 1 else {}),
                    **({"labels": dict(spec.labels)} if spec.labels else {}),
                },
            )
            row["ports"][name] = spec.port
    if any(set(row["ports"]) != set(names.values()) for row in rows.values()):
        raise RenderingError(
            [f"clusters_file: {host} has other addresses at one port than at another: declare it in Istio"]
        )
    return {
        "hosts": [host],
        "location": "MESH_EXTERNAL",
        "resolution": "STATIC",
        "ports": [{"number": port, "name": name, "protocol": "HTTP"} for port, name in names.items()],
        "endpoints": list(rows.values()),
    }


def _rule(host: str, destinations: Sequence[MeshName], tls: Mapping[int, EngineTls | None]) -> Manifest:
    policy: Manifest = {
        "connectionPool": {
            "tcp": {"connectTimeout": _CONNECT_TIMEOUT},
            "http": {"idleTimeout": _IDLE_TIMEOUT, "h2UpgradePolicy": "DO_NOT_UPGRADE"},
        }
    }
    spoken = {port: settings for port, settings in tls.items() if settings is not None}
    if spoken:
        policy["portLevelSettings"] = [
            {"port": {"number": port}, **policy, "tls": engine_tls(settings)}
            for port, settings in sorted(spoken.items())
        ]
    subsets = sorted({destination.subset for destination in destinations if destination.subset})
    spec: Manifest = {"host": host, "trafficPolicy": policy}
    if subsets:
        spec["subsets"] = [{"name": name, "labels": {SUBSET_LABEL: name}} for name in subsets]
    return spec


def _engine_tls(config: Config, destination: MeshName) -> EngineTls | None:
    found = {_service(name): tls for name, tls in config.engine_tls.items()}
    return found.get(destination.service)


def _own_service(
    config: Config, gateway: IstioGateway, service: MeshName, sockets: Sequence[str]
) -> list[Manifest]:
    """Tokenway where no Kubernetes Service is it, and how it is spoken to."""
    found: list[Manifest] = []
    address = config.edge.gateway
    if gateway.service is None:
        places = sockets if address is None else address.addresses
        spec: Manifest = {
            "hosts": [service.host],
            "location": "MESH_EXTERNAL",
            "resolution": "STATIC",
            "ports": [{"number": service.port, "name": "grpc-tokenway", "protocol": "GRPC"}],
            "endpoints": [_own_endpoint(place) for place in places],
        }
        found.append(_manifest("ServiceEntry", GATEWAY, gateway, spec))
    if address is not None and address.ca_file is not None:
        spec = {
            "host": service.host,
            "trafficPolicy": {
                "tls": {
                    "mode": "MUTUAL",
                    "clientCertificate": address.cert_file,
                    "privateKey": address.key_file,
                    "caCertificates": address.ca_file,
                    "sni": address.server_name,
                    "subjectAltNames": [address.server_name],
                }
            },
        }
        found.append(_manifest("DestinationRule", GATEWAY, gateway, spec))
    return found


def _own_endpoint(place: str) -> Manifest:
    path = place.removeprefix("unix:")
    if path.startswith("/"):
        return {"address": f"unix://{path}"}
    address = Address.parse(place)
    return {"address": address.host, "ports": {"grpc-tokenway": address.port}}


def _filter(name: str, gateway: IstioGateway, patches: list[Manifest]) -> Manifest:
    spec = {
        "workloadSelector": {"labels": dict(gateway.selector)},
        "priority": PRIORITY,
        "configPatches": patches,
    }
    return _manifest("EnvoyFilter", name, gateway, spec, FILTERS)


def _patch(applies_to: str, match: Manifest, operation: str, value: Manifest) -> Manifest:
    return {
        "applyTo": applies_to,
        "match": {"context": "GATEWAY", **match},
        "patch": {"operation": operation, "value": value},
    }


def _listener_filter(gateway: IstioGateway, profile: Profile) -> Manifest:
    """What our listener has: bounds, headers stripped early, ext_proc, scripts, access logs."""
    port = gateway.pod_port or gateway.port
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
            _patch(
                "LISTENER",
                {"listener": {"portNumber": port}},
                "MERGE",
                {"per_connection_buffer_limit_bytes": profile.buffer_limit_bytes},
            ),
            _patch("NETWORK_FILTER", manager, "MERGE", {"name": _MANAGER, "typed_config": profile.manager}),
            *(_patch("HTTP_FILTER", router, "INSERT_BEFORE", each) for each in profile.filters),
            _patch("HTTP_FILTER", router, "MERGE", {"name": _ROUTER, "typed_config": profile.router}),
        ],
    )


def _with_names(fallback: Fragment, config: Config, opened: Sequence[_Open]) -> Fragment:
    """What the script knows without Tokenway: where `*` is served, also which names are not its."""
    if all(ANY_MODEL not in model.names for model in opened):
        return fallback
    names = {name for key, model in config.models.items() for name in (key, *model.aliases)} - {ANY_MODEL}
    of_script = fallback["filter_metadata"][SCRIPT]
    settings = {**of_script["settings"], "names": sorted(names)}
    return {"filter_metadata": {SCRIPT: {**of_script, "settings": settings}}}


def _routes_filter(gateway: IstioGateway, fallback: Fragment, profile: Profile) -> Manifest:
    """Routes that go where a header says, and one that goes nowhere."""
    backoff = profile.retries["retry_back_off"]
    decided = {"route": {"cluster_header": CLUSTER_HEADER, "retry_policy": {"retry_back_off": backoff}}}
    nowhere = {
        "route": {"cluster": "tokenway-none", "cluster_not_found_response_code": "NOT_FOUND"},
        "metadata": fallback,
    }
    of_gateway = {"routeConfiguration": {"gateway": f"{gateway.namespace}/{GATEWAY}"}}
    return _filter(
        f"{GATEWAY}-routes",
        gateway,
        [
            *(_patch("HTTP_ROUTE", _route(name), "MERGE", decided) for name in (PINNED, DECIDED)),
            _patch("HTTP_ROUTE", _route(NOWHERE), "MERGE", nowhere),
            _patch("VIRTUAL_HOST", of_gateway, "MERGE", {"include_request_attempt_count": True}),
        ],
    )


def _route(name: str) -> Manifest:
    return {"routeConfiguration": {"vhost": {"route": {"name": name}}}}


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
