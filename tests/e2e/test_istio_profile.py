"""The configuration for an Istio gateway on the real Envoy, put there by hand instead of by istiod."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from testbed.assembled import assembled
from tests.e2e.assembled_stack import AssembledStack, cluster_of
from tests.e2e.harness import (
    answer_chat,
    chat,
    check,
    cluster,
    envoy_binary,
    eventually,
    key_of,
    post,
    recording,
    simulators,
)
from tests.e2e.istio_scenarios import CONFIG, MODELS, SCENARIOS, Under, led_by_a_rule
from tests.e2e.stopping import HEAD, STALL_S, said_until_closed, stopping_soon
from tokenway.cli.render import rendered

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _under() -> AsyncIterator[Under]:
    async with AsyncExitStack() as exits:
        engines = await exits.enter_async_context(simulators(2, time_scale=0.1))
        recorders = [await exits.enter_async_context(recording()) for _ in range(4)]
        stack = AssembledStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), 1)
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        made = Under(stack, engines, *recorders)
        stack.write_config(CONFIG)
        stack.write_clusters(*made.clusters())
        await stack.start_gateway()
        await stack.start_envoy()
        yield made


@pytest.fixture
def under(_under: Under) -> Under:
    """The gateway with clean recorders."""
    _under.reset()
    return _under


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_an_envoy_configured_so(under: Under, scenario: Callable[[Under], Awaitable[None]]) -> None:
    """It does what our own does; each scenario says what."""
    await scenario(under)


async def test_envoy_takes_what_is_rendered_for_every_setting(tmp_path: Path) -> None:
    """Envoy's own check, which refuses unknown fields, with all of `edge` and `away` given."""
    config = {
        "version": 1,
        "server": {"run_dir": str(tmp_path)},
        "istio_gateway": {"port": 1, "hosts": ["llm.example.com"]},
        "away": {"gone": "refuse", "late": "refuse", "after_s": 1.25},
        "edge": {
            "headers_timeout_s": 1.5,
            "upload_timeout_s": 7200,
            "idle_timeout_s": 3,
            "max_connection_s": 4,
            "max_streams": 5,
            "trusted_hops": 2,
            "keep_request_id": True,
        },
        "request": {"allow_fields": ["priority"], "max_body_bytes": 4096, "forward_credentials": True},
        "models": MODELS,
    }
    path = tmp_path / "tokenway.yaml"
    path.write_text(yaml.safe_dump(config))
    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    files = rendered(path)
    document = assembled(
        [manifest for manifests in files.values() for manifest in manifests],
        port=1,
        admin_port=2,
        endpoints={cluster_of(name): [("127.0.0.1", 3)] for name in ("sim", "recorder", "pair")},
        sockets=["/nowhere.sock"],
    )
    envoy = tmp_path / "envoy.json"
    envoy.write_text(json.dumps(document))
    checking = await asyncio.create_subprocess_exec(
        envoy_binary(), "--mode", "validate", "-c", envoy, stderr=asyncio.subprocess.PIPE
    )
    _, said = await checking.communicate()
    assert checking.returncode == 0, said[-2000:].decode()


SERVICES: Final = ("one", "other")


def _to(service: str) -> dict[str, Any]:
    return {"models": {"sim": {"rules": [{"cluster": cluster_of(service)}]}}}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_rule_leads_to_another_service_under_load(workers: int) -> None:
    """One that the gateway has: no route of it has to be another, so no request fails."""
    async with simulators(2, time_scale=0.1) as engines:
        stack = AssembledStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), workers)
        try:
            stack.write_config(_to(SERVICES[0]))
            stack.write_clusters(*(cluster(cluster_of(name), map(key_of, engines)) for name in SERVICES))
            await stack.start_gateway()
            await stack.start_envoy()

            load = await led_by_a_rule(
                stack, lambda service: stack.write_config(_to(service)), SERVICES, cluster_of, workers
            )
        finally:
            await stack.stop()
            shutil.rmtree(stack.run_dir, ignore_errors=True)
    assert load.failures == [], f"{len(load.failures)} beside {load.answers} answers: {load.failures[:3]}"


async def test_a_service_that_the_gateway_has_not_yet() -> None:
    """Tokenway may hear of one before istiod has told the gateway: such requests are refused in words."""
    async with recording() as engine, recording() as late:
        stack = AssembledStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), 1)
        config = {"models": {name: {"rules": [{"cluster": cluster_of(name)}]} for name in SERVICES}}
        try:
            stack.write_config(config)
            stack.write_clusters(cluster(cluster_of("one"), [engine.key]))
            await stack.start_gateway()
            await stack.start_envoy()
            places = zip(SERVICES, (engine, late), strict=True)
            stack.write_clusters(*(cluster(cluster_of(name), [each.key]) for name, each in places))
            await eventually(stack.rows, lambda rows: late.key in rows)
            reply = await post(stack, chat("other", "hi"))
            assert check(reply, 503, "no_healthy_endpoint")
            assert reply.headers["retry-after"] == "1"
            assert (await post(stack, chat("one", "hi"))).status == 200
            await stack.settled()
            rows = await stack.rows()
            assert late.received == []
            assert [rows[each.key]["state"] for each in (engine, late)] == ["healthy", "healthy"]
        finally:
            await stack.stop()
            shutil.rmtree(stack.run_dir, ignore_errors=True)


async def test_what_a_client_leaves_half_done_is_bounded() -> None:
    """As by our own bootstrap: silence, half a line, an upload that stops; no engine that takes its time."""

    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(STALL_S * 3)
        return await answer_chat(request)

    config: dict[str, Any] = {
        "models": {"m": {"rules": [{"cluster": "m"}]}},
        "edge": {"headers_timeout_s": 1.0},
    }
    async with recording() as engine:
        engine.behaviour = late
        folder = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))
        stack = AssembledStack(folder, 1, adapt=stopping_soon)
        try:
            stack.write_config(config)
            stack.write_clusters(cluster("m", [engine.key]))
            await stack.start_gateway()
            await stack.start_envoy()
            for said in (b"", b"P"):
                assert await said_until_closed(stack.port, said) == b""
            assert (await said_until_closed(stack.port, b"POST /v1")).startswith(b"HTTP/1.1 408 ")
            heard = await said_until_closed(stack.port, HEAD + b"content-length: 1000\r\n\r\n{")
            assert heard.startswith(b"HTTP/1.1 408 ")
            assert b"The request did not arrive in time." in heard
            assert engine.received == []
            assert (await post(stack, chat("m", "hi"))).status == 200
            await stack.gateway.kill()
            assert (await post(stack, chat("m", "hi"))).status == 200
        finally:
            await stack.stop()
            shutil.rmtree(folder, ignore_errors=True)
