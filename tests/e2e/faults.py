"""What the fault tests break with and measure by: links that fail, a load that shares prefixes, figures.

Rules:
    1. A fault is injected under load and healed under load; every request belongs to the phase it began in.
    2. Figures come from the gateways' request log, which is written whatever else is broken; what no gateway
       decided (Envoy went on by itself) counts by what the engine answered the client.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import numpy as np
import pytest

from testbed.processes import REPOSITORY, free_port
from testbed.redis_server import RedisServer
from tests.e2e.harness import DEBUG_HEADERS, DECISION_HEADER, EngineProcess, Stack, eventually, sample
from tests.e2e.pair import all_settled

IS_FULL: Final = os.environ.get("TOKENWAY_FAULTS_FULL") == "1"
"""10,000 requests per fault and the durations of the requirement; otherwise as short as each fault allows."""

PHASE_REQUESTS: Final = 3_334 if IS_FULL else 110

CLIENTS: Final = 8
"""Per gateway."""

INTERVAL_S: Final = 0.1
"""Between the beginnings of one client's requests, at least. Without it a quicker gateway would ask more of
the same engines, whose caches would then turn over faster than they can say."""

MODEL: Final = "sim"
CHUNK_BYTES: Final = 65_536
ROUND_TRIP_S: Final = 0.2
"""Of a slow link."""

BUFFER_STEPS: Final = 1_000_000
"""Engines keep every batch of a run: with fewer, a gateway that comes late does not follow them any more."""

LATEST: Final = 12
"""Hits per engine of which all but two were foreseen once all is well again."""

CALM_CLIENTS: Final = 1
"""Per gateway, to see whether every cache is foreseen to the token. Caches of the engines here are so small
that on a busy machine `CLIENTS` turn them over within a second, sooner than a block is taken to be evicted
(`extproc.routing.running.LINGER_S`), and evict between a decision and its prefill: then up to a sixth of the
requests is foreseen wrongly, and no fault of any part has to do with it."""

CALM_REQUESTS: Final = 110

LONG_TOKENS: Final = 8_000
"""Some ten seconds of a stream."""

LONG_STREAMS: Final = 3
"""Per gateway, to count."""


class Mode(StrEnum):
    """What a link does to its connections."""

    PASS = "pass"
    CUT = "cut"
    """Connections are reset, new ones too."""
    STALL = "stall"
    """Packets vanish: nothing arrives, nothing is closed; what was sent arrives after the end of it."""
    DELAY = "delay"
    """Each direction takes half of `ROUND_TRIP_S`."""


class Link:
    """A TCP proxy on loopback in front of one port, which can be made to fail.

    Attributes:
        port: Where to connect.
        upstream_port: Where connections lead; a change is for new ones.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self.upstream_port = upstream_port
        self._mode = Mode.PASS
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close."""
        self.set(Mode.CUT)
        if self._server is not None:
            self._server.close()

    def set(self, mode: Mode) -> None:
        """Behave so from now on."""
        self._mode = mode
        if mode is Mode.STALL:
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode is Mode.CUT:
            self.reset()

    def reset(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        other = None
        try:
            await self._flowing.wait()
            if self._mode is Mode.CUT:
                return
            upstream, other = await asyncio.open_connection("127.0.0.1", self.upstream_port)
            self._writers.add(other)
            pumps = {
                asyncio.create_task(self._pump(reader, other)),
                asyncio.create_task(self._pump(upstream, writer)),
            }
            _, rest = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in rest:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # no server listens there now
        finally:
            for each in (writer, other):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction until it ends or breaks."""
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(64)

        async def take() -> None:
            with suppress(OSError):
                while data := await reader.read(CHUNK_BYTES):
                    delay_s = ROUND_TRIP_S / 2 if self._mode is Mode.DELAY else 0.0
                    await under_way.put((clock() + delay_s, data))
            await under_way.put(None)

        taking = asyncio.create_task(take())
        try:
            while (taken := await under_way.get()) is not None:
                await asyncio.sleep(taken[0] - clock())
                await self._flowing.wait()
                writer.write(taken[1])
                await writer.drain()
        except OSError:
            return
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)


class Phase(StrEnum):
    """When a request began."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer, as its client saw it.

    Attributes:
        phase: When it was asked for.
        decision_id: Under which a gateway knows it; None if none decided.
        prompt_tokens: As the engine counted.
        cached_tokens: As the engine counted.
        duration_s: Until the last byte.
    """

    phase: Phase
    decision_id: str | None
    prompt_tokens: int
    cached_tokens: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """One request without a whole answer."""

    phase: Phase
    gateway: int
    what: str


class Prompts:
    """Completion prompts of many lengths that share prefixes of many lengths.

    Args:
        seed: Equal seeds give equal prompts, others share no prefix.
        prefixes: How many.
    """

    def __init__(self, seed: str, prefixes: int = 24) -> None:
        self._rng = random.Random(seed)
        files = sorted((REPOSITORY / "extproc").rglob("*.py"))
        self._source = "".join(path.read_text() for path in files)
        self._prefixes = [self._text(self._rng.randrange(400, 2_400)) for _ in range(prefixes)]

    def draw(self) -> str:
        """A prefix of some, and an end of its own."""
        return self._rng.choice(self._prefixes) + self._text(self._rng.randrange(20, 400))

    def _text(self, length: int) -> str:
        start = self._rng.randrange(len(self._source) - length)
        return f"{self._rng.getrandbits(64):016x}\n{self._source[start : start + length]}"


class PrefixLoad:
    """Clients of every gateway that ask again and again until the block ends.

    Attributes:
        prompts: What they ask.
        phase: What requests that begin now belong to.
        answers: Whole, correct answers so far.
        failures: What every other request met.
    """

    def __init__(self, stacks: Sequence[Stack], prompts: Prompts, *, clients: int = CLIENTS) -> None:
        self.prompts = prompts
        self.phase = Phase.BEFORE
        self.answers: list[Answer] = []
        self.failures: list[Failure] = []
        self._stacks = stacks
        self._clients = clients
        self._rng = random.Random(1)
        self._is_over = False
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._ask_on(number, stack))
            for number, stack in enumerate(self._stacks)
            for _ in range(self._clients)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        self._may_ask.set()
        await asyncio.gather(*self._tasks)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No request begins during the block; those under way go on."""
        self._may_ask.clear()
        try:
            yield
        finally:
            self._may_ask.set()

    async def more(self, count: int, least_s: float = 0.0) -> None:
        """Wait for `count` further answers, and for as long as that."""
        goal, until_s = len(self.answers) + count, time.monotonic() + least_s

        async def done() -> bool:
            assert len(self.failures) < 100, self.failures[-3:]
            return len(self.answers) >= goal and time.monotonic() >= until_s

        await eventually(done, bool, 60.0 + least_s + 0.2 * count)

    def slowest_s(self, phase: Phase) -> float:
        """Longest time to a whole answer of a phase; 0 without any."""
        return max((answer.duration_s for answer in self.answers if answer.phase is phase), default=0.0)

    async def _ask_on(self, gateway: int, stack: Stack) -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout, headers=DEBUG_HEADERS) as session:
            while await self._may_ask.wait() and not self._is_over:
                phase, started_s = self.phase, time.monotonic()
                body = completion(self.prompts.draw(), self._rng.choice((1, 4, 16, 64)))
                try:
                    async with session.post(f"{stack.url}/v1/completions", json=body) as reply:
                        answer = await reply.read()
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.failures.append(Failure(phase, gateway, repr(error)))
                    await asyncio.sleep(0.05)
                    continue
                usage = usage_of(answer)
                if reply.status != 200 or usage is None:
                    self.failures.append(Failure(phase, gateway, f"{reply.status} {answer[-200:]!r}"))
                    continue
                self.answers.append(
                    Answer(
                        phase,
                        reply.headers.get(DECISION_HEADER),
                        usage["prompt_tokens"],
                        usage["prompt_tokens_details"]["cached_tokens"],
                        time.monotonic() - started_s,
                    )
                )
                await asyncio.sleep(max(0.0, started_s + INTERVAL_S - time.monotonic()))


def completion(prompt: str, max_tokens: int) -> dict[str, Any]:
    """A streamed completion that says what it used."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def usage_of(stream: bytes) -> dict[str, Any] | None:
    """The usage in a stream that ended as it should, else None."""
    chunks = stream.split(b"\n\n")
    if chunks[-2:] != [b"data: [DONE]", b""]:
        return None
    usage: dict[str, Any] | None = json.loads(chunks[-3].removeprefix(b"data: "))["usage"]
    return usage


@dataclass(frozen=True, slots=True)
class Quality:
    """How good the placement of some requests was.

    Attributes:
        requests: How many were answered.
        hit_ratio: Share of prompt tokens that came from engines' caches.
        spread: Most requests at one engine by the mean, of those that a gateway decided; 1 is even.
        exact_ratio: Share of decided requests whose cached tokens were foreseen to the token.
        decision_p99_ms: Of the decided ones.
    """

    requests: int
    hit_ratio: float
    spread: float
    exact_ratio: float
    decision_p99_ms: float

    def __str__(self) -> str:
        return f"{self.hit_ratio:.2f}/{self.spread:.2f}/{self.exact_ratio:.2f}"


class RequestLogs:
    """What gateways logged of requests that ended, by decision."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self._offsets = {stack.run_dir / "gateway.log": 0 for stack in stacks}
        self.lines: dict[str, dict[str, Any]] = {}
        self.others: list[dict[str, Any]] = []

    def forget(self) -> None:
        """Begin anew with what comes now."""
        self.read()
        self.lines.clear()
        self.others.clear()

    def read(self) -> None:
        """Take what was logged since the last time."""
        for path, offset in self._offsets.items():
            with path.open("rb") as file:
                file.seek(offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offsets[path] = offset + len(whole) + len(newline)
            for line in filter(lambda line: line.startswith(b"{"), whole.splitlines()):
                said = json.loads(line)
                if said["logger"] == "tokenway.request":
                    self.lines[said["request_id"]] = said
                else:
                    self.others.append(said)

    def is_foreseen(self, skipped: int, engines: int) -> bool:
        """Of the latest hits at each engine nearly all were foreseen; the first `skipped` do not count."""
        latest: dict[str, deque[bool]] = {}
        for line in islice(self.lines.values(), skipped, None):
            if line["cached_tokens"] or line["predicted_cached_tokens"]:
                at_engine = latest.setdefault(line["endpoint"], deque(maxlen=LATEST))
                at_engine.append(line["predicted_cached_tokens"] == line["cached_tokens"])
        return len(latest) == engines and all(sum(found) >= LATEST - 2 for found in latest.values())

    def quality(self, answers: Iterable[Answer], engines: int) -> Quality:
        """Of these answers."""
        counted = list(answers)
        lines = [self.lines[a.decision_id] for a in counted if a.decision_id in self.lines]
        placed = Counter(line["endpoint"] for line in lines)
        foreseen = [line["predicted_cached_tokens"] == line["cached_tokens"] for line in lines]
        decisions = [line["decision_us"] for line in lines]
        prompt_tokens = sum(answer.prompt_tokens for answer in counted)
        return Quality(
            requests=len(counted),
            hit_ratio=sum(answer.cached_tokens for answer in counted) / max(1, prompt_tokens),
            spread=max(placed.values(), default=0) * engines / max(1, len(lines)),
            exact_ratio=sum(foreseen) / max(1, len(lines)),
            decision_p99_ms=float(np.percentile(decisions, 99)) / 1e3 if decisions else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """How a gateway stands with the others.

    Attributes:
        connected: Caught up with the shared metadata center.
        gateways: Whose load counts, itself included.
        requests: In flight by engine, as its decisions see them.
    """

    connected: bool
    gateways: int
    requests: Mapping[str, int]


async def standing(stack: Stack) -> Standing | None:
    """Of one gateway; None if it does not answer."""
    with suppress(aiohttp.ClientError, TimeoutError, AssertionError):
        scrape, rows = await asyncio.gather(stack.metrics(), stack.rows())
        return Standing(
            sample(scrape, "tokenway_sharing_connected") == 1.0,
            int(sample(scrape, "tokenway_sharing_gateways") or 0),
            {key: row["requests"] for key, row in rows.items()},
        )
    return None


@asynccontextmanager
async def streaming(stack: Stack, prompt: str) -> AsyncIterator[None]:
    """A request that a gateway decided and that is answered for as long as the block lasts, and longer."""
    timeout = aiohttp.ClientTimeout(total=60)
    body = completion(prompt, LONG_TOKENS)
    async with aiohttp.ClientSession(timeout=timeout, headers=DEBUG_HEADERS) as session:
        while True:
            async with session.post(f"{stack.url}/v1/completions", json=body) as reply:
                assert reply.status == 200
                if DECISION_HEADER not in reply.headers:  # Envoy alone placed it: it counts nowhere
                    continue
                yield
                return


@dataclass(slots=True)
class Deployment:
    """What tests ask and break.

    Attributes:
        gateways: Each with an Envoy of its own and over all engines.
        engines: The first one's events come through `events` and `replay`; the others are asked for theirs.
        redis: Where the gateways meet.
        to_redis: Each gateway's way there.
        events: Of both gateways to the first engine's events.
        replay: Of both gateways to its replays.
    """

    gateways: list[Stack]
    engines: list[EngineProcess]
    redis: RedisServer
    to_redis: list[Link]
    events: Link
    replay: Link

    async def standings(self) -> list[Standing | None]:
        """How each gateway stands, read at once."""
        return list(await asyncio.gather(*(standing(stack) for stack in self.gateways)))

    async def joined(self, timeout_s: float = 60.0) -> None:
        """Wait until all gateways are connected and count each other."""

        def are_joined(found: Sequence[Standing | None]) -> bool:
            return all(one is not None and one.connected and one.gateways == len(found) for one in found)

        await eventually(self.standings, are_joined, timeout_s)

    async def exact(self, load: PrefixLoad, timeout_s: float = 60.0) -> None:
        """Wait until all gateways count exactly the requests that run: a few long ones, while others wait."""
        prompts = Prompts("exact", 1)
        async with AsyncExitStack() as stack:
            stack.enter_context(load.held())
            for _ in range(LONG_STREAMS):
                for gateway in self.gateways:
                    await stack.enter_async_context(streaming(gateway, prompts.draw()))
            running = LONG_STREAMS * len(self.gateways)

            def are_exact(found: Sequence[Standing | None]) -> bool:
                counts = [None if one is None else one.requests for one in found]
                return all(
                    count is not None and count == counts[0] and sum(count.values()) == running
                    for count in counts
                )

            await eventually(self.standings, are_exact, timeout_s)

    async def counted_gateways(self, index: int, count: int, timeout_s: float = 30.0) -> float:
        """Wait until a gateway counts so many; seconds it took."""
        started_s = time.monotonic()

        async def found() -> int | None:
            seen = await standing(self.gateways[index])
            return None if seen is None else seen.gateways

        await eventually(found, lambda gateways: gateways == count, timeout_s)
        return time.monotonic() - started_s

    async def series(self, name: str) -> list[float]:
        """One series of every gateway; 0 where there is none."""
        return [sample(await stack.metrics(), name) or 0.0 for stack in self.gateways]

    async def announcing(self, timeout_s: float = 60.0) -> None:
        """Wait until every engine announces to every gateway."""

        async def known() -> list[bool]:
            rows = [row for stack in self.gateways for row in (await stack.rows()).values()]
            return [row["announcing"] for row in rows]

        await eventually(known, all, timeout_s)


@dataclass(slots=True)
class Course:
    """One fault's course under load, and what came of it.

    Attributes:
        deployment: What is broken.
        load: Asks all the while.
        logs: What the gateways say of it.
        recovered_s: From the healing on until all gateways counted exactly what ran.
        notes: Further figures, for the table.
    """

    deployment: Deployment
    load: PrefixLoad
    logs: RequestLogs
    recovered_s: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    async def begin(self) -> None:
        """The time before the fault; it may be injected afterwards."""
        await self.load.more(PHASE_REQUESTS)
        self.load.phase = Phase.DURING

    async def during(self, least_s: float) -> None:
        """The time of the fault."""
        await self.load.more(PHASE_REQUESTS, least_s)

    async def end(self) -> None:
        """From the healing on: wait until the gateways count and foresee exactly, and go on for a while."""
        started_s = time.monotonic()
        self.logs.read()
        before = len(self.logs.lines)
        await self.deployment.joined()
        await self.deployment.exact(self.load)
        self.recovered_s = time.monotonic() - started_s
        await self.deployment.announcing()
        self.notes["announcing_s"] = round(time.monotonic() - started_s, 2)

        async def foreseen() -> bool:
            self.logs.read()
            return self.logs.is_foreseen(before, len(self.deployment.engines))

        await eventually(foreseen, bool, 180.0)
        self.notes["foreseen_s"] = round(time.monotonic() - started_s, 2)
        self.load.phase = Phase.AFTER
        await self.load.more(PHASE_REQUESTS)

    def foreseen_at(
        self, engine: EngineProcess, phase: Phase, load: PrefixLoad | None = None
    ) -> tuple[int, int]:
        """Of the decided requests that one engine answered: how many were foreseen to the token, and all.

        Args:
            engine: Which answered.
            phase: When they were asked for.
            load: Which asked; None is the one of the fault.
        """
        lines = [
            self.logs.lines[answer.decision_id]
            for answer in (load or self.load).answers
            if answer.phase is phase and answer.decision_id in self.logs.lines
        ]
        found = [
            line["predicted_cached_tokens"] == line["cached_tokens"]
            for line in lines
            if line["endpoint"] == engine.key
        ]
        return sum(found), len(found)

    async def calm(self) -> tuple[PrefixLoad, Quality]:
        """After the load: go on with its prompts, but so lightly that a cache which is known is foreseen."""
        load = PrefixLoad(self.deployment.gateways, self.load.prompts, clients=CALM_CLIENTS)
        load.phase = Phase.AFTER
        async with load:
            await load.more(CALM_REQUESTS)
        assert load.failures == []
        await all_settled(self.deployment.gateways, 10.0)
        self.logs.read()
        quality = self.logs.quality(load.answers, len(self.deployment.engines))
        self.notes["calm"] = str(quality)
        return load, quality

    async def settle(self) -> dict[Phase, Quality]:
        """After the load: every counter is exactly zero; the quality by phase."""
        await all_settled(self.deployment.gateways, 10.0)
        self.logs.read()
        engines = len(self.deployment.engines)
        return {
            phase: self.logs.quality((a for a in self.load.answers if a.phase is phase), engines)
            for phase in Phase
        }


class FaultTable:
    """The figures of all faults, printed at the end of the run; registered as a plugin of pytest."""

    def __init__(self) -> None:
        self._courses: list[tuple[str, Course, Mapping[Phase, Quality]]] = []

    def add(self, fault: str, course: Course, quality: Mapping[Phase, Quality]) -> None:
        """One fault, after which all counters were found to be zero."""
        self._courses.append((fault, course, quality))

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "fault": fault,
                "requests": len(course.load.answers) + len(course.load.failures),
                "failed": len(course.load.failures),
                **{phase.value: str(quality[phase]) for phase in Phase},
                "decision_p99_ms": [round(quality[phase].decision_p99_ms, 2) for phase in Phase],
                "slowest_s": [round(course.load.slowest_s(phase), 2) for phase in Phase],
                "recovered_s": None if course.recovered_s is None else round(course.recovered_s, 2),
                "counters": 0,
                **course.notes,
            }
            for fault, course, quality in self._courses
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a row per fault, then all of them as one JSON object."""
        terminalreporter.section("faults of the shared metadata center")
        terminalreporter.write_line(
            "fault, requests, failed, hit ratio/spread/foreseen exactly (before, during, after), "
            "seconds until exact, counters"
        )
        rows = self._rows()
        for row in rows:
            terminalreporter.write_line(
                f"{row['fault']:<28} {row['requests']:>6} {row['failed']:>3}   "
                f"{row['before']}  {row['during']}  {row['after']}  {row['recovered_s']}  {row['counters']}"
            )
        terminalreporter.write_line(json.dumps(rows))


def engine_words(tokenizer: Path, events_port: int, replay_port: int) -> list[str]:
    """A replica that publishes events, too small for all prefixes, so that placement shows."""
    return [
        *("--model", MODEL, "--profile", "llama8b-h100", "--kv-tokens", "12288", "--time-scale", "0.2"),
        *("--tokenizer", str(tokenizer), "--kv-events-bind", "--kv-buffer-steps", str(BUFFER_STEPS)),
        *("--kv-events", f"tcp://127.0.0.1:{events_port}", "--kv-replay", f"tcp://127.0.0.1:{replay_port}"),
    ]


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


CLOCK_FILE_ENV: Final = "TOKENWAY_TEST_CLOCK_FILE"

_CLOCK_SHIM: Final = f"""
import os
import time

real = time.time


def jumping():
    try:
        with open(os.environ["{CLOCK_FILE_ENV}"]) as file:
            return real() + float(file.read())
    except (OSError, ValueError):
        return real()


time.time = jumping
"""


class Clock:
    """The wall clock of processes that are started with `env`; their monotonic clock goes on as ever."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(_CLOCK_SHIM)
        self._file = folder / "offset_s"
        self.env = {"PYTHONPATH": str(folder), CLOCK_FILE_ENV: str(self._file)}

    def jump(self, offset_s: float) -> None:
        """Be off by so much from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(str(offset_s))
        new.replace(self._file)


def free_ports(count: int) -> Iterator[int]:
    """Ports on which no process listens now, all different."""
    seen: set[int] = set()
    while len(seen) < count:
        port = free_port()
        if port not in seen:
            seen.add(port)
            yield port
