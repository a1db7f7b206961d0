"""An InferencePool end to end (`tests.kubernetes.pool_site`): the choice, and what becomes of pods."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from testbed import own_network
from testbed.helm import binary
from testbed.istiod import Istiod
from testbed.kubernetes import Cluster
from tests.e2e.harness import Load, chat, eventually, post
from tests.e2e.istio_scenarios import chosen, ended
from tests.kubernetes.leaving import WAYS, Pods, check_charges_of_what_terminates, check_leaving
from tests.kubernetes.pool_site import LABELS, MODES, POOL, Site, installed, llm_d_kinds

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.istio,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(MODES))
async def site(request: pytest.FixtureRequest, cluster: Cluster, istiod: Istiod) -> AsyncIterator[Site]:
    """One in clear text; one by TLS, as the chart's DestinationRule says."""
    address = os.environ.get(own_network.VARIABLE)
    if address is None:
        pytest.skip("run by `make test-kubernetes`, in a network of its own")
    async with installed(cluster, istiod, request.param, address) as made:
        yield made


def place_of(key: str) -> str:
    """`ip:port` of an endpoint, by its key."""
    return key.partition("/")[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_comes_from_the_choice_that_is_explained(site: Site, *, stream: bool) -> None:
    """By the official client: engine, `served` and choice are one, and the usage is that of the answer."""
    for turn in range(4):
        before = site.received()
        question: dict[str, Any] = {
            "model": "sim",
            "messages": [{"role": "user", "content": f"{turn}: hello"}],
            "max_tokens": 5,
            "extra_body": {"ignore_eos": True},
        }
        async with site.stack.client() as client:
            if stream:
                options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
                parts = [part async for part in await client.chat.completions.create(**question, **options)]
                usage = parts[-1].usage
            else:
                usage = (await client.chat.completions.create(**question)).usage
        assert usage is not None
        await ended(site.stack)
        record = await site.explained()
        (engine,) = [
            engine
            for engine, count in zip(site.engines, before, strict=True)
            if len(engine.served) == count + 1
        ]
        outcome = record["outcome"]
        assert sum(site.received()) == sum(before) + 1
        assert outcome["endpoint"] == chosen(record)
        assert place_of(outcome["endpoint"]) == site.place_of(engine)
        assert (outcome["ended"], outcome["completion_tokens"]) == ("completed", usage.completion_tokens)
    await site.stack.settled()


async def test_the_gateway_closes_idle_connections_before_engines_do(site: Site) -> None:
    """By the chart's DestinationRule for the Service that istiod makes of the pool, whose name is a guess."""
    dumps = (await site.proxy.config_dump())["configs"]
    clusters = [each["cluster"] for dump in dumps for each in dump.get("dynamic_active_clusters", ())]
    ours = f".{site.namespace}.svc.cluster.local"  # the gateway hears of all namespaces
    (pool,) = [
        each
        for each in clusters
        if each["name"].startswith("outbound|54321|") and each["name"].endswith(ours)
    ]
    (options,) = pool["typed_extension_protocol_options"].values()
    assert options["common_http_protocol_options"]["idle_timeout"] == "4s"


def pods_of(site: Site) -> Pods:
    """One for each engine."""
    places = [(engine.settings.host, engine.port) for engine in site.engines]
    return Pods(site.cluster, site.namespace, LABELS, places)


@pytest.mark.parametrize("way", WAYS)
async def test_a_pod_that_leaves_gets_nothing_within_a_second(site: Site, way: str) -> None:
    """Under load, and no request fails; when it is back it is chosen again."""
    await check_leaving(site.stack, pods_of(site), way, site.received)


async def test_charges_of_a_pod_that_terminates_stay(site: Site) -> None:
    """Until what runs there has ended by itself."""
    await check_charges_of_what_terminates(site.stack, pods_of(site), site.received, 12_000)


async def test_a_model_that_the_pool_rewrites_has_its_old_name_back(site: Site) -> None:
    """By an InferenceModelRewrite, whose kind is installed while Tokenway runs; before it is not served."""
    assert (await post(site.stack, chat("chat", "hello"))).status == 404
    await site.cluster.apply(*llm_d_kinds())
    rule = {"matches": [{"model": {"value": "chat"}}], "targets": [{"modelRewrite": "sim"}]}
    rewrite = {
        "apiVersion": "llm-d.ai/v1alpha2",
        "kind": "InferenceModelRewrite",
        "metadata": {"name": "chat", "namespace": site.namespace},
        "spec": {"poolRef": {"name": POOL}, "rules": [rule]},
    }
    await site.cluster.apply(rewrite)
    for stream in (False, True):
        reply = await eventually(
            lambda: post(site.stack, chat("chat", "hello", stream=stream)),  # noqa: B023 - awaited here
            lambda reply: reply.status == 200,
            90,
        )
        assert b'"model":"chat"' in reply.body.replace(b'": "', b'":"')
        assert b'"sim"' not in reply.body
        assert (await ended(site.stack))["outcome"]["ended"] == "completed"
    await site.stack.settled()


async def test_a_pool_without_its_picker_does_as_its_failure_mode_says(site: Site) -> None:
    """FailOpen loses no request when the picker leaves and comes back; FailClose answers 500 meanwhile."""
    is_open = site.failure_mode == "FailOpen"
    async with Load(site.stack, "sim", clients=4 if is_open else 0, stream=True) as load:
        assert await site.status() == 200
        await site.cluster.delete_pod("picker", namespace=site.namespace)
        site.stack.gateway.signal(signal.SIGTERM)  # as a kubelet does, which is no sooner than others
        await site.has_pickers()
        assert await site.stack.gateway.ended() == 0
        assert await site.status() == (200 if is_open else 500)
        await site.cluster.delete_pod("picker", namespace=site.namespace, gone=True)
        await site.stack.start_gateway()
        await site.add_picker_pod()
        await site.has_pickers(f"{site.address}:{site.picker_port}")
        assert await site.status() == 200
    assert load.failures == []
    assert (await ended(site.stack))["outcome"]["ended"] == "completed"
    await site.stack.settled()


async def test_a_lone_picker_that_is_killed(site: Site) -> None:
    """Its pod stays in the Service. FailOpen: it costs what it had and what finds it gone; FailClose: 500."""
    is_open = site.failure_mode == "FailOpen"
    async with Load(site.stack, "sim", clients=4 if is_open else 0, stream=True) as load:
        assert await site.status() == 200
        await site.stack.gateway.kill()
        await eventually(site.status, lambda status: status == (200 if is_open else 500))
        left_s = time.monotonic()
        if is_open:
            await load.more(40)
        await site.stack.start_gateway()

        async def decided() -> list[dict[str, Any]]:
            await site.status()
            return await site.stack.last(1)

        await eventually(decided, bool, 30)
        assert await site.status() == 200
    assert [failure for failure in load.failures if failure.began_s > left_s] == []
    assert len(load.failures) <= 8
    await site.stack.settled()


async def test_an_engine_that_is_gone_is_followed_by_the_next(site: Site) -> None:
    """The next that was named answers, and `served` says so. The last test: the engine stays away."""
    gone = site.place_of(site.engines[0])
    await site.engines[0].kill()

    async def read() -> tuple[str, str]:
        assert await site.status() == 200
        record = await ended(site.stack)
        return place_of(chosen(record)), place_of(record["outcome"]["endpoint"])

    named, served = await eventually(read, lambda places: places[0] == gone)
    assert served != named
    await site.stack.settled()
