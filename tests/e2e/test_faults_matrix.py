"""The shared metadata center, broken in every way under load: no client notices, and it heals by itself."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from testbed.processes import SETTLE_TIMEOUT_S, Subprocess
from testbed.redis_server import running
from testbed.tokenizer_folder import write_tokenizer
from tests.e2e.faults import (
    CLIENTS,
    IS_FULL,
    MODEL,
    ROUND_TRIP_S,
    Clock,
    Course,
    Deployment,
    FaultTable,
    Link,
    Mode,
    Phase,
    PrefixLoad,
    Prompts,
    Quality,
    RequestLogs,
    completion,
    engine_words,
    free_ports,
    rss_bytes,
    usage_of,
)
from tests.e2e.harness import (
    DEBUG_HEADERS,
    DEBUG_TOKEN_ENV,
    DECISION_HEADER,
    EngineProcess,
    cluster,
    eventually,
    running_stack,
    send,
)
from tests.e2e.pair import SHARE_LEASE_S, all_settled, shared

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

ENGINES = 4
HEALTH = {"interval_s": 0.5, "recovery_interval_s": 0.2, "ejection_s": 0.5, "timeout_s": 5.0}
"""Quick to see an engine go and come back; patient with one whose core is busy."""

MAX_BLOCKS = 50_000
"""Bound on the gateways' cache maps: a third of what the flood announces."""

WITHIN_S = 5.0
"""Counters are exact again so soon after Redis is back: the requirement's bound."""

LEAST_EXACT_RATIO = 0.95
"""Of the requirement."""

BLOCK_TOKENS = 16
"""Of the engines' profile."""

FLOOD_BATCHES = 100_000
MAX_GROWTH_BYTES = 256 << 20
"""Of a gateway's memory by the flood: 50,000 blocks take 6 MB, what ZeroMQ queues takes the rest."""

DAY_S = 86_400.0


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> FaultTable:
    """Takes figures that are printed at the end of the run."""
    made = FaultTable()
    pytestconfig.pluginmanager.register(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer.json` of engines and gateways."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def deployment(_envoy: None, tokenizer: Path) -> AsyncIterator[Deployment]:
    """Two gateways, two Envoys, a Redis behind links, and engines in processes of their own."""
    folder = Path(tempfile.mkdtemp(prefix="twf", dir="/tmp"))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        redis = stack.enter_context(running(folder / "redis"))

        async def link(port: int) -> Link:
            made = Link(port)
            await made.start()
            stack.push_async_callback(made.stop)
            return made

        ports = list(free_ports(2 * ENGINES))
        engines = [
            EngineProcess(folder / f"engine{number}.log", *engine_words(tokenizer, *ports[2 * number :][:2]))
            for number in range(ENGINES)
        ]
        for engine in engines:
            stack.push_async_callback(engine.kill)
        await asyncio.gather(*(engine.start() for engine in engines))
        events, replay = await link(ports[0]), await link(ports[1])
        pool = cluster("sim", [engine.key for engine in engines])
        pool["endpoints"][0]["metadata"] = {
            "kv-events": f"tcp://127.0.0.1:{events.port}",
            "kv-events-replay": f"tcp://127.0.0.1:{replay.port}",
        }
        config = {
            "models": {MODEL: {"rules": [{"cluster": "sim"}], "tokenizer": str(tokenizer.parent)}},
            "health": HEALTH,
            "explain": {"debug_token_env": DEBUG_TOKEN_ENV},
            "cache": {"kv_events": {"max_blocks": MAX_BLOCKS, "discovery_interval_s": 2.0}},
        }
        links = [await link(redis.port) for _ in range(2)]
        gateways = [
            await stack.enter_async_context(
                running_stack([pool], {**config, **shared(f"redis://127.0.0.1:{each.port}", f"gw{number}")})
            )
            for number, each in enumerate(links)
        ]
        made = Deployment(gateways, engines, redis, links, events, replay)
        await made.joined()
        await made.announcing()
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def course(deployment: Deployment, request: pytest.FixtureRequest) -> Course:
    """A fault's course with prompts of its own; the load is not yet running."""
    await deployment.joined()
    await deployment.announcing()
    logs = RequestLogs(deployment.gateways)
    logs.forget()
    return Course(deployment, PrefixLoad(deployment.gateways, Prompts(request.node.name)), logs)


async def run(
    course: Course,
    table: FaultTable,
    fault: str,
    *,
    inject: Callable[[], Awaitable[None]],
    heal: Callable[[], Awaitable[None]],
    least_s: float = 0.0,
) -> Mapping[Phase, Quality]:
    """Before, during and after a fault under load; at the end every counter is exactly zero."""
    async with course.load:
        await course.begin()
        try:
            await inject()
            await course.during(least_s)
        finally:  # a failure here must not be that of all later tests
            await heal()
        await course.end()
    quality = await course.settle()
    table.add(fault, course, quality)
    return quality


async def test_a_prompt_seen_before_is_foreseen_to_the_token(deployment: Deployment) -> None:
    """The second request with a prompt is judged by announcements, and exactly so, at either gateway."""
    for number, stack in enumerate(deployment.gateways):
        body = completion(Prompts(f"twice {number}").draw(), 4)
        for _ in range(2):
            reply = await send(stack, "POST", "/v1/completions", body, DEBUG_HEADERS)
            assert reply.status == 200
            await all_settled(deployment.gateways, SETTLE_TIMEOUT_S)
        record = await stack.explain(reply.headers[DECISION_HEADER])
        assert record["views"] == ["announced"] * ENGINES
        usage = usage_of(reply.body)
        assert usage is not None
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached == (usage["prompt_tokens"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS > 0
        assert record["outcome"]["cached_tokens"] == record["outcome"]["predicted_cached_tokens"] == cached


async def test_cached_tokens_are_foreseen_under_load(course: Course) -> None:
    """Of a load of many lengths that shares prefixes, nearly all requests are foreseen to the token."""
    async with PrefixLoad(course.deployment.gateways, Prompts("exact"), clients=2) as load:
        await load.more(100)
    assert load.failures == []
    course.load = load
    quality = (await course.settle())[Phase.BEFORE]
    assert quality.requests >= 100
    assert quality.exact_ratio >= LEAST_EXACT_RATIO
    assert quality.hit_ratio > 0.3


async def test_redis_is_killed_and_comes_back_empty(course: Course, table: FaultTable) -> None:
    """Routing goes on without Redis; the counters are exact again soon after it is back, without its data."""
    redis = course.deployment.redis

    async def kill() -> None:
        redis.kill()

    async def start() -> None:
        course.notes["connected"] = await course.deployment.series("tokenway_sharing_connected")
        await asyncio.to_thread(redis.start)

    quality = await run(course, table, "redis killed", inject=kill, heal=start, least_s=2.0)
    check_unharmed(course, quality)
    assert course.notes["connected"] == [0.0, 0.0]


@pytest.mark.parametrize("mode", [Mode.CUT, Mode.STALL])
async def test_redis_is_out_of_reach_of_one_gateway(course: Course, table: FaultTable, mode: Mode) -> None:
    """A gateway cut off from Redis goes on by what it knows itself, the other without it after a lease."""
    link = course.deployment.to_redis[0]

    async def part() -> None:
        link.set(mode)
        lone_s = await asyncio.gather(*(course.deployment.counted_gateways(index, 1) for index in (0, 1)))
        course.notes["alone_s"] = [round(seconds, 1) for seconds in lone_s]

    async def join() -> None:
        link.set(Mode.PASS)

    quality = await run(course, table, f"redis partitioned ({mode})", inject=part, heal=join)
    check_unharmed(course, quality)
    assert max(course.notes["alone_s"]) < 3 * SHARE_LEASE_S


async def test_redis_is_slow(course: Course, table: FaultTable) -> None:
    """With 200 ms to Redis and back no request waits, and the gateways still count each other."""
    deployment = course.deployment

    async def slow_down() -> None:
        for link in deployment.to_redis:
            link.set(Mode.DELAY)

    async def speed_up() -> None:
        course.notes["gateways_during"] = [found and found.gateways for found in await deployment.standings()]
        course.notes["round_trip_s"] = await deployment.series("tokenway_sharing_round_trip_seconds")
        for link in deployment.to_redis:
            link.set(Mode.PASS)

    quality = await run(course, table, "redis slow (200 ms)", inject=slow_down, heal=speed_up, least_s=3.0)
    check_unharmed(course, quality)
    assert course.notes["gateways_during"] == [2, 2]
    assert min(course.notes["round_trip_s"]) > ROUND_TRIP_S / 2  # a moving average on its way there


async def test_a_gateway_is_killed_and_restarted(course: Course, table: FaultTable) -> None:
    """Its Envoy falls open, the other gateway forgets its share within the lease, and it joins again."""
    first = course.deployment.gateways[0]

    async def kill() -> None:
        await first.gateway.kill()
        alone_s = await course.deployment.counted_gateways(1, 1)
        course.notes["share_gone_s"] = round(alone_s, 1)
        assert alone_s < SHARE_LEASE_S + WITHIN_S

    quality = await run(course, table, "gateway killed", inject=kill, heal=first.start_gateway)
    assert course.load.failures == []
    assert quality[Phase.AFTER].hit_ratio > 0.7 * quality[Phase.BEFORE].hit_ratio


async def test_a_gateway_hangs_longer_than_its_lease(course: Course, table: FaultTable) -> None:
    """It is stopped until the other has forgotten it; when it goes on, both agree on every counter again."""
    first = course.deployment.gateways[0]

    async def stop() -> None:
        first.gateway.signal(signal.SIGSTOP)
        course.notes["share_gone_s"] = round(await course.deployment.counted_gateways(1, 1), 1)

    async def resume() -> None:
        first.gateway.signal(signal.SIGCONT)

    pause_s = 30.0 if IS_FULL else SHARE_LEASE_S + 2.0
    quality = await run(course, table, "gateway paused", inject=stop, heal=resume, least_s=pause_s)
    assert course.load.failures == []
    assert quality[Phase.AFTER].hit_ratio > 0.7 * quality[Phase.BEFORE].hit_ratio


async def test_an_engine_is_killed_and_comes_back_empty(course: Course, table: FaultTable) -> None:
    """Only what it was answering fails; afterwards its old blocks are forgotten and its new ones foreseen."""
    victim = course.deployment.engines[1]

    await run(course, table, "engine killed", inject=victim.kill, heal=victim.start, least_s=2.0)
    assert len(course.load.failures) <= 2 * CLIENTS
    assert {failure.phase for failure in course.load.failures} <= {Phase.BEFORE, Phase.DURING}
    foreseen, count = course.notes["at_restarted"] = course.foreseen_at(victim, Phase.AFTER)
    assert count > 0
    # Requests that begin together with a common prefix, which the engine has no longer, may each be foreseen
    # by what the other is about to leave. Were old blocks remembered, that would hide it: 29 of 33 were right
    # then, and a light load showed it, 31 of 42.
    assert foreseen >= 0.7 * count
    load, calm = await course.calm()
    foreseen, count = course.notes["at_restarted_calm"] = course.foreseen_at(victim, Phase.AFTER, load)
    assert calm.exact_ratio >= LEAST_EXACT_RATIO
    assert foreseen >= 0.9 * count > 0


async def test_the_event_stream_of_an_engine_is_cut(course: Course, table: FaultTable) -> None:
    """What an engine announced meanwhile is replayed when its stream is back; requests do not notice."""
    deployment = course.deployment

    async def replays() -> list[float]:
        return await deployment.series("tokenway_kv_event_replays_total")

    replays_before = await replays()

    async def cut() -> None:
        deployment.events.set(Mode.CUT)
        deployment.replay.set(Mode.CUT)

    async def join() -> None:
        deployment.replay.set(Mode.PASS)
        deployment.events.set(Mode.PASS)
        replayed = await eventually(
            replays,
            lambda found: all(now > then for now, then in zip(found, replays_before, strict=True)),
            20.0,
        )
        course.notes["replays"] = [now - then for now, then in zip(replayed, replays_before, strict=True)]

    quality = await run(
        course, table, "event stream cut", inject=cut, heal=join, least_s=10.0 if IS_FULL else 3.0
    )
    check_unharmed(course, quality)
    course.notes["at_cut_off"] = course.foreseen_at(deployment.engines[0], Phase.DURING)
    _, calm = await course.calm()
    assert calm.exact_ratio >= LEAST_EXACT_RATIO


async def test_an_unreachable_engine_does_not_announce(deployment: Deployment) -> None:
    """While an engine's events cannot arrive, no gateway takes what it said before for what it holds."""
    await deployment.announcing()
    deployment.events.set(Mode.CUT)
    try:

        async def announcing() -> list[bool]:
            return [
                (await stack.rows())[deployment.engines[0].key]["announcing"] for stack in deployment.gateways
            ]

        await eventually(announcing, lambda found: not any(found))
    finally:
        deployment.events.set(Mode.PASS)


async def test_an_engine_floods_the_gateways_with_events(
    course: Course, table: FaultTable, tmp_path: Path
) -> None:
    """100,000 batches as fast as they can be sent: no request fails, and memory stays bounded."""
    deployment = course.deployment
    own = deployment.events.upstream_port, deployment.replay.upstream_port
    ports = tuple(free_ports(2))
    log = tmp_path / "flood.log"
    pids = [stack.gateway.pid for stack in deployment.gateways]
    before_bytes = [rss_bytes(pid) for pid in pids]
    batches_before = await deployment.series("tokenway_kv_event_batches_total")

    def lead_to(events_port: int, replay_port: int) -> None:
        deployment.events.upstream_port, deployment.replay.upstream_port = events_port, replay_port
        for link in (deployment.replay, deployment.events):
            link.reset()

    async def gaps() -> list[float]:
        return await deployment.series('tokenway_kv_event_faults_total{fault="gap"}')

    gaps_before = await gaps()

    async def taken() -> list[float]:
        batches = await deployment.series("tokenway_kv_event_batches_total")
        return [now - before for now, before in zip(batches, batches_before, strict=True)]

    async def is_over() -> list[bool]:
        """All was sent, and each gateway has taken nearly all of it or noticed that it could not."""
        lost = [now > before for now, before in zip(await gaps(), gaps_before, strict=True)]
        most = [count > 0.9 * FLOOD_BATCHES for count in await taken()]
        return [log.read_bytes().endswith(b"}\n"), *map(max, lost, most)]

    async def flood() -> None:
        lead_to(*ports)

    async def end_flood() -> None:
        try:
            await eventually(is_over, all, 120.0)
            stored = await deployment.series('tokenway_cache_map_blocks{what="stored"}')
            grown = [rss_bytes(pid) - before for pid, before in zip(pids, before_bytes, strict=True)]
        finally:
            lead_to(*own)
        course.notes |= {
            "flood": json.loads(log.read_bytes()),
            "batches_taken": await taken(),
            "gaps": [now - before for now, before in zip(await gaps(), gaps_before, strict=True)],
            "stored_blocks": stored,
            "grown_mib": [size >> 20 for size in grown],
        }
        assert max(stored) <= MAX_BLOCKS
        assert max(grown) < MAX_GROWTH_BYTES

    words = [sys.executable, "-m", "tests.e2e.flood", *map(str, (*ports, FLOOD_BATCHES, 2))]
    publisher = await Subprocess.start(words, log)
    try:
        quality = await run(course, table, "event flood", inject=flood, heal=end_flood)
    finally:
        await publisher.kill()
    check_unharmed(course, quality)
    _, calm = await course.calm()
    assert calm.exact_ratio >= LEAST_EXACT_RATIO


async def test_the_wall_clock_jumps(
    course: Course, table: FaultTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day forward, then two back, on one gateway: load, leases and counters do not notice.

    Redis' own clock, by which it expires keys, stays as it is: it cannot be moved here.
    """
    first = course.deployment.gateways[0]
    clock = Clock(tmp_path)
    with monkeypatch.context() as patch:
        for name, value in clock.env.items():
            patch.setenv(name, value)
        await first.gateway.kill()
        await first.start_gateway()
    await course.deployment.joined()
    await course.deployment.announcing()

    async def forward() -> None:
        clock.jump(DAY_S)

    async def backward() -> None:
        clock.jump(-DAY_S)

    quality = await run(course, table, "clock jump", inject=forward, heal=backward, least_s=SHARE_LEASE_S)
    days = {line["time"][:10] for line in course.logs.lines.values()}
    assert len(days) >= 3
    check_unharmed(course, quality)


async def test_a_gateway_that_comes_late_follows_an_engine(tokenizer: Path, tmp_path: Path) -> None:
    """An engine that no longer keeps its first batches for replay announces to a gateway started then."""
    ports = free_ports(2)
    words = [*engine_words(tokenizer, *ports), "--kv-buffer-steps", "20"]
    engine = EngineProcess(tmp_path / "engine.log", *words)
    try:
        await engine.start()
        prompts = Prompts("late")
        async with aiohttp.ClientSession() as session:
            for _ in range(40):
                body = completion(prompts.draw(), 1)
                async with session.post(f"http://{engine.key}/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    await reply.read()  # a reader who leaves early ends the request before it is cached
        models = {MODEL: {"rules": [{"cluster": "sim"}], "tokenizer": str(tokenizer.parent)}}
        async with running_stack([cluster("sim", [engine.key])], {"models": models}) as stack:

            async def announcing() -> bool:
                found: bool = (await stack.rows())[engine.key]["announcing"]
                return found

            await eventually(announcing, bool, 5.0)
    finally:
        await engine.kill()


def check_unharmed(course: Course, quality: Mapping[Phase, Quality]) -> None:
    """No request failed, the gateways agreed soon, and prompts went where they were cached all the time."""
    assert course.load.failures == []
    assert course.recovered_s is not None
    assert course.recovered_s <= WITHIN_S
    least = 0.7 * quality[Phase.BEFORE].hit_ratio
    assert least > 0.2
    assert quality[Phase.DURING].hit_ratio > least
    assert quality[Phase.AFTER].hit_ratio > least
