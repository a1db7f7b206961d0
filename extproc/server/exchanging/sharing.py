"""Where this gateway meets others, as configured: under which name, and by which transport."""

from __future__ import annotations

import random
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from extproc.config.schema import Config
from extproc.config.sections.sharing import MetadataCenter
from extproc.errors import ConfigError
from extproc.routing.router import Reserve
from extproc.server.exchanging.entry_relay import EntryRelay
from extproc.server.process.background import Background
from extproc.server.process.environment import secret
from extproc.values.endings import RequestEvent
from metadata_center.errors import MetadataError
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.sharing.http_transport import HttpTransport
from metadata_center.sharing.messages import MAX_NAME_CHARS, MemberId, member_id
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.store import EmbeddedStore
from metadata_center.tokens import bearer
from metadata_center.types import EndpointKey, Waiter

if TYPE_CHECKING:
    from metadata_center.sharing.redis_transport import RedisTransport

_NOT_IN_NAMES: Final = re.compile(r"[^0-9A-Za-z_.-]")


@dataclass(frozen=True, slots=True)
class Alone:
    """Load and history of a gateway that meets no other.

    Attributes:
        store: They.
    """

    store: EmbeddedStore


@dataclass(frozen=True, slots=True)
class Shared:
    """Load and history of a gateway that meets others.

    Attributes:
        store: They.
        sync: Keeps them in step with the others.
    """

    store: SharedStore
    sync: Sync


def store_of(
    config: Config,
    path: str,
    worker: int,
    counters: Counters,
    history: PrefixIndex,
    on_responses: Callable[[EndpointKey, Sequence[int]], None],
    known: Callable[[], Mapping[EndpointKey, Sequence[int]]],
    on_line: Callable[[MemberId, list[Waiter]], None],
) -> Alone | Shared:
    """Load and history that the configuration asks for.

    Args:
        config: Says whether and where gateways meet.
        path: Of the configuration, for errors.
        worker: Which of this gateway's.
        counters: Where load is counted.
        history: Blocks by routing history.
        on_responses: See `SharedStore`.
        known: See `SharedStore`.
        on_line: See `SharedStore`.

    Raises:
        ConfigError: The URL of the rendezvous cannot be used.
    """
    load, shared = config.load, config.metadata_center
    bounds = LedgerBounds(load.lease_s, load.tombstone_s, load.max_tombstones, load.max_requests)
    if shared.url is None:
        return Alone(EmbeddedStore(LoadTable(counters, bounds), history))
    store = SharedStore(
        member_of(config, worker, secrets.token_hex(4)),
        counters,
        history,
        share_lease_s=shared.lease_s,
        optimistic=not shared.reserve,
        bounds=bounds,
        on_responses=on_responses,
        known=known,
        on_line=on_line,
    )
    settings = SyncSettings(shared.timeout_s, shared.reserve_timeout_s)
    return Shared(store, Sync(store, transport_of(shared, path), time.monotonic, random.Random(), settings))


def gateway_name(config: Config) -> str:
    """The configured name, or one that no other gateway has: host and admin port."""
    named = config.metadata_center.gateway
    if named is not None:
        return named
    suffix = f"-{config.server.admin.port}"
    return _NOT_IN_NAMES.sub("-", socket.gethostname())[: MAX_NAME_CHARS - len(suffix)] + suffix


def member_of(config: Config, worker: int, incarnation: str) -> MemberId:
    """The name of a worker process among all members."""
    return member_id(gateway_name(config), worker, incarnation)


def transport_of(section: MetadataCenter, path: str) -> HttpTransport | RedisTransport:
    """The way to the other gateways; `section.url` is set. Nothing is connected yet.

    Raises:
        ConfigError: The URL cannot be used; `path` names the file.
    """
    assert section.url is not None
    password = secret(section.password_env)
    try:
        if section.url.startswith("http"):
            token = None if not password else _bearer(password, path)
            return HttpTransport(section.url, token=token, timeout_s=section.timeout_s)
        url = parse_url(
            section.url,
            username=section.username,
            password=password,
            sentinel_password=secret(section.sentinel_password_env),
        )
        from metadata_center.sharing.redis_transport import RedisTransport  # 6 MiB that most do without

        return RedisTransport(url, prefix=section.key_prefix)
    except MetadataError as error:
        raise ConfigError(path, [f"metadata_center.url: {error}"]) from None


def _bearer(value: str, path: str) -> str:
    try:
        return bearer(value)
    except ValueError as error:
        raise ConfigError(path, [f"metadata_center.password_env: the variable has {error}"]) from None


def entry_relay(
    config: Config, path: str, owner: str, on_entry: Callable[[RequestEvent], None]
) -> EntryRelay | None:
    """What takes entries to the replica that decided, where several serve one gateway: over Redis.

    Raises:
        ConfigError: The URL cannot be used; `path` names the file.
    """
    shared = config.metadata_center
    if config.istio_gateway is None or shared.url is None:
        return None
    transport = transport_of(shared, path)
    return None if isinstance(transport, HttpTransport) else EntryRelay(owner, transport, on_entry)


def reserve_by(sync: Sync) -> Reserve:
    """Compare and set, its answer by callback."""
    background = Background()
    return lambda request_id, candidates: background.begin(sync.reserve(request_id, candidates))
