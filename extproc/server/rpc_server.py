"""The gRPC server of a worker: where it listens, and how it ends; by Tokenway's own HTTP/2 or by grpc.aio."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from extproc.config.sections.listening import EndpointPicker, ListenTls, PickerTls, Server, Transport
from extproc.server.run_dir import closed_to_others
from extproc.transport import grpc_aio, listen_tls
from extproc.transport.http2.faults import FaultReason
from extproc.transport.listen_tls import TlsFiles
from extproc.transport.native import NativeServer, tcp_socket, unix_socket
from extproc.transport.seam import Rpc


@dataclass(frozen=True, slots=True)
class Places:
    """Where a worker listens.

    Attributes:
        socket: The Unix socket that Envoy on this host knows; made anew, and closed to others. None has none.
        others: Further addresses, `unix:/path` or `ip:port`.
        tls: For the `ip:port` among them; None for clear text.
    """

    socket: Path | None
    others: tuple[str, ...] = ()
    tls: TlsFiles | None = None


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
    return Places(socket, server.listen, _files(server.listen_tls)) if index == 0 else Places(socket)


def picker_places(picker: EndpointPicker) -> Places:
    """Where the endpoint picker listens."""
    return Places(None, picker.listen, _files(picker.listen_tls))


def _files(tls: ListenTls | PickerTls | None) -> TlsFiles | None:
    if tls is None:
        return None
    authority = None if tls.client_ca_file is None else Path(tls.client_ca_file)
    return TlsFiles(Path(tls.cert_file), Path(tls.key_file), authority)


def credentials_of(tls: TlsFiles | None) -> grpc.ServerCredentials | None:
    """TLS for gRPC, mutual where there is a CA of clients; None for clear text.

    Raises:
        OSError: A file cannot be read.
    """
    if tls is None:
        return None
    authority = None if tls.client_ca_file is None else tls.client_ca_file.read_bytes()
    return grpc.ssl_server_credentials(
        [(tls.key_file.read_bytes(), tls.cert_file.read_bytes())],
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
        if self._places.socket is not None:
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
            _take_away(self._places.socket)


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
            opened = _opened(address)
            await self._server.serve(opened, None if opened.family == socket.AF_UNIX else tls)
        self._server.start()

    async def drain(self, grace_s: float) -> None:
        """See `RpcServer`."""
        await self._server.stop(grace_s)

    async def close(self) -> None:
        """See `RpcServer`."""
        await self._server.stop(0.0)
        _take_away(self._places.socket)


def _take_away(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def _opened(address: str) -> socket.socket:
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
    return tcp_socket(host.strip("[]"), int(port))


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
    return GrpcServer(rpcs, places, max_message_bytes)
