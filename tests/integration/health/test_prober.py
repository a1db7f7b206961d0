"""Probing over real sockets: what engines answer, and what the tracker makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import aiohttp
import pytest
from aiohttp import web

from extproc.health import prober
from extproc.health.facts import EngineFacts, Occupancy, engine_facts
from extproc.health.prober import Prober
from extproc.health.settings import HealthSettings
from extproc.health.states import HealthState, ProbeFailure, Transition
from extproc.health.tracker import HealthTracker
from extproc.values.endpoints import Endpoint
from extproc.values.evidence import FailureKind
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey
from tests.waiting import until

pytestmark = pytest.mark.asyncio

SETTINGS = HealthSettings(
    interval_s=0.05, recovery_interval_s=0.02, timeout_s=0.2, ejection_s=0.1, unhealthy_threshold=2
)

METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 0.0
# HELP vllm:engine_sleep_state Engine sleep state; awake = 0 means engine is sleeping
# TYPE vllm:engine_sleep_state gauge
vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="weights_offloaded"} 0.0
vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="discard_all"} 0.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{_block_size_resolved="True",block_size="32",effective_attention_block_size="64",\
engine="0",num_cpu_blocks="None",num_gpu_blocks="1024",num_gpu_blocks_override="None"} 1.0
"""
ASLEEP = METRICS.replace(b'sleep_state="awake"} 1.0', b'sleep_state="awake"} 0.0')


@dataclass
class Engine:
    """An engine whose answers a test decides."""

    health: int = 200
    metrics: bytes = METRICS
    metrics_status: int = 200
    delay_s: float = 0.0
    probes: int = 0
    scrapes: int = 0
    concurrent: int = 0
    keys: list[EndpointKey] = field(default_factory=list)

    async def answer_health(self, _: web.Request) -> web.Response:
        """GET /health."""
        self.probes += 1
        self.concurrent += 1
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.concurrent -= 1
        return web.Response(status=self.health)

    async def answer_metrics(self, _: web.Request) -> web.Response:
        """GET /metrics."""
        self.scrapes += 1
        return web.Response(status=self.metrics_status, body=self.metrics)

    @property
    def key(self) -> EndpointKey:
        """Its only identity."""
        (key,) = self.keys
        return key


def at(key: EndpointKey) -> Endpoint:
    """The endpoint of that identity: it says at which port of this machine it is, to tests alone."""
    return Endpoint(key, "m", Address("127.0.0.1", int(key.removeprefix("uid/"))))


@contextlib.asynccontextmanager
async def serving(num_ports: int = 1, keepalive_timeout: float = 5.0) -> AsyncIterator[Engine]:
    """An engine behind so many ports of its own."""
    built = Engine()
    app = web.Application()
    app.router.add_get("/health", built.answer_health)
    app.router.add_get("/metrics", built.answer_metrics)
    runner = web.AppRunner(
        app, keepalive_timeout=keepalive_timeout, handler_cancellation=True, shutdown_timeout=0.1
    )
    await runner.setup()
    for _ in range(num_ports):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    built.keys = [EndpointKey(f"uid/{port}") for _, port in runner.addresses]
    try:
        yield built
    finally:
        await runner.cleanup()


@dataclass
class Watch:
    """A prober and everything it reported."""

    tracker: HealthTracker = field(default_factory=lambda: HealthTracker(SETTINGS))
    transitions: list[Transition] = field(default_factory=list)
    configs: list[tuple[EndpointKey, int, int]] = field(default_factory=list)
    cleared: list[EndpointKey] = field(default_factory=list)
    occupancies: list[tuple[EndpointKey, Occupancy]] = field(default_factory=list)
    skipped_s: float = 0.0
    known: set[EndpointKey] = field(default_factory=set)
    probed: list[EndpointKey] = field(default_factory=list)
    most_probed: int = 0
    prober: Prober = field(init=False)

    def __post_init__(self) -> None:
        self.prober = Prober(
            self.tracker,
            SETTINGS,
            clock=lambda: time.monotonic() + self.skipped_s,
            rng=random.Random(1),
            on_transition=self.transitions.append,
            on_cache_config=lambda key, kv_tokens, block_size: self.configs.append(
                (key, kv_tokens, block_size)
            ),
            on_cache_cleared=self.cleared.append,
            on_occupancy=lambda key, occupancy: self.occupancies.append((key, occupancy)),
        )
        self._health, self.prober._health = self.prober._health, self._count  # type: ignore[method-assign]

    async def _count(
        self, session: aiohttp.ClientSession, key: EndpointKey, timeout_s: float
    ) -> tuple[str | None, ProbeFailure]:
        """Counted here: an engine may learn late that one has hung up."""
        self.probed.append(key)
        self.most_probed = max(self.most_probed, len(self.probed))
        try:
            return await self._health(session, key, timeout_s)
        finally:
            self.probed.remove(key)

    def set_endpoints(self, *keys: EndpointKey) -> None:
        """Probe these and no others."""
        gone = dict.fromkeys(self.known - set(keys), ())
        self.known = set(keys)
        self.prober.update({**gone, **{key: (at(key),) for key in keys}})


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    """A running prober without endpoints."""
    built = Watch()
    built.prober.start()
    yield built
    await built.prober.stop()


async def test_first_success_reports_the_cache(watch: Watch) -> None:
    """A healthy engine stays available, and its cache size arrives with the first probe only."""
    async with serving() as engine:
        watch.set_endpoints(engine.key)
        await until(lambda: engine.probes >= 5)
        assert watch.configs == [(engine.key, 32 * 1024, 32)]
        assert engine.scrapes == 1
        assert watch.transitions == []
        watch.skipped_s = 61.0
        await until(lambda: len(watch.configs) == 2)


async def test_sick_engine_is_ejected_and_recovers(watch: Watch) -> None:
    """Failed probes eject, the first good one recovers, and the cache is read again."""
    async with serving() as engine, serving() as other:
        watch.set_endpoints(engine.key, other.key)
        await until(lambda: engine.probes >= 1 and other.probes >= 1)
        engine.health = 503
        await until(lambda: not watch.tracker.is_available(engine.key))
        assert watch.tracker.reason(engine.key) == "probe failed: status 503"
        engine.health = 200
        await until(lambda: watch.tracker.is_available(engine.key))
        assert [t.after for t in watch.transitions] == [HealthState.EJECTED, HealthState.HEALTHY]
        await until(lambda: [key for key, *_ in watch.configs].count(engine.key) == 2)


async def test_ejection_by_traffic_ends_with_a_probe(watch: Watch) -> None:
    """An endpoint that traffic ejected is probed as soon as its time is over, not at the old interval."""
    async with serving() as engine:
        watch.set_endpoints(engine.key)
        await until(lambda: engine.probes >= 1)
        watch.tracker.attempt_failed(engine.key, FailureKind.CONNECT_FAILURE, time.monotonic())
        assert not watch.tracker.is_available(engine.key)
        await until(lambda: watch.tracker.is_available(engine.key))


async def test_probes_that_are_due_together_begin_one_by_one(watch: Watch) -> None:
    """No turn of the loop begins two: a hundred at once would hold up requests for many milliseconds."""
    async with serving(40) as engine:
        watch.set_endpoints(*engine.keys)
        await until(lambda: engine.probes >= 40)
        seen, most_new, all_probed = asyncio.all_tasks(), 0, engine.probes + 40
        watch.skipped_s = 10 * SETTINGS.interval_s
        while engine.probes < all_probed:
            new = {task for task in asyncio.all_tasks() - seen if "Prober._probe" in repr(task.get_coro())}
            most_new = max(most_new, len(new))
            seen |= new
            await asyncio.sleep(0)
        assert len(seen) >= 40
        assert most_new == 1


async def test_no_server_listening(watch: Watch) -> None:
    """A refused connection is a failed probe, with a name of its own."""
    async with serving() as engine:
        key = engine.key
    watch.set_endpoints(key)
    await until(lambda: not watch.tracker.is_available(key))
    assert watch.tracker.reason(key) == "probe failed: ClientConnectorError"


async def test_a_probe_that_cannot_be_sent_is_no_result(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """This process has no files left: it says so once, and ejects nobody for it."""
    async with serving() as engine:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        number = os.dup(0)
        os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, limit[1]))
        try:
            watch.set_endpoints(engine.key)
            await until(lambda: "probes cannot be sent" in caplog.messages)
            await asyncio.sleep(5 * SETTINGS.interval_s)
            assert watch.tracker.is_available(engine.key)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        await until(lambda: engine.probes >= 2)
        (said,) = [line for line in caplog.records if line.message == "probes cannot be sent"]
        assert said.__dict__["problem"] == "Too many open files"


async def test_hung_engine_does_not_delay_others(watch: Watch) -> None:
    """A probe is bounded in time, and probes of other endpoints go on meanwhile."""
    async with serving() as hung, serving() as well:
        hung.delay_s = 60.0
        watch.set_endpoints(hung.key, well.key)
        await until(lambda: watch.tracker.reason(hung.key) == "probe failed: timeout")
        assert well.probes >= 3
        assert watch.tracker.is_available(well.key)


async def test_sleeping_engine_is_out_until_awake(watch: Watch) -> None:
    """An engine asleep is ejected and its cache cleared, once, though it answers probes with 200."""
    async with serving() as engine:
        engine.metrics = ASLEEP
        watch.set_endpoints(engine.key)
        await until(lambda: not watch.tracker.is_available(engine.key))
        assert watch.tracker.reason(engine.key) == "engine is asleep"
        engine.metrics_status = 500
        probes = engine.probes
        await until(lambda: engine.probes >= probes + 3)
        assert not watch.tracker.is_available(engine.key)
        engine.metrics_status, engine.metrics = 200, METRICS
        await until(lambda: watch.tracker.is_available(engine.key))
        assert watch.cleared == [engine.key]


async def test_engine_without_metrics_is_asked_seldom(watch: Watch) -> None:
    """404 on /metrics is no failure and not asked again with every probe; other errors are."""
    async with serving() as engine:
        engine.metrics_status = 503
        watch.set_endpoints(engine.key)
        await until(lambda: engine.scrapes >= 2)
        engine.metrics_status = 404
        scrapes = engine.scrapes + 1
        await until(lambda: engine.scrapes >= scrapes)
        probes = engine.probes
        await until(lambda: engine.probes >= probes + 3)
        assert engine.scrapes == scrapes
        assert watch.tracker.is_available(engine.key)
        assert watch.configs == []


async def test_endless_metrics_are_not_swallowed(watch: Watch) -> None:
    """More than the bound of /metrics is no fact at all."""
    async with serving() as engine:
        engine.metrics = METRICS + b"#" * (4 * 1024 * 1024)
        watch.set_endpoints(engine.key)
        await until(lambda: engine.scrapes >= 2)
        assert watch.configs == []


async def test_connection_closed_by_the_engine_is_no_failure(watch: Watch) -> None:
    """An idle connection that the engine closed between two probes costs no failed probe."""
    async with serving(keepalive_timeout=0.01) as engine:
        watch.set_endpoints(engine.key)
        await until(lambda: engine.probes >= 10)
        assert watch.transitions == []
        assert watch.tracker._records.by_key[engine.key].probe_failures == 0


async def test_removed_endpoint_is_no_longer_probed(watch: Watch) -> None:
    """Removing an endpoint cancels its probe in flight and forgets it."""
    async with serving() as gone, serving() as stays:
        gone.delay_s = 60.0
        watch.set_endpoints(gone.key, stays.key)
        await until(lambda: gone.concurrent == 1)
        watch.set_endpoints(stays.key)
        await until(lambda: gone.concurrent == 0)
        probes, others = gone.probes, stays.probes
        await until(lambda: stays.probes >= others + 3)
        assert gone.probes == probes
        assert watch.tracker.state(gone.key) is None


async def test_draining_is_reported(watch: Watch) -> None:
    """A change of configuration that changes a state is reported like one a probe caused."""
    key = EndpointKey("uid/1")
    watch.set_endpoints(key)
    watch.prober.update({key: (replace(at(key), draining=True),)})
    assert [t.after for t in watch.transitions] == [HealthState.DRAINING]


async def test_probes_at_once_are_bounded(watch: Watch) -> None:
    """Of 80 endpoints that hang at most 64 are probed at the same time, and all get their turn."""
    async with serving(num_ports=80) as engine:
        engine.delay_s = 60.0
        watch.set_endpoints(*engine.keys)
        records = watch.tracker._records.by_key
        await until(lambda: all(record.probe_failures for record in records.values()))
        assert watch.most_probed == 64


async def test_those_that_hang_leave_room_for_the_others(watch: Watch) -> None:
    """Endpoints known to hang take half of the probes at most, however many they are."""
    async with serving(num_ports=80) as engine, serving() as well:
        engine.delay_s = 60.0
        watch.set_endpoints(*engine.keys, well.key)
        records = watch.tracker._records.by_key
        await until(lambda: all(records[key].patience for key in engine.keys))
        await until(lambda: len(watch.probed) <= 32)
        watch.most_probed = 0
        probes = well.probes
        await until(lambda: well.probes >= probes + 5)
        assert watch.most_probed <= 33


async def test_time_outs_while_this_process_stood_still_are_none(watch: Watch) -> None:
    """A gateway that did not run for a while blames no endpoint for the answers it did not read."""
    async with serving() as engine, serving() as other:
        watch.set_endpoints(engine.key, other.key)
        for turn in range(6):
            await until(lambda turn=turn: engine.probes > turn and other.probes > turn)  # type: ignore[misc]
            time.sleep(2 * SETTINGS.timeout_s)  # noqa: ASYNC251 - that is what is tested
        assert watch.transitions == []


async def test_a_slow_answer_is_not_a_missing_one(watch: Watch) -> None:
    """An engine whose probe takes longer than `timeout_s`, and comes, is given the time and stays."""
    async with serving() as slow, serving() as other:
        slow.delay_s = 1.5 * SETTINGS.timeout_s
        watch.set_endpoints(slow.key, other.key)
        await until(lambda: slow.probes >= 5)
        assert watch.transitions == []


async def test_raising_callback_does_not_end_probing(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    """A bug in a listener is logged; probing goes on and the health is right."""

    def explode(transition: Transition) -> None:
        raise RuntimeError(transition.reason)

    watch.prober._on_transition = explode
    async with serving() as engine, serving() as other:
        engine.health = 500
        watch.set_endpoints(engine.key, other.key)
        await until(lambda: not watch.tracker.is_available(engine.key))
        engine.health = 200
        await until(lambda: watch.tracker.is_available(engine.key))
    assert [record.levelname for record in caplog.records if record.message == "probe raised"] == ["ERROR"]


async def test_stop_leaves_nothing_behind() -> None:
    """Stopping cancels probes in flight, ends all tasks, closes connections, and can be repeated."""
    async with serving() as engine:
        engine.delay_s = 60.0
        before = asyncio.all_tasks()
        watch = Watch()
        await watch.prober.stop()
        watch.prober.start()
        with pytest.raises(RuntimeError, match="already started"):
            watch.prober.start()
        watch.set_endpoints(engine.key)
        await until(lambda: engine.concurrent == 1)
        await watch.prober.stop()
        await watch.prober.stop()
        await until(lambda: engine.concurrent == 0)
        await until(lambda: asyncio.all_tasks() <= before)


async def test_facts_of_data_parallel_engines() -> None:
    """Each rank repeats the total of all ranks: it is not added up; one sleeping rank counts as asleep."""
    second = METRICS.replace(b'engine="0"', b'engine="1"')
    assert engine_facts(METRICS + second) == EngineFacts(32 * 1024, 32, is_asleep=False)
    assert engine_facts(METRICS + second.replace(b'"awake"} 1.0', b'"awake"} 0.0')).is_asleep


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (b"", EngineFacts(None, None, is_asleep=False)),
        (b"garbage \xff\n\n", EngineFacts(None, None, is_asleep=False)),
        (
            METRICS.replace(b'gpu_blocks="1024"', b'gpu_blocks="None"'),
            EngineFacts(None, None, is_asleep=False),
        ),
        (
            b'sglang:cache_config_info{num_pages="100",page_size="16"} 1.0',
            EngineFacts(1600, 16, is_asleep=False),
        ),
    ],
)
async def test_facts_of_other_expositions(text: bytes, facts: EngineFacts) -> None:
    """Missing or malformed series give no capacity and an engine awake; SGLang's names are known."""
    assert engine_facts(text) == facts


FULL = b"""
vllm:num_requests_running{engine="0",model_name="m"} 128.0
vllm:num_requests_running{engine="1",model_name="m"} 120.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
"""


async def test_how_full_an_engine_is() -> None:
    """Requests of all ranks are added up, the fullest cache counts; SGLang's names are known."""
    assert engine_facts(FULL).occupancy == Occupancy(248, 7, 0.75)
    sglang = (
        b'sglang:num_running_reqs{m="x"} 3\nsglang:num_queue_reqs{m="x"} 1\nsglang:token_usage{m="x"} 0.5'
    )
    assert engine_facts(sglang).occupancy == Occupancy(3, 1, 0.5)


OLDER = FULL.replace(b"kv_cache_usage_perc", b"gpu_cache_usage_perc")
FORMER_ENGINE = b"""
vllm:num_requests_running{model_name="m"} 3.0
vllm:num_requests_swapped{model_name="m"} 0.0
vllm:num_requests_waiting{model_name="m"} 1.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.4
vllm:cpu_cache_usage_perc{model_name="m"} 0.9
vllm:cache_config_info{block_size="16",num_cpu_blocks="2048",num_gpu_blocks="100",sliding_window="None"} 1.0
vllm:prompt_tokens_total{model_name="m"} 71.0
"""
"""What the engine before V1 says, which had no rank and no sleep."""


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (OLDER, EngineFacts(None, None, is_asleep=False, occupancy=Occupancy(248, 7, 0.75))),
        (
            FORMER_ENGINE,
            EngineFacts(1600, 16, is_asleep=False, occupancy=Occupancy(3, 1, 0.4, prompt_tokens=71.0)),
        ),
        (OLDER.replace(b" 0.25", b" NaN"), EngineFacts(None, None, is_asleep=False)),
    ],
)
async def test_how_full_an_older_vllm_is(text: bytes, facts: EngineFacts) -> None:
    """The usage by its former name, held to what the present one is held to; the rest has kept its names."""
    assert engine_facts(text) == facts


@pytest.mark.parametrize("former", [b"0.99", b"NaN"])
async def test_the_former_name_says_nothing_beside_the_present_one(former: bytes) -> None:
    """Versions between have both, and the help of the one that went names the other."""
    help_line = b"# HELP vllm:gpu_cache_usage_perc DEPRECATED: use vllm:kv_cache_usage_perc{ instead\n"
    both = FULL + help_line + b'vllm:gpu_cache_usage_perc{engine="0",model_name="m"} ' + former + b"\n"
    assert engine_facts(both).occupancy == Occupancy(248, 7, 0.75)


SGLANG = (
    'sglang:num_running_reqs{{tp_rank="{tp}",dp_rank="{dp}",priority="{priority}"}} {running}\n'
    'sglang:num_queue_reqs{{tp_rank="{tp}",dp_rank="{dp}",priority="{priority}"}} {waiting}\n'
)


def of_sglang(tp: int, dp: int, running: int, waiting: int, priority: str = "") -> bytes:
    """Two lines of its page."""
    return SGLANG.format(tp=tp, dp=dp, running=running, waiting=waiting, priority=priority).encode()


async def test_sglang_counts_each_request_once() -> None:
    """Its tensor-parallel ranks repeat each other, and what it says by priority is in the total already."""
    text = (
        b'sglang:token_usage{dp_rank="0",tp_rank="0"} 0.5\nsglang:token_usage{dp_rank="1",tp_rank="0"} 0.7\n'
    )
    for tp in range(2):
        text += of_sglang(tp, 0, 3, 1) + of_sglang(tp, 0, 2, 1, "1") + of_sglang(tp, 0, 1, 0, "5")
        text += of_sglang(tp, 1, 4, 0)
    assert engine_facts(text).occupancy == Occupancy(7, 1, 0.7)
    assert engine_facts(text + of_sglang(0, 1, -1, 0)).occupancy is None


async def test_the_cache_of_sglang() -> None:
    """In labels or, later, by gauges: of each data-parallel rank its own, however often it is said."""
    labels, gauges = b"", b""
    for dp in range(2):
        for tp in range(2):
            ranks = b'dp_rank="%d",tp_rank="%d"' % (dp, tp)
            labels += b'sglang:cache_config_info{%b,page_size="16",num_pages="100"} 1.0\n' % ranks
            gauges += b"sglang:num_pages{%b} 100.0\nsglang:page_size{%b} 16.0\n" % (ranks, ranks)
    assert engine_facts(labels) == engine_facts(gauges) == EngineFacts(3200, 16, is_asleep=False)
    for bad in (b"NaN", b"0.0", b"-1", b"1e300", b"64.0"):
        text = gauges.replace(b"} 16.0", b"} " + bad, 1)
        assert engine_facts(text) == EngineFacts(None, None, is_asleep=False), bad
    assert engine_facts(gauges.replace(b"} 100.0", b"} NaN", 1)).kv_tokens is None


async def test_a_time_behind_a_value_is_no_value() -> None:
    """The format allows it; tabs and several spaces as well."""
    text = b"process_start_time_seconds 7.0 1795228451530\n"
    for line in FULL.splitlines():
        text += line.replace(b"} ", b"}\t ") + b" 1795228451530\n" if line else b"\n"
    assert engine_facts(text).occupancy == Occupancy(248, 7, 0.75, 7.0)
    asleep = METRICS.replace(b'"awake"} 1.0', b'"awake"} 0.0 1795228451530')
    assert engine_facts(asleep).is_asleep


async def test_when_an_engine_began() -> None:
    """As its process says; two processes on one page say nothing, nor does what is no time."""
    for lines, started_s in (
        (b"process_start_time_seconds 1.79522845153e+09\n", 1795228451.53),
        (b"process_start_time_seconds 1.0\nprocess_start_time_seconds 2.0\n", None),
        (b"process_start_time_seconds 0\n", None),
        (b"process_start_time_seconds NaN\n", None),
        (b"process_start_time_seconds_total 7.0\n", None),
    ):
        assert engine_facts(FULL + lines).occupancy == Occupancy(248, 7, 0.75, started_s)


async def test_what_prompts_an_engine_has_computed() -> None:
    """Of all ranks and models together; one that is no number spoils the sum and nothing else."""
    one = b'vllm:prompt_tokens_total{engine="0",model_name="m"} 9046.0\n'
    two = b'vllm:prompt_tokens_total{engine="1",model_name="m"} 4.0\n'
    other = b'vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 7.0\n'
    for lines, prompt_tokens in (
        (one + two + other, 9050.0),
        (b'sglang:prompt_tokens_total{model_name="m"} 8.1e+06\n', 8.1e6),
        (one + two.replace(b"4.0", b"NaN"), None),
        (other, None),
    ):
        occupancy = engine_facts(FULL + lines).occupancy
        assert occupancy == Occupancy(248, 7, 0.75, prompt_tokens=prompt_tokens)


@pytest.mark.parametrize("bad", [b"NaN", b"+Inf", b"-1", b"many", b""])
async def test_a_reading_that_makes_no_sense_is_none(bad: bytes) -> None:
    """A series without a usable value leaves the occupancy unknown."""
    text = b"".join(line for line in FULL.splitlines(keepends=True) if b'engine="0"' in line)
    assert engine_facts(text.replace(b"128.0", bad)).occupancy is None


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (b"9999999999999999", b"9999999999999999"),
        (b"1", b"1048577"),
        (b"1048577", b"1048576"),
        (b"99999999999999999999", b"16"),
        (b"-5", b"16"),
        (b"1e9", b"16"),
        (b"0", b"16"),
    ],
)
async def test_a_cache_that_no_engine_has_is_not_believed(count: bytes, size: bytes) -> None:
    """A capacity beyond every engine is none; a second rank that reports the truth still counts."""
    lie = METRICS.replace(b'gpu_blocks="1024"', b'gpu_blocks="%b"' % count).replace(
        b'block_size="32",eff', b'block_size="%b",eff' % size
    )
    assert engine_facts(lie) == EngineFacts(None, None, is_asleep=False)
    assert engine_facts(lie + METRICS) == EngineFacts(32 * 1024, 32, is_asleep=False)


@pytest.mark.parametrize("most", [b"1e308", b"1048577", b"9" * 400, b"1e400"])
async def test_numbers_of_requests_that_no_engine_has_are_no_reading(most: bytes) -> None:
    """Two ranks of 1e308 requests each add up to infinity: none of it is believed, nothing raises."""
    assert (
        engine_facts(FULL.replace(b" 128.0", b" " + most).replace(b" 120.0", b" " + most)).occupancy is None
    )
    assert engine_facts(FULL.replace(b" 7.0", b" " + most)).occupancy is None


async def test_endless_series_and_lines_are_not_followed() -> None:
    """A page of one series a million times, or of one line, is read as far as engines go."""
    line = b'vllm:num_requests_running{engine="0"} 1\n'
    page = line * 100_000 + FULL.replace(b"vllm:num_requests_running", b"#")
    occupancy = engine_facts(page).occupancy
    assert occupancy is not None
    assert occupancy.running == 4096
    one_line = METRICS.replace(b"{_block", b'{x="%b",_block' % (b"y" * 20_000))
    assert engine_facts(one_line).kv_tokens is None


@pytest.mark.parametrize("facts_raise", [ValueError, OverflowError, RecursionError])
async def test_metrics_that_no_code_foresaw_are_a_failed_reading(
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    facts_raise: type[Exception],
) -> None:
    """The engine stays healthy, is probed on, and one line says so until a page is read again."""

    def explode(_: bytes) -> EngineFacts:
        raise facts_raise

    async with serving() as engine:
        monkeypatch.setattr(prober, "engine_facts", explode)
        watch.set_endpoints(engine.key)
        await until(lambda: engine.scrapes > 3)
        assert watch.tracker.is_available(engine.key)
        probes = engine.probes
        await until(lambda: engine.probes > probes + 3)
        monkeypatch.setattr(prober, "engine_facts", engine_facts)
        await until(lambda: bool(watch.configs))
    assert caplog.text.count("metrics cannot be read") == 1
    assert "probe raised" not in caplog.text


async def test_occupancy_is_reported_again_and_again(watch: Watch) -> None:
    """Every few seconds an engine that answers is asked how full it is."""
    async with serving() as engine:
        engine.metrics = FULL
        watch.set_endpoints(engine.key)
        await until(lambda: len(watch.occupancies) == 1)
        watch.skipped_s += 10.0
        await until(lambda: len(watch.occupancies) == 2)
        assert watch.occupancies[0] == (engine.key, Occupancy(248, 7, 0.75))
