"""Envoy's bootstrap for a given gateway: the shipped envoy/bootstrap.yaml with its places filled in.

Pure but for `template`, which reads the shipped file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from extproc.config.rule_headers import SECRET_HEADERS

PROCESSOR = "tokenway.ext_proc"
"""Name of the filter that asks Tokenway."""

SHIPPED = Path(__file__).parents[1] / "shipped"

WORKER_CLUSTERS = ("tokenway-extproc", "tokenway-als", "tokenway-xds")


def shipped(name: str) -> Path:
    """A file that comes with the package, by its name in the repository (`etc/tokenway.yaml`) or alone.

    The repository keeps links in the package's place, so that operators find the files where they look for
    them; a wheel has the files themselves.
    """
    return SHIPPED / Path(name).name


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
    rule_headers: Collection[str] = (),
) -> str:
    """The bootstrap as YAML.

    Args:
        document: From `template`; edited.
        listen: Address and port for clients.
        admin_port: Of Envoy's own admin surface, on loopback.
        sockets: One per worker: a path, or `ip:port`.
        allow_headers: Steering headers that clients may use after all, lower case.
        max_body_bytes: Largest request body; None keeps the template's.
        rule_headers: Headers that rules match, lower case: forwarded, unless they are secret.
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
    patterns = _withholding(document)
    patterns[:] = [
        pattern
        for pattern in patterns
        if any(_matches(pattern, secret) for secret in SECRET_HEADERS)
        or not any(_matches(pattern, name) for name in rule_headers)
    ]
    endpoints = [{"endpoint": {"address": _address(socket)}} for socket in sockets]
    for cluster in static["clusters"]:
        if cluster["name"] in WORKER_CLUSTERS:
            cluster["load_assignment"] = {
                "cluster_name": cluster["name"],
                "endpoints": [{"lb_endpoints": endpoints}],
            }
    text: str = yaml.dump(document, Dumper=_NoAliases, sort_keys=False, width=110)
    return text


def withheld(document: dict[str, Any], names: Collection[str]) -> list[str]:
    """Those of these headers, lower case, that a bootstrap keeps from Tokenway, sorted."""
    patterns = _withholding(document)
    return sorted(name for name in names if any(_matches(pattern, name) for pattern in patterns))


def _withholding(document: dict[str, Any]) -> list[dict[str, str]]:
    """The patterns of headers that are not forwarded; edit in place."""
    (listener,) = document["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (ours,) = [one["typed_config"] for one in filters if one["name"] == PROCESSOR]
    patterns: list[dict[str, str]] = ours["forward_rules"]["disallowed_headers"]["patterns"]
    return patterns


def _matches(pattern: dict[str, str], name: str) -> bool:
    """Envoy's StringMatcher, as far as the bootstrap uses it."""
    ((kind, text),) = pattern.items()
    return {"exact": name == text, "prefix": name.startswith(text), "suffix": name.endswith(text)}[kind]


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


def _address(socket: str) -> dict[str, Any]:
    if socket.startswith("/"):
        return {"pipe": {"path": socket}}
    host, _, port = socket.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
