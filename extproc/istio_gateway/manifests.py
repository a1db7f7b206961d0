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
from typing import Any, Final

from extproc.config.clusters import ClusterSpec
from extproc.config.schema import Config
from extproc.istio_gateway.engines_file import engines
from extproc.istio_gateway.filters_file import filters
from extproc.istio_gateway.gateway_file import gateway_and_routes
from extproc.istio_gateway.profile import profile_of
from extproc.istio_gateway.resources import Open, RenderingError, destination_of, service_of
from extproc.istio_gateway.service_file import own_service
from extproc.istio_gateway.text import Manifest
from extproc.values.mesh_names import MeshName
from extproc.xds.open_models import open_models_and_any

OWN_HOST: Final = "tokenway.internal"
"""Tokenway, where no Kubernetes Service is it."""

OWN_PORT: Final = 9000

ACCEPTED: Final = "`host:port`, with a dot in the host, or Istio's own `outbound|port||host`"


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
    service = service_of(gateway.service or f"{OWN_HOST}:{OWN_PORT}")
    if service is None:
        raise RenderingError([f"istio_gateway.service: `{gateway.service}` is no host name and port"])
    profile = profile_of(bootstrap, replaced, str(service))
    hosts = sorted({destination.service for destination in destinations}, key=str)
    first = hosts[0] if hosts else default or service
    return {
        "gateway.yaml": gateway_and_routes(config, gateway, profile, opened, first),
        "engines.yaml": engines(config, gateway, destinations, clusters),
        "service.yaml": own_service(config, gateway, service, sockets),
        "envoyfilters.yaml": filters(config, gateway, profile, opened, [*hosts, service]),
    }


def _destinations(config: Config) -> tuple[set[MeshName], MeshName | None, list[Open]]:
    """Where rules go, where what is no inference goes, and which models Envoy may serve alone."""
    problems: list[str] = []
    found: set[MeshName] = set()
    for model_name, model in config.models.items():
        for i, rule in enumerate(model.rules):
            destination = destination_of(rule)
            if destination is None:
                place = f"models.{model_name}.rules[{i}].cluster"
                problems.append(f"{place}: `{rule.cluster}` is no service of Istio's; accepted: {ACCEPTED}")
            else:
                found.add(destination)
    default = None if config.default_cluster is None else service_of(config.default_cluster)
    if config.default_cluster is not None and default is None:
        problems.append(
            f"default_cluster: `{config.default_cluster}` is no service of Istio's; accepted: {ACCEPTED}"
        )
    if problems:
        raise RenderingError(problems)
    names: dict[MeshName, list[str]] = {}
    for name, rule in open_models_and_any(config).items():
        destination = destination_of(rule)
        if destination is not None and (not rule.subset or destination.subset):
            names.setdefault(destination, []).append(name)
    return found, default, [Open(tuple(of_it), destination) for destination, of_it in names.items()]
