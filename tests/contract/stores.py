"""Every kind of metadata store, as two gateways have it, for tests that all of them must pass."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.sharing.http_transport import HttpTransport
from metadata_center.sharing.messages import MemberId, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.sharing.transport import Transport
from metadata_center.store import EmbeddedStore, MetadataStore
from metadata_center.types import EndpointKey, Waiter
from testbed.redis_server import running
from tests.waiting import until

DEADLINE_S = 20.0
LEASE_S, TOMBSTONE_S, SHARE_LEASE_S = 180.0, 60.0, 3.0


@dataclass(frozen=True, slots=True)
class Pair:
    """What two gateways hold.

    Attributes:
        stores: One each; the embedded kind shares nothing, so there both are the same.
        syncs: What keeps them in step, none for the embedded kind.
        lines: Per store, who waits at the other, as it was heard, the newest last.
    """

    stores: tuple[MetadataStore, MetadataStore]
    syncs: tuple[Sync, ...] = ()
    lines: tuple[list[list[Waiter]], list[list[Waiter]]] = ([], [])

    async def settled(self, endpoints: Sequence[EndpointKey], requests: Sequence[int]) -> None:
        """Wait until both see so many requests on `endpoints`."""

        def holds() -> bool:
            views = [store.load.view(store.load.slots(endpoints)).requests for store in self.stores]
            return views == [list(requests)] * 2

        await until(holds)


Maker = Callable[[Path], AbstractAsyncContextManager[Pair]]


def _noted(lines: list[list[Waiter]], _member: MemberId, line: list[Waiter]) -> None:
    lines.append(line)


@asynccontextmanager
async def joined(*transports: Transport, settings: SyncSettings | None = None) -> AsyncIterator[Pair]:
    """Two gateways that meet by these transports, one each, with a snapshot taken."""
    stores, syncs = [], []
    lines: tuple[list[list[Waiter]], list[list[Waiter]]] = ([], [])
    for number, transport in enumerate(transports):
        store = SharedStore(
            member_id(f"gw{number}", 0, "x"),
            Counters(),
            PrefixIndex(1000, 1000),
            share_lease_s=SHARE_LEASE_S,
            bounds=LedgerBounds(lease_s=LEASE_S, tombstone_s=TOMBSTONE_S),
            on_line=partial(_noted, lines[number]),
        )
        stores.append(store)
        syncs.append(Sync(store, transport, time.monotonic, random.Random(number), settings))
    async with AsyncExitStack() as stack:
        for sync in syncs:
            stack.push_async_callback(sync.stop)
            sync.start()
        await until(lambda: all(store.live_gateways == len(stores) for store in stores))
        yield Pair((stores[0], stores[1]), tuple(syncs), lines)


@asynccontextmanager
async def embedded(_: Path) -> AsyncIterator[Pair]:
    """In process."""
    store = EmbeddedStore(
        LoadTable(Counters(), LedgerBounds(lease_s=LEASE_S, tombstone_s=TOMBSTONE_S)), PrefixIndex(1000, 1000)
    )
    yield Pair((store, store))


@asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[Pair]:
    """Through a real redis-server."""
    with running(folder) as server:
        url = parse_url(server.url)
        async with joined(RedisTransport(url), RedisTransport(url)) as pair:
            yield pair


@asynccontextmanager
async def http(_: Path) -> AsyncIterator[Pair]:
    """Through our own service."""
    server = HttpServer(Limits())
    await server.start("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.port}"
        async with joined(HttpTransport(url), HttpTransport(url)) as pair:
            yield pair
    finally:
        await server.stop()


KINDS: dict[str, Maker] = {"embedded": embedded, "redis": redis, "http": http}
"""Every kind there is."""
