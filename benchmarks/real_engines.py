"""Simulated engines in real time, a gateway before them, and what a run of requests through it comes to.

Four engines (a process each, an H100 slowed by `SLOWDOWN`) announce their caches; a gateway is whatever takes
requests for them at one address: Tokenway with its Envoy (`benchmarks.real_path`), or another router
(`benchmarks.peer_quality`). Engines and gateway are started afresh for each run.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import processes
from benchmarks.streaming import Figures, ScheduledRequest, figures, open_loop
from testbed.processes import free_port

MODEL: Final = "bench"
ENGINES: Final = 4

PROFILE: Final = "llama8b-h100"
SLOWDOWN: Final = 8.0
"""Real seconds per second of the profile: the knee is at some five requests a second, an eighth of a core."""

WARMUP_S: Final = 15.0
START_TIMEOUT_S: Final = 60.0
"""Six Python processes that import at once on two cores that others use as well."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine.

    Attributes:
        port: Of its HTTP API on 127.0.0.1.
        events: ZeroMQ address of what its cache gains and loses.
        replay: ZeroMQ address at which events are asked for again.
        pid: Its process.
    """

    port: int
    events: str
    replay: str
    pid: int

    @property
    def url(self) -> str:
        """Of its HTTP API."""
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class Front:
    """A gateway that serves.

    Attributes:
        url: For clients.
        admin_url: Of Tokenway; None of others.
        pids: Processes by role; those of one role count together, with their children.
        envoy_admin_url: Of its Envoy; None where there is none.
        other_urls: Of further gateways before the same engines; clients take turns.
        other_admin_urls: Of those that are Tokenway's.
    """

    url: str
    admin_url: str | None
    pids: Mapping[str, tuple[int, ...]]
    envoy_admin_url: str | None = None
    other_urls: tuple[str, ...] = ()
    other_admin_urls: tuple[str, ...] = ()


class Gateway(Protocol):
    """What takes requests for the engines."""

    @property
    def name(self) -> str:
        """For reports."""

    def serving(
        self, engines: Sequence[Engine], run_dir: Path, tokenizer: Path
    ) -> AbstractAsyncContextManager[Front]:
        """Started afresh, killed at the end.

        Args:
            engines: They run.
            run_dir: Empty; short, for Unix sockets take 107 bytes.
            tokenizer: `tokenizer.json` of the engines.

        Yields:
            Once a request has passed through.

        Raises:
            TimeoutError: It does not start.
        """


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway with its engines.

    Attributes:
        name: Of the gateway.
        front: The gateway.
        engines: Behind it.
    """

    name: str
    front: Front
    engines: tuple[Engine, ...]


@asynccontextmanager
async def running_engines(tokenizer: Path) -> AsyncIterator[tuple[Engine, ...]]:
    """Fresh engines, killed at the end.

    Args:
        tokenizer: Their `tokenizer.json`.

    Yields:
        Once all of them answer.

    Raises:
        TimeoutError: One does not start.
    """
    ports: set[int] = set()
    while len(ports) < 3 * ENGINES:
        ports.add(free_port())
    serve_ports, event_ports, replay_ports = (list(ports)[start::3] for start in range(3))
    with ExitStack() as stack:
        engines = tuple(
            _start_engine(stack, tokenizer, *each)
            for each in zip(serve_ports, event_ports, replay_ports, strict=True)
        )
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            for engine in engines:
                await until_answers(session, f"{engine.url}/health", "engine")
        yield engines


def engine_command(
    tokenizer: Path, port: int, events: str, replay: str, slowdown: float = SLOWDOWN
) -> tuple[str, ...]:
    """The command line of an engine.

    Args:
        tokenizer: Its `tokenizer.json`.
        port: See `Engine`, as are the next two.
        events: It binds it.
        replay: It binds it.
        slowdown: Real seconds per second of the profile.
    """
    return (
        *(sys.executable, "-m", "tokenway.simulator"),
        *("--port", str(port), "--model", MODEL, "--tokenizer", str(tokenizer)),
        *("--profile", PROFILE, "--time-scale", str(slowdown)),
        *("--kv-events", events, "--kv-events-bind", "--kv-replay", replay),
    )


def _start_engine(stack: ExitStack, tokenizer: Path, port: int, event_port: int, replay_port: int) -> Engine:
    events, replay = f"tcp://127.0.0.1:{event_port}", f"tcp://127.0.0.1:{replay_port}"
    command = engine_command(tokenizer, port, events, replay)
    return Engine(port, events, replay, stack.enter_context(processes.running(*command)))


async def until_answers(session: aiohttp.ClientSession, url: str, what: str) -> None:
    """Wait until an address answers 200.

    Raises:
        TimeoutError: `what` is not there in time.
    """

    async def answers() -> bool:
        async with session.get(url) as reply:
            return reply.status == 200

    await processes.until(answers, what, START_TIMEOUT_S)


async def until_completes(session: aiohttp.ClientSession, url: str, what: str) -> None:
    """Wait until a completion passes through a gateway.

    Raises:
        TimeoutError: None does in time.
    """

    async def completes() -> bool:
        body = {"model": MODEL, "prompt": " ready", "max_tokens": 1}
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            return reply.status == 200

    await processes.until(completes, what, START_TIMEOUT_S)


def announced_ratio(exposition: str) -> float:
    """Share of a scrape's decisions in which the chosen endpoint's cache was known from its announcements.

    A prompt on its way to the endpoint that reaches further than what is announced (`running`) is counted in:
    it stands on announcements as well. Without any decision, 0.
    """
    found = _by_label(exposition, "tokenway_cache_views_total", "view")
    followed = found.get("announced", 0.0) + found.get("running", 0.0)
    return followed / max(1.0, sum(found.values()))


def held_requests(exposition: str) -> int:
    """Requests that had to wait at the gateway, by a scrape; 0 if it does not count them."""
    return int(sum(_by_label(exposition, "tokenway_holds_total", "reason").values()))


def value_of(exposition: str, name: str) -> float | None:
    """The first sample of a name in a scrape; None without one."""
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == name:
                return sample.value
    return None


def _by_label(exposition: str, name: str, label: str) -> dict[str, float]:
    """Values of a counter by one of its labels, summed over the others."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == name:
                value = sample.labels[label]
                found[value] = found.get(value, 0.0) + sample.value
    return found


@dataclass(frozen=True, slots=True)
class Used:
    """CPU over a span of time.

    Attributes:
        cores: By role, all processes of it together.
        busy_ratio: Of the machine's cores, whichever process kept them busy.
        waited_ratio: Share of the time in which some process of the machine waited for a core.
    """

    cores: dict[str, float]
    busy_ratio: float
    waited_ratio: float


@dataclass(frozen=True, slots=True)
class _Clocks:
    now_s: float
    by_role_s: dict[str, float]
    busy_s: float
    waited_s: float

    @classmethod
    def read(cls, pids: Mapping[str, tuple[int, ...]]) -> _Clocks:
        user, nice, system, _, _, irq, soft, *_ = (
            int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
        pressure = Path("/proc/pressure/cpu").read_text().split("\n", 1)[0]
        return cls(
            time.monotonic(),
            {
                role: sum(processes.cpu_s(each) for pid in started for each in processes.tree(pid))
                for role, started in pids.items()
            },
            (user + nice + system + irq + soft) / processes.TICKS_PER_S,
            int(pressure.rpartition("total=")[2]) / 1e6,
        )

    def since(self, before: _Clocks) -> Used:
        span_s = self.now_s - before.now_s
        return Used(
            {role: (used_s - before.by_role_s[role]) / span_s for role, used_s in self.by_role_s.items()},
            (self.busy_s - before.busy_s) / span_s / (os.cpu_count() or 1),
            (self.waited_s - before.waited_s) / span_s,
        )


@dataclass(frozen=True, slots=True)
class Real:
    """A run on the real path.

    Attributes:
        figures: Of the requests that count.
        engine_requests: Per engine, warm-up included.
        announced: See `announced_ratio`.
        held: Requests that waited at the gateway, warm-up included.
        used: CPU from the end of the warm-up to the last arrival.
        drained_s: From the last arrival to the last answer.
        errors: Of those that failed, the first few.
    """

    figures: Figures
    engine_requests: list[int]
    announced: float
    held: int
    used: Used
    drained_s: float
    errors: list[str]


async def measure(
    gateway: Gateway, root: Path, tokenizer: Path, asked: Sequence[ScheduledRequest], until_s: float
) -> Real:
    """One run on the real path.

    Raises:
        TimeoutError: Something does not start.
    """
    (run,) = (await measure_together([gateway], root, tokenizer, asked, until_s)).values()
    if isinstance(run, TimeoutError):
        raise run
    return run


async def measure_together(
    gateways: Sequence[Gateway],
    root: Path,
    tokenizer: Path,
    asked: Sequence[ScheduledRequest],
    until_s: float,
) -> dict[str, Real | TimeoutError]:
    """Runs at the same time, each with engines of its own: what the machine does besides falls on all.

    Returns:
        By name of the gateway; the error of one that did not start, while the others ran.

    Raises:
        TimeoutError: An engine does not start.
    """
    runs: dict[str, Real | TimeoutError] = {}
    served: list[Served] = []
    async with AsyncExitStack() as stack:
        for gateway in gateways:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=root)))
            engines = await stack.enter_async_context(running_engines(tokenizer))
            try:
                front = await stack.enter_async_context(gateway.serving(engines, folder, tokenizer))
            except TimeoutError as error:
                runs[gateway.name] = error
            else:
                served.append(Served(gateway.name, front, engines))
        began_s = time.monotonic()
        found = await asyncio.gather(*(_run(each, asked, began_s, until_s) for each in served))
        runs |= {each.name: run for each, run in zip(served, found, strict=True)}
    return runs


async def _run(served: Served, asked: Sequence[ScheduledRequest], began_s: float, until_s: float) -> Real:
    pids = {
        **served.front.pids,
        "engines": tuple(engine.pid for engine in served.engines),
        "client": (os.getpid(),),
    }
    urls = [f"{url}/v1/completions" for url in (served.front.url, *served.front.other_urls)]
    loop = asyncio.create_task(open_loop(urls, asked, began_s))
    await asyncio.sleep(began_s + WARMUP_S - time.monotonic())
    before = _Clocks.read(pids)
    await asyncio.sleep(began_s + until_s - time.monotonic())
    used = _Clocks.read(pids).since(before)
    answers = await loop
    drained_s = time.monotonic() - began_s - until_s
    exposition = ""  # of all gateways, one after the other: counts are summed
    async with aiohttp.ClientSession() as session:
        counts = []
        for engine in served.engines:
            async with session.get(f"{engine.url}/sim/state") as reply:
                counts.append(len((await reply.json())["served"]))
        for admin_url in (served.front.admin_url, *served.front.other_admin_urls):
            if admin_url is not None:
                async with session.get(f"{admin_url}/metrics") as reply:
                    exposition += await reply.text()
    errors = [answer.error for answer in answers if answer.error is not None and not answer.is_refused]
    return Real(
        figures(answers, WARMUP_S),
        counts,
        announced_ratio(exposition),
        held_requests(exposition),
        used,
        drained_s,
        errors[:3],
    )
