"""Requests that end in every way, at two gateways that share by a real Redis; what fails is up to a test."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import numpy as np

from extproc.errors import RouterError
from extproc.health.settings import HealthSettings
from extproc.server.exchanging.sharing import reserve_by
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
from tests.conftest import Rig, build_rig, chat, endpoint, request_line, result_of

CLIENTS: Final = 12
LEASE_S: Final = 1.5
"""Of a request whose end is never reported."""

SHARE_LEASE_S: Final = 0.8
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
    """Clients of both gateways.

    Args:
        urls: Where each gateway finds Redis.
        rng: Decides what happens.
    """

    def __init__(self, urls: Sequence[str], rng: random.Random) -> None:
        self._urls = urls
        self._rng = rng
        self._lives = 1
        self._gate = asyncio.Event()
        self._gate.set()
        self.sites = [Site(index, 0, url) for index, url in enumerate(urls)]
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

    async def replace(self, end: Callable[[Site], Awaitable[None]]) -> None:
        """One gateway ends, in this way, and another life of it begins."""
        index = self._rng.randrange(2)
        before = self.sites[index]
        self.sites[index] = Site(index, self._lives, self._urls[index])
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
async def traffic(urls: Sequence[str], seed: int) -> AsyncIterator[Traffic]:
    """Two gateways, and clients; in the end nothing is counted any more."""
    made = Traffic(urls, random.Random(seed))
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
