"""Envoy's bootstrap for a given gateway: the shipped envoy/bootstrap.yaml with its places filled in.

Pure but for `shipped_document` and `template`, which read shipped files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from extproc.config.notation import read_yaml
from extproc.config.rule_headers import SECRET_HEADERS
from extproc.config.sections.edge import Away, Cors, Edge, EdgeTls
from extproc.config.sections.listening import GatewayAddress
from metadata_center.addresses import Address

PROCESSOR = "tokenway.ext_proc"
"""Name of the filter that asks Tokenway."""

SHIPPED = Path(__file__).parents[2] / "shipped"

WORKER_CLUSTERS = ("tokenway-extproc", "tokenway-als", "tokenway-xds")

_AWAY, _EDGE = Away(), Edge()
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"


def shipped(name: str) -> Path:
    """A file that comes with the package, by its name in the repository (`etc/tokenway.yaml`) or alone.

    The repository keeps links in the package's place, so that operators find the files where they look for
    them; a wheel has the files themselves.
    """
    return SHIPPED / Path(name).name


def shipped_document(name: str) -> dict[str, Any]:
    """What a YAML file that comes with the package says; libyaml reads it where it is installed."""
    text = shipped(name).read_text(encoding="utf-8")
    document: dict[str, Any] = read_yaml(text, name).data
    return document


def template() -> dict[str, Any]:
    """The shipped bootstrap."""
    return shipped_document("envoy/bootstrap.yaml")


def fill(
    document: dict[str, Any],
    *,
    listen: tuple[str, int],
    admin_port: int,
    sockets: Iterable[str],
    allow_headers: Collection[str] = (),
    max_body_bytes: int | None = None,
    rule_headers: Collection[str] = (),
    allow_fields: Collection[str] = (),
    away: Away = _AWAY,
    edge: Edge = _EDGE,
    others: str = "unknown",
    forward_credentials: bool = False,
) -> None:
    """Put settings into the places of a bootstrap.

    Args:
        document: From `template`; edited.
        listen: Address and port for clients.
        admin_port: Of Envoy's own admin surface, on loopback.
        sockets: One per worker: a path, or `ip:port`.
        allow_headers: Steering headers that clients may use after all, lower case.
        max_body_bytes: Largest request body; None keeps the template's.
        rule_headers: Headers that rules match, lower case: forwarded, unless they are secret.
        allow_fields: Steering fields of a body that clients may use after all, also while Tokenway is away.
        away: What goes on without Tokenway.
        edge: Bounds, TLS and CORS towards clients, and where Tokenway is.
        others: While Tokenway is away, paths that are no inference are `unknown` (404) or `refuse`d (503).
        forward_credentials: Engines get the client's `SECRET_HEADERS`.
    """
    document["admin"]["address"]["socket_address"]["port_value"] = admin_port
    static = document["static_resources"]
    (listener,) = static["listeners"]
    listener["address"]["socket_address"] = {"address": listen[0], "port_value": listen[1]}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    if max_body_bytes is not None:
        (host,) = manager["route_config"]["virtual_hosts"]
        listener["per_connection_buffer_limit_bytes"] = max_body_bytes
        host["request_body_buffer_limit"] = max_body_bytes
    _set_headers(document, manager, allow_headers, rule_headers, forward_credentials=forward_credentials)
    _set_workers(static, sockets, edge.gateway)
    _set_away(manager, away, allow_fields, others)
    _set_bounds(document, manager, edge)
    listener["listener_filters_timeout"] = _duration(edge.headers_timeout_s)
    if edge.tls is not None:
        _add_tls(listener, edge)
    if edge.cors is not None:
        _add_cors(manager, edge.cors)


def as_yaml(document: dict[str, Any]) -> str:
    """A bootstrap as Envoy reads it."""
    text: str = yaml.dump(document, Dumper=_NoAliases, sort_keys=False, width=110)
    return text


def withheld(document: dict[str, Any], names: Collection[str]) -> list[str]:
    """Those of these headers, lower case, that a bootstrap keeps from Tokenway, sorted."""
    patterns = _withholding(document)
    return sorted(name for name in names if any(_matches(pattern, name) for pattern in patterns))


def _set_headers(
    document: dict[str, Any],
    manager: dict[str, Any],
    allow_headers: Collection[str],
    rule_headers: Collection[str],
    *,
    forward_credentials: bool,
) -> None:
    """Which headers clients may use, engines get, and Tokenway sees."""
    (early,) = manager["early_header_mutation_extensions"]
    mutations = early["typed_config"]["mutations"]
    mutations[:] = [mutation for mutation in mutations if mutation.get("remove") not in allow_headers]
    if forward_credentials:
        for host in manager["route_config"]["virtual_hosts"]:
            taken = host["request_headers_to_remove"]
            taken[:] = [name for name in taken if name not in SECRET_HEADERS]
    patterns = _withholding(document)
    patterns[:] = [
        pattern
        for pattern in patterns
        if any(_matches(pattern, secret) for secret in SECRET_HEADERS)
        or not any(_matches(pattern, name) for name in rule_headers)
    ]


def _set_workers(static: dict[str, Any], sockets: Iterable[str], gateway: GatewayAddress | None) -> None:
    """Where Tokenway is."""
    places = sockets if gateway is None else gateway.addresses
    endpoints = [{"endpoint": {"address": _address(place)}} for place in places]
    for cluster in static["clusters"]:
        if cluster["name"] in WORKER_CLUSTERS:
            cluster["load_assignment"] = {
                "cluster_name": cluster["name"],
                "endpoints": [{"lb_endpoints": endpoints}],
            }
            if gateway is not None and gateway.ca_file is not None:
                cluster["transport_socket"] = _mutual_tls(gateway)


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


def _set_away(manager: dict[str, Any], away: Away, allow_fields: Collection[str], others: str) -> None:
    (host,) = manager["route_config"]["virtual_hosts"]
    nowhere = host["routes"][-1]
    settings = nowhere["metadata"]["filter_metadata"]["tokenway.fallback"]["settings"]
    settings |= {"gone": away.gone, "late": away.late, "others": others}
    settings["fields"] = [name for name in settings["fields"] if name not in allow_fields]
    settings["xargs"] = [name for name in settings["xargs"] if f"vllm_xargs.{name}" not in allow_fields]
    (processor,) = [each for each in manager["http_filters"] if each["name"] == "tokenway.ext_proc"]
    processor["typed_config"]["message_timeout"] = _duration(away.after_s)


def _set_bounds(document: dict[str, Any], manager: dict[str, Any], edge: Edge) -> None:
    document["node"]["metadata"]["edge"]["max_downstream_connections"] = edge.max_connections
    heap, connections = document["overload_manager"]["resource_monitors"]
    heap["typed_config"]["max_heap_size_bytes"] = edge.max_heap_bytes
    connections["typed_config"]["max_active_downstream_connections"] = edge.max_connections
    _scaled_idle_timeout(document)["min_timeout"] = _duration(
        min(edge.headers_timeout_s, edge.idle_timeout_s)
    )
    document["admin"]["allow_paths"] += [{"prefix": path} for path in edge.admin_paths]
    manager["request_headers_timeout"] = _duration(edge.headers_timeout_s)
    manager["request_timeout"] = _duration(edge.upload_timeout_s)
    common = manager["common_http_protocol_options"]
    common["idle_timeout"] = _duration(edge.idle_timeout_s)
    common["max_connection_duration"] = _duration(edge.max_connection_s)
    manager["http2_protocol_options"]["max_concurrent_streams"] = edge.max_streams
    manager["xff_num_trusted_hops"] = edge.trusted_hops
    if edge.keep_request_id:
        manager["preserve_external_request_id"] = True


def _scaled_idle_timeout(document: dict[str, Any]) -> dict[str, Any]:
    """What an idle connection still has when nearly all connections are taken."""
    (action,) = [
        each
        for each in document["overload_manager"]["actions"]
        if each["name"] == "envoy.overload_actions.reduce_timeouts"
    ]
    (scaled,) = action["typed_config"]["timer_scale_factors"]
    factor: dict[str, Any] = scaled
    return factor


def _add_tls(listener: dict[str, Any], edge: Edge) -> None:
    """TLS for clients; a handshake that stops half way ends as half headers do."""
    assert edge.tls is not None
    (chain,) = listener["filter_chains"]
    chain["transport_socket_connect_timeout"] = _duration(edge.headers_timeout_s)
    chain["transport_socket"] = _client_tls(edge.tls)


def _client_tls(tls: EdgeTls) -> dict[str, Any]:
    """The transport socket of the clients' listener."""
    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificates": [_certificate(tls.cert_file, tls.key_file)],
    }
    settings: dict[str, Any] = {"@type": f"{_TLS}.DownstreamTlsContext", "common_tls_context": common}
    if tls.client_ca_file is not None:
        common["validation_context"] = {"trusted_ca": {"filename": tls.client_ca_file}}
        settings["require_client_certificate"] = True
    return {"name": "envoy.transport_sockets.tls", "typed_config": settings}


def _mutual_tls(gateway: GatewayAddress) -> dict[str, Any]:
    """The transport socket of the clusters that are Tokenway."""
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TLS}.UpstreamTlsContext",
            "sni": gateway.server_name,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "tls_certificates": [_certificate(gateway.cert_file, gateway.key_file)],
                "validation_context": {
                    "trusted_ca": {"filename": gateway.ca_file},
                    "match_typed_subject_alt_names": [
                        {"san_type": "DNS", "matcher": {"exact": gateway.server_name}}
                    ],
                },
            },
        },
    }


def _certificate(cert_file: str | None, key_file: str | None) -> dict[str, Any]:
    return {"certificate_chain": {"filename": cert_file}, "private_key": {"filename": key_file}}


def _add_cors(manager: dict[str, Any], cors: Cors) -> None:
    """Envoy's CORS filter first, so that a preflight is answered whether or not Tokenway is there."""
    matchers: list[dict[str, Any]] = [{"exact": origin} for origin in cors.origins]
    if "*" in cors.origins:
        matchers = [{"safe_regex": {"regex": ".*"}}]
    (host,) = manager["route_config"]["virtual_hosts"]
    host["typed_per_filter_config"] = {
        "envoy.filters.http.cors": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
            "allow_origin_string_match": matchers,
            "allow_methods": "GET, HEAD, POST, DELETE",
            "allow_headers": ", ".join(cors.headers),
            "expose_headers": ", ".join(cors.expose_headers),
            "max_age": str(cors.max_age_s),
            "forward_not_matching_preflights": False,
        }
    }
    manager["http_filters"].insert(
        0,
        {
            "name": "envoy.filters.http.cors",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"},
        },
    )


def _duration(seconds: float) -> str:
    """Seconds as Envoy's YAML has them; a millisecond at least: Envoy counts them, and 0 is no end."""
    return f"{max(0.001, seconds):g}s" if seconds < 1_000_000 else f"{seconds:.0f}s"


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


def _address(socket: str) -> dict[str, Any]:
    path = socket.removeprefix("unix:")
    if path.startswith("/"):
        return {"pipe": {"path": path}}
    host, port = Address.parse(socket)
    return {"socket_address": {"address": host, "port_value": port}}
