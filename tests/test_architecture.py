"""The structure that the documents promise, read from the sources and the shipped bootstrap."""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from extproc.config.rule_headers import SECRET_HEADERS
from extproc.config.schema import Config
from extproc.config.sections.edge import Away, Edge
from extproc.request.parse import INFERENCE_PATHS, is_form
from extproc.request.paths import ADMIN_PATHS
from extproc.request.sanitize import STEERING_FIELDS, STEERING_HEADERS, STEERING_XARGS
from extproc.server.envoys.bootstrap import WORKER_CLUSTERS, as_yaml, fill, template, withheld
from extproc.server.listening.run_dir import SYSTEM_DIR
from extproc.values.headers import DEBUG_HEADER, OWNER_HEADER
from tests.source_tree import CORE_FILES, MAY_IMPORT, MODULES, PACKAGES, ROOT, module_of, name_of, sources

IMPURE = (
    *("aiohttp", "asyncio", "grpc", "redis", "select", "selectors", "socket", "ssl", "urllib.request", "zmq"),
    *("concurrent", "contextvars", "multiprocessing", "subprocess", "threading"),
    *("queue", "sched", "signal", "sqlite3", "uvloop"),
    *("numpy.random", "random", "secrets", "time", "uuid"),
    *("fcntl", "glob", "http.client", "mmap", "shutil"),
    *("logging", "os", "pathlib", "platform", "prometheus_client", "tempfile"),
    *("envoy", "envoy_data_plane", "google"),
)
"""I/O, concurrency, randomness and clocks, environment and logging, and the messages of others' protocols.
`datetime` is for types alone."""

IMPURE_CALLS = frozenset({"open", "print", "input", "datetime.now", "datetime.utcnow", "date.today"})

_MESSAGES = "what it makes of values, or values of, are these messages; it does nothing else"

EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "extproc/accesslog/entries.py": {"envoy": _MESSAGES},
    "extproc/discovery/istio/wire.py": {"envoy": _MESSAGES, "google": _MESSAGES},
    "extproc/xds/delta.py": {"envoy": _MESSAGES},
    "extproc/xds/cluster_encoding.py": {"envoy_data_plane": _MESSAGES},
}
"""Core module -> forbidden import -> why it may all the same, and may reach it."""


WIRE_ONLY = {
    "envoy": (
        *("extproc/protocol/wire.py", "extproc/protocol/bootstrap_dialect.py", "extproc/picker/dialect.py"),
        *(
            "extproc/protocol/istio_dialect.py",
            "extproc/accesslog/",
            "extproc/xds/ads.py",
            "extproc/xds/delta.py",
            "extproc/discovery/istio/wire.py",
        ),
    ),
    "envoy_data_plane": ("extproc/xds/cluster_encoding.py",),
    "grpc": ("extproc/transport/", "extproc/server/listening/grpcio_server.py"),
}
"""Protobuf package, or gRPC's own -> where alone it may be imported."""

MADE_OF_PARTS: Mapping[str, tuple[str, ...]] = {
    "extproc/health/tracker.py": ("self._records.members",),
}
"""Module -> what it sets on a part of its own that no other module changes."""

NO_PYTHON = ("envoy", "istio", "etc")
"""Configuration only; a module under envoy/ would also hide the protobuf package of that name."""

OWN_STRIPPED = (
    "x-tokenway-owner",
    "x-tokenway-model",
    "x-envoy-max-retries",
    "x-envoy-retry-on",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-attempt-count",
    "expect",
)
"""What Tokenway or Envoy's router takes orders from, or Envoy answers; no setting allows a client these."""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at any depth of it; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(name: str, packages: Iterable[str]) -> bool:
    """True if a dotted name is one of the packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@cache
def imported_modules() -> dict[str, set[str]]:
    """Our modules, each with those of ours that it imports."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        imported = {name if name in MODULES else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = {name for name in imported if name in MODULES and name != module}
    return graph


@cache
def impure_imports(module: str) -> frozenset[str]:
    """What a module of ours imports that acts on the world."""
    return frozenset(name for name in imports(MODULES[module]) if is_under(name, IMPURE))


def reached_from(module: str) -> dict[str, tuple[str, ...]]:
    """Modules of ours that come with a module, each with the shortest way there, but for itself."""
    ways: dict[str, tuple[str, ...]] = {module: (module,)}
    ahead = deque([module])
    while ahead:
        here = ahead.popleft()
        for there in sorted(imported_modules()[here] - ways.keys()):
            ways[there] = (*ways[here], there)
            ahead.append(there)
    del ways[module]
    return ways


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_the_core_does_no_io(path: Path) -> None:
    """Core modules import and call nothing that acts on the world, but for listed reasons."""
    allowed = EXCEPTIONS.get(name_of(path), {})
    assert [name for name in imports(path) if is_under(name, IMPURE) and not is_under(name, allowed)] == []
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert calls & IMPURE_CALLS == set()


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_the_core_reaches_nothing_that_does(path: Path) -> None:
    """Nor do the modules that a core module imports, nor those that these import, and so on."""
    allowed = EXCEPTIONS.get(name_of(path), {})
    found = [
        f"{' > '.join(way)} > {name}"
        for module, way in reached_from(module_of(path)).items()
        for name in impure_imports(module)
        if not is_under(name, allowed)
    ]
    assert found == []


def test_every_exception_is_needed() -> None:
    """An exception that nothing uses any more is taken out of the table."""
    for name, allowed in EXCEPTIONS.items():
        used = list(imports(ROOT / name))
        assert all(any(is_under(imported, [package]) for imported in used) for package in allowed), name
        assert all(allowed.values()), name


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_only_what_they_may(package: str) -> None:
    """Dependencies are those of the table: above all, the metadata center knows nothing of a gateway."""
    where = package.replace(".", "/")
    ours = {"extproc", "metadata_center", "tokenway", "benchmarks", "tests"}
    for path in [path for path in PACKAGES if name_of(path).startswith((f"{where}/", f"{where}.py"))]:
        for name in imports(path):
            if name.partition(".")[0] in ours:
                assert is_under(name, [package, *MAY_IMPORT[package]]), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("folder", ["benchmarks", "testbed"])
def test_nothing_but_tests_imports_tests(folder: str) -> None:
    """What a benchmark and a test both start lives in `testbed/`."""
    files = sources(f"{folder}/**/*.py")
    assert [name_of(path) for path in files if any(is_under(name, ["tests"]) for name in imports(path))] == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Modules import each other in one direction only."""
    graph = imported_modules()
    assert set(TopologicalSorter(graph).static_order()) == set(graph)


def test_packages_do_not_import_each_other_in_circles() -> None:
    """So do packages: what two of them know of each other belongs into one of them, or below both."""
    packages: dict[str, set[str]] = {}
    for module, imported in imported_modules().items():
        here = module.rpartition(".")[0] or module
        there = {name.rpartition(".")[0] or name for name in imported}
        packages.setdefault(here, set()).update(
            # A package and what is inside it are one.
            name
            for name in there
            if not is_under(name, [here]) and not is_under(here, [name])
        )
    assert set(TopologicalSorter(packages).static_order()) >= set(packages)


def test_what_gateways_embed_knows_nothing_of_the_service() -> None:
    """The metadata center is a library; the process that serves it is one more user of that library."""
    service = "metadata_center.service"
    library = sources("metadata_center/**/*.py")
    users = [name_of(path) for path in library if any(is_under(name, [service]) for name in imports(path))]
    assert [user for user in users if not user.startswith("metadata_center/service/")] == []
    assert users


def test_the_command_is_on_top() -> None:
    """Nothing below knows the command, but for the former name that starts it."""
    users = {
        module
        for module, imported in imported_modules().items()
        if any(is_under(name, ["tokenway.cli"]) for name in imported) and not is_under(module, ["tokenway"])
    }
    assert users == {"extproc.cli.main"}


WHOLE = sources("extproc/server/**/*.py", "extproc/routing/*.py", "extproc/health/*.py")


@pytest.mark.parametrize("path", WHOLE, ids=name_of)
def test_objects_are_whole_when_they_are_made(path: Path) -> None:
    """No code sets an attribute of an object that it holds: an object gets all it needs, or is notified."""
    held = re.compile(r"self\._?\w+\.\w+")
    found = [
        ast.unparse(target)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
        and (held.fullmatch(ast.unparse(target)) or path.name == "building.py")
    ]
    assert [name for name in found if name not in MADE_OF_PARTS.get(name_of(path), ())] == []


@pytest.mark.parametrize("protobuf", sorted(WIRE_ONLY))
def test_protobuf_stays_at_the_edges(protobuf: str) -> None:
    """Messages are known where they are translated and nowhere else."""
    users = {name_of(path) for path in PACKAGES if any(is_under(name, [protobuf]) for name in imports(path))}
    assert users
    assert [user for user in users if not user.startswith(WIRE_ONLY[protobuf])] == []


@pytest.mark.parametrize("folder", NO_PYTHON)
def test_configuration_folders_hold_no_python(folder: str) -> None:
    """They are for operators to read and copy."""
    assert list((ROOT / folder).rglob("*.py")) == []


@pytest.mark.parametrize("name", ["utils", "util", "common", "helpers", "misc"])
def test_no_module_is_named_after_nothing(name: str) -> None:
    """A module is named after what it knows."""
    assert [name_of(path) for path in PACKAGES if name in (path.stem, path.parent.name)] == []


def test_nothing_is_logged_by_f_string() -> None:
    """Events are constant; what differs goes into `extra`, where it is filtered by its name."""
    loggers = {"_log", "_LOGGER", "logger", "logging"}
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in PACKAGES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in loggers
        and any(isinstance(argument, ast.JoinedStr) for argument in node.args)
    ]
    assert found == []


def manager(document: Mapping[str, Any]) -> dict[str, Any]:
    """The HTTP connection manager of a bootstrap."""
    (listener,) = document["static_resources"]["listeners"]
    typed: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return typed


def stripped(document: Mapping[str, Any]) -> list[str]:
    """Headers that Envoy takes from clients before anything else sees them."""
    (early,) = manager(document)["early_header_mutation_extensions"]
    return [mutation["remove"] for mutation in early["typed_config"]["mutations"] if "remove" in mutation]


def rendered(**changes: Any) -> dict[str, Any]:
    """What `tokenway bootstrap` prints for the default configuration, parsed."""
    settings: dict[str, Any] = {
        "listen": ("127.0.0.1", 10000),
        "admin_port": 15000,
        "sockets": [f"{SYSTEM_DIR}/gw0.sock"],
        "allow_headers": Config().request.allow_headers,
        "max_body_bytes": Config().request.max_body_bytes,
        "forward_credentials": Config().request.forward_credentials,
    }
    filled = template()
    fill(filled, **{**settings, **changes})
    document: dict[str, Any] = yaml.safe_load(as_yaml(filled))
    return document


def without_cluster_names(document: dict[str, Any]) -> dict[str, Any]:
    """The bootstrap but for `load_assignment.cluster_name`, which says nothing in a static cluster."""
    for cluster in document["static_resources"]["clusters"]:
        cluster.get("load_assignment", {}).pop("cluster_name", None)  # clusters may share one by a YAML alias
    return document


def test_the_shipped_bootstrap_strips_all_that_steers() -> None:
    """Exactly the steering headers and those of this gateway and its Envoy, each once."""
    assert stripped(template()) == [*STEERING_HEADERS, *OWN_STRIPPED]


def test_allowed_headers_are_no_longer_stripped_and_no_others() -> None:
    """An operator may allow a client some of them by name."""
    assert stripped(rendered(allow_headers=["x-session-token", "unknown"])) == [
        name for name in stripped(template()) if name != "x-session-token"
    ]


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("user-agent",),
        ("accept-language", "x-forwarded-for", "x-request-id", ":scheme", "content-language"),
        SECRET_HEADERS,  # no configuration has them, and no bootstrap would
    ],
)
def test_what_rules_match_is_forwarded_and_secrets_never(names: tuple[str, ...]) -> None:
    """Secrets are withheld by every bootstrap, all else only until a rule matches it."""
    assert withheld(template(), SECRET_HEADERS) == sorted(SECRET_HEADERS)
    document = rendered(rule_headers=names)
    assert withheld(document, SECRET_HEADERS) == sorted(SECRET_HEADERS)
    assert withheld(document, set(names) - set(SECRET_HEADERS)) == []
    others = {"x-stainless-lang", "x-envoy-external-address"}
    assert withheld(document, others) == withheld(template(), others) == sorted(others)


def removed(document: Mapping[str, Any]) -> list[str]:
    """Headers that Envoy takes off before a request goes to an engine."""
    (host,) = manager(document)["route_config"]["virtual_hosts"]
    names: list[str] = host["request_headers_to_remove"]
    return names


def test_engines_see_neither_our_headers_nor_credentials() -> None:
    """What is taken off on the way to an engine; a setting leaves the credentials in, and nothing else."""
    ours = [OWNER_HEADER, "x-tokenway-model", DEBUG_HEADER]
    assert removed(template()) == [*ours, *SECRET_HEADERS]
    assert removed(rendered(forward_credentials=True)) == ours


def test_the_bootstrap_of_the_defaults_is_the_shipped_one() -> None:
    """`tokenway bootstrap` without settings of one's own prints what is shipped."""
    assert without_cluster_names(rendered()) == without_cluster_names(template())


def test_the_bootstrap_puts_each_setting_in_its_place() -> None:
    """Addresses, ports, sockets and the body limit are filled in where Envoy reads them."""
    document = rendered(
        listen=("::", 80), admin_port=9901, sockets=["/run/a.sock", "[::1]:50051"], max_body_bytes=4096
    )
    (listener,) = document["static_resources"]["listeners"]
    assert listener["address"]["socket_address"] == {"address": "::", "port_value": 80}
    assert listener["per_connection_buffer_limit_bytes"] == 4096
    (host,) = listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert host["request_body_buffer_limit"] == 4096
    assert document["admin"]["address"]["socket_address"]["port_value"] == 9901
    clusters = {cluster["name"]: cluster for cluster in document["static_resources"]["clusters"]}
    assert set(WORKER_CLUSTERS) <= set(clusters)
    for name in WORKER_CLUSTERS:
        (locality,) = clusters[name]["load_assignment"]["endpoints"]
        assert [member["endpoint"]["address"] for member in locality["lb_endpoints"]] == [
            {"pipe": {"path": "/run/a.sock"}},
            {"socket_address": {"address": "::1", "port_value": 50051}},
        ]


def fallback_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the script that runs without Tokenway goes by."""
    (host,) = manager(document)["route_config"]["virtual_hosts"]
    nowhere = host["routes"][-1]  # where a request is that Tokenway did not answer
    settings: dict[str, Any] = nowhere["metadata"]["filter_metadata"]["tokenway.fallback"]["settings"]
    return settings


def test_without_tokenway_the_same_fields_steer() -> None:
    """Envoy's own look at a body knows every steering field, and allows what Tokenway allows."""
    settings = fallback_settings(template())
    assert settings["fields"] == list(STEERING_FIELDS)
    assert settings["xargs"] == list(STEERING_XARGS)
    allowed = fallback_settings(rendered(allow_fields=["priority", "vllm_xargs.kv_transfer_params"]))
    assert allowed["fields"] == [name for name in STEERING_FIELDS if name != "priority"]
    assert allowed["xargs"] == [name for name in STEERING_XARGS if name != "kv_transfer_params"]


def test_without_tokenway_only_inference_has_a_route() -> None:
    """Script and routes name the same paths, all of them inference to Tokenway; the rest goes nowhere."""
    paths = fallback_settings(template())["paths"]
    assert paths == [path for path in INFERENCE_PATHS if not is_form(path)]
    (host,) = manager(template())["route_config"]["virtual_hosts"]
    pinned, decided, *fallbacks, nowhere = host["routes"]
    for route in (pinned, decided):
        assert {"name": "x-tokenway-owner", "present_match": True} in route["match"]["headers"]
    for fallback in fallbacks:
        assert {"name": ":method", "string_match": {"exact": "POST"}} in fallback["match"]["headers"]
    served = re.compile("|".join(fallback["match"]["safe_regex"]["regex"] for fallback in fallbacks))
    assert all(served.fullmatch(path) and served.fullmatch(f"{path}/") for path in paths)
    assert not any(served.fullmatch(path) for path in ADMIN_PATHS)
    assert nowhere["route"]["cluster"] == "tokenway-none"


@pytest.mark.parametrize("seconds", [5e-324, 1e-9, 1e-5, 0.001, 0.0625, 86_400])
def test_the_bootstrap_has_times_that_envoy_can_read(seconds: float) -> None:
    """No exponent, and never 0, by which Envoy waits without end."""
    http = manager(rendered(edge=Edge.model_validate({"headers_timeout_s": seconds})))
    assert re.fullmatch(r"[0-9]+(\.[0-9]{1,9})?s", http["request_headers_timeout"])
    assert float(http["request_headers_timeout"][:-1]) == max(0.001, seconds)


def test_the_bootstrap_puts_the_edge_in_its_place() -> None:
    """Each setting of `edge` and `away` is where Envoy reads it."""
    edge = Edge.model_validate(
        {
            "max_connections": 7,
            "max_heap_bytes": 1 << 27,
            "headers_timeout_s": 1.5,
            "upload_timeout_s": 7_200,
            "idle_timeout_s": 3,
            "max_connection_s": 4,
            "max_streams": 5,
            "trusted_hops": 2,
            "keep_request_id": True,
            "admin_paths": ["/drain_listeners"],
        }
    )
    away = Away.model_validate({"gone": "refuse", "late": "refuse", "after_s": 2.5})
    document = rendered(edge=edge, away=away, others="refuse")
    heap, connections = document["overload_manager"]["resource_monitors"]
    assert heap["typed_config"]["max_heap_size_bytes"] == 1 << 27
    assert connections["typed_config"]["max_active_downstream_connections"] == 7
    assert {"prefix": "/drain_listeners"} in document["admin"]["allow_paths"]
    http = manager(document)
    assert (http["request_headers_timeout"], http["request_timeout"]) == ("1.5s", "7200s")
    common = http["common_http_protocol_options"]
    assert (common["idle_timeout"], common["max_connection_duration"]) == ("3s", "4s")
    assert http["http2_protocol_options"]["max_concurrent_streams"] == 5
    assert (http["xff_num_trusted_hops"], http["preserve_external_request_id"]) == (2, True)
    settings = fallback_settings(document)
    assert (settings["gone"], settings["late"], settings["others"]) == ("refuse", "refuse", "refuse")
    (processor,) = [each for each in http["http_filters"] if each["name"] == "tokenway.ext_proc"]
    assert processor["typed_config"]["message_timeout"] == "2.5s"


def test_tokenway_on_another_host_is_reached_with_a_certificate() -> None:
    """All three clusters have the addresses and the TLS of `edge.gateway` in place of the sockets."""
    gateway = {
        "addresses": ["10.0.0.5:9000"],
        "cert_file": "/c",
        "key_file": "/k",
        "ca_file": "/a",
        "server_name": "gw.internal",
    }
    document = rendered(edge=Edge.model_validate({"gateway": gateway}))
    clusters = {each["name"]: each for each in document["static_resources"]["clusters"]}
    for each in (clusters[name] for name in WORKER_CLUSTERS):
        assert each["transport_socket"]["typed_config"]["sni"] == "gw.internal"
        (locality,) = each["load_assignment"]["endpoints"]
        (member,) = locality["lb_endpoints"]
        assert member["endpoint"]["address"]["socket_address"] == {"address": "10.0.0.5", "port_value": 9000}
    with pytest.raises(ValidationError, match="all of cert_file"):
        Edge.model_validate({"gateway": {**gateway, "ca_file": None}})


def test_no_test_is_imported() -> None:
    """What tests share is in modules that are no tests, named after what they hold."""
    imported = {
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
        if node.module.startswith("tests.") and node.module.rpartition(".")[2].startswith("test_")
    }
    assert not imported
