"""A real istiod makes the real Envoy a gateway that goes by Tokenway: `tokenway render istio`, end to end."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from extproc.config.schema import Config
from testbed.control_planes.build import binary
from testbed.processes import REPOSITORY, envoy_binary, get
from tests.e2e.assembled_stack import cluster_of, host
from tests.e2e.harness import Load, chat, key_of, post, send
from tests.e2e.istio_scenarios import SCENARIOS, Under
from tests.istio.gateway import NAMESPACE, ORIGIN, Behind, behind_istio

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

SAMPLES = REPOSITORY / "istio"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def behind() -> AsyncIterator[Behind]:
    """One gateway for all tests here."""
    async with behind_istio() as made:
        yield made


@pytest.fixture
def under(behind: Behind) -> Under:
    """With clean recorders."""
    behind.under.reset()
    return behind.under


async def istioctl(*words: str | Path) -> tuple[int, str]:
    """Exit code and all that it printed."""
    process = await asyncio.create_subprocess_exec(
        binary("istio", "istioctl"), *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_nothing_of_what_is_rendered_is_refused_or_idle(behind: Behind) -> None:
    """Envoy took all that istiod sent, and every patch found what it changes."""
    assert behind.proxy.refused() == ""
    metrics = await behind.istiod.metrics()
    rejects = re.findall(r"^pilot_total_xds_rejects\S* (\S+)", metrics, re.MULTILINE)
    assert all(float(count) == 0 for count in rejects)
    document: Any = static(await behind.proxy.config_dump())
    (listener,) = document["static_resources"]["listeners"]
    assert listener["per_connection_buffer_limit_bytes"] == Config().request.max_body_bytes
    assert listener["listener_filters_timeout"] == "10s"
    assert [each["name"] for each in listener["listener_filters"]] == ["envoy.filters.listener.tls_inspector"]
    manager = listener["filter_chains"][0]["filters"][-1]["typed_config"]
    assert manager["early_header_mutation_extensions"]
    assert [log["name"] for log in manager["access_log"]] == ["envoy.access_loggers.http_grpc"]
    filters = [each["name"] for each in manager["http_filters"]]
    ours = ["tokenway.ext_proc", "tokenway.fallback", "tokenway.usage", "tokenway.answer"]
    assert filters[-5:] == [*ours, "envoy.filters.http.router"]
    assert manager["http_filters"][-1]["typed_config"]["upstream_log"]
    (host_of_all,) = manager["route_config"]["virtual_hosts"]
    assert host_of_all["include_request_attempt_count"]
    clusters_of = {route["name"]: route["route"] for route in host_of_all["routes"]}
    for name in ("tokenway-pinned", "tokenway-decided"):
        assert clusters_of[name]["cluster_header"] == "x-tokenway-cluster"
    assert clusters_of["tokenway-nowhere"]["cluster"] == "tokenway-none"
    stops = {name: route["idle_timeout"] for name, route in clusters_of.items()}
    assert stops.pop("tokenway-nowhere") == "65s"
    assert "tokenway-fallback-0" in stops
    assert set(stops.values()) == {manager["stream_idle_timeout"]} == {"600s"}
    clusters = {each["name"]: each for each in document["static_resources"]["clusters"]}
    for name in ("sim", "recorder", "pair", "mortal"):
        assert "override_host" in str(clusters[cluster_of(name)]["load_balancing_policy"])
    assert clusters["outbound|9000||tokenway.internal"]["health_checks"]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_gateway_of_istios(under: Under, scenario: Callable[[Under], Awaitable[None]]) -> None:
    """It does what our own Envoy does; each scenario says what."""
    await scenario(under)


async def test_pages_of_one_origin_may_call(behind: Behind) -> None:
    """A preflight of a page that may call is answered, by Istio's own filter; others get nothing."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    path = "/v1/chat/completions"
    reply = await send(behind.stack, "OPTIONS", path, None, {**asked, "origin": ORIGIN})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in reply.headers["access-control-allow-headers"]
    reply = await send(behind.stack, "OPTIONS", path, None, {**asked, "origin": "https://other.example.com"})
    assert "access-control-allow-origin" not in reply.headers
    answer = await post(behind.stack, chat("recorded", "hello"), {"origin": ORIGIN})
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)


async def test_an_edit_of_the_service_entry_under_load(behind: Behind) -> None:
    """An engine is taken out and put back while clients ask: no request fails, and it serves again."""
    stack = behind.stack
    sim, *others = behind.under.clusters()
    first, second = sim["endpoints"]
    served = len(behind.under.engines[1].served)
    async with Load(stack, "sim", clients=6, stream=False) as load:
        await load.more(12)
        await stack.declare({**sim, "endpoints": [first]}, *others)
        await load.more(12)
        await stack.declare({**sim, "endpoints": [second]}, *others)
        await load.more(12)
        await stack.declare(sim, *others)
        await load.more(12)
    assert load.failures == []
    assert len(behind.under.engines[1].served) > served
    await stack.settled()


async def test_istiod_may_be_away(behind: Behind) -> None:
    """Killed under load, and started again: no request fails, and an edit made meanwhile is taken."""
    stack = behind.stack
    sim, *others = behind.under.clusters()
    async with Load(stack, "sim", clients=4, stream=True) as load:
        await load.more(8)
        await behind.istiod.kill()
        await load.more(20)
        await behind.istiod.start()
        await stack.declare({**sim, "endpoints": sim["endpoints"][:1]}, *others)
        await load.more(8)
        await stack.declare(sim, *others)
        await load.more(8)
    assert load.failures == []
    await stack.settled()


async def test_istioctl_shows_what_is_there(behind: Behind, tmp_path: Path) -> None:
    """The operator's own checks, on a dump of the running Envoy."""
    dump = tmp_path / "config_dump.json"
    dump.write_text(json.dumps(await behind.proxy.config_dump()))
    clusters_dump = tmp_path / "clusters.json"
    url = f"http://127.0.0.1:{behind.proxy.admin_port}/clusters?format=json"
    clusters_dump.write_bytes(await get(url))

    async def shown(what: str, *words: str, file: Path = dump) -> str:
        code, said = await istioctl("proxy-config", what, "-f", file, *words)
        assert code == 0, said
        return said

    listeners = await shown("listener", "--port", str(behind.stack.port), "-o", "json")
    assert "tokenway.ext_proc" in listeners
    assert "tokenway.usage" in listeners
    routes = await shown("route", "-o", "json")
    for name in ("tokenway-pinned", "tokenway-decided", "tokenway-fallback-0", "tokenway-nowhere"):
        assert f'"{name}"' in routes
    assert "x-tokenway-cluster" in routes
    clusters = await shown("cluster", "--fqdn", host("sim"), "-o", "json")
    assert "override_host" in clusters
    endpoints = await shown("endpoint", "--cluster", cluster_of("sim"), file=clusters_dump)
    assert [key_of(engine) for engine in behind.under.engines if key_of(engine) not in endpoints] == [], (
        endpoints
    )


async def test_it_is_whole_without_istiod(behind: Behind, tmp_path: Path) -> None:
    """What istiod made of it, as a static configuration: Envoy's own check, which refuses unknown fields."""
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(static(await behind.proxy.config_dump())))
    process = await asyncio.create_subprocess_exec(
        envoy_binary(), "--mode", "validate", "-c", path, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 0, said[-2000:].decode()


def static(dump: dict[str, object]) -> dict[str, object]:
    """A configuration dump as a bootstrap: listeners with their routes, clusters, no xDS."""
    configs = {str(each["@type"]).rpartition(".")[2]: each for each in dump["configs"]}  # type: ignore[attr-defined]
    routes = {
        each["route_config"]["name"]: each["route_config"]
        for each in configs["RoutesConfigDump"]["dynamic_route_configs"]
    }
    listeners = [
        each["active_state"]["listener"] for each in configs["ListenersConfigDump"]["dynamic_listeners"]
    ]
    clusters = [each["cluster"] for each in configs["ClustersConfigDump"]["dynamic_active_clusters"]]
    for of_type in (*listeners, *clusters, *routes.values()):
        of_type.pop("@type")
    for listener in listeners:
        for chain in listener["filter_chains"]:
            manager = chain["filters"][-1]["typed_config"]
            manager["route_config"] = routes[manager.pop("rds")["route_config_name"]]
    for made in clusters:
        if made.get("type") == "EDS":
            made["type"] = "STATIC"
            made.pop("eds_cluster_config")
            made["load_assignment"] = {"cluster_name": made["name"]}
    return {"static_resources": {"listeners": listeners, "clusters": clusters}}


async def test_istioctl_validates_the_samples() -> None:
    """No error, and no other warning than that EnvoyFilters are internals."""
    code, said = await istioctl("validate", "-f", SAMPLES)
    assert code == 0, said
    warnings = [line for line in said.splitlines() if line.lstrip().startswith("*")]
    assert all("EnvoyFilter exposes internal implementation details" in line for line in warnings)


async def test_istioctl_finds_nothing_but_the_documented() -> None:
    """IST0133, of each EnvoyFilter, and no other message of any level."""
    code, said = await istioctl("analyze", "--use-kube=false", "-A", "--output-threshold", "Info", SAMPLES)
    assert code == 0, said
    codes = re.findall(r"\[(IST\d+)\] \((\S+) ", said)
    filters = [
        document["metadata"]["name"]
        for document in yaml.safe_load_all((SAMPLES / "envoyfilters.yaml").read_text())
    ]
    assert codes == [("IST0133", "EnvoyFilter")] * len(filters)
    assert NAMESPACE in said
