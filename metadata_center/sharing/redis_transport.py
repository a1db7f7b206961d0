"""Members meet in Redis: shares in hashes, messages by publish/subscribe, each message one round trip.

Keys, P being the prefix; the braces make a Cluster keep them all in one slot, as one script needs them:

    name                type        content                                 size                    lifetime
    {P}:members         sorted set  live members by the end of their lease  100 B a member          swept by
                                    (Unix milliseconds of the server)                               an update
    {P}:share:<member>  hash        `@newest`, `@full`: sequences;          110 B an endpoint with  the lease,
                                    `<endpoint>`: sequence and five         load since the last     anew with
                                    counts, as text                         heartbeat               an update
    {P}:updates         channel     `messages.encode` of an update          30 B, 22 B a row,       not kept
                                                                            8 B a block
    {P}:to:<name>       channel     what is sent to one member alone        up to 1 MiB             not kept

Rights that a user needs (ACL, on Redis 6 after `resetchannels`): `~{P}:* &{P}:* +evalsha +eval +publish
+subscribe +time +hset +hget +hmget +hgetall +hdel +del +pexpire +pttl +zadd +zrem +zrange +zrangebyscore
+zremrangebyscore`.

Publish/subscribe and not streams: a message is only worth something while it is the newest, a subscriber
that was away takes the snapshot in any case, and a stream costs memory on the server, a blocking read per
subscriber and message, and trimming. `benchmarks/bursts.py` has both latencies.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from hashlib import sha1
from math import inf
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import structs
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MovedError, NoScriptError, ReadOnlyError, RedisError

from metadata_center.files import require_regular
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.load.kinds import KINDS, NUM_KINDS, Adds
from metadata_center.sharing.messages import (
    MAX_LEASE_S,
    Candidate,
    MemberId,
    MessageError,
    Reservation,
    Reserved,
    Row,
    Update,
    decode,
    encode,
)
from metadata_center.sharing.peers import MAX_MEMBERS, share
from metadata_center.sharing.redis_faults import NO_TLS_THERE, explained
from metadata_center.sharing.redis_url import RedisUrl, UrlError
from metadata_center.sharing.transport import TransportError
from metadata_center.types import EndpointKey

CONNECT_S: Final = 2.0
"""For a connection, TLS and AUTH included; callers bound the whole call as well."""

_MAX_SHARES: Final = MAX_MEMBERS
_MAX_FIELDS: Final = MAX_ENDPOINTS + 8
"""Of one share: its rows, `@newest`, `@full`, and what a later version adds."""

_MAX_ROW_BYTES: Final = 256
"""Six numbers of 16 digits, and what a later version adds."""

_MAX_MOVES: Final = 3  # from a Cluster node that has not the slot to the one that has, and two fail-overs
_OTHER_FORM: Final = "an answer of another form than ours"
_FOLDER: Final = Path(__file__).with_name("lua")

_T = TypeVar("_T")


class RedisTransport:
    """A `Transport` over Redis 6.2 or newer, or what speaks like it.

    One connection for all commands, which follow each other, and one per subscription. All keys are on one
    server, so neither Sentinel nor Cluster need more; where that server is is found out at each connect.
    Callers bound their calls, so a node whose host is gone ends a call by its cancellation: the next call
    begins with the next node, else the first one, gone, would keep all from ever being asked.

    Args:
        url: From `redis_url.parse_url`.
        prefix: Of all keys and the channel, without braces; gateways that share it share their load.
    """

    def __init__(self, url: RedisUrl, *, prefix: str = "tokenway") -> None:
        if not prefix or set("{}") & set(prefix):
            raise UrlError("a key prefix is not empty and has no braces")
        self._url = url
        self._members = f"{{{prefix}}}:members"
        self._share = f"{{{prefix}}}:share:"
        self._channel = f"{{{prefix}}}:updates"
        self._to = f"{{{prefix}}}:to:"
        self._secrets = [secret for secret in (url.password, url.sentinel_password) if secret]
        self._scripts = {name: _Script(name) for name in ("update", "snapshot")}
        self._connection: AbstractConnection | None = None
        self._moved: tuple[str, int] | None = None
        self._asked_first = 0
        self._turn = asyncio.Lock()
        self.refused = 0
        """Messages and shares received that were none, and skipped."""
        self.had_share = True
        """See `Transport`."""

    async def publish(self, update: Update) -> None:
        """See `Transport`."""
        await self._update(update, b"")

    async def reserve(self, update: Update, reservations: Sequence[Reservation]) -> list[Reserved]:
        """See `Transport`."""
        answer = await self._update(update, _ENCODER.encode(reservations))
        try:
            return msgspec.convert(answer, list[Reserved])
        except msgspec.ValidationError as exc:
            raise TransportError(_OTHER_FORM) from exc

    async def snapshot(self) -> list[Update]:
        """See `Transport`."""
        answer = await self._run("snapshot", [self._members], [self._share, 2 * _MAX_SHARES, _MAX_FIELDS])
        if type(answer) is not list:
            raise TransportError(_OTHER_FORM)
        updates: list[Update] = []
        for entry in answer:
            try:
                updates += _updates(*entry)
            except (TypeError, ValueError, msgspec.MsgspecError, MessageError):
                self.refused += 1  # a damaged share, or one of another version: the others still count
        return updates

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[AsyncIterator[Update]]:
        """See `Transport`. Redis cuts off slow subscribers (`client-output-buffer-limit pubsub`)."""
        async with self._subscribed([self._channel]) as payloads:
            yield self._updates_of(payloads)

    async def send_to(self, name: str, payload: bytes) -> bool:
        """See `DirectMessages`."""
        heard = await self._exchange(partial(self._ask, "PUBLISH", self._to + name, payload))
        return isinstance(heard, int) and heard > 0

    def addressed_to(self, names: Iterable[str]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `DirectMessages`."""
        return self._subscribed([self._to + name for name in names])

    async def close(self) -> None:
        """See `Transport`."""
        await self._drop()

    @asynccontextmanager
    async def _subscribed(self, channels: list[str]) -> AsyncIterator[AsyncIterator[bytes]]:
        connection: AbstractConnection | None = None
        try:
            try:
                connection = await self._connect()
                await connection.send_command("SUBSCRIBE", *channels)
                for _ in channels:
                    await connection.read_response(timeout=inf)
            except (RedisError, OSError) as exc:
                self._turn_to_next()
                raise self._error(exc, is_new=True) from exc
            except asyncio.CancelledError:
                self._turn_to_next()
                raise
            yield self._payloads(connection)
        finally:
            if connection is not None:
                await connection.disconnect(nowait=True)

    async def _payloads(self, connection: AbstractConnection) -> AsyncIterator[bytes]:
        while True:
            try:
                message = await connection.read_response(timeout=inf)
            except (RedisError, OSError) as exc:
                raise self._error(exc) from exc
            if message[0] == b"message":
                yield message[2]

    async def _updates_of(self, payloads: AsyncIterator[bytes]) -> AsyncIterator[Update]:
        async for payload in payloads:
            try:
                update = decode(payload)
            except MessageError:
                self.refused += 1
                continue
            yield update

    async def _update(self, update: Update, reservations: bytes) -> Any:
        try:
            if update.blocks or update.line:
                payload, head = encode(update), encode(structs.replace(update, blocks=(), line=None))
            else:
                payload, head = b"", encode(update)
        except MessageError as exc:
            raise TransportError(str(exc)) from exc
        keys = [self._members, self._share + update.member]
        answer = await self._run(
            "update", keys, [self._channel, self._share, head, reservations, payload, _ADDS]
        )
        if type(answer) is not list or len(answer) != 2:
            raise TransportError(_OTHER_FORM)
        self.had_share = answer[0] == 1
        return answer[1]

    async def _run(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        script = self._scripts[name]
        tail = (len(keys), *keys, *arguments)

        async def ask() -> Any:
            try:
                return await self._ask("EVALSHA", script.digest, *tail)
            except NoScriptError:  # flushed, restarted or failed over: EVAL keeps it for the next time
                return await self._ask("EVAL", script.source, *tail)

        return await self._exchange(ask)

    async def _exchange(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        async with self._turn:
            for _ in range(_MAX_MOVES):
                is_new = self._connection is None
                try:
                    if self._connection is None:
                        self._connection = await self._connect()
                    return await ask()
                except MovedError as exc:
                    # A node that does not say its host, as behind a NAT, means that of the one asked.
                    host = exc.host or getattr(self._connection, "host", "")
                    await self._drop()
                    self._moved = host, int(exc.port)
                except (RedisError, OSError) as exc:
                    connection = self._connection
                    # A master that became a replica (Redis 6 says so in a sentence): ask which one is master.
                    is_demoted = "READONLY" in str(exc) or isinstance(exc, ReadOnlyError)
                    is_apart = isinstance(exc, ClusterDownError)  # others may be in the larger part
                    if is_demoted or is_apart or connection is None or not connection.is_connected:
                        await self._leave()
                    raise self._error(exc, is_new=is_new) from exc
                except (TransportError, asyncio.CancelledError):
                    await self._leave()  # an answer that is still to come would be taken for the next one's
                    raise
        raise TransportError("the cluster moves the slot around")

    async def _ask(self, *command: Any) -> Any:
        connection = self._connection
        assert connection is not None
        await connection.send_command(*command)
        return await connection.read_response(timeout=inf)

    def _turn_to_next(self) -> None:
        """The next connection begins with another node, and not where a node said that the slot is."""
        self._moved = None
        self._asked_first = (self._asked_first + 1) % len(self._url.nodes)

    async def _leave(self) -> None:
        self._turn_to_next()
        await self._drop()

    async def _drop(self) -> None:
        connection, self._connection, self._moved = self._connection, None, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _connect(self) -> AbstractConnection:
        """A connection to the server that has our keys."""
        url = self._url
        if url.kind == "sentinel":
            return await self._server(*await self._master())
        if self._moved is not None:
            return await self._server(*self._moved)
        return await self._first(self._server)

    async def _server(self, host: str, port: int) -> AbstractConnection:
        url = self._url
        return await self._open(host, port, url.username, url.password, url.database)

    async def _master(self) -> tuple[str, int]:
        url = self._url

        async def ask(host: str, port: int) -> tuple[str, int]:
            try:
                sentinel = await self._open(host, port, url.sentinel_username, url.sentinel_password, 0)
                try:
                    await sentinel.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.service)
                    answer = await sentinel.read_response(timeout=CONNECT_S)
                finally:
                    await sentinel.disconnect(nowait=True)
            except (RedisError, OSError) as exc:
                raise TransportError(explained(exc, self._secrets, by_sentinel=True, unanswered=url)) from exc
            if not answer:
                raise TransportError(
                    "a sentinel does not know the master that the path of metadata_center.url names"
                )
            return answer[0].decode(), int(answer[1])

        return await self._first(ask)

    async def _first(self, attempt: Callable[[str, int], Awaitable[_T]]) -> _T:
        """The result of the first node that has one."""
        failure: Exception = TransportError("no server is named")
        for _ in self._url.nodes:
            try:
                return await attempt(*self._url.nodes[self._asked_first])
            except (RedisError, OSError, TransportError) as exc:
                failure = exc
                self._turn_to_next()
        raise failure

    async def _open(
        self, host: str, port: int, username: str | None, password: str | None, database: int
    ) -> AbstractConnection:
        make: type[Connection] = Connection
        tls: dict[str, Any] = {}
        if self._url.tls is not None:
            make = SSLConnection
            require_regular(*(self._url.tls[f"ssl_{name}"] for name in ("ca_certs", "certfile", "keyfile")))
            tls = {**self._url.tls, "ssl_min_version": ssl.TLSVersion.TLSv1_2}
            if tls["ssl_ca_certs"] is not None:
                # Python 3.13's default asks more of an authority than OpenSSL does, and than older Pythons: a
                # private one whose certificate says no key usage would not do.
                tls["ssl_exclude_verify_flags"] = [ssl.VERIFY_X509_STRICT]
            if tls["ssl_certfile"] is not None:
                tls["ssl_password"] = ""  # else OpenSSL asks the terminal for that of a key, and all wait
        connection = make(
            host=host,
            port=port,
            db=database,
            username=username,
            password=password,
            socket_timeout=CONNECT_S,
            socket_connect_timeout=CONNECT_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
            **tls,
        )
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            # From here on callers bound each call. With a time-out of its own redis-py waits by
            # `asyncio.wait_for`, which on Python 3.11 loses a cancellation that meets the end of a send.
            connection.socket_timeout = None
        except BaseException as exc:
            if self._url.tls is not None and isinstance(exc, asyncio.CancelledError):
                exc.add_note(NO_TLS_THERE)  # for the time-out that it becomes
            await connection.disconnect(nowait=True)
            raise
        return connection

    def _error(self, exc: Exception, *, is_new: bool = False) -> TransportError:
        return TransportError(explained(exc, self._secrets, unanswered=self._url if is_new else None))


class _Script:
    """A Lua file and the name Redis knows it by."""

    __slots__ = ("digest", "source")

    def __init__(self, name: str) -> None:
        self.source = (_FOLDER / f"{name}.lua").read_bytes()
        self.digest = sha1(self.source, usedforsecurity=False).hexdigest()


_ENCODER: Final = msgspec.msgpack.Encoder()

_ITEMS: Final[Mapping[Adds, int]] = {
    Adds.ONE: 0,
    Adds.PREFILL_TOKENS: 1 + Candidate.__struct_fields__.index("prefill_tokens"),
    Adds.CONTEXT_TOKENS: 1 + Candidate.__struct_fields__.index("context_tokens"),
    Adds.NOTHING: -1,
}

_ADDS: Final = _ENCODER.encode([_ITEMS[kind.adds] for kind in KINDS])
"""What a charge adds, as `update.lua` takes it; Lua counts from 1."""


def _updates(member: bytes, left_ms: int, fields: list[bytes]) -> list[Update]:
    """A member's hash as updates; `decode` checks them, since others than us may write to Redis.

    Fields that begin with `@` and numbers after the known ones are a later version's, and left out.

    Raises:
        TypeError, ValueError, MessageError, msgspec.MsgspecError: It is of another form.
    """
    full, rows = 0, []
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if len(value) > _MAX_ROW_BYTES:
            raise ValueError("a field of another length")
        if name == b"@full":
            full = int(value)
        elif not name.startswith(b"@"):
            sequence, *amounts = map(int, value.split())
            if len(amounts) < NUM_KINDS:
                raise ValueError("a row of another length")
            rows.append((sequence, Row(EndpointKey(name.decode()), *amounts[:NUM_KINDS])))
    lease_s = min(left_ms / 1000.0, MAX_LEASE_S)  # more is left if the server's clock was set back
    updates = share(MemberId(member.decode()), full, lease_s, rows)
    return [decode(encode(update)) for update in updates]
