"""A real redis-server behind what ends TLS before it: what it refuses is said in words, and it may change."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.sharing.messages import Row, Update, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.sharing.transport import TransportError
from metadata_center.types import Charge, EndpointKey, RequestId
from testbed.certificates import expired, issued
from testbed.redis_server import RedisServer, running
from tests.contract.stores import Pair, joined
from tests.waiting import until

A = EndpointKey("10.0.0.1:8000")
UPDATE = Update(member_id("gw1", 0, "x"), 1, (Row(A, 1),), True, 6.0, (), False)
DEADLINE_S = 20.0
SETTINGS = SyncSettings(timeout_s=1.0, backoff_s=0.2)
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all, which speaks no TLS."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, what it signed, and a stranger."""
    folder = tmp_path_factory.mktemp("pki")
    for name in ("ca", "other"):
        issued(folder, name)
    for name in ("server", "client"):
        issued(folder, name, "ca")
    issued(folder, "stranger", "other")
    expired(folder, "late", "ca", who="IP:127.0.0.1")
    locked = ["openssl", "ec", "-in", "client.key", "-aes256", "-passout", "pass:x", "-out", "locked.key"]
    subprocess.run(locked, cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


def ending_tls(
    folder: Path, *, of_clients: bool = True, version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """What a terminator has: `server.pem`, and a demand for certificates of `ca.pem`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if of_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(folder / "ca.pem")
    return context


class Terminator:
    """Ends TLS before a server, and closes without a word what it does not accept.

    Args:
        server: What is behind it.
    """

    def __init__(self, server: RedisServer) -> None:
        self._behind = server.port
        self._ends: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self.port = 0

    async def start(self, context: ssl.SSLContext) -> None:
        """Listen; where it did before, if it did."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """It is killed: all connections are cut."""
        assert self._listener is not None
        self._listener.close()
        for end in self._ends:
            end.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._behind)
        ends = {writer, inner_writer}
        self._ends |= ends
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        self._ends -= ends


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def terminator(server: RedisServer, context: ssl.SSLContext) -> AsyncIterator[Terminator]:
    """One for the length of a block."""
    made = Terminator(server)
    await made.start(context)
    try:
        yield made
    finally:
        await made.stop()


@contextmanager
def refusing(context: ssl.SSLContext) -> Iterator[int]:
    """The port of one that refuses all, and says why by TLS's own alert, as OpenSSL's programs do."""

    def refuse(connection: ssl.SSLSocket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(DEADLINE_S)
            with suppress(ssl.SSLError):
                connection.do_handshake()
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):  # else a reset may overtake the alert
                pass

    def serve() -> None:
        with suppress(OSError):
            while True:
                accepted, _ = listener.accept()
                refuse(context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


def url_of(port: int, folder: Path, certificate: str | None = None, key: str | None = None) -> str:
    """With the authority, and a client certificate with its key."""
    pair = ""
    if certificate is not None:
        pair = f"&certfile={folder / certificate}.pem&keyfile={folder / (key or certificate)}.key"
    return f"rediss://127.0.0.1:{port}?ca_certs={folder / 'ca.pem'}{pair}"


async def refusals(url: str) -> list[str]:
    """What is said of a message that cannot be sent, and of a subscription that does not stand."""
    transport = RedisTransport(parse_url(url))
    said = []
    try:
        for call in (_sent, _subscribed):
            with pytest.raises(TransportError) as refused:
                async with asyncio.timeout(DEADLINE_S):
                    await call(transport)
            said.append(str(refused.value))
    finally:
        await transport.close()
    return said


async def _sent(transport: RedisTransport) -> None:
    await transport.publish(UPDATE)


async def _subscribed(transport: RedisTransport) -> None:
    async with transport.subscribe():
        pass


async def test_tls(server: RedisServer, pki: Path) -> None:
    """A server whose certificate is signed by the authority given is trusted; without it, it is not.

    The authority's certificate says no key usage, which Python 3.13 by default, alone, wants of it.
    """
    async with terminator(server, ending_tls(pki, of_clients=False)) as front, AsyncExitStack() as stack:
        transport = RedisTransport(parse_url(url_of(front.port, pki)))
        stack.push_async_callback(transport.close)
        messages = await stack.enter_async_context(transport.subscribe())
        async with asyncio.timeout(DEADLINE_S):
            await transport.publish(UPDATE)
            assert (await anext(messages)).rows == UPDATE.rows
        for said in await refusals(f"rediss://127.0.0.1:{front.port}"):
            assert "is checked against ca_certs" in said


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: str(version.name))
@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        (None, "the server wants a client certificate"),
        ("stranger", "the server wants a client certificate that it trusts: certfile and keyfile in"),
        ("late", "the server says that the client certificate is out of date"),
    ],
)
async def test_an_alert_about_the_client_certificate_has_a_hint(
    pki: Path, version: ssl.TLSVersion, certificate: str | None, says: str
) -> None:
    """One that is missing, of another authority, or out of date; and what to set."""
    with refusing(ending_tls(pki, version=version)) as port:
        for said in await refusals(url_of(port, pki, certificate)):
            assert says in said
            assert "certfile and keyfile in metadata_center.url" in said


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: str(version.name))
async def test_who_closes_without_a_word_has_a_hint_as_well(
    server: RedisServer, pki: Path, version: ssl.TLSVersion
) -> None:
    """Where a client certificate is wanted, and where there is no TLS in the URL."""
    async with terminator(server, ending_tls(pki, version=version)) as front:
        for certificate in (None, "stranger"):
            for said in await refusals(url_of(front.port, pki, certificate)):
                assert "it may want another client certificate, or one (certfile and keyfile in" in said
        for scheme, path, who in (
            ("", "", "server"),
            ("+cluster", "", "server"),
            ("+sentinel", "/main", "sentinel"),
        ):
            for said in await refusals(f"redis{scheme}://127.0.0.1:{front.port}{path}"):
                assert f"the {who} closed before it answered: it may speak TLS there" in said
                assert "metadata_center.url with rediss" in said


async def test_who_closes_after_an_answer_has_no_hint(server: RedisServer, pki: Path) -> None:
    """What was accepted once is not what is wrong."""
    async with terminator(server, ending_tls(pki)) as front, AsyncExitStack() as stack:
        transport = RedisTransport(parse_url(url_of(front.port, pki, "client")))
        stack.push_async_callback(transport.close)
        messages = await stack.enter_async_context(transport.subscribe())
        await transport.publish(UPDATE)
        await anext(messages)
        await front.stop()
        for call in (transport.publish(UPDATE), anext(messages)):
            with pytest.raises(TransportError) as lost:
                async with asyncio.timeout(DEADLINE_S):
                    await call
            assert "before it answered" not in str(lost.value)


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("client", "server", "the key is another certificate's"),
        ("client", "locked", "in PEM, without a passphrase"),
        ("client.key", "client", "No such file"),
    ],
)
async def test_files_that_are_no_pair_are_said_to_be_none(
    pki: Path, certificate: str, key: str, says: str
) -> None:
    """And nobody is asked for a passphrase, for which all would wait."""
    for said in await refusals(url_of(1, pki, certificate, key)):
        assert says in said
        assert "certfile and keyfile in metadata_center.url" in said


@asynccontextmanager
async def gateways(url: str) -> AsyncIterator[Pair]:
    """Two that meet there, and serve one endpoint."""
    transports = [RedisTransport(parse_url(url)) for _ in range(2)]
    async with joined(*transports, settings=SETTINGS) as pair:
        for store in pair.stores:
            store.load.retain(frozenset({A}))
        yield pair


def charge(pair: Pair, index: int, name: str) -> None:
    """A decision of one of them."""
    assert pair.stores[index].load.charge(Charge(RequestId(name), A, 10, 20), time.monotonic(), None)


async def test_tls_to_a_server_without_it_gives_no_answer_and_says_what_may_be_wrong(
    server: RedisServer, pki: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis waits for the end of what it takes for a command; the time is up before any library's is."""

    def has_hint() -> bool:
        reasons = [getattr(record, "reason", "") for record in caplog.records]
        return any("metadata_center.url with redis, not rediss" in reason for reason in reasons)

    transport = RedisTransport(parse_url(url_of(server.port, pki)))
    store = SharedStore(member_id("gw1", 0, "x"), Counters(), PrefixIndex(9, 9))
    sync = Sync(store, transport, time.monotonic, random.Random(1), SyncSettings(timeout_s=0.3))
    sync.start()
    try:
        await until(has_hint)
    finally:
        await sync.stop()


async def test_certificates_rotate_and_their_terminator_restarts(
    server: RedisServer, pki: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gateways come back by the files that they have, else when these are replaced, without a restart."""
    server.command("FLUSHALL")
    for name in ("ca", "server", "client"):
        for kind in ("pem", "key"):
            (tmp_path / f"{name}.{kind}").write_bytes((pki / f"{name}.{kind}").read_bytes())
    async with (
        terminator(server, ending_tls(pki)) as front,
        gateways(url_of(front.port, tmp_path, "client")) as pair,
    ):
        charge(pair, 0, "1")
        await pair.settled([A], [1])
        await front.stop()
        await until(lambda: not any(sync.stats.connected for sync in pair.syncs))
        charge(pair, 1, "2")
        await front.start(ending_tls(pki))
        await pair.settled([A], [2])

        new = tmp_path / "new"
        new.mkdir()
        issued(new, "ca")
        for name in ("server", "client"):
            issued(new, name, "ca")
        await front.stop()
        await until(lambda: not any(sync.stats.connected for sync in pair.syncs))
        caplog.clear()
        await front.start(ending_tls(new))
        await until(lambda: caplog.text.count("metadata center lost") >= 2)
        charge(pair, 0, "3")
        await until(lambda: any("ca_certs" in getattr(record, "reason", "") for record in caplog.records))
        for name in ("ca", "client"):
            for kind in ("key", "pem"):
                (new / f"{name}.{kind}").replace(tmp_path / f"{name}.{kind}")
        await pair.settled([A], [3])
        assert all(sync.stats.reconnects >= 2 for sync in pair.syncs)
        for store in pair.stores:
            for name in "123":
                store.load.release(RequestId(name), time.monotonic())
        await pair.settled([A], [0])
