"""What `tokenway render istio` prints: from where it is taken, what it may hold, and that istio/ is it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from google.protobuf import any_pb2, symbol_database
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from extproc.config.loading import load_all
from extproc.istio_gateway.resources import RenderingError
from extproc.istio_gateway.text import Manifest, as_yaml
from extproc.server.envoys.bootstrap import template
from extproc.xds.cluster_encoding import encode
from extproc.xds.resources import cluster_resources
from tokenway.cli.main import main
from tokenway.cli.render import rendered

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "etc" / "istio" / "tokenway.yaml"
LISTS = ROOT / "tests" / "data" / "istio_proxy"
OLDEST = "1.27"

for _module in (  # types of `Any` that are looked into
    "access_loggers.filters.cel.v3.cel_pb2",
    "access_loggers.grpc.v3.als_pb2",
    "filters.http.ext_proc.v3.ext_proc_pb2",
    "filters.http.header_mutation.v3.header_mutation_pb2",
    "filters.http.lua.v3.lua_pb2",
    "filters.http.router.v3.router_pb2",
    "filters.listener.tls_inspector.v3.tls_inspector_pb2",
    "http.early_header_mutation.header_mutation.v3.header_mutation_pb2",
    "load_balancing_policies.least_request.v3.least_request_pb2",
    "load_balancing_policies.override_host.v3.override_host_pb2",
    "retry.host.previous_hosts.v3.previous_hosts_pb2",
    "upstreams.http.v3.http_protocol_options_pb2",
):
    importlib.import_module(f"envoy.extensions.{_module}")

HOST = "llama.models.internal"
CLUSTER = f"outbound|8000||{HOST}"


def write(folder: Path, clusters: list[dict[str, Any]] | None = None, **config: Any) -> Path:
    """A configuration in a folder."""
    (folder / "clusters.json").write_text(json.dumps({"clusters": clusters or []}))
    settings = {
        "version": 1,
        "server": {"run_dir": "/run/tokenway"},
        "istio_gateway": {},
        "models": {"llama": {"aliases": ["l"], "rules": [{"cluster": f"{HOST}:8000"}]}},
        **config,
    }
    path = folder / "tokenway.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def of_kind(files: dict[str, list[Manifest]], kind: str) -> list[dict[str, Any]]:
    """The specs of one kind."""
    return [each["spec"] for manifests in files.values() for each in manifests if each["kind"] == kind]


def patches(files: dict[str, list[Manifest]], applies_to: str) -> list[dict[str, Any]]:
    """Patches of one sort, in order."""
    return [
        patch
        for spec in of_kind(files, "EnvoyFilter")
        for patch in spec["configPatches"]
        if patch["applyTo"] == applies_to
    ]


def filters(files: dict[str, list[Manifest]]) -> list[dict[str, Any]]:
    """HTTP filters that are put in, in order."""
    return [
        patch["patch"]["value"]
        for patch in patches(files, "HTTP_FILTER")
        if patch["patch"]["operation"] == "INSERT_BEFORE"
    ]


def manager(files: dict[str, list[Manifest]]) -> dict[str, Any]:
    """What is merged into the connection manager."""
    (patch,) = patches(files, "NETWORK_FILTER")
    merged: dict[str, Any] = patch["patch"]["value"]["typed_config"]
    return merged


def bootstrap_manager() -> dict[str, Any]:
    """The connection manager of our own Envoy."""
    (listener,) = template()["static_resources"]["listeners"]
    typed: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return typed


def test_the_samples_are_what_is_rendered(tmp_path: Path) -> None:
    """istio/ is no second truth: `tokenway render istio` makes it of etc/istio/tokenway.yaml."""
    assert main(["render", "istio", "--config", str(SAMPLE), "--out", str(tmp_path)]) == 0
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    samples = {path.name: path.read_text() for path in (ROOT / "istio").iterdir()}
    engines = yaml.safe_load(samples.pop("models.yaml"))  # declared by hand
    assert engines["spec"]["hosts"] == [HOST]
    assert made == samples


def test_a_file_of_an_earlier_rendering_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be applied with the rest; its resources have to go as well."""
    (tmp_path / "service.yaml").write_text("kind: ServiceEntry\n")
    assert main(["render", "istio", "--config", str(SAMPLE), "--out", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/service.yaml: warning: nothing goes there now")
    assert (tmp_path / "service.yaml").read_text() == "kind: ServiceEntry\n"


def test_all_of_it_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """One text of several documents, the same as the files'."""
    assert main(["render", "istio", "--config", str(SAMPLE)]) == 0
    printed = capsys.readouterr().out
    assert printed == "".join(as_yaml(manifests) for manifests in rendered(SAMPLE).values())
    kinds = [document["kind"] for document in yaml.safe_load_all(printed)]
    assert {"Gateway", "VirtualService", "DestinationRule", "EnvoyFilter"} <= set(kinds)


def test_scripts_and_logs_are_those_of_the_bootstrap() -> None:
    """Not a copy with a life of its own: the same text and the same log, but for who is called."""
    files = rendered(SAMPLE)
    ours = {each["name"]: each["typed_config"] for each in bootstrap_manager()["http_filters"]}
    theirs = {each["name"]: each["typed_config"] for each in filters(files)}
    assert list(theirs) == ["tokenway.ext_proc", "tokenway.fallback", "tokenway.usage", "tokenway.answer"]
    assert theirs["tokenway.usage"] == ours["tokenway.usage"]
    assert theirs["tokenway.fallback"] == ours["tokenway.fallback"]["extension_config"]["typed_config"]
    service = "outbound|9000||tokenway.tokenway.svc.cluster.local"

    def adapted(fragment: Any) -> Any:
        for log in [*fragment.get("access_log", ()), *fragment.get("upstream_log", ())]:
            tags = log["typed_config"]["common_config"]["custom_tags"]
            tags[:] = [tag for tag in tags if tag["tag"] in ("rid", "owner")]  # a script tells the third
        return json.loads(json.dumps(fragment).replace("tokenway-als", service))

    assert manager(files)["access_log"] == adapted(bootstrap_manager())["access_log"]
    (router,) = [
        patch["patch"]["value"]["typed_config"]
        for patch in patches(files, "HTTP_FILTER")
        if patch["patch"]["operation"] == "MERGE"
    ]
    assert router == adapted(ours["envoy.filters.http.router"])


def test_clients_steer_nothing() -> None:
    """What the bootstrap strips early, and the header that names the cluster."""
    (early,) = bootstrap_manager()["early_header_mutation_extensions"]
    (merged,) = manager(rendered(SAMPLE))["early_header_mutation_extensions"]
    assert merged["typed_config"]["mutations"] == [
        {"remove": "x-tokenway-cluster"},
        *early["typed_config"]["mutations"],
    ]
    (virtual,) = of_kind(rendered(SAMPLE), "VirtualService")
    for route in virtual["http"][:-1]:
        removed = route["headers"]["request"]["remove"]
        assert {"x-tokenway-cluster", "x-tokenway-owner", "x-tokenway-model", "authorization"} <= set(removed)


def test_engines_clusters_are_as_we_make_them() -> None:
    """What an EnvoyFilter adds to istiod's clusters is what our own have by xDS."""
    raw = cluster_resources(["any"], {}, encode)["any"]
    ours = MessageToDict(cluster_pb2.Cluster.FromString(raw), preserving_proto_field_name=True)
    (engines, _) = [patch["patch"]["value"] for patch in patches(rendered(SAMPLE), "CLUSTER")]
    parsed = ParseDict(engines, cluster_pb2.Cluster())
    theirs = MessageToDict(parsed, preserving_proto_field_name=True)
    assert theirs == {name: ours[name] for name in theirs}


def test_routes_go_by_owner_then_by_model_then_nowhere() -> None:
    """In this order; only what Envoy may serve alone has a route of its own."""
    files = rendered(SAMPLE)
    (virtual,) = of_kind(files, "VirtualService")
    pinned, decided, fallback, nowhere = virtual["http"]
    assert pinned["match"] == [{"headers": {"x-tokenway-owner": {}, "x-envoy-retry-on": {}}}]
    assert pinned["retries"] == {"attempts": 2, "retryOn": "connect-failure,reset,refused-stream"}
    assert decided["match"] == [{"headers": {"x-tokenway-owner": {}}}]
    assert decided["retries"] == {
        "attempts": 2,
        "retryOn": "gateway-error,reset,connect-failure,refused-stream,retriable-status-codes,429",
    }
    assert [each["headers"]["x-tokenway-model"]["exact"] for each in fallback["match"]] == [
        "model:meta-llama/Llama-3.1-8B-Instruct",
        "model:llama",
    ]
    assert {each["method"]["exact"] for each in fallback["match"]} == {"POST"}
    assert fallback["route"] == [{"destination": {"host": HOST, "port": {"number": 8000}}}]
    assert nowhere == {"name": "tokenway-nowhere", "directResponse": {"status": 404}}
    by_route = {
        patch["match"]["routeConfiguration"]["vhost"]["route"]["name"]: patch["patch"]["value"]
        for patch in patches(files, "HTTP_ROUTE")
    }
    for name in ("tokenway-pinned", "tokenway-decided"):
        assert by_route[name]["route"]["cluster_header"] == "x-tokenway-cluster"
    assert by_route["tokenway-nowhere"]["route"]["cluster"] == "tokenway-none"
    settings = by_route["tokenway-nowhere"]["metadata"]["filter_metadata"]["tokenway.fallback"]["settings"]
    assert (settings["gone"], settings["others"]) == ("open", "unknown")


def test_names_that_no_model_has_go_where_any_model_does(tmp_path: Path) -> None:
    """The script knows which names those are; where `*` is served to some alone, none goes there."""
    gated = {"rules": [{"cluster": f"{HOST}:8000", "headers": {"x-team": "red"}}]}
    models = {"llama": {"rules": [{"cluster": "other.internal:8000"}]}, "gated": {**gated, "aliases": ["g"]}}
    for served in (True, False):
        any_model = {"*": {"rules": [{"cluster": f"{HOST}:8000"}]} if served else gated}
        files = rendered(write(tmp_path, models={**models, **any_model}))
        (virtual,) = of_kind(files, "VirtualService")
        matched = {
            match["headers"]["x-tokenway-model"]["exact"]: route["route"][0]["destination"]["host"]
            for route in virtual["http"][2:-1]
            for match in route["match"]
        }
        assert matched == {"model:llama": "other.internal", **({"model:*": HOST} if served else {})}
        nowhere = patches(files, "HTTP_ROUTE")[-1]["patch"]["value"]["metadata"]["filter_metadata"]
        names_known = nowhere["tokenway.fallback"]["settings"].get("names")
        assert names_known == (["g", "gated", "llama"] if served else None)


def test_a_connection_that_says_nothing_is_bounded_on_a_port_without_tls(tmp_path: Path) -> None:
    """Where istiod's listener has no filter that waits, so that no time-out would begin."""
    (listener,) = template()["static_resources"]["listeners"]
    (added,) = patches(rendered(write(tmp_path)), "LISTENER_FILTER")
    assert added["patch"] == {"operation": "ADD", "value": listener["listener_filters"][0]}


@pytest.mark.parametrize(
    "config",
    [
        {"istio_gateway": {"credential": "edge"}},
        {"edge": {"headers_timeout_s": 3, "tls": {"cert_file": "/c", "key_file": "/k"}}},
    ],
)
def test_a_handshake_is_bounded_on_a_port_for_tls(tmp_path: Path, config: dict[str, Any]) -> None:
    """There istiod's listener has a filter that waits for the first bytes already."""
    files = rendered(write(tmp_path, **config))
    assert patches(files, "LISTENER_FILTER") == []
    (chain,) = patches(files, "FILTER_CHAIN")
    (listener,) = patches(files, "LISTENER")
    timeout = listener["patch"]["value"]["listener_filters_timeout"]
    assert timeout == ("3s" if "edge" in config else "10s")
    assert chain["patch"] == {"operation": "MERGE", "value": {"transport_socket_connect_timeout": timeout}}


def test_an_upload_that_stops_is_bounded_before_its_decision_alone(tmp_path: Path) -> None:
    """Each other route has a bound of its own, which replaces that of the route before."""
    (host,) = bootstrap_manager()["route_config"]["virtual_hosts"]
    *_, ours = host["routes"]
    other = {"rules": [{"cluster": "other.internal:8000"}]}
    llama = {"rules": [{"cluster": f"{HOST}:8000"}]}
    files = rendered(write(tmp_path, models={"llama": llama, "other": other}))
    (virtual,) = of_kind(files, "VirtualService")
    bounds = {
        patch["match"]["routeConfiguration"]["vhost"]["route"]["name"]: patch["patch"]["value"]["route"][
            "idle_timeout"
        ]
        for patch in patches(files, "HTTP_ROUTE")
    }
    assert list(bounds) == [route["name"] for route in virtual["http"]]
    assert len(bounds) == 5
    assert bounds.pop("tokenway-nowhere") == ours["route"]["idle_timeout"]
    assert set(bounds.values()) == {bootstrap_manager()["stream_idle_timeout"]}


def test_a_subset_is_a_route_of_its_own_and_a_label_more_is_none(tmp_path: Path) -> None:
    """Without Tokenway a rule's subset is kept, or the model is not served."""
    models = {
        "whole": {"rules": [{"cluster": f"{HOST}:8000"}]},
        "part": {"rules": [{"cluster": f"{HOST}:8000", "subset": {"subset": "h200"}}]},
        "other": {"rules": [{"cluster": f"{HOST}:8000", "subset": {"gpu": "h200"}}]},
        "gated": {"rules": [{"cluster": f"{HOST}:8000", "headers": {"x-team": "red"}}]},
    }
    files = rendered(write(tmp_path, models=models))
    (virtual,) = of_kind(files, "VirtualService")
    fallbacks = {
        route["match"][0]["headers"]["x-tokenway-model"]["exact"]: route["route"][0]["destination"]
        for route in virtual["http"][2:-1]
    }
    assert fallbacks == {
        "model:whole": {"host": HOST, "port": {"number": 8000}},
        "model:part": {"host": HOST, "port": {"number": 8000}, "subset": "h200"},
    }
    (rule,) = of_kind(files, "DestinationRule")
    assert rule["subsets"] == [{"name": "h200", "labels": {"subset": "h200"}}]


def test_what_clusters_json_lists_becomes_a_service_entry(tmp_path: Path) -> None:
    """Addresses, ports, weights and labels; a host that it does not list is declared by somebody else."""
    endpoints = [
        {"address": "10.0.0.1", "port": 8001, "labels": {"gpu": "h200"}},
        {"address": "10.0.0.1", "port": 8002, "weight": 3},
    ]
    files = rendered(write(tmp_path, [{"name": CLUSTER, "endpoints": endpoints}]))
    entry, own = of_kind(files, "ServiceEntry")
    assert entry["hosts"] == [HOST]
    assert entry["ports"] == [{"number": 8000, "name": "http-8000", "protocol": "HTTP"}]
    assert entry["endpoints"] == [
        {"address": "10.0.0.1", "ports": {"http-8000": 8001}, "labels": {"gpu": "h200"}},
        {"address": "10.0.0.1", "ports": {"http-8000": 8002}, "weight": 3},
    ]
    assert own["endpoints"] == [{"address": "unix:///run/tokenway/gw0.sock"}]


@pytest.mark.parametrize(
    ("config", "clusters", "problem"),
    [
        ({"istio_gateway": None}, [], "istio_gateway: not given"),
        (
            {"models": {"m": {"rules": [{"cluster": "vllm"}]}}},
            [],
            "models.m.rules[0].cluster: `vllm` is no service",
        ),
        ({"default_cluster": "rest"}, [], "default_cluster: `rest` is no service"),
        (
            {},
            [{"name": CLUSTER, "endpoints": [{"address": "engine.internal", "port": 1}]}],
            "`engine.internal` of llama.models.internal:8000 is a host name",
        ),
        (
            {"models": {"m": {"rules": [{"cluster": CLUSTER}, {"cluster": f"{HOST}:8001"}]}}},
            [
                {"name": CLUSTER, "endpoints": [{"address": "10.0.0.1", "port": 1}]},
                {"name": f"outbound|8001||{HOST}", "endpoints": [{"address": "10.0.0.2", "port": 1}]},
            ],
            "has other addresses at one port than at another",
        ),
    ],
)
def test_what_has_no_form_in_istio_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    clusters: list[dict[str, Any]],
    problem: str,
) -> None:
    """With the setting's name, on standard error; nothing is printed or written."""
    path = write(tmp_path, clusters, **config)
    out = tmp_path / "out"
    assert main(["render", "istio", "--config", str(path), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert not out.exists()
    with pytest.raises(RenderingError):
        rendered(path)


def test_each_setting_is_in_its_place(tmp_path: Path) -> None:
    """Of `istio_gateway`, `edge`, `engine_tls` and `request`."""
    tls = {"cert_file": "/c", "key_file": "/k", "ca_file": "/a", "server_name": "gw.internal"}
    path = write(
        tmp_path,
        istio_gateway={
            "namespace": "edge",
            "selector": {"app": "gw"},
            "port": 443,
            "pod_port": 8443,
            "hosts": ["llm.example.com"],
        },
        edge={
            "tls": {"cert_file": "/s.pem", "key_file": "/s.key", "client_ca_file": "/clients.pem"},
            "gateway": {"addresses": ["10.0.0.5:9000", "unix:/run/x.sock"], **tls},
            "cors": {"origins": ["https://chat.example.com"]},
            "trusted_hops": 2,
            "headers_timeout_s": 2,
        },
        engine_tls={
            f"{HOST}:8000": {"ca_file": "/ca", "server_name": "engine", "cert_file": "/e", "key_file": "/f"}
        },
        request={"max_body_bytes": 4096, "forward_credentials": True},
    )
    files = rendered(path)
    assert all(each["metadata"]["namespace"] == "edge" for of_file in files.values() for each in of_file)
    (gateway,) = of_kind(files, "Gateway")
    assert gateway["selector"] == {"app": "gw"}
    (server,) = gateway["servers"]
    assert server["port"] == {"number": 443, "name": "https-tokenway", "protocol": "HTTPS"}
    assert server["hosts"] == ["llm.example.com"]
    assert server["tls"]["mode"] == "MUTUAL"
    assert server["tls"]["caCertificates"] == "/clients.pem"
    (listener,) = patches(files, "LISTENER")
    assert listener["match"]["listener"] == {"portNumber": 8443}
    assert listener["patch"]["value"] == {
        "per_connection_buffer_limit_bytes": 4096,
        "listener_filters_timeout": "2s",
    }
    assert manager(files)["http2_protocol_options"]["initial_stream_window_size"] == 65_535
    assert manager(files)["xff_num_trusted_hops"] == 2
    (virtual,) = of_kind(files, "VirtualService")
    assert all(
        route["corsPolicy"]["allowOrigins"] == [{"exact": "https://chat.example.com"}]
        for route in virtual["http"]
    )
    assert "authorization" not in virtual["http"][0]["headers"]["request"]["remove"]
    (own,) = of_kind(files, "ServiceEntry")
    assert own["endpoints"] == [
        {"address": "10.0.0.5", "ports": {"grpc-tokenway": 9000}},
        {"address": "unix:///run/x.sock"},
    ]
    engines, tokenway = of_kind(files, "DestinationRule")
    (of_port,) = engines["trafficPolicy"]["portLevelSettings"]
    assert of_port["port"] == {"number": 8000}
    assert (of_port["tls"]["mode"], of_port["tls"]["sni"]) == ("MUTUAL", "engine")
    assert of_port["connectionPool"] == engines["trafficPolicy"]["connectionPool"]
    assert tokenway["trafficPolicy"]["tls"]["caCertificates"] == "/a"
    assert load_all(path)[0].istio_gateway is not None
    secret = rendered(write(tmp_path, istio_gateway={"credential": "llm-cert", "service": "t.ns.svc:9000"}))
    (gateway,) = of_kind(secret, "Gateway")
    assert gateway["servers"][0]["tls"]["credentialName"] == "llm-cert"
    assert of_kind(secret, "ServiceEntry") == []


def names(node: Any) -> Iterator[str]:
    """Extension names and type URLs in a fragment of Envoy configuration."""
    if isinstance(node, dict):
        if "typed_config" in node or "@type" in node:
            yield from (str(node[key]) for key in ("@type", "name") if key in node)
        for inner in node.values():
            yield from names(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from names(inner)


def unknown_to(version: str, fragments: Any) -> set[str]:
    """Types that an istio-proxy of that version has no extension for."""
    extensions = set((LISTS / f"{version}.txt").read_text().split())
    providers = json.loads((LISTS / "type_urls.json").read_text())
    found = set()
    for name in names(fragments):
        if name.startswith("type.googleapis.com/"):
            provider = providers.get(name.partition("/")[2])
            if provider is None or provider not in extensions:
                found.add(name)
        elif name.startswith("envoy.") and name not in extensions:
            found.add(name)
    return found


def every_patch() -> list[Any]:
    """Of the sample, and of all that a configuration can add."""
    return [
        patch["patch"]["value"]
        for spec in of_kind(rendered(SAMPLE), "EnvoyFilter")
        for patch in spec["configPatches"]
    ]


VERSIONS = sorted(path.stem for path in LISTS.glob("1.*.txt"))


def test_there_is_a_list_of_the_oldest_and_of_later_ones() -> None:
    """The oldest istio-proxy that is supported is the first of them."""
    assert VERSIONS[0] == OLDEST
    assert len(VERSIONS) >= 5


@pytest.mark.parametrize("version", VERSIONS)
def test_every_istio_proxy_has_the_extensions_that_are_rendered(version: str) -> None:
    """One that it was built without makes Envoy refuse the whole listener."""
    assert unknown_to(version, every_patch()) == set()


@pytest.mark.parametrize(
    "planted",
    [
        {"name": "envoy.filters.http.sse_to_metadata", "typed_config": {}},
        {
            "name": "mine",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.sse_to_metadata.v3.SseToMetadata"
            },
        },
        {
            "name": "mine",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.common.matching.v3.ExtensionWithMatcher"
            },
        },
        {
            "extension": {
                "name": "envoy.router.cluster_specifier_plugin.priority_group",
                "typed_config": {
                    "@type": "type.googleapis.com/"
                    "envoy.extensions.router.cluster_specifiers.priority_group.v3.PriorityGroupClusterSpecifier"
                },
            }
        },
        {"name": "x", "typed_config": {"@type": "type.googleapis.com/not.there.v3.NotThere"}},
    ],
)
def test_an_extension_that_is_not_there_is_found(planted: dict[str, Any]) -> None:
    """What our own bootstrap uses and istio-proxy lacks, wherever it is planted."""
    for version in VERSIONS:
        assert unknown_to(version, [*every_patch(), {"deep": [planted]}]) != set()


FIELDS: dict[str, list[str]] = json.loads((LISTS / "fields-1.27.json").read_text())
"""Message -> its fields in the API of the oldest istio-proxy's Envoy, for the messages that are rendered."""

PATCHED: dict[str, Message] = {
    "LISTENER": listener_pb2.Listener(),
    "LISTENER_FILTER": listener_components_pb2.ListenerFilter(),
    "FILTER_CHAIN": listener_components_pb2.FilterChain(),
    "NETWORK_FILTER": listener_components_pb2.Filter(),
    "HTTP_FILTER": http_connection_manager_pb2.HttpFilter(),
    "VIRTUAL_HOST": route_components_pb2.VirtualHost(),
    "HTTP_ROUTE": route_components_pb2.Route(),
    "CLUSTER": cluster_pb2.Cluster(),
}
"""What a patch is a part of."""


def younger(message: Message) -> set[str]:
    """Fields that are set in a message, or within it, and that the oldest Envoy does not have."""
    kind = message.DESCRIPTOR.full_name
    if isinstance(message, any_pb2.Any):
        inner = symbol_database.Default().GetSymbol(message.TypeName())()
        message.Unpack(inner)
        return younger(inner)
    if kind.startswith("google.protobuf."):
        return set()
    found = set()
    for field, value in message.ListFields():
        if field.name not in FIELDS.get(kind, ()):
            found.add(f"{kind}.{field.name}")
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inner_values = [each for each in value.values() if isinstance(each, Message)]
        else:
            inner_values = list(value) if field.is_repeated else [value]
        for each in inner_values:
            found |= younger(each)
    return found


def younger_in(files: dict[str, list[Manifest]]) -> set[str]:
    """The same of all patches."""
    found = set()
    for spec in of_kind(files, "EnvoyFilter"):
        for patch in spec["configPatches"]:
            message = copy(PATCHED[patch["applyTo"]])
            found |= younger(ParseDict(patch["patch"]["value"], message))
    return found


def test_every_field_is_one_that_the_oldest_envoy_knows(tmp_path: Path) -> None:
    """What is younger, istiod would drop or Envoy refuse."""
    assert younger_in(rendered(SAMPLE)) == set()
    every: dict[str, Any] = {
        "edge": {
            "trusted_hops": 2,
            "keep_request_id": True,
            "cors": {"origins": ["*"]},
            "tls": {"cert_file": "/c", "key_file": "/k"},
        },
        "away": {"gone": "refuse", "late": "refuse", "after_s": 2},
        "models": {"m": {"rules": [{"cluster": f"{HOST}:8000", "subset": {"subset": "h200"}}]}},
    }
    assert younger_in(rendered(write(tmp_path, **every))) == set()


def test_a_field_that_is_too_young_is_found() -> None:
    """The formatter in a tag of our own access log, and the removal of headers by a pattern."""
    found = younger(
        ParseDict(
            {"http_filters": bootstrap_manager()["http_filters"][2:]},
            http_connection_manager_pb2.HttpConnectionManager(),
        )
    )
    assert "envoy.config.common.mutation_rules.v3.HeaderMutation.remove_on_match" in found
    assert "envoy.type.tracing.v3.CustomTag.value" in found


def test_our_own_bootstrap_would_not_do() -> None:
    """The check tells: the filters of our Envoy, as they are, need what istio-proxy does not have."""
    assert unknown_to(OLDEST, bootstrap_manager()) != set()
