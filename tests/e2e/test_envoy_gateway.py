"""What Envoy Gateway's own translator makes of the chart, and the real Envoy that has it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from testbed import envoy_gateway
from testbed.envoy_gateway import CONTROLLER, Translation, translated
from testbed.helm import HTTP_LISTENER, NAMESPACE, binary, rendered
from testbed.processes import free_ports
from tests.e2e.harness import Load, chat, envoy_binary, post, simulators
from tests.e2e.pair import all_settled
from tests.e2e.replicas import CLIENTS, running_replicas
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`"),
    pytest.mark.skipif(not envoy_gateway.is_available(), reason=envoy_gateway.HOW_TO_BUILD),
]

CASES = {"envoy-gateway": NAMESPACE, "envoy-gateway-tls": "gateways"}
"""Sets of values, each with the namespace of its Gateway."""

PICKERS = "envoyextensionpolicy/"
ENGINES = "httproute/"
"""How Envoy Gateway's names of their clusters begin."""


@pytest.fixture(scope="module")
def authority() -> str:
    """A certificate, PEM."""
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca"
    done = subprocess.run(
        [*words.split(), "-keyout", "/dev/null"], capture_output=True, text=True, check=True
    )
    return done.stdout


def around(namespace: str, authority: str) -> list[dict[str, Any]]:
    """What is there before the chart: the Gateway of the route, who signs the picker's certificate."""
    return [
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": "eg"},
            "spec": {"controllerName": CONTROLLER},
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "eg", "namespace": namespace},
            "spec": {"gatewayClassName": "eg", "listeners": [HTTP_LISTENER]},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "picker-ca", "namespace": NAMESPACE},
            "data": {"ca.crt": authority},
        },
    ]


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, authority: str) -> Iterator[tuple[str, Translation]]:
    """A set of values and what comes of it."""
    objects = [*around(CASES[request.param], authority), *rendered(request.param)]
    with TemporaryDirectory() as folder:
        yield request.param, translated(objects, Path(folder))


async def test_envoy_gateway_takes_every_object(case: tuple[str, Translation]) -> None:
    """Each policy is accepted, and none is passed over."""
    name, translation = case
    assert translation.refused() == []
    kinds = {each["kind"] for each in translation.objects}
    assert {"HTTPRoute", "EnvoyExtensionPolicy", "BackendTrafficPolicy"} <= kinds
    assert ("BackendTLSPolicy" in kinds) is (name == "envoy-gateway-tls")
    assert ("ClientTrafficPolicy" in kinds) is (name == "envoy-gateway")


async def test_what_it_makes_is_taken_by_envoy(
    case: tuple[str, Translation], authority: str, tmp_path: Path
) -> None:
    """`envoy --mode validate`, with routes, endpoints and secrets in the same file."""
    _, translation = case
    path = tmp_path / "envoy.json"
    admin_port, port = free_ports(2)
    path.write_text(json.dumps(translation.bootstrap(admin_port, port, {}, authority)))
    done = await asyncio.to_thread(
        subprocess.run,
        [str(envoy_binary()), "--mode", "validate", "-c", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


async def test_the_streams_of_pickers_are_what_the_chart_says(case: tuple[str, Translation]) -> None:
    """Nothing of it is lost on the way: full duplex, no limit below ours, a replica that is gone is left."""
    _, translation = case
    document = translation.bootstrap(1, 2, {})["static_resources"]
    (pickers,) = [each for each in document["clusters"] if each["name"].startswith(PICKERS)]
    assert pickers["circuitBreakers"]["thresholds"][0]["maxRequests"] == 65_535
    assert pickers["healthChecks"][0]["grpcHealthCheck"] == {"serviceName": "liveness"}
    text = json.dumps(document)
    assert '"requestBodyMode": "FULL_DUPLEX_STREAMED"' in text
    assert '"connectionKeepalive": {"interval": "4s", "timeout": "3s"}' in text
    assert '"retryOn": "connect-failure,refused-stream,reset,unavailable"' in text


def document(
    translation: Translation, picker_ports: list[int], engines: list[SimulatorServer], port: int, admin: int
) -> dict[str, Any]:
    """With the endpoints that Envoy Gateway reads from EndpointSlices."""
    places = {
        PICKERS: [("127.0.0.1", each) for each in picker_ports],
        ENGINES: [("127.0.0.1", engine.port) for engine in engines],
    }
    return translation.bootstrap(admin, port, places)


async def test_requests_go_through_it(authority: str, tmp_path: Path) -> None:
    """Answers of more than ten seconds, prompts of 400 KB; a picker that is killed costs what it had."""
    values: dict[str, Any] = {"httpRoute": {"hostnames": []}}
    objects = [*around(NAMESPACE, authority), *rendered("envoy-gateway", values)]
    made = partial(document, translated(objects, tmp_path))
    cluster = f"{PICKERS}{NAMESPACE}/test-tokenway/extproc/0"
    async with (
        simulators(3, time_scale=0.1) as engines,
        running_replicas(engines, made, cluster) as replicas,
    ):
        first, second = replicas.stacks
        began_s = time.monotonic()
        long = asyncio.create_task(post(replicas, chat("sim", "a long one", 14_000, stream=True)))
        reply = await post(replicas, chat("sim", "and " * 100_000, 4))
        assert reply.status == 200, reply.body
        async with Load(replicas, "sim", clients=CLIENTS, stream=True, padding=40_000) as load:
            await load.more(60)
        assert load.failures == []
        reply = await long
        assert reply.status == 200
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert time.monotonic() - began_s > 10
        async with Load(replicas, "sim", clients=CLIENTS, stream=True, max_tokens=30) as load:
            await load.more(60)
            await first.gateway.kill()
            killed_s = time.monotonic()
            await load.more(180)
        assert [failure for failure in load.failures if failure.began_s > killed_s] == []
        assert len(load.failures) <= CLIENTS
        await all_settled([second], 20)
