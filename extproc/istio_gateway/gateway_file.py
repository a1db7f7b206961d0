"""gateway.yaml: where clients connect (Gateway), and which way a request goes (VirtualService)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from extproc.config.schema import Config
from extproc.config.sections.edge import Cors, EdgeTls
from extproc.config.sections.fields import MODEL_ALIAS_PREFIX
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
from extproc.istio_gateway.tls import client_tls
from extproc.values.headers import OWNER_HEADER
from extproc.values.mesh_names import MeshName

MODEL_HEADER: Final = "x-tokenway-model"

RETRY_HEADER: Final = "x-envoy-retry-on"


def gateway_and_routes(
    config: Config, gateway: IstioGateway, profile: Profile, opened: Sequence[Open], first: MeshName
) -> list[Manifest]:
    """The resources of the file.

    Args:
        config: Whose TLS and CORS they have.
        gateway: Which pods.
        profile: Whose retries and removed headers they have.
        opened: Models with a route of their own, for when Tokenway is away.
        first: Any destination: a route must have one, before a filter has it read a header instead.
    """
    return [_gateway(gateway, config.edge.tls), _routes(config, gateway, profile, opened, first)]


def _gateway(gateway: IstioGateway, tls: EdgeTls | None) -> Manifest:
    server: Manifest = {
        "port": {"number": gateway.port, "name": "http-tokenway", "protocol": "HTTP"},
        "hosts": list(gateway.hosts),
    }
    if gateway.credential is not None or tls is not None:
        server["port"] = {"number": gateway.port, "name": "https-tokenway", "protocol": "HTTPS"}
        server["tls"] = client_tls(gateway.credential, tls)
    return manifest("Gateway", GATEWAY, gateway, {"selector": dict(gateway.selector), "servers": [server]})


def _routes(
    config: Config, gateway: IstioGateway, profile: Profile, opened: Sequence[Open], first: MeshName
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
                "name": fallback_name(number),
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
    return manifest("VirtualService", GATEWAY, gateway, spec)


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
