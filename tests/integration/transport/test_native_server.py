"""Our own gRPC server on real sockets, before the official client and before peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from extproc.transport import native
from extproc.transport.http2 import frames
from extproc.transport.http2.faults import ErrorCode, FaultReason
from extproc.transport.http2.outbox import MAX_UNSENT_BYTES
from extproc.transport.listen_tls import ListenTls, TlsFiles
from extproc.transport.native import NativeServer, tcp_socket, unix_socket
from extproc.transport.seam import Received, Rpc
from testbed.certificates import issued, trusting
from tests.http2_peers import (
    GREETING,
    MAX_MESSAGE_BYTES,
    PATH,
    SERVICE,
    Echo,
    Listener,
    data,
    framed,
    opening,
    parsed,
)
from tests.waiting import until

pytestmark = pytest.mark.asyncio

DEADLINE_S = 5.0


class Serving:
    """A server with a method that echoes and one that says nothing.

    Args:
        folder: For its socket.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "s"
        self.receivers: list[Echo] = []
        self.faults: list[tuple[FaultReason, bool]] = []
        rpcs = [Rpc(SERVICE, "Echo", self._made(Echo)), Rpc(SERVICE, "Silent", self._made(Listener))]
        self.server = NativeServer(rpcs, MAX_MESSAGE_BYTES, lambda *fault: self.faults.append(fault))

    @property
    def target(self) -> str:
        """For the official client."""
        return f"unix:{self.path}"

    def _made(self, kind: type[Echo]) -> Callable[[Any], Echo]:
        def opened(call: Any) -> Echo:
            self.receivers.append(kind(call))
            return self.receivers[-1]

        return opened


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Serving]:
    """A server on a Unix socket."""
    made = Serving(folder)
    await made.server.serve(unix_socket(made.path))
    made.server.start()
    try:
        yield made
    finally:
        await made.server.stop(0.0)
    assert made.server.num_connections == 0


@asynccontextmanager
async def peer(made: Serving) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A peer that writes bytes of its own."""
    reader, writer = await asyncio.open_unix_connection(made.path)
    try:
        yield reader, writer
    finally:
        writer.close()


async def sent_until_closed(reader: asyncio.StreamReader) -> list[tuple[int, int, int, bytes]]:
    """All that the server sends before it closes."""
    async with asyncio.timeout(DEADLINE_S):
        return list(parsed(await reader.read()))


# The official client.


@pytest.mark.parametrize("size", [0, 5, 100_000, MAX_MESSAGE_BYTES])
async def test_unary_calls(tmp_path: Path, size: int) -> None:
    """A request of any length taken, and its echo."""
    async with serving(tmp_path) as made, grpc.aio.insecure_channel(made.target) as channel:
        assert await channel.unary_unary(PATH)(b"m" * size, timeout=DEADLINE_S) == b"m" * size


async def test_a_read_takes_what_the_socket_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long messages much at once."""
    reads: list[int] = []
    updated = native._Peer.buffer_updated

    def counted(peer: Any, nbytes: int) -> None:
        reads.append(nbytes)
        updated(peer, nbytes)

    monkeypatch.setattr(native._Peer, "buffer_updated", counted)
    async with serving(tmp_path) as made, grpc.aio.insecure_channel(made.target) as channel:
        for _ in range(10):
            message = b"m" * MAX_MESSAGE_BYTES
            assert await channel.unary_unary(PATH)(message, timeout=DEADLINE_S) == message
        assert made.faults == []
    assert 65_536 < max(reads) <= native.READ_BYTES


async def test_what_takes_long_is_taken_in_several_turns(tmp_path: Path) -> None:
    """A read that brings many calls holds nothing else up; all are answered, and in their order."""
    turns, turn = Counter[int](), 0
    numbers: list[int] = []

    class Slow(Listener):
        def on_message(self, message: Received) -> None:
            turns[turn] += 1
            time.sleep(0.0005)
            numbers.append(message[0])

    async def count() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    made = Serving(tmp_path)
    made.server.rpcs = {PATH: Rpc(SERVICE, "Echo", Slow)}
    await made.server.serve(unix_socket(made.path))
    counting = asyncio.create_task(count())
    async with peer(made) as (_, writer):
        calls = [opening(2 * n + 1) + data(2 * n + 1, framed(bytes([n]) * 4096)) for n in range(30)]
        writer.write(GREETING + b"".join(calls))
        await until(lambda: len(numbers) == 30)
    counting.cancel()
    await made.server.stop(0.0)
    assert numbers == list(range(30))
    assert max(turns.values()) <= native._PIECE_BYTES // 4096


async def test_what_waits_for_its_turn_is_taken_though_its_peer_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends of requests that were received count, and a call that is received so ends."""
    monkeypatch.setattr(native, "_TURN_S", -1.0)
    received: list[Listener] = []

    class Listening(Listener):
        def on_message(self, message: Received) -> None:
            super().on_message(message)
            received.append(self)
            for connected in made.server._peers:
                connected.abort()

    made = Serving(tmp_path)
    made.server.rpcs = {PATH: Rpc(SERVICE, "Echo", Listening)}
    await made.server.serve(unix_socket(made.path))
    async with peer(made) as (_, writer):
        calls = [opening(2 * n + 1) + data(2 * n + 1, framed(b"m" * 4096)) for n in range(30)]
        writer.write(GREETING + b"".join(calls))
        await until(lambda: made.server.num_connections == 0 and len(received) > 0)
    await made.server.stop(0.0)
    assert len(received) >= 10
    assert all(one.received[-1] == "reset" for one in received)


async def test_calls_that_stream(tmp_path: Path) -> None:
    """Both ways, in step and ahead of each other."""
    async with serving(tmp_path) as made, grpc.aio.insecure_channel(made.target) as channel:
        call = channel.stream_stream(PATH)(timeout=DEADLINE_S)
        for number in range(50):
            await call.write(b"%d" % number)
            assert await call.read() == b"%d" % number

        async def messages() -> AsyncIterator[bytes]:
            for number in range(500):
                yield b"%d" % number * 100

        got = [m async for m in channel.stream_stream(PATH)(messages(), timeout=DEADLINE_S)]
        assert got == [b"%d" % number * 100 for number in range(500)]
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
        assert made.faults == []


async def test_the_synchronous_client(tmp_path: Path) -> None:
    """The same core by its other interface, from a thread."""

    def ask(target: str) -> list[bytes]:
        with grpc.insecure_channel(target) as channel:
            return list(channel.stream_stream(PATH)(iter([b"a", b"b"]), timeout=DEADLINE_S))

    async with serving(tmp_path) as made:
        assert await asyncio.to_thread(ask, made.target) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("path", "message", "options", "code"),
    [
        ("/no.Such/Method", b"x", {}, grpc.StatusCode.UNIMPLEMENTED),
        (PATH, b"x" * (MAX_MESSAGE_BYTES + 1), {}, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (PATH, b"x" * 10_000, {"compression": grpc.Compression.Gzip}, grpc.StatusCode.UNIMPLEMENTED),
        (f"/{SERVICE}/Silent", b"x", {"timeout": 0.1}, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_calls_that_are_refused(
    tmp_path: Path, path: str, message: bytes, options: dict[str, Any], code: grpc.StatusCode
) -> None:
    """Each with the status that gRPC has for it, and the connection goes on."""
    async with serving(tmp_path) as made, grpc.aio.insecure_channel(made.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary(path)(message, **{"timeout": DEADLINE_S, **options})
        assert raised.value.code() is code
        assert await channel.unary_unary(PATH)(b"y", timeout=DEADLINE_S) == b"y"
        assert made.server.num_connections == 1


async def test_a_deadline_that_the_client_does_not_keep(tmp_path: Path) -> None:
    """The server ends the call by itself, and informs its service."""
    async with serving(tmp_path) as made, peer(made) as (_, writer):
        writer.write(GREETING + opening(1, (b"grpc-timeout", b"50m")))
        await until(lambda: bool(made.receivers) and made.receivers[0].received == ["reset"])


async def test_a_drain_lets_calls_end(tmp_path: Path) -> None:
    """Open calls are served, new ones are not, and the server stops with the last."""
    async with serving(tmp_path) as made, grpc.aio.insecure_channel(made.target) as channel:
        call = channel.stream_stream(PATH)(timeout=DEADLINE_S)
        await call.write(b"1")
        assert await call.read() == b"1"
        stopping = asyncio.create_task(made.server.stop(DEADLINE_S))
        await asyncio.sleep(0.05)
        await call.write(b"2")
        assert await call.read() == b"2"
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(PATH)(b"x", timeout=0.5)
        assert not stopping.done()
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
        async with asyncio.timeout(DEADLINE_S):
            await stopping


async def test_a_drain_ends_calls_that_do_not(tmp_path: Path) -> None:
    """When their time is over; their service is informed."""
    async with serving(tmp_path) as made, grpc.aio.insecure_channel(made.target) as channel:
        call = channel.stream_stream(PATH)()
        await call.write(b"1")
        assert await call.read() == b"1"
        async with asyncio.timeout(DEADLINE_S):
            await made.server.stop(0.1)
        assert made.receivers[0].received == [b"1", "reset"]
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_transports_of_other_event_loops() -> None:
    """They are of no class of asyncio's: what they do counts."""

    class Transport:
        """As uvloop's: no subclass of `asyncio.Transport`."""

        def __init__(self) -> None:
            self.written: list[bytes] = []

        def get_extra_info(self, _: str) -> None:
            """Nothing is known."""

        def set_write_buffer_limits(self, high: int) -> None:
            """As asked."""

        def write(self, written: bytes) -> None:
            """Keep it."""
            self.written.append(written)

        def close(self) -> None:
            """Nothing is open."""

    transport = Transport()
    connected = native._Peer(NativeServer([], MAX_MESSAGE_BYTES), is_local=True)
    connected.connection_made(transport)  # type: ignore[arg-type]
    room = connected.get_buffer(-1)
    room[: len(GREETING)] = GREETING
    connected.buffer_updated(len(GREETING))
    assert frames.SETTINGS in [kind for kind, _, _, _ in parsed(b"".join(transport.written))]
    connected.connection_lost(None)


# Peers that misbehave.


async def test_a_peer_that_speaks_something_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is announced by GOAWAY, counted and logged."""
    async with serving(tmp_path) as made, peer(made) as (reader, writer):
        with caplog.at_level(logging.WARNING, "tokenway.transport"):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await sent_until_closed(reader))[-1][0] == frames.GOAWAY
        assert made.faults == [(FaultReason.PREFACE, True)]
        assert caplog.records[-1].__dict__["reason"] == FaultReason.PREFACE


async def test_a_flood_ends_its_connection_alone(tmp_path: Path) -> None:
    """Rapid resets, CVE-2023-44487; a client beside it goes on."""
    async with (
        serving(tmp_path) as made,
        peer(made) as (reader, writer),
        grpc.aio.insecure_channel(made.target) as channel,
    ):
        call = channel.stream_stream(PATH)(timeout=4 * DEADLINE_S)
        await call.write(b"1")
        writer.write(GREETING)
        for number in range(20_000):
            writer.write(opening(2 * number + 1) + frames.rst_stream(2 * number + 1, ErrorCode.CANCEL))
        # Closed with more of the flood unread, which the kernel answers by a reset of its own.
        with contextlib.suppress(ConnectionError):
            await sent_until_closed(reader)
        assert made.faults == [(FaultReason.RESET_FLOOD, True)]
        assert await call.read() == b"1"
        await call.write(b"2")
        assert await call.read() == b"2"


async def test_a_log_is_not_flooded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All faults are counted, a few are logged."""
    async with serving(tmp_path) as made:
        with caplog.at_level(logging.WARNING, "tokenway.transport"):
            for _ in range(50):
                async with peer(made) as (reader, writer):
                    writer.write(b"nonsense, and more of it than a preface has")
                    await sent_until_closed(reader)
        assert len(made.faults) == 50
        assert 1 <= len(caplog.records) < 50


async def test_a_peer_that_does_not_read(tmp_path: Path) -> None:
    """What it asks for does not pile up without a bound."""
    async with serving(tmp_path) as made, peer(made) as (_, writer):
        wide = frames.settings({frames.INITIAL_WINDOW_SIZE: frames.GREATEST_WINDOW})
        wide += frames.window_update(0, frames.GREATEST_WINDOW - frames.DEFAULT_WINDOW)
        writer.write(GREETING + wide + opening(1))
        message = data(1, framed(b"m" * 60_000))
        await until(lambda: made.server.num_connections == 1)
        (served,) = made.server._peers
        connection = served._connection
        assert connection is not None
        most = 0
        async with asyncio.timeout(4 * DEADLINE_S):
            while not made.faults:
                writer.write(message)
                await writer.drain()
                most = max(most, connection.outbox.unsent_bytes)
        # Nothing is granted any more, and it goes on all the same.
        assert made.faults == [(FaultReason.FLOW_CONTROL, False)]
        assert MAX_UNSENT_BYTES // 2 < most < MAX_UNSENT_BYTES + 1_000_000
        assert made.receivers[0].received[-1] == "reset"
        assert connection.outbox.unsent_bytes == 0


async def test_peers_that_are_of_no_use_lose_their_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never greets, one that takes nothing; one that is silent on a Unix socket stays."""
    monkeypatch.setattr(native, "_WATCH_S", 0.01)
    async with serving(tmp_path) as made, peer(made) as (silent, _), peer(made) as (_, idle):
        idle.write(GREETING)
        await until(lambda: made.server.num_connections == 2)
        for each in made.server._peers:
            each._began_s -= native.GREETING_S + 1
            each._heard_s -= 10 * native.PROBE_S
        await sent_until_closed(silent)
        assert made.faults == [(FaultReason.PREFACE, True)]
        (left,) = made.server._peers
        left._blocked_s = left._heard_s - native.STALL_S - 1
        await until(lambda: made.server.num_connections == 0)
        assert made.faults[1:] == [(FaultReason.SLOW_READER, True)]


async def test_a_silent_peer_over_tcp_is_asked_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a PING first."""
    monkeypatch.setattr(native, "_WATCH_S", 0.01)
    async with serving(tmp_path) as made:
        listening = tcp_socket("127.0.0.1", 0)
        port = listening.getsockname()[1]
        await made.server.serve(listening)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GREETING)
        await until(lambda: made.server.num_connections == 1)
        (served,) = made.server._peers
        connection = served._connection
        assert connection is not None
        await until(lambda: connection.is_greeted)
        served._heard_s -= native.PROBE_S + 1
        await until(lambda: served._is_probed)
        served._heard_s -= native.STALL_S + 1
        sent = await sent_until_closed(reader)
        assert frames.PING in [kind for kind, _, _, _ in sent]
        assert made.faults == [(FaultReason.SILENT, True)]
        writer.close()


@pytest.mark.parametrize("is_tls", [False, True])
async def test_small_frames_are_sent_at_once_over_tcp(tmp_path: Path, *, is_tls: bool) -> None:
    """Nagle's algorithm holds none back until the peer has acknowledged what went before."""
    for name, authority in (("ca", None), ("server", "ca")):
        issued(tmp_path, name, authority)
    greeted = trusting(tmp_path / "ca.pem")
    greeted.check_hostname = False
    greeted.set_alpn_protocols(["h2"])
    async with serving(tmp_path) as made:
        listening = tcp_socket("127.0.0.1", 0)
        port = listening.getsockname()[1]
        await made.server.serve(listening, ListenTls(files(tmp_path, "server", None)) if is_tls else None)
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=greeted if is_tls else None)
        writer.write(GREETING)
        await until(lambda: made.server.num_connections == 1)
        (served,) = made.server._peers
        assert served._transport is not None
        accepted = served._transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()


async def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed; the others go on."""
    monkeypatch.setattr(native, "MAX_CONNECTIONS", 2)
    async with serving(tmp_path) as made, peer(made), peer(made):
        await until(lambda: made.server.num_connections == 2)
        async with peer(made) as (reader, _):
            assert await sent_until_closed(reader) == []
        assert made.faults == [(FaultReason.TOO_MANY_CONNECTIONS, True)]
        assert made.server.num_connections == 2


async def test_a_peer_that_leaves(tmp_path: Path) -> None:
    """Its calls get the reset, once."""
    async with serving(tmp_path) as made:
        async with peer(made) as (_, writer):
            writer.write(GREETING + opening(1) + opening(3))
            await until(lambda: len(made.receivers) == 2)
        await until(lambda: made.server.num_connections == 0)
        assert [receiver.received for receiver in made.receivers] == [["reset"], ["reset"]]


# TLS.


def files(folder: Path, name: str, client_authority: str | None) -> TlsFiles:
    """Where they are."""
    client_ca = None if client_authority is None else folder / f"{client_authority}.pem"
    return TlsFiles(folder / f"{name}.pem", folder / f"{name}.key", client_ca)


def credentials(folder: Path, authority: str, name: str | None) -> grpc.ChannelCredentials:
    """A client's: what it trusts, and what it shows."""
    root = (folder / f"{authority}.pem").read_bytes()
    if name is None:
        return grpc.ssl_channel_credentials(root)
    return grpc.ssl_channel_credentials(
        root, (folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes()
    )


async def echoed(port: int, shown: grpc.ChannelCredentials) -> grpc.StatusCode:
    """How a call ends."""
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", shown) as channel:
        call = channel.unary_unary(PATH)(b"x", timeout=DEADLINE_S)
        code: grpc.StatusCode = await call.code()
        return code


async def test_tls_for_clients_that_can_show_a_certificate(tmp_path: Path) -> None:
    """Mutual: a client of the authority is answered, one without or of another is not."""
    for name, authority in (
        ("ca", None),
        ("other", None),
        ("server", "ca"),
        ("client", "ca"),
        ("stranger", "other"),
    ):
        issued(tmp_path, name, authority)
    async with serving(tmp_path) as made:
        listening = tcp_socket("127.0.0.1", 0)
        port = listening.getsockname()[1]
        await made.server.serve(listening, ListenTls(files(tmp_path, "server", "ca")))
        assert await echoed(port, credentials(tmp_path, "ca", "client")) is grpc.StatusCode.OK
        assert await echoed(port, credentials(tmp_path, "ca", None)) is not grpc.StatusCode.OK
        assert await echoed(port, credentials(tmp_path, "ca", "stranger")) is not grpc.StatusCode.OK
        assert FaultReason.TLS in {reason for reason, _ in made.faults}


async def test_certificates_are_read_again_when_they_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a restart, authority and all; what cannot be read changes nothing, and is said once."""
    for name, authority in (
        ("ca", None),
        ("new", None),
        ("server", "ca"),
        ("client", "ca"),
        ("renewed", "new"),
    ):
        issued(tmp_path, name, authority)
    issued(tmp_path, "visitor", "new")
    named = files(tmp_path, "server", "ca")
    async with serving(tmp_path) as made:
        listening = tcp_socket("127.0.0.1", 0)
        port = listening.getsockname()[1]
        old, new = credentials(tmp_path, "ca", "client"), credentials(tmp_path, "new", "visitor")
        await made.server.serve(listening, ListenTls(named))
        assert await echoed(port, old) is grpc.StatusCode.OK
        named.cert_file.write_text("half a certificate")
        assert await echoed(port, old) is grpc.StatusCode.OK
        assert await echoed(port, old) is grpc.StatusCode.OK
        (said,) = [record for record in caplog.records if record.msg == "certificates cannot be read"]
        assert str(named.cert_file) in said.__dict__["files"]
        for target, source in (
            (named.cert_file, "renewed.pem"),
            (named.key_file, "renewed.key"),
            (tmp_path / "ca.pem", "new.pem"),
        ):
            target.write_bytes((tmp_path / source).read_bytes())
        assert await echoed(port, new) is grpc.StatusCode.OK
        assert await echoed(port, old) is not grpc.StatusCode.OK


async def test_a_tls_client_must_ask_for_h2(tmp_path: Path) -> None:
    """A client that did not by ALPN is closed."""
    issued(tmp_path, "ca")
    issued(tmp_path, "server", "ca")
    async with serving(tmp_path) as made:
        listening = tcp_socket("127.0.0.1", 0)
        port = listening.getsockname()[1]
        await made.server.serve(listening, ListenTls(files(tmp_path, "server", None)))
        context = trusting(tmp_path / "ca.pem")
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(GREETING)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        assert made.faults == [(FaultReason.TLS, True)]
        writer.close()
