"""The gRPC server of a worker: where it listens, and how it ends; another implementation goes here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import grpc

from extproc.config.sections.listening import ListenTls, Server
from extproc.server.run_dir import closed_to_others
from extproc.transport import grpc_aio
from extproc.transport.seam import Rpc
from metadata_center.types import value


@value
class Places:
    """Where a worker listens.

    Attributes:
        socket: The Unix socket that Envoy on this host knows; made anew, and closed to others.
        others: Further addresses, `unix:/path` or `ip:port`.
        tls: Mutual TLS for the `ip:port` among them; None for clear text.
    """

    socket: Path
    others: tuple[str, ...] = ()
    tls: ListenTls | None = None


class RpcServer(Protocol):
    """What a worker needs of its gRPC server."""

    async def listen(self) -> None:
        """Open all places and serve. Raises OSError if one cannot be opened, or a file of TLS not read."""

    async def drain(self, grace_s: float) -> None:
        """Take no new calls; returns when none runs any more, or ends those that do after `grace_s`."""

    async def close(self) -> None:
        """End what still runs and take the socket away."""


def places_of(server: Server, socket: Path, index: int) -> Places:
    """Where worker `index` listens: the first one has the further addresses."""
    return Places(socket, server.listen, server.listen_tls) if index == 0 else Places(socket)


def credentials_of(tls: ListenTls | None) -> grpc.ServerCredentials | None:
    """Mutual TLS for gRPC; None for clear text.

    Raises:
        OSError: A file cannot be read.
    """
    if tls is None:
        return None
    key, certificate, authority = (
        Path(name).read_bytes() for name in (tls.key_file, tls.cert_file, tls.client_ca_file)
    )
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=authority, require_client_auth=True
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
        self._server: grpc.aio.Server | None = None

    async def listen(self) -> None:
        """See `RpcServer`."""
        server = self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.so_reuseport", 0),
            ]
        )
        server.add_generic_rpc_handlers(grpc_aio.handlers(self._rpcs))
        self._places.socket.unlink(missing_ok=True)
        with closed_to_others():
            server.add_insecure_port(f"unix:{self._places.socket}")
        credentials = credentials_of(self._places.tls)
        for address in self._places.others:
            if credentials is None or address.startswith("unix:"):
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, credentials)
        await server.start()

    async def drain(self, grace_s: float) -> None:
        """See `RpcServer`."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def close(self) -> None:
        """See `RpcServer`."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
            self._places.socket.unlink(missing_ok=True)
