"""Serves the seam by our own HTTP/2: sockets, clocks and logs around `extproc.transport.http2`.

Rules:
    1. A connection writes once in a turn of the loop: what is sent meanwhile goes together.
    2. All connections read into one buffer, for what they read is taken over before the next one reads.
    3. What a read brought is taken piece by piece. Once that has taken `_TURN_S` the rest waits for the next
       turn of the loop, and nothing more is read until then.
    4. A peer that is not heard, does not read or does not greet within its time loses its connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, cast

from extproc.transport.http2.connection import Connection
from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason
from extproc.transport.http2.outbox import OUTPUT_BYTES
from extproc.transport.large_memory import memory_for
from extproc.transport.listen_tls import ListenTls
from extproc.transport.seam import Rpc

_log = logging.getLogger("tokenway.transport")

READ_BYTES: Final = 262_144
"""At once from a socket, for each read costs a turn of the loop: more than a Unix socket holds."""

_PIECE_BYTES: Final = 16_384
"""Taken without a look at the clock: some four prompts of 4 KB. What lies within a large message is no more
than copied, and taken at once."""

_TURN_S: Final = 0.001

MAX_CONNECTIONS: Final = 256
"""At once; an Envoy opens one for each of its threads and `ANNOUNCED_STREAMS` calls."""

BACKLOG: Final = 128
GREETING_S: Final = 10.0
"""For the TLS handshake, and again for the preface and SETTINGS."""

PROBE_S: Final = 60.0
"""A peer over TCP that was silent for so long is asked whether it lives."""

STALL_S: Final = 60.0
"""A peer that takes nothing for so long, though there is something for it, is given up; so is a silent one,
so long after it was asked."""

_WATCH_S: Final = 5.0
_DRAIN_ANSWER_S: Final = 1.0
_CLOSE_S: Final = 1.0
_LOG_LINES_PER_S: Final = 5.0


class Faults:
    """Counts what goes wrong, and logs it as far as a log can bear.

    Args:
        count: Called with each reason and whether it ended the connection; for a metric.
    """

    def __init__(self, count: Callable[[FaultReason, bool], None]) -> None:
        self._count = count
        self._left = _LOG_LINES_PER_S
        self._at_s = 0.0
        self._unlogged = 0

    def report(self, reason: FaultReason, detail: str, peer: str, *, is_connection: bool) -> None:
        """A stream or a connection was ended."""
        self._count(reason, is_connection)
        if not is_connection and not _log.isEnabledFor(logging.DEBUG):
            return
        now_s = asyncio.get_running_loop().time()
        self._left = min(_LOG_LINES_PER_S, self._left + (now_s - self._at_s) * _LOG_LINES_PER_S)
        self._at_s = now_s
        if self._left < 1.0:
            self._unlogged += 1
            return
        self._left -= 1.0
        extra = {"reason": reason, "detail": detail, "peer": peer, "unlogged_before": self._unlogged}
        self._unlogged = 0
        _log.log(
            logging.WARNING if is_connection else logging.DEBUG,
            "connection ended by us" if is_connection else "stream ended by us",
            extra=extra,
        )


def unix_socket(path: Path) -> socket.socket:
    """A socket that listens at a path; its mode is the process's umask.

    Raises:
        OSError: It cannot be opened.
    """
    return _listening(socket.AF_UNIX, str(path))


def tcp_socket(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A socket that listens at an IP address.

    Args:
        host: The address.
        port: TCP; 0 takes any that is free.
        is_shared: Other processes of this user may listen there too; the kernel gives each connection to one.

    Raises:
        OSError: It cannot be opened.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return _listening(family, (host, port), is_shared=is_shared)


def _listening(family: int, address: str | tuple[str, int], *, is_shared: bool = False) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where the protocol is said to be TCP, and an accepted socket
    # has the listener's. With it a WINDOW_UPDATE waits 40 ms for the peer to acknowledge what went before.
    opened = socket.socket(family, socket.SOCK_STREAM, 0 if family == socket.AF_UNIX else socket.IPPROTO_TCP)
    try:
        if family != socket.AF_UNIX:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
        opened.setblocking(False)
    except OSError as error:
        opened.close()
        # The system names no address; for whoever reads what is wrong.
        error.filename = address if isinstance(address, str) else "{}:{}".format(*address)
        raise
    return opened


class NativeServer:
    """Serves methods on any number of sockets.

    Args:
        rpcs: The methods.
        max_message_bytes: A longer message is refused.
        on_fault: Called with each reason why a stream (False) or a connection (True) was ended.
    """

    def __init__(
        self,
        rpcs: Sequence[Rpc],
        max_message_bytes: int,
        on_fault: Callable[[FaultReason, bool], None] = lambda _reason, _is_connection: None,
    ) -> None:
        self.rpcs: Mapping[str, Rpc] = {rpc.path: rpc for rpc in rpcs}
        self.max_message_bytes = max_message_bytes
        self.faults = Faults(on_fault)
        self.buffer = memoryview(bytearray(READ_BYTES))
        self._peers: set[_Peer] = set()
        self._listeners: list[asyncio.Server] = []
        self._acceptors: list[tuple[socket.socket, asyncio.Task[None]]] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._peers)

    async def serve(self, listening: socket.socket, tls: ListenTls | None = None) -> None:
        """Serve connections to a socket of `unix_socket` or `tcp_socket`, which is taken over."""
        loop = asyncio.get_running_loop()
        if tls is not None:
            acceptor = loop.create_task(self._accept(listening, tls), name="accept")
            self._acceptors.append((listening, acceptor))
        elif listening.family == socket.AF_UNIX:
            local = await loop.create_unix_server(lambda: _Peer(self, is_local=True), sock=listening)
            self._listeners.append(local)
        else:
            remote = await loop.create_server(lambda: _Peer(self, is_local=False), sock=listening)
            self._listeners.append(remote)

    def leave(self, path: str) -> None:
        """Listen no more at a Unix socket, whose name leads to another one by now; its connections stay."""
        for listener in list(self._listeners):
            if any(each.getsockname() == path for each in listener.sockets):
                listener.close()
                self._listeners.remove(listener)

    def start(self) -> None:
        """Begin to watch over connections."""
        self._watch = asyncio.get_running_loop().create_task(self._look(), name="transport")

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, wait so long for those that are open, then end them.

        Args:
            grace_s: Seconds.
        """
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()
        for opened, acceptor in self._acceptors:
            acceptor.cancel()
            opened.close()
        for handshake in self._handshakes:
            handshake.cancel()
        for peer in list(self._peers):
            peer.drain()
        deadline_s = asyncio.get_running_loop().time() + grace_s
        await self._until_none(deadline_s)
        for peer in list(self._peers):
            peer.close()
        await self._until_none(deadline_s + _CLOSE_S)
        for peer in list(self._peers):
            peer.abort()
        tasks = [acceptor for _, acceptor in self._acceptors]
        if self._watch is not None:
            self._watch.cancel()
            tasks.append(self._watch)
        await asyncio.gather(*tasks, *self._handshakes, return_exceptions=True)

    def came(self, peer: _Peer) -> bool:
        """A connection was made; False if it is one too many."""
        if self._is_stopping or len(self._peers) >= MAX_CONNECTIONS:
            return False
        self._peers.add(peer)
        return True

    def left(self, peer: _Peer) -> None:
        """A connection is closed."""
        self._peers.discard(peer)

    async def _until_none(self, deadline_s: float) -> None:
        loop = asyncio.get_running_loop()
        while self._peers and loop.time() < deadline_s:  # noqa: ASYNC110 - a stop need not be swift
            await asyncio.sleep(0.01)

    async def _accept(self, listening: socket.socket, tls: ListenTls) -> None:
        """By hand, for each connection begins with the certificates of its time."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError:  # the peer has gone already, or there are no more files: others may be served
                await asyncio.sleep(0.01)
                continue
            if len(self._handshakes) + len(self._peers) >= MAX_CONNECTIONS:
                accepted.close()
                reason = FaultReason.TOO_MANY_CONNECTIONS
                self.faults.report(reason, "too many connections", "", is_connection=True)
                continue
            handshake = loop.create_task(self._shake_hands(accepted, tls), name="handshake")
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, accepted: socket.socket, tls: ListenTls) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Peer(self, is_local=False),
                accepted,
                ssl=tls.context(),
                ssl_handshake_timeout=GREETING_S,
            )
        except OSError as error:
            accepted.close()
            self.faults.report(FaultReason.TLS, str(error), "", is_connection=True)

    async def _look(self) -> None:
        """Rule 4."""
        while True:
            await asyncio.sleep(_WATCH_S)
            now_s = asyncio.get_running_loop().time()
            for peer in list(self._peers):
                peer.look(now_s)


class _Peer(asyncio.BufferedProtocol):
    """One connection.

    Args:
        server: Whose it is.
        is_local: By a Unix socket, where the kernel says when a peer is gone.
    """

    def __init__(self, server: NativeServer, *, is_local: bool) -> None:
        self._server = server
        self._is_local = is_local
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._connection: Connection | None = None
        self._name = ""
        self._is_receiving = self._is_scheduled = self._is_closed = self._is_probed = False
        self._left = b""
        self._began_s = self._heard_s = self._loop.time()
        self._blocked_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._timer_s: float | None = None

    # What asyncio reports.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        # No check of its class: other event loops than asyncio's have transports of their own kind.
        self._transport = transport = cast("asyncio.Transport", transport)
        address = transport.get_extra_info("peername")
        self._name = "unix:" if not isinstance(address, tuple) else f"{address[0]}:{address[1]}"
        if not self._server.came(self):
            self._end_by(FaultReason.TOO_MANY_CONNECTIONS, "too many connections")
            return
        encrypted = transport.get_extra_info("ssl_object")
        if encrypted is not None and encrypted.selected_alpn_protocol() != "h2":
            self._end_by(FaultReason.TLS, "the peer did not ask for h2")
            return
        transport.set_write_buffer_limits(high=OUTPUT_BYTES)
        self._connection = Connection(
            self._server.rpcs,
            self._server.max_message_bytes,
            self._name,
            self,
            self._wake,
            self._loop.time(),
            memory_for,
        )

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """See `asyncio.BufferedProtocol`."""
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        connection = self._connection
        if connection is None:
            return
        self._heard_s = now_s = self._loop.time()
        self._take(connection, self._server.buffer[:nbytes], now_s)
        self._flush()

    def _take(self, connection: Connection, received: memoryview, began_s: float) -> None:
        """Rule 3."""
        at, end = 0, len(received)
        self._is_receiving = True
        try:
            while True:
                if end - at > _PIECE_BYTES:
                    at += connection.fill(received[at:])
                connection.receive(received[at : at + _PIECE_BYTES], began_s)
                at += _PIECE_BYTES
                if at >= end:
                    return
                if self._loop.time() - began_s > _TURN_S and self._transport is not None:
                    break
        finally:
            self._is_receiving = False
        self._left = bytes(received[at:])
        self._transport.pause_reading()
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        connection, left, self._left = self._connection, memoryview(self._left), b""
        if connection is None or self._transport is None:
            return
        self._take(connection, left, self._loop.time())
        if not self._left:
            self._transport.resume_reading()
        self._flush()

    def eof_received(self) -> bool:
        """See `asyncio.BaseProtocol`: a peer that sends no more is gone."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """See `asyncio.BaseProtocol`."""
        self._is_closed = True
        for timer in (self._timer, self._closing):
            if timer is not None:
                timer.cancel()
        connection, self._connection, self._transport = self._connection, None, None  # no cycle is left
        if connection is not None:
            if self._left:  # such as the ends of requests
                connection.receive(self._left, self._loop.time())
            connection.end()
        self._server.left(self)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        if self._connection is not None:
            self._connection.outbox.is_blocked = True
            self._blocked_s = self._loop.time()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        if self._connection is not None:
            self._blocked_s = None
            self._connection.unblock()
            self._wake()

    # What the connection reports.

    def fault(self, reason: FaultReason, detail: str, *, is_connection: bool) -> None:
        """See `Notices`."""
        self._server.faults.report(reason, detail, self._name, is_connection=is_connection)

    def bug(self, path: str, error: Exception) -> None:
        """See `Notices`."""
        _log.error("service failed", extra={"path": path, "peer": self._name}, exc_info=error)

    # What the server says.

    def drain(self) -> None:
        """Let what is open end, and nothing begin."""
        if self._connection is not None:
            self._connection.drain()
            self._wake()
            self._loop.call_later(_DRAIN_ANSWER_S, self._finish_drain)

    def close(self) -> None:
        """End what is open."""
        if self._connection is not None:
            self._connection.end(None)
        self._wake()

    def abort(self) -> None:
        """Close, whatever has yet to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def look(self, now_s: float) -> None:
        """Is the peer still of use?"""
        connection = self._connection
        if connection is None or self._is_closed:
            return
        if not connection.is_greeted and now_s - self._began_s > GREETING_S:
            self._end_by(FaultReason.PREFACE, "no greeting within its time")
        elif self._blocked_s is not None and now_s - self._blocked_s > STALL_S:
            self._end_by(FaultReason.SLOW_READER, "answers are not taken")
        elif not self._is_local and now_s - self._heard_s > PROBE_S + STALL_S:
            self._end_by(FaultReason.SILENT, "the peer does not answer")
        elif not self._is_local and now_s - self._heard_s > PROBE_S and not self._is_probed:
            self._is_probed = True
            connection.probe()
        elif now_s - self._heard_s <= PROBE_S:
            self._is_probed = False

    def _finish_drain(self) -> None:
        if self._connection is not None and not self._is_closed:
            self._connection.finish_drain()
            self._wake()

    def _end_by(self, reason: FaultReason, detail: str) -> None:
        if self._connection is None:
            self.fault(reason, detail, is_connection=True)
        else:
            self._connection.end(ConnectionFault(reason, ErrorCode.ENHANCE_YOUR_CALM, detail))
        self.abort()

    # Writing.

    def _wake(self) -> None:
        if not self._is_receiving and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_scheduled = False
        connection, transport = self._connection, self._transport
        if connection is None or transport is None or self._is_closed:
            return
        outbox = connection.outbox
        while not outbox.is_blocked and (data := connection.take()):
            transport.write(data)
        outbox.notify_sent()
        if connection.is_over:
            self._is_closed = True
            transport.close()
            self._closing = self._loop.call_later(STALL_S, transport.abort)
        elif connection.next_deadline_s != self._timer_s:
            self._set_timer(connection.next_deadline_s)

    def _set_timer(self, at_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = at_s
        self._timer = None if at_s is None else self._loop.call_at(at_s, self._expire)

    def _expire(self) -> None:
        self._timer = self._timer_s = None
        if self._connection is not None and not self._is_closed:
            self._connection.expire(self._loop.time())
            self._flush()
