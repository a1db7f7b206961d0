"""service.yaml: Tokenway as a service of Istio's, where no Kubernetes Service is it."""

from __future__ import annotations

from collections.abc import Sequence

from extproc.config.schema import Config
from extproc.config.sections.istio import IstioGateway
from extproc.istio_gateway.resources import GATEWAY, manifest
from extproc.istio_gateway.text import Manifest
from extproc.values.mesh_names import MeshName
from metadata_center.addresses import Address


def own_service(
    config: Config, gateway: IstioGateway, service: MeshName, sockets: Sequence[str]
) -> list[Manifest]:
    """Tokenway where no Kubernetes Service is it, and how it is spoken to.

    Args:
        config: Whose `edge.gateway` they have.
        gateway: In whose namespace they are.
        service: What Tokenway is called.
        sockets: Of its workers, `/path`, where `edge.gateway` has no addresses.
    """
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
        found.append(manifest("ServiceEntry", GATEWAY, gateway, spec))
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
        found.append(manifest("DestinationRule", GATEWAY, gateway, spec))
    return found


def _own_endpoint(place: str) -> Manifest:
    path = place.removeprefix("unix:")
    if path.startswith("/"):
        return {"address": f"unix://{path}"}
    address = Address.parse(place)
    return {"address": address.host, "ports": {"grpc-tokenway": address.port}}
