"""Late binding on the real Envoy: held requests are answered in order, once, in time, and whatever fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final

import pytest
import pytest_asyncio

from extproc.observing.explain import render
from testbed.redis_server import running
from tests.e2e.harness import (
    FAST_HEALTH,
    Reply,
    Stack,
    chat,
    check,
    cluster,
    eventually,
    key_of,
    post,
    running_stack,
    simulators,
)
from tests.e2e.holding import (
    BURST_TOKENS,
    FULL_TOKENS,
    SHORT_TOKENS,
    GatedEngine,
    all_free,
    answered,
    ask,
    envoy_total,
    fill,
    fill_caches,
    gated,
    held,
    held_records,
    reconfigured,
    served_by,
    total,
)
from tests.e2e.pair import all_settled, running_pair
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

GATED: Final = ("order", "gone", "late", "patience", "reload")
"""Models with one gated engine each: what one test has taught the gateway is no other's price."""

KV_TOKENS: Final = {"bounds": 20_000, "one": 48_000, "other": 48_000}
"""Engines that are full for as long as a test likes: beside a prompt of `ASKED_TOKENS` there is no room for
another one at `bounds`, nor for one of `PAIR_TOKENS` at the others."""

PAIR_TOKENS: Final = 40_000
"""Several times what fills these caches: its prefill is predicted to take several times as long as that
took, so the next request is not sent before the first token says that the cache is full again."""

MESSAGE_TIMEOUT_S: Final = 0.5
"""What envoy/bootstrap.yaml grants the gateway unless it asks for more."""

HOLDING: Final = {"enabled": True, "max_requests": 1_000, "max_s": 50.0, "refuse": True}

BURST: Final = 24

PATIENT: Final = {"x-slo-ttft-ms": "60000"}
"""Nothing is late, so nobody stands back for those that could still be in time."""

DRAIN_S: Final = 60.0
"""The harness has gateways cut what they do; a real one lets it end."""


MODELS: Final = {name: served_by(name) for name in (*GATED, "bounds", "sim", "pair")}
REWRITTEN: Final = "polite"
"""The adapter that engines see instead of the model, unless Envoy goes on without the gateway."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slow() -> AsyncIterator[list[SimulatorServer]]:
    """Two engines that a few long prompts fill."""
    async with simulators(2, time_scale=1.0) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gates() -> AsyncIterator[dict[str, GatedEngine]]:
    """The engine of each model of `GATED` and of `bounds`, and the two behind `pair`."""
    sizes = dict.fromkeys(GATED, 0) | KV_TOKENS
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(gated(size)) for name, size in sizes.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def common(slow: list[SimulatorServer], gates: dict[str, GatedEngine]) -> AsyncIterator[Stack]:
    """One worker that holds requests."""
    clusters = [cluster(name, [gates[name].key]) for name in (*GATED, "bounds")]
    clusters.append(cluster("sim", map(key_of, slow)))
    clusters.append(cluster("pair", [gates["one"].key, gates["other"].key]))
    models = {**MODELS, "patience": served_by("patience", lora=REWRITTEN)}
    config = {"models": models, "holding": HOLDING, "health": FAST_HEALTH}
    async with running_stack(clusters, config) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="session")
async def stack(common: Stack) -> AsyncIterator[Stack]:
    """The same; afterwards no request may be held or charged."""
    yield common
    await all_free(common)


@pytest_asyncio.fixture(loop_scope="session")
async def configured(stack: Stack) -> AsyncIterator[Stack]:
    """The same for a test that changes the configuration."""
    yield stack
    await reconfigured(stack, holding=HOLDING)


async def test_a_burst_beyond_what_engines_take_is_held_and_answered(stack: Stack) -> None:
    """Some wait, all are answered; decisions, metrics and the log agree on which waited and for how long."""
    await answered(ask(stack, "sim", f"burst-{number}", BURST_TOKENS) for number in range(BURST))
    await all_free(stack)
    records = await held_records(stack, "sim", BURST)
    assert BURST / 2 < len(records) < BURST
    scrape = await stack.metrics()
    assert total(scrape, "tokenway_held_requests") == 0
    assert total(scrape, "tokenway_holds_total", model="sim") == len(records)
    assert total(scrape, "tokenway_hold_seconds_count", model="sim", ending="placed") == len(records)
    assert total(scrape, "tokenway_hold_seconds_count", model="sim") == len(records)
    held_s = sum(record["held_s"] for record in records)
    assert total(scrape, "tokenway_hold_seconds_sum", model="sim") == pytest.approx(held_s, rel=0.1)
    logged = {line["request_id"]: line for line in stack.gateway_log() if line.get("held_for")}
    assert logged.keys() == {record["request_id"] for record in records}
    for record in records:
        line = logged[record["request_id"]]
        assert line["held_ms"] == pytest.approx(record["held_s"] * 1000, abs=1)
        assert line["held_for"] == record["hold"]["reason"]


async def test_requests_wait_without_a_word_of_it_in_the_configuration() -> None:
    """Holding is on, and one that cannot keep its own limit is sent in its turn instead of refused."""
    async with gated() as engine:
        config = {"models": {"plain": served_by("plain")}}
        async with running_stack([cluster("plain", [engine.key])], config) as stack:
            asked = await fill(stack, "plain", engine)
            asked.append(ask(stack, "plain", "hasty", headers={"x-slo-ttft-ms": "500"}))
            await held(stack, 1)
            asked.append(ask(stack, "plain", "waits"))
            await held(stack, 2)
            await engine.has(2)
            engine.open()
            await answered(asked)
            assert engine.arrived == ["full-0", "hasty", "waits"]


async def test_short_work_goes_first(stack: Stack, gates: dict[str, GatedEngine]) -> None:
    """A short request that comes soon after long ones is sent before them; they follow as they came."""
    engine = gates["order"]
    asked = await fill(stack, "order", engine)
    longs = ["long-0", "long-1"]  # no more: on a busy machine the first grows old while others come
    for number, name in enumerate(longs, 1):
        asked.append(ask(stack, "order", name, 100_000))
        await held(stack, number)
    asked.append(ask(stack, "order", "short", SHORT_TOKENS))
    await held(stack, 3)
    await asyncio.sleep(4.0)  # so long, by its tokens, work is said to take as soon as the first has answered
    for count in range(2, 5):
        engine.let_go()
        await engine.has(count)
    engine.open()
    await answered(asked)
    assert engine.arrived[0] == "full-0"
    assert sorted(engine.arrived[1:]) == sorted(["short", *longs])  # two that go at once are a race behind us
    records = await held_records(stack, "order", 4)
    short, *sent = sorted(records, key=lambda record: float(record["time_unix_s"]))
    assert short["prompt_tokens"] < min(record["prompt_tokens"] for record in sent)
    came_s = [record["time_unix_s"] - record["held_s"] for record in sent]
    assert len(came_s) == len(longs)
    assert came_s == sorted(came_s)
    hold, counted = short["hold"], short["hold"]["counted"]
    assert counted["times"] > 1.0
    place_s = counted["times"] * counted["work_s"] + hold["yields_s"]
    assert hold["place_s"] == pytest.approx(place_s, abs=1e-5)
    assert f"counted {counted['times']:.2f} times" in render(short)


async def test_no_request_starves(stack: Stack) -> None:
    """A long request is answered while short ones, together more than engines can do, go on coming."""
    is_over = False
    shorts = 0

    async def keep_sending(client: int) -> None:
        nonlocal shorts
        while not is_over:
            shorts += 1
            await answered([ask(stack, "sim", f"short-{client}-{shorts}", BURST_TOKENS)])

    clients = [asyncio.create_task(keep_sending(number)) for number in range(10)]
    try:
        await eventually(stack.endpoints, lambda view: view["held"] >= 4)
        before = shorts
        await answered([ask(stack, "sim", "long", 24_000)])
        assert shorts > before
    finally:
        is_over = True
        await asyncio.gather(*clients)


async def test_a_client_that_leaves_while_held_is_free_at_once(
    stack: Stack, gates: dict[str, GatedEngine]
) -> None:
    """Nothing of it is charged or sent, and those behind it move up."""
    engine = gates["gone"]
    asked = await fill(stack, "gone", engine)
    leaving = [ask(stack, "gone", f"leaving-{number}") for number in range(5)]
    await held(stack, 5)
    asked.append(ask(stack, "gone", "behind"))
    await held(stack, 6)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await held(stack, 1)
    assert (await stack.endpoints())["in_flight"] == 1
    engine.let_go()
    await engine.has(2)
    engine.open()
    await answered(asked)
    await all_free(stack)
    assert engine.arrived == ["full-0", "behind"]
    records = [record for record in await stack.last(50) if record["model"] == "gone"]
    assert len(records) == 2
    scrape = await stack.metrics()
    assert total(scrape, "tokenway_hold_seconds_count", model="gone", ending="gone") == 5
    assert total(scrape, "tokenway_holds_total", model="gone") == 6


def _check_overloaded(reply: Reply) -> None:
    error = check(reply, 429, "overloaded")
    assert "busy" in error["message"]
    assert int(reply.headers["retry-after"]) >= 1


async def test_bounds_are_kept(configured: Stack, gates: dict[str, GatedEngine]) -> None:
    """One too many is refused at once; a held one is refused as soon as its time cannot suffice any more."""
    # Shorter than what a wait may be for what it foresees here: room in half a second, and its work.
    engine, max_s = gates["bounds"], 2.0
    await reconfigured(configured, holding={"max_requests": 2, "max_s": max_s})
    asked = await fill_caches(configured, "bounds", engine)
    waiting = [ask(configured, "bounds", f"waiting-{number}") for number in range(2)]
    await held(configured, 2)
    _check_overloaded(await ask(configured, "bounds", "one-too-many"))
    for reply in await asyncio.gather(*waiting):
        _check_overloaded(reply)
    scrape = await configured.metrics()
    refused = total(scrape, "tokenway_hold_seconds_count", model="bounds", ending="refused")
    assert refused == 2
    # Of both, by the gateway's clock: ours counts what a busy machine adds. The time in which room is
    # predicted to come, half a second, would have to fit as well.
    refused_s = total(scrape, "tokenway_hold_seconds_sum", model="bounds", ending="refused")
    assert max_s < refused_s <= 2 * (max_s + 1)
    assert total(scrape, "tokenway_rejections_total", reason="overloaded") == 3
    engine.open()
    await answered(asked)
    assert engine.arrived == ["full-0"]


async def test_what_would_come_too_late_is_refused_early(stack: Stack, gates: dict[str, GatedEngine]) -> None:
    """The client's own limit reaches the gateway and bounds the wait; a limit that can be met does not."""
    engine = gates["late"]
    asked = await fill(stack, "late", engine)
    _check_overloaded(await ask(stack, "late", "hasty", headers={"x-slo-ttft-ms": "500"}))
    assert total(await stack.metrics(), "tokenway_holds_total", model="late") == 0
    asked.append(ask(stack, "late", "patient", headers={"x-slo-ttft-ms": "25000"}))
    await held(stack, 1)
    engine.open()
    await answered(asked)
    assert engine.arrived == ["full-0", "patient"]


async def test_envoy_waits_as_long_as_we_hold(stack: Stack, gates: dict[str, GatedEngine]) -> None:
    """Held for several times Envoy's usual patience, a request is still ours, its body rewritten."""
    engine = gates["patience"]
    asked = await fill(stack, "patience", engine)
    before = [await envoy_total(stack, name) for name in ("message_timeouts", "failure_mode_allowed")]
    asked_for = await envoy_total(stack, "override_message_timeout_received")
    # So long that twice what is foreseen of it is far beyond the time it has to wait here.
    asked.append(ask(stack, "patience", "held", 80_000, priority=-1))
    await held(stack, 1)
    await asyncio.sleep(3 * MESSAGE_TIMEOUT_S)
    await held(stack, 1)
    assert engine.arrived == ["full-0"]
    engine.open()
    await answered(asked)
    await stack.settled()
    body = json.loads(engine.received[1].body)
    assert body["model"] == REWRITTEN
    assert "priority" not in body
    (record,) = await held_records(stack, "patience", 2)
    assert record["held_s"] >= 3 * MESSAGE_TIMEOUT_S
    assert record["outcome"]["ended"] == "completed"
    after = [await envoy_total(stack, name) for name in ("message_timeouts", "failure_mode_allowed")]
    assert after == before
    assert await envoy_total(stack, "override_message_timeout_received") == asked_for + 1


async def test_switching_it_off_sends_held_requests(configured: Stack, gates: dict[str, GatedEngine]) -> None:
    """A reload is in force for requests that wait already."""
    engine = gates["reload"]
    asked = await fill(configured, "reload", engine)
    asked += [ask(configured, "reload", f"held-{number}") for number in range(3)]
    await held(configured, 3)
    await reconfigured(configured, holding={"enabled": False})
    await engine.has(4)
    await held(configured, 0)
    assert (await configured.endpoints())["in_flight"] == 4
    engine.open()
    await answered(asked)


async def test_a_request_held_for_an_engine_that_dies_goes_elsewhere(
    stack: Stack, gates: dict[str, GatedEngine]
) -> None:
    """They go to those that are left; when none is, they are refused."""
    one, other = gates["one"], gates["other"]
    broken, kept = await fill_caches(stack, "pair", one, other)
    if one.arrived != ["full-0"]:
        broken, kept = kept, broken
    waiting = [ask(stack, "pair", f"held-{number}", PAIR_TOKENS) for number in range(4)]
    await held(stack, 4)
    await one.stop()
    await asyncio.gather(broken, return_exceptions=True)
    other.let_go()
    await answered([kept])
    await other.has(2)
    await held(stack, 3)
    await other.stop()
    replies = await asyncio.gather(*waiting, return_exceptions=True)
    refused = [reply for reply in replies if isinstance(reply, Reply) and reply.status == 503]
    for reply in refused:
        check(reply, 503, "no_healthy_endpoint")
    assert len(refused) == 3, replies


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mortal() -> AsyncIterator[tuple[Stack, dict[str, GatedEngine]]]:
    """A gateway that tests end, with an engine for each of them."""
    async with gated() as terminated, gated() as killed:
        engines = {"terminated": terminated, "killed": killed}
        models = {name: served_by(name, lora=REWRITTEN) for name in engines}
        config = {"models": models, "holding": HOLDING}
        clusters = [cluster(name, [engine.key], model=name) for name, engine in engines.items()]
        async with running_stack(clusters, config) as stack:
            yield stack, engines


async def _deciding(stack: Stack) -> None:
    """Have a running gateway that Envoy asks."""
    if not stack.gateway.is_running:
        await stack.start_gateway()

    async def decided() -> int:
        await post(stack, chat("unknown", "hello"))
        return len(await stack.last(1))

    await eventually(decided, bool)


async def test_a_gateway_that_is_stopped_sends_held_requests(
    mortal: tuple[Stack, dict[str, GatedEngine]],
) -> None:
    """SIGTERM: everybody is sent at once and answered, and the gateway ends in order."""
    stack, engines = mortal
    engine = engines["terminated"]
    await _deciding(stack)
    await reconfigured(stack, server={"drain_s": DRAIN_S})
    asked = await fill(stack, "terminated", engine)
    asked += [ask(stack, "terminated", f"held-{number}") for number in range(8)]
    await held(stack, 8)
    stack.gateway.signal(signal.SIGTERM)
    await engine.has(9)
    engine.open()
    assert await stack.gateway.ended() == 0
    await answered(asked)
    assert {json.loads(received.body)["model"] for received in engine.received} == {REWRITTEN}
    assert not [line for line in stack.gateway_log() if line["level"] == "ERROR"]


async def test_envoy_answers_requests_held_by_a_gateway_that_died(
    mortal: tuple[Stack, dict[str, GatedEngine]],
) -> None:
    """SIGKILL: Envoy goes on with each of them by itself."""
    stack, engines = mortal
    engine = engines["killed"]
    await _deciding(stack)
    asked = await fill(stack, "killed", engine)
    asked += [ask(stack, "killed", f"held-{number}") for number in range(4)]
    await held(stack, 4)
    await stack.gateway.kill()
    await engine.has(5)
    engine.open()
    await answered(asked)


SIM_CONFIG: Final = {"models": {"sim": served_by("sim")}, "holding": HOLDING}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def workers(slow: list[SimulatorServer]) -> AsyncIterator[tuple[Stack, GatedEngine]]:
    """Two workers in front of the simulators, and of an engine of a model of its own."""
    async with gated() as engine:
        config = {"models": {"sim": served_by("sim"), "one": served_by("one")}, "holding": HOLDING}
        clusters = [cluster("sim", map(key_of, slow)), cluster("one", [engine.key], model="one")]
        async with running_stack(clusters, config, workers=2) as stack:
            yield stack, engine


async def test_two_workers_hold_and_lose_no_request(workers: tuple[Stack, GatedEngine]) -> None:
    """Each worker holds its own and finds the room that the other one frees."""
    stack, _ = workers
    await answered(ask(stack, "sim", f"workers-{number}", BURST_TOKENS) for number in range(BURST))
    await all_free(stack)
    by_worker = await _holds(stack)
    scrape = await stack.metrics()
    assert min(by_worker) > 0
    assert sum(by_worker) == total(scrape, "tokenway_hold_seconds_count", ending="placed")


async def test_a_request_held_by_a_worker_that_died_is_answered(workers: tuple[Stack, GatedEngine]) -> None:
    """Envoy goes on with them; the other worker keeps its own, and nothing is left charged."""
    stack, engine = workers
    asked = await fill(stack, "one", engine)
    asked += [ask(stack, "one", f"held-{number}") for number in range(12)]
    await held(stack, 12)
    os.kill(stack.gateway.children()[0], signal.SIGKILL)
    await eventually(stack.endpoints, lambda view: 0 < view["held"] < 12)
    await engine.has(2)
    engine.open()
    await answered(asked)
    assert len(engine.arrived) == len(set(engine.arrived)) == 13
    await all_free(stack)


async def test_room_goes_to_whoever_came_first_at_whichever_worker() -> None:
    """Of two that wait at different workers the younger one is served last, and explain shows why."""
    async with gated() as engine:
        config = {"models": {"turns": served_by("turns")}, "holding": HOLDING, "health": FAST_HEALTH}
        async with running_stack([cluster("turns", [engine.key])], config, workers=2) as stack:
            asked = await fill(stack, "turns", engine)
            asked.append(ask(stack, "turns", "older", BURST_TOKENS, PATIENT))
            await held(stack, 1)
            for attempt in range(20):  # Envoy asks whichever worker it likes
                # So long that it is behind by the prices, too, that the first answer teaches one worker.
                younger = ask(stack, "turns", f"younger-{attempt}", FULL_TOKENS, PATIENT)
                await held(stack, 2)
                if min(await _holds(stack)) > 0:
                    break
                younger.cancel()
                await held(stack, 1)
            asked.append(younger)
            for count in (2, 3):
                engine.let_go()
                await engine.has(count)
            assert engine.arrived == ["full-0", "older", younger.get_name()]
            engine.open()
            await answered(asked)
            await all_free(stack)
            records = await held_records(stack, "turns", 2)
            assert sorted(record["hold"]["elsewhere_s"] > 0.0 for record in records) == [False, True]


async def _holds(stack: Stack) -> list[float]:
    """How many each of two workers has held."""
    scrape = await stack.metrics()
    return [total(scrape, "tokenway_holds_total", worker=str(worker)) for worker in range(2)]


async def test_two_gateways_hold_and_lose_no_request(
    slow: list[SimulatorServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two gateways that share the load over Redis both hold; each of their clients is answered."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        clusters = [cluster("sim", map(key_of, slow))]
        async with running_pair(server.url, clusters, SIM_CONFIG) as stacks:
            await answered(
                ask(stacks[number % 2], "sim", f"pair-{number}", BURST_TOKENS) for number in range(BURST)
            )
            await all_settled(stacks, 8)
            for stack in stacks:
                await held(stack, 0)
                scrape = await stack.metrics()
                placed = total(scrape, "tokenway_hold_seconds_count", ending="placed")
                assert placed == total(scrape, "tokenway_holds_total") > 0


async def test_room_goes_to_whoever_came_first_at_whichever_gateway(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The younger one's gateway is told of the room first, and lets the older one of the other gateway go."""
    async with AsyncExitStack() as entered:
        server = entered.enter_context(running(tmp_path_factory.mktemp("redis")))
        engine = await entered.enter_async_context(gated())
        config = {"models": {"order": served_by("order")}, "holding": HOLDING, "health": FAST_HEALTH}
        pair = running_pair(server.url, [cluster("order", [engine.key])], config)
        first, second = await entered.enter_async_context(pair)
        asked = await fill(second, "order", engine)
        asked.append(ask(first, "order", "older", BURST_TOKENS, PATIENT))
        await held(first, 1)
        # So long that it is behind by the prices, too, that the first answer teaches its gateway alone.
        asked.append(ask(second, "order", "younger", FULL_TOKENS, PATIENT))
        await held(second, 1)
        engine.let_go()
        await engine.has(2)
        engine.let_go()
        await engine.has(3)
        assert engine.arrived == ["full-0", "older", "younger"]
        engine.open()
        await answered(asked)
        await all_settled([first, second], 8)
        (younger,) = await held_records(second, "order", 2)
        assert younger["hold"]["elsewhere_s"] > 0.0
        (older,) = await held_records(first, "order", 1)
        assert older["hold"]["elsewhere_s"] == 0.0
