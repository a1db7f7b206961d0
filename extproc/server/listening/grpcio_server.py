"""The gRPC server of a worker by grpc.aio: imported where `server.transport` names it, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import grpc

from extproc.server.listening.rpc_places import Places, take_away
from extproc.server.listening.run_dir import closed_to_others
from extproc.transport import grpc_aio
from extproc.transport.listen_tls import TlsFiles
from extproc.transport.seam import Rpc
from metadata_center.files import read_regular

MAX_RENEWALS: Final = 64
"""Of sockets that were taken away: each is a server more."""


def credentials_of(tls: TlsFiles | None) -> grpc.ServerCredentials | None:
    """TLS for gRPC, mutual where there is a CA of clients; None for clear text.

    Raises:
        OSError: A file cannot be read.
    """
    if tls is None:
        return None
    authority = None if tls.client_ca_file is None else read_regular(tls.client_ca_file)
    return grpc.ssl_server_credentials(
        [(read_regular(tls.key_file), read_regular(tls.cert_file))],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )


class GrpcServer:
    """`grpc.aio` as a worker's server.

    Args:
        rpcs: What is served.
        places: Where to listen.
        max_message_bytes: Of one message received.
    """

    def __init__(self, rpcs: Iterable[Rpc], places: Places, max_message_bytes: int) -> None:
        self._rpcs = tuple(rpcs)
        self._places = places
        self._max_message_bytes = max_message_bytes
        self._servers: list[grpc.aio.Server] = []

    async def listen(self) -> None:
        """See `RpcServer`."""
        server = self._made()
        if self._places.socket is not None:
            self._places.socket.unlink(missing_ok=True)
            self._add_own(server, self._places.socket)
        credentials = credentials_of(self._places.tls)
        for address in self._places.others:
            _add(server, address, credentials)
        await server.start()

    async def drain(self, grace_s: float) -> None:
        """See `RpcServer`."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))

    async def close(self) -> None:
        """See `RpcServer`."""
        servers, self._servers = self._servers, []
        if servers:
            await asyncio.gather(*(server.stop(None) for server in servers))
            take_away(self._places.socket)

    def is_reached(self) -> bool:
        """See `RpcServer`: gRPC does not say who is connected."""
        return True

    def sockets(self) -> tuple[Path, ...]:
        """See `RpcServer`."""
        return self._places.sockets

    async def renew(self, path: Path) -> None:
        """See `RpcServer`: by another server, for one that has started takes no further address.

        The one before stays until the end: it would take the socket of that name away when it stops.
        """
        if len(self._servers) > MAX_RENEWALS:
            raise OSError(f"it was made anew {MAX_RENEWALS} times; server.transport: native has no bound")
        server = self._made()
        try:
            if path == self._places.socket:
                self._add_own(server, path)
            else:
                _add(server, f"unix:{path}")
        except OSError:
            self._servers.remove(server)
            raise
        await server.start()

    def _made(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.so_reuseport", int(self._places.is_shared)),
                ("grpc.http2.max_ping_strikes", 0),  # gateways ask each second whether we are there
            ]
        )
        server.add_generic_rpc_handlers(grpc_aio.handlers(self._rpcs))
        self._servers.append(server)
        return server

    @staticmethod
    def _add_own(server: grpc.aio.Server, path: Path) -> None:
        with closed_to_others():
            _add(server, f"unix:{path}")


def _add(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> None:
    """Have a server listen at an address, a Unix socket in clear text.

    Raises:
        OSError: It cannot. gRPC does not say why.
    """
    try:
        if credentials is None or address.startswith("unix:"):
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
    except RuntimeError as error:
        path = address.removeprefix("unix:")
        if path == address:
            why = "another program listens there, or it is no address of this machine"
        else:
            why = "its folder is not there, or is closed to us"
        raise OSError(f"{path}: cannot be listened at: {why}") from error
