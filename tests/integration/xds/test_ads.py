"""Delta ADS against the real Envoy: what is published takes effect, and only that is sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from envoy_data_plane.envoy.config.cluster import v3 as cluster_v3
from envoy_data_plane.envoy.service.discovery import v3 as discovery_v3

from extproc.health.states import HealthState
from extproc.transport import grpc_aio
from extproc.transport.seam import Call, Message, joined
from extproc.values.endpoints import Endpoint
from extproc.xds import delta
from extproc.xds.ads import AdsServer
from extproc.xds.cluster_encoding import encode
from extproc.xds.resources import cluster_resources, load_assignments
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

pytestmark = [pytest.mark.asyncio, pytest.mark.e2e]

DEADLINE_S = 10.0

BOOTSTRAP = """
node: {{id: test, cluster: test}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin_port}}}}}}}
dynamic_resources:
  ads_config:
    api_type: DELTA_GRPC
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]
  cds_config: {{ads: {{}}, resource_api_version: V3, initial_fetch_timeout: 2s}}
static_resources:
  listeners:
  - name: ingress
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster_header: x-cluster}}}}]
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 0.25s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: xds
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {xds_socket}}}}}}}}}]}}]
"""  # noqa: E501 - a type URL cannot be broken


@pytest.fixture
def envoy_binary() -> Path:
    """The Envoy under test: TOKENWAY_ENVOY, or the one fetched into the repository."""
    fetched = Path(__file__).parents[3] / ".tools/envoy/envoy/_bin/envoy"
    path = Path(os.environ.get("TOKENWAY_ENVOY", fetched))
    if not path.exists():
        pytest.fail("no Envoy: run `make envoy`, or set TOKENWAY_ENVOY to the binary")
    return path


def free_port() -> int:
    """A port that nothing listens on right now; Envoy cannot report one it chose."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """One Envoy, its control plane, two engines, and what was said on the wire."""

    ads: AdsServer
    server: grpc.aio.Server
    xds_socket: str
    http: aiohttp.ClientSession
    url: str
    engines: dict[str, Endpoint]
    nacks: Counter[str]
    published: set[str] = field(default_factory=set)
    sent: list[discovery_v3.DeltaDiscoveryResponse] = field(default_factory=list)

    def publish(
        self,
        clusters: dict[str, list[str]],
        models: dict[str, str] | None = None,
        ejected: tuple[str, ...] = (),
    ) -> list[str]:
        """Publish clusters by engine names."""
        endpoints = {name: [self.engines[e] for e in engines] for name, engines in clusters.items()}
        out = {self.engines[name].key for name in ejected}

        def state_of(key: EndpointKey) -> HealthState:
            return HealthState.EJECTED if key in out else HealthState.HEALTHY

        resources = {
            CLUSTER_TYPE: cluster_resources(clusters, models or {}, encode),
            ASSIGNMENT_TYPE: load_assignments(endpoints, state_of),
        }
        gone, self.published = self.published, {name for bodies in resources.values() for name in bodies}
        return self.ads.publish(
            {type_url: {**dict.fromkeys(gone), **bodies} for type_url, bodies in resources.items()}
        )

    async def ask(self, cluster: str) -> str:
        """Which engine answers, or the status that Envoy gives instead."""
        async with self.http.get(self.url, headers={"x-cluster": cluster}) as response:
            return await response.text() if response.status == 200 else str(response.status)

    async def serve(self) -> None:
        """Start a control plane at the socket, recording every response it sends."""
        self.server = grpc.aio.server()
        rpc = replace(self.ads.rpc, open=lambda call: self.ads.open(Recorded(call, self.sent)))
        self.server.add_generic_rpc_handlers(grpc_aio.handlers([rpc]))
        self.server.add_insecure_port(f"unix:{self.xds_socket}")
        await self.server.start()


class Recorded:
    """A call whose messages are kept.

    Args:
        call: What it is.
        sent: Where they are kept.
    """

    def __init__(self, call: Call, sent: list[discovery_v3.DeltaDiscoveryResponse]) -> None:
        self._call = call
        self._sent = sent
        self.finish = call.finish
        self.abort = call.abort

    @property
    def peer(self) -> str:
        """See `Call`."""
        return self._call.peer

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        self._sent.append(discovery_v3.DeltaDiscoveryResponse.FromString(joined(message)))
        self._call.send(message, sent)


async def eventually(ask: Callable[[], Awaitable[object]], expected: object) -> float:
    """Ask until the answer is as expected; returns the seconds it took."""
    start_s = time.monotonic()
    while (answer := await ask()) != expected:
        assert time.monotonic() - start_s < DEADLINE_S, f"still {answer}, not {expected}"
        await asyncio.sleep(0.01)
    return time.monotonic() - start_s


@contextlib.asynccontextmanager
async def engine(name: str) -> AsyncIterator[Endpoint]:
    """An HTTP server that answers with its name."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=name)

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield Endpoint(EndpointKey(f"uid/{name}"), "m", Address("127.0.0.1", runner.addresses[0][1]))
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def envoy(binary: Path, tmp_path: Path, xds_socket: str) -> AsyncIterator[str]:
    """A running Envoy; yields the listener's URL and kills the process in the end, whatever happens."""
    port, admin_port = free_port(), free_port()
    bootstrap = tmp_path / "envoy.yaml"
    bootstrap.write_text(BOOTSTRAP.format(port=port, admin_port=admin_port, xds_socket=xds_socket))
    with (tmp_path / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            binary, "-c", bootstrap, "--concurrency", "1", "--use-dynamic-base-id", stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.fixture
async def world(envoy_binary: Path, tmp_path: Path) -> AsyncIterator[World]:
    """Envoy connected to a control plane that publishes cluster `m` with engine `a`."""
    nacks: Counter[str] = Counter()

    def count(type_url: str) -> None:
        nacks[type_url] += 1

    async with (
        engine("a") as a,
        engine("b") as b,
        aiohttp.ClientSession() as http,
        contextlib.AsyncExitStack() as stack,
    ):
        built = World(
            AdsServer(count), grpc.aio.server(), str(tmp_path / "xds.sock"), http, "", {"a": a, "b": b}, nacks
        )
        built.publish({"m": ["a"]})
        await built.serve()
        stack.push_async_callback(lambda: built.server.stop(None))
        built.url = await stack.enter_async_context(envoy(envoy_binary, tmp_path, built.xds_socket))

        async def first() -> str:
            try:
                return await built.ask("m")
            except aiohttp.ClientConnectionError:
                return "starting"

        await eventually(first, "a")
        yield built


async def test_endpoint_swap_takes_effect(world: World) -> None:
    """Publishing another endpoint moves the traffic, and sends the assignment alone."""
    world.sent.clear()
    assert world.publish({"m": ["b"]})
    await eventually(lambda: world.ask("m"), "b")
    assert [(r.type_url, [x.name for x in r.resources]) for r in world.sent] == [(ASSIGNMENT_TYPE, ["m"])]
    assert not world.publish({"m": ["b"]})


async def test_fallback_avoids_ejected_endpoints(world: World) -> None:
    """With an endpoint ejected, Envoy's own choice falls on the others only; if all are, on any."""
    world.publish({"m": ["a", "b"]}, ejected=("a",))
    await eventually(lambda: world.ask("m"), "b")
    assert {await world.ask("m") for _ in range(20)} == {"b"}
    world.publish({"m": ["a"]}, ejected=("a",))
    await eventually(lambda: world.ask("m"), "a")


async def test_removed_cluster_is_gone(world: World) -> None:
    """A cluster that is no longer published is no longer routable, and can return."""
    world.publish({"n": ["b"]})
    await eventually(lambda: world.ask("m"), "503")
    await eventually(lambda: world.ask("n"), "b")
    world.publish({"m": ["b"]})
    await eventually(lambda: world.ask("m"), "b")


async def test_model_alias_of_a_known_cluster_is_usable_at_once(world: World) -> None:
    """A new alias shares an assignment Envoy has already, and does not wait out a fetch time-out."""
    world.publish({"m": ["a"]}, {"gpt": "m"})
    assert await eventually(lambda: world.ask("model:gpt"), "a") < 2.0
    world.publish({"m": ["b"]}, {"gpt": "m"})
    await eventually(lambda: world.ask("model:gpt"), "b")


async def test_reconnect_does_not_resend_what_envoy_has(world: World) -> None:
    """After a restart of the control plane only what changed meanwhile is sent."""
    world.publish({"m": ["a"], "n": ["a"]})
    await eventually(lambda: world.ask("n"), "a")
    await world.server.stop(None)
    assert await world.ask("m") == "a"
    world.sent.clear()
    nacks = world.nacks
    world.ads = AdsServer(lambda type_url: nacks.update([type_url]))
    world.publish({"m": ["a"], "n": ["b"]})
    await world.serve()
    await eventually(lambda: world.ask("n"), "b")
    assert [r.name for response in world.sent for r in response.resources] == ["n"]
    assert not nacks


async def test_invalid_resource_is_refused_and_counted(world: World) -> None:
    """Envoy's refusal is counted, harms nothing that works, and the next good version is taken."""
    bad = cluster_v3.Cluster(name="bad", type=cluster_v3.ClusterDiscoveryType.EDS)  # names no source
    good = cluster_resources(["m"], {}, encode)

    async def refusals() -> int:
        return world.nacks[CLUSTER_TYPE]

    world.ads.publish({CLUSTER_TYPE: {**good, "bad": bytes(bad)}})
    await eventually(refusals, 1)
    assert await world.ask("m") == "a"
    world.publish({"m": ["a"], "bad": ["b"]})
    await eventually(lambda: world.ask("bad"), "b")
    assert world.nacks == {CLUSTER_TYPE: 1}


async def test_a_cluster_that_envoy_keeps_as_it_was_is_known(world: World) -> None:
    """It refused the change and goes on by what it had, until the next good version, or its end."""
    bad = cluster_v3.Cluster(name="m", type=cluster_v3.ClusterDiscoveryType.EDS)  # names no source

    async def kept() -> set[str]:
        return set(world.ads.kept)

    world.publish({"m": ["a"], "n": ["b"]})
    await eventually(lambda: world.ask("m"), "a")
    assert await kept() == set()
    for _ in range(2):
        world.ads.publish({CLUSTER_TYPE: {"m": bytes(bad)}})
        await eventually(kept, {"m"})
        assert await world.ask("m") == "a"
        world.publish({"m": ["a"], "n": ["b"]})
        await eventually(kept, set())
    world.ads.publish({CLUSTER_TYPE: {"m": bytes(bad)}})
    await eventually(kept, {"m"})
    world.ads.publish({CLUSTER_TYPE: {"m": None}})
    await eventually(kept, set())


@contextlib.asynccontextmanager
async def client(ads: AdsServer, tmp_path: Path) -> AsyncIterator[Any]:
    """A delta stream of a client that can do what Envoy does not."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(grpc_aio.handlers([ads.rpc]))
    address = f"unix:{tmp_path}/xds.sock"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel.stream_stream(
                "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
                request_serializer=bytes,
                response_deserializer=discovery_v3.DeltaDiscoveryResponse.FromString,
            )()
    finally:
        await server.stop(None)


async def test_stream_that_asks_for_too_much_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client beyond the subscription limit gets RESOURCE_EXHAUSTED and leaves no stream."""
    monkeypatch.setattr(delta, "MAX_NAMES", 1)
    ads = AdsServer(lambda _: None)
    async with client(ads, tmp_path) as call:
        await call.write(
            discovery_v3.DeltaDiscoveryRequest(type_url=ASSIGNMENT_TYPE, resource_names_subscribe=["a", "b"])
        )
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(ads._subscribers) == 0


async def test_stream_ends_with_its_client(tmp_path: Path) -> None:
    """A client that goes away, or is done asking, leaves no stream behind."""
    ads = AdsServer(lambda _: None)

    async def streams() -> int:
        return len(ads._subscribers)

    for leave in ("cancel", "done_writing"):
        async with client(ads, tmp_path) as call:
            await call.write(discovery_v3.DeltaDiscoveryRequest(type_url=CLUSTER_TYPE))
            assert (await call.read()).type_url == CLUSTER_TYPE
            assert len(ads._subscribers) == 1
            if leave == "cancel":
                call.cancel()
            else:
                await call.done_writing()
            await eventually(streams, 0)


async def test_close_ends_streams(world: World) -> None:
    """Closing ends all streams without waiting for Envoy, which keeps serving what it has."""
    assert len(world.ads._subscribers) == 1
    world.ads.close()

    async def streams() -> int:
        return len(world.ads._subscribers)

    await eventually(streams, 0)
    assert await world.ask("m") == "a"
