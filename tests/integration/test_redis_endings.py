"""Requests that end in every way, over two gateways that share by a real Redis, while Redis and they fail.

`make test` has some hundreds; `make test-endings ENDINGS=10000` as many as are asked for.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from extproc.errors import RouterError
from extproc.health.settings import HealthSettings
from extproc.server.sharing import reserve_by
from extproc.values.deciding import Later, Now, Refusal
from extproc.values.evidence import FailureKind
from extproc.values.outcomes import Ended
from extproc.values.pending import Pending
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters, IntArray
from metadata_center.load.ledger import LedgerBounds
from metadata_center.sharing.messages import Candidate, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.types import EndpointKey, RequestId
from testbed.redis_server import RedisServer, running
from tests.conftest import Rig, build_rig, chat, endpoint, request_line, result_of

REQUESTS: Final = int(os.environ.get("TOKENWAY_REDIS_ENDINGS", "400"))
CLIENTS: Final = 12
LEASE_S: Final = 1.5
"""Of a request whose end is never reported."""

SHARE_LEASE_S: Final = 0.8
FAULTS_BETWEEN: Final = 3
"""Faults from one moment at which all views are compared to the next."""

DEADLINE_S: Final = 60.0
SETTINGS: Final = SyncSettings(timeout_s=0.4, reserve_timeout_s=0.1, backoff_s=0.1)
ENDPOINTS: Final = tuple(map(endpoint, range(1, 4)))
KEYS: Final = tuple(member.key for member in ENDPOINTS)

HEALTH: Final = HealthSettings(ejection_s=0.05, max_ejection_s=0.05)
"""What engine errors eject is back soon."""

WAYS: Final = (
    "completed",
    "client_leaves",
    "client_leaves_undecided",
    "ended_undecided",
    "engine_error",
    "refused",
    "timeout",
    "fallback",
    "never_reported",
)
"""How a request ends, beside the restart of the gateway that decided."""


class Cable:
    """The way from one gateway to Redis, which can be cut alone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._is_cut = False
        self.url = ""

    async def lay(self) -> None:
        """Begin."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def take_up(self) -> None:
        """End."""
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Nothing goes through, and all that was under way is lost."""
        self._is_cut = True
        for end in self._ends:
            end.transport.abort()

    def mend(self) -> None:
        """New connections go through."""
        self._is_cut = False

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with suppress(OSError):
            if not self._is_cut:
                their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._port)
                ends.append(their_writer)
                self._ends.update(ends)
                await asyncio.gather(_pump(reader, their_writer), _pump(their_reader, writer))
        for end in ends:
            self._ends.discard(end)
            end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


class Site:
    """One life of one gateway: the request path of a worker, and its sharing.

    Args:
        index: Which gateway.
        life: Which of its lives.
        url: Where it finds Redis.
    """

    def __init__(self, index: int, life: int, url: str) -> None:
        self.member = member_id(f"gw{index}", 0, f"life{life}")
        self.rig: Rig = build_rig(
            ENDPOINTS, health=HEALTH, load_of=self._load_of, reserve=self._reserve, seed=life
        )
        self._transport = RedisTransport(parse_url(url))
        self.sync = Sync(self.store, self._transport, time.monotonic, random.Random(life), SETTINGS)
        self._confirm = reserve_by(self.sync)
        self._random = random.Random(f"{index}{life}")
        self.sync.start()

    def _load_of(self, counters: Counters, history: PrefixIndex) -> Any:
        bounds = LedgerBounds(lease_s=LEASE_S, tombstone_s=LEASE_S)
        self.store = SharedStore(self.member, counters, history, share_lease_s=SHARE_LEASE_S, bounds=bounds)
        return self.store.load

    def _reserve(self, request_id: RequestId, candidates: Sequence[Candidate]) -> Pending[EndpointKey | None]:
        """Half of the decisions are confirmed by Redis, the others are not."""
        if self._random.random() < 0.5:
            return self._confirm(request_id, candidates)
        here: Pending[EndpointKey | None] = Pending()
        here.give(None)
        return here

    def pass_time(self) -> None:
        """Now is now: what is due is released; what is counted is what runs, and nothing is below zero."""
        now_s = self.rig.clock.now_s = time.monotonic()
        self.rig.scheduling.running.advance(now_s)
        self.store.advance(now_s)
        own, seen = self.own(), self.view()
        assert (own >= 0).all(), own
        assert (seen >= own).all(), (seen, own)
        assert own[0].sum() == self.store.load.in_flight == len(self.rig.scheduling.running)

    def own(self) -> IntArray:
        """What this one counts itself, shape (kinds, endpoints)."""
        slots = list(self.store.load.slots(KEYS))
        own: IntArray = self.rig.counters._own[:, slots]
        return own

    def view(self) -> IntArray:
        """What a decision would see, shape (kinds, endpoints)."""
        return np.array(self.rig.counters.totals(self.store.load.slots(KEYS)))

    async def leave(self) -> None:
        """It stops in good order."""
        await self.sync.stop()

    async def die(self) -> None:
        """It is killed: not a word to anybody."""
        assert self.sync._task is not None
        self.sync._is_stopping = True
        self.sync._task.cancel()
        await asyncio.wait([self.sync._task])
        await self._transport.close()


class Traffic:
    """Clients of both gateways, and what fails meanwhile.

    Args:
        server: The real Redis.
        cables: Each gateway's way there.
        rng: Decides what happens.
    """

    def __init__(self, server: RedisServer, cables: list[Cable], rng: random.Random) -> None:
        self._server = server
        self._cables = cables
        self._rng = rng
        self._lives = 1
        self._gate = asyncio.Event()
        self._gate.set()
        self.sites = [Site(index, 0, cable.url) for index, cable in enumerate(cables)]
        self.ways: Counter[str] = Counter()
        self.begun = 0
        self.is_over = False

    async def client(self) -> None:
        """Requests one after the other, until it is over."""
        while not self.is_over:
            await self._pause()
            self.begun += 1
            await self._request(RequestId(f"request-{self.begun}"), self._rng.choice(WAYS))

    async def _request(self, name: RequestId, way: str) -> None:
        index = self._rng.randrange(2)
        site = self.sites[index]
        site.pass_time()
        body = chat(f"{name} " * self._rng.randrange(1, 60), stream=self._rng.random() < 0.5)
        if way == "refused":
            body = body.replace(b'"m"', b'"none"', 1)
        line = request_line(name)
        deciding = site.rig.gateway.decide(line, body)
        if isinstance(deciding, Refusal):
            site.rig.gateway.rejected(line, deciding.error)
            self.ways["refused" if way == "refused" else "none_available"] += 1
            return
        assert way != "refused"
        try:
            is_left = isinstance(deciding, Later) and not await self._decided(site, name, way, deciding)
        except RouterError:
            self.ways["none_available"] += 1
            return
        if isinstance(deciding, Now | Later) and not is_left:
            await self._answer(index, name, way)
        self.ways[way] += 1

    async def _decided(self, site: Site, name: RequestId, way: str, later: Later[Any]) -> bool:
        """Wait for the decision; False where the request was over before there was one."""
        if way == "client_leaves_undecided":
            await asyncio.sleep(0.002 * self._rng.random())
            later.pending.cancel()
            self._end(site, name, ended=Ended.CLIENT_ABORT, status=None, endpoint=None)
            return False
        if way == "ended_undecided":
            self._end(site, name, ended=Ended.CLIENT_ABORT, status=None, endpoint=None)
        await result_of(later.pending)
        return way != "ended_undecided"

    async def _answer(self, index: int, name: RequestId, way: str) -> None:
        await self._pause()
        rng, site = self._rng, self.sites[index]
        if rng.random() < 0.7:
            site.rig.gateway.first_token(name, late=rng.random() < 0.2)
            await self._pause()
        site = self.sites[index]  # perhaps another by now, which knows nothing of the request
        if rng.random() < 0.2:
            site.rig.alive(name)
        other = rng.choice(KEYS)
        match way:
            case "client_leaves" | "client_leaves_undecided" | "ended_undecided":
                self._end(site, name, ended=Ended.CLIENT_ABORT, status=None)
            case "engine_error":
                site.rig.failed(name, other, FailureKind.CONNECT_FAILURE)
                self._end(site, name, ended=Ended.UPSTREAM_ERROR, status=503)
            case "timeout":
                self._end(site, name, ended=Ended.TIMEOUT, status=504)
            case "fallback":
                site.rig.started(name, other)
                await self._pause()
                self._end(self.sites[index], name, endpoint=other, attempts=2)
            case "completed":
                self._end(site, name, prompt_tokens=40, completion_tokens=9, cached_tokens=rng.randrange(40))
            case _:
                assert way == "never_reported"

    def _end(self, site: Site, name: RequestId, **changes: Any) -> None:
        site.pass_time()
        site.rig.end(name, **changes)
        site.pass_time()
        if self._rng.random() < 0.1:
            site.rig.end(name, **changes)  # reported again

    async def _pause(self) -> None:
        """As long as an engine takes, or longer, if the gate is closed meanwhile."""
        await asyncio.sleep(0.05 * self._rng.random())
        await self._gate.wait()

    async def watch(self) -> None:
        """Time passes without requests as well, and engines answer probes."""
        while True:
            await asyncio.sleep(0.02)
            for site in self.sites:
                site.pass_time()
                for key in KEYS:  # which engine errors ejected
                    site.rig.scheduling.health.probe_succeeded(key, site.rig.clock())

    async def stopped(self) -> None:
        """Redis hangs."""
        self._server.pause()
        await asyncio.sleep(self._rng.random())
        self._server.resume()

    async def killed(self) -> None:
        """Redis loses all that it has, and is away."""
        self._server.kill()
        await asyncio.sleep(0.6 * self._rng.random())
        await asyncio.to_thread(self._server.start)

    async def flushed(self) -> None:
        """Redis loses all that it has, under connections that stand."""
        await asyncio.to_thread(self._server.command, "FLUSHALL")

    async def disconnected(self) -> None:
        """All connections are cut by the server."""
        for kind in self._rng.sample(("pubsub", "normal"), self._rng.randint(1, 2)):
            await asyncio.to_thread(self._server.command, "CLIENT", "KILL", "TYPE", kind)

    async def cut_off(self) -> None:
        """One gateway, or both, cannot reach it; longer than a lease or not."""
        cut = self._rng.sample(self._cables, self._rng.randint(1, 2))
        for cable in cut:
            cable.cut()
        await asyncio.sleep(1.5 * SHARE_LEASE_S * self._rng.random())
        for cable in cut:
            cable.mend()

    async def gateway_killed(self) -> None:
        """A gateway is killed, and another life of it begins."""
        await self._replace(Site.die)

    async def gateway_restarted(self) -> None:
        """The same, in good order."""
        await self._replace(Site.leave)

    async def _replace(self, end: Callable[[Site], Awaitable[None]]) -> None:
        index = self._rng.randrange(2)
        before = self.sites[index]
        self.sites[index] = Site(index, self._lives, self._cables[index].url)
        self._lives += 1
        await end(before)

    async def agreed(self, *, zero: bool = False) -> None:
        """Nothing else happens: in the end both see the sum of what both count; nothing, if all is over."""
        self._gate.clear()

        def holds() -> bool:
            total: IntArray = np.sum([site.own() for site in self.sites], axis=0)
            return all(np.array_equal(site.view(), total) for site in self.sites) and not (
                zero and total.any()
            )

        async with asyncio.timeout(DEADLINE_S):
            while not holds():  # noqa: ASYNC110 - of what is waited for there is no word
                await asyncio.sleep(0.01)
        self._gate.set()


@asynccontextmanager
async def traffic(server: RedisServer, seed: int) -> AsyncIterator[Traffic]:
    """Two gateways, and clients."""
    async with AsyncExitStack() as stack:
        cables = [Cable(server.port) for _ in range(2)]
        for cable in cables:
            await cable.lay()
            stack.push_async_callback(cable.take_up)
        made = Traffic(server, cables, random.Random(seed))
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(made.watch())
            clients = [tasks.create_task(made.client()) for _ in range(CLIENTS)]
            yield made
            made.is_over = True
            await asyncio.gather(*clients)
            await made.agreed(zero=True)
            watch.cancel()
        for site in made.sites:
            assert site.store.load.in_flight == len(site.rig.scheduling.running) == 0
            assert not site.store.is_reserving
            await site.leave()


@pytest.mark.timeout(60 + REQUESTS)
async def test_nothing_is_left_of_requests_that_end_in_every_way(tmp_path: Path) -> None:
    """Counts are never negative, agree at both whenever faults pause, and are zero in the end."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with running(tmp_path) as server:
        async with traffic(server, seed) as made:
            faults: list[Callable[[], Awaitable[None]]] = [
                *(made.stopped, made.killed, made.flushed, made.disconnected, made.cut_off),
                *(made.gateway_killed, made.gateway_restarted),
            ]
            happened = 0
            while made.begun < REQUESTS or happened < len(faults):
                if not happened % len(faults):
                    rng.shuffle(faults)
                await faults[happened % len(faults)]()
                happened += 1
                await asyncio.sleep(0.2 * rng.random())
                if not happened % FAULTS_BETWEEN:
                    await made.agreed()
        assert {*WAYS} <= made.ways.keys()
        print(f"{made.begun} requests, {happened} faults, {dict(made.ways)}")
