"""engines.yaml: how engines are spoken to (DestinationRule), and which clusters.json lists (ServiceEntry)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from extproc.config.clusters import ClusterSpec, EndpointSpec
from extproc.config.schema import Config
from extproc.config.sections.engines import EngineTls
from extproc.config.sections.istio import IstioGateway
from extproc.istio_gateway.resources import RenderingError, manifest, service_of
from extproc.istio_gateway.text import Manifest
from extproc.istio_gateway.tls import engine_tls
from extproc.values.endpoints import SUBSET_LABEL
from extproc.values.mesh_names import MeshName

_CONNECT_TIMEOUT: Final = "0.5s"

_IDLE_TIMEOUT: Final = "4s"
"""vLLM closes idle connections after 5.0 s; Envoy must be first or requests race the close."""


def engines(
    config: Config,
    gateway: IstioGateway,
    destinations: Iterable[MeshName],
    clusters: Iterable[ClusterSpec],
) -> list[Manifest]:
    """A DestinationRule for each host, and a ServiceEntry for each that clusters.json lists.

    Args:
        config: Whose TLS to engines they have.
        gateway: In whose namespace they are.
        destinations: Of rules.
        clusters: Of clusters.json.

    Raises:
        RenderingError: What clusters.json lists has no form in Istio.
    """
    found: list[Manifest] = []
    listed = {service_of(cluster.name): cluster.endpoints for cluster in clusters}
    for host in sorted({destination.host for destination in destinations}):
        of_host = [destination for destination in destinations if destination.host == host]
        name = host.replace(".", "-")
        ports = {each.port: listed[each.service] for each in of_host if each.service in listed}
        if ports:
            found.append(manifest("ServiceEntry", name, gateway, _entry(host, ports)))
        tls = {each.port: _engine_tls(config, each) for each in of_host}
        found.append(manifest("DestinationRule", name, gateway, _rule(host, of_host, tls)))
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
    found = {service_of(name): tls for name, tls in config.engine_tls.items()}
    return found.get(destination.service)
