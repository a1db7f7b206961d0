"""The gRPC server of a worker: where it listens, and how it ends; by Tokenway's own HTTP/2 or by grpc.aio."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from errno import ENOENT
from pathlib import Path
from typing import Protocol

from extproc.config.sections.listening import Transport
from extproc.server.listening.rpc_places import Places, take_away
from extproc.server.listening.run_dir import closed_to_others
from extproc.transport import listen_tls
from extproc.transport.http2.faults import FaultReason
from extproc.transport.native import NativeServer, tcp_socket, unix_socket
from extproc.transport.seam import Rpc


class RpcServer(Protocol):
    """What a worker needs of its gRPC server."""

    async def listen(self) -> None:
        """Open all places and serve. Raises OSError if one cannot be opened, or a file of TLS not read."""

    async def drain(self, grace_s: float) -> None:
        """Take no new calls; returns when none runs any more, or ends those that do after `grace_s`."""

    async def close(self) -> None:
        """End what still runs and take the socket away."""

    def is_reached(self) -> bool:
        """False if nobody is connected any more; True also where that is not known."""

    def sockets(self) -> tuple[Path, ...]:
        """The Unix sockets among its places."""

    async def renew(self, path: Path) -> None:
        """Listen anew at one of them, whose name leads nowhere. Raises OSError if it cannot be opened."""


def check_free(addresses: Iterable[str]) -> None:
    """Make sure that workers can listen there.

    Raises:
        OSError: Another program does: among workers that share an address it would go unnoticed, and a worker
            that alone listens there would die again and again. Or there is no folder for a socket.
    """
    for address in addresses:
        if not address.startswith("unix:"):
            _opened(address).close()
        elif not Path(address.removeprefix("unix:")).parent.is_dir():
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT), address.removeprefix("unix:"))


class OwnServer:
    """Tokenway's own HTTP/2 as a worker's server.

    Args:
        rpcs: What is served.
        places: Where to listen. Certificates are read again when they change.
        max_message_bytes: Of one message received.
        on_fault: Called with each reason why a stream (False) or a connection (True) was ended.
    """

    def __init__(
        self,
        rpcs: Iterable[Rpc],
        places: Places,
        max_message_bytes: int,
        on_fault: Callable[[FaultReason, bool], None],
    ) -> None:
        self._places = places
        self._server = NativeServer(tuple(rpcs), max_message_bytes, on_fault)

    async def listen(self) -> None:
        """See `RpcServer`."""
        tls = None if self._places.tls is None else listen_tls.ListenTls(self._places.tls)
        if self._places.socket is not None:
            self._places.socket.unlink(missing_ok=True)
            with closed_to_others():
                own = unix_socket(self._places.socket)
            await self._server.serve(own)
        for address in self._places.others:
            opened = _opened(address, is_shared=self._places.is_shared)
            await self._server.serve(opened, None if opened.family == socket.AF_UNIX else tls)
        self._server.start()

    async def drain(self, grace_s: float) -> None:
        """See `RpcServer`."""
        await self._server.stop(grace_s)

    async def close(self) -> None:
        """See `RpcServer`."""
        await self._server.stop(0.0)
        take_away(self._places.socket)

    def is_reached(self) -> bool:
        """See `RpcServer`."""
        return self._server.num_connections > 0

    def sockets(self) -> tuple[Path, ...]:
        """See `RpcServer`."""
        return self._places.sockets

    async def renew(self, path: Path) -> None:
        """See `RpcServer`."""
        if path == self._places.socket:
            with closed_to_others():
                own = unix_socket(path)
        else:
            own = unix_socket(path)
        self._server.leave(str(path))
        await self._server.serve(own)


def _opened(address: str, *, is_shared: bool = False) -> socket.socket:
    """The socket of `unix:/path`, `ip:port` or `[ip]:port`; of a path, what is left of an earlier one goes.

    Raises:
        OSError: It cannot be opened.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        if path.is_socket():
            path.unlink()
        return unix_socket(path)
    host, _, port = address.rpartition(":")
    return tcp_socket(host.strip("[]"), int(port), is_shared=is_shared)


def rpc_server(
    transport: Transport,
    rpcs: Iterable[Rpc],
    places: Places,
    max_message_bytes: int,
    on_fault: Callable[[FaultReason, bool], None],
) -> RpcServer:
    """The server that the configuration names; grpc.aio reports no faults of its peers."""
    if transport is Transport.NATIVE:
        return OwnServer(rpcs, places, max_message_bytes, on_fault)
    from extproc.server.listening.grpcio_server import GrpcServer  # 15 MiB that the other one does without

    return GrpcServer(rpcs, places, max_message_bytes)
