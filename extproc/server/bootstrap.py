"""Envoy's bootstrap for a given gateway: the shipped envoy/bootstrap.yaml with its places filled in.

Pure but for `template`, which reads the shipped file.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

CREDENTIAL_HEADERS = ("authorization", "proxy-authorization", "x-api-key", "api-key", "cookie")
"""What proves who a client is; no engine's business unless `request.forward_credentials` says so."""

WORKER_CLUSTERS = ("tokenway-extproc", "tokenway-als", "tokenway-xds")


def shipped(name: str) -> Path:
    """A file that comes with the distribution: in the source tree, else under the installation's share."""
    source = Path(__file__).parents[2] / name
    return source if source.exists() else Path(sys.prefix) / "share" / "tokenway" / Path(name).name


def template() -> dict[str, Any]:
    """The shipped bootstrap."""
    document: dict[str, Any] = yaml.safe_load(shipped("envoy/bootstrap.yaml").read_text(encoding="utf-8"))
    return document


def render(
    document: dict[str, Any],
    *,
    listen: tuple[str, int],
    admin_port: int,
    sockets: Iterable[str],
    allow_headers: Collection[str] = (),
    max_body_bytes: int | None = None,
    forward_credentials: bool = False,
) -> str:
    """The bootstrap as YAML.

    Args:
        document: From `template`; edited.
        listen: Address and port for clients.
        admin_port: Of Envoy's own admin surface, on loopback.
        sockets: One per worker: a path, or `ip:port`.
        allow_headers: Steering headers that clients may use after all, lower case.
        max_body_bytes: Largest request body; None keeps the template's.
        forward_credentials: Engines get the client's `CREDENTIAL_HEADERS`.
    """
    document["admin"]["address"]["socket_address"]["port_value"] = admin_port
    static = document["static_resources"]
    (listener,) = static["listeners"]
    listener["address"]["socket_address"] = {"address": listen[0], "port_value": listen[1]}
    if max_body_bytes is not None:
        listener["per_connection_buffer_limit_bytes"] = max_body_bytes
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (early,) = manager["early_header_mutation_extensions"]
    mutations = early["typed_config"]["mutations"]
    mutations[:] = [mutation for mutation in mutations if mutation.get("remove") not in allow_headers]
    if forward_credentials:
        for host in manager["route_config"]["virtual_hosts"]:
            taken = host["request_headers_to_remove"]
            taken[:] = [name for name in taken if name not in CREDENTIAL_HEADERS]
    endpoints = [{"endpoint": {"address": _address(socket)}} for socket in sockets]
    for cluster in static["clusters"]:
        if cluster["name"] in WORKER_CLUSTERS:
            cluster["load_assignment"] = {
                "cluster_name": cluster["name"],
                "endpoints": [{"lb_endpoints": endpoints}],
            }
    text: str = yaml.dump(document, Dumper=_NoAliases, sort_keys=False, width=110)
    return text


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


def _address(socket: str) -> dict[str, Any]:
    if socket.startswith("/"):
        return {"pipe": {"path": socket}}
    host, _, port = socket.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
