"""Two gateways behind two Envoys, sharing one Redis, place requests as one would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from extproc.observing.metrics.sharing import FAMILIES as SHARING_FAMILIES
from testbed.redis_server import RedisServer, running
from tests.e2e.harness import Load, Stack, chat, cluster, eventually, key_of, post, sample
from tests.e2e.pair import all_settled, running_pair
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A real redis-server."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(redis: RedisServer, engines: list[SimulatorServer]) -> AsyncIterator[list[Stack]]:
    """Push mode."""
    async with running_pair(redis.url, [cluster("sim", map(key_of, engines))]) as stacks:
        yield stacks


async def test_each_gateway_sees_the_load_of_both(pair: list[Stack]) -> None:
    """What one gateway has in flight is in the sums of the other while it runs, and gone when it ends."""
    first, second = pair
    running = [asyncio.create_task(post(first, chat("sim", f"long {n}", 400, stream=True))) for n in range(6)]

    async def seen() -> int:
        return sum(row["requests"] for row in (await second.rows()).values())

    await eventually(seen, lambda requests: requests == 6)
    replies = await asyncio.gather(*running)
    assert {reply.status for reply in replies} == {200}
    await all_settled(pair, 8)


async def test_a_prompt_seen_by_one_gateway_is_known_to_the_other(pair: list[Stack]) -> None:
    """The second gateway sends a prompt where the first one had it computed."""
    first, second = pair
    prompt = "one prompt for both gateways " * 100
    assert (await post(first, chat("sim", prompt))).status == 200
    await all_settled(pair, 8)
    (before,) = await first.last(1)
    assert (await post(second, chat("sim", prompt))).status == 200
    await all_settled(pair, 8)
    (after,) = await second.last(1)
    assert after["outcome"]["endpoint"] == before["outcome"]["endpoint"]
    assert after["outcome"]["cached_tokens"] > 0


async def test_nothing_is_left_after_load_through_both(pair: list[Stack]) -> None:
    """Streams through both gateways at once end with every counter at exactly zero on both."""
    first, second = pair
    async with (
        Load(first, "sim", clients=8, stream=True) as one,
        Load(second, "sim", clients=8, stream=True) as other,
    ):
        await one.more(100)
        await other.more(100)
    assert one.failures == other.failures == []
    await all_settled(pair, 8)


async def test_what_is_shared_is_measured(pair: list[Stack]) -> None:
    """Each family about other gateways has a sample, and both gateways count two."""
    for stack in pair:
        scrape = await stack.metrics()
        sampled = {
            line.partition(" ")[0].partition("{")[0] for line in scrape.splitlines() if line[:1] != "#"
        }
        assert {family.name for family in SHARING_FAMILIES} <= sampled
        assert sample(scrape, "tokenway_sharing_connected") == 1
        assert sample(scrape, "tokenway_sharing_gateways") == 2


async def test_compare_and_set_spreads_a_burst_over_both_gateways(
    redis: RedisServer, engines: list[SimulatorServer]
) -> None:
    """With `reserve`, bursts through two gateways at once load equal endpoints equally."""
    clusters = [cluster("sim", map(key_of, engines))]
    models = {"sim": {"rules": [{"cluster": "sim"}], "load_balancing": {"algorithm": "least_request"}}}
    async with running_pair(
        redis.url, clusters, {"models": models}, reserve=True, reserve_timeout_s=0.4, key_prefix="cas"
    ) as stacks:
        replies = await asyncio.gather(
            *(post(stacks[n % 2], chat("sim", f"burst {n}", 200, stream=True)) for n in range(64))
        )
        assert {reply.status for reply in replies} == {200}
        await all_settled(stacks, 8)
        placed: dict[str, int] = {}
        for stack in stacks:
            for record in await stack.last(32):
                endpoint = record["outcome"]["endpoint"]
                placed[endpoint] = placed.get(endpoint, 0) + 1
        assert sum(placed.values()) == 64
        assert len(placed) == 8
        assert max(placed.values()) - min(placed.values()) <= 2
