"""Members of one worker each: their endpoints, messages and stores."""

from __future__ import annotations

import random
import secrets
import time
from typing import Final

from benchmarks.sizing.model import LEASE_S
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.sharing.messages import Chain, Row, Update, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync
from metadata_center.types import EndpointKey

PROMPT_BLOCKS: Final = 32
"""Of 512 bytes: 16 KiB, about 4,000 tokens."""


def keys(count: int) -> tuple[EndpointKey, ...]:
    """Endpoints."""
    return tuple(EndpointKey(f"10.20.{n // 250}.{n % 250}:8000") for n in range(count))


def update(sequence: int, rows: int, chains: int, *, full: bool = False, worker: int = 0) -> Update:
    """A message as a busy gateway sends it: three requests on each endpoint, 2,000 tokens to prefill."""
    busy = tuple(Row(key, 3, 1, 2_000 + n % 100, 12_000, 900) for n, key in enumerate(keys(rows)))
    chain = Chain.of(busy[0].endpoint, [(n + 1) << 40 for n in range(PROMPT_BLOCKS)])
    name = member_id("gateway-1", worker, "0123abcd")
    return Update(name, sequence, busy, full, LEASE_S, (chain,) * chains)


def store_of(number: int, endpoints: int) -> SharedStore:
    """The store of a member that knows so many endpoints."""
    member = member_id(f"gw{number}", 0, secrets.token_hex(4))
    store = SharedStore(member, Counters(), PrefixIndex(1_000, 1_000), share_lease_s=LEASE_S)
    store.load.retain(frozenset(keys(endpoints)))
    store.load.slots(keys(endpoints))
    return store


def sync_of(store: SharedStore, url: str, prefix: str = "tokenway") -> Sync:
    """Its exchange with others by Redis, not started."""
    transport = RedisTransport(parse_url(url), prefix=prefix)
    return Sync(store, transport, time.monotonic, random.Random(1))
