"""The gRPC server of a worker by grpc.aio: imported where `server.transport` names it, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from extproc.server.rpc_places import Places, take_away
from extproc.server.run_dir import closed_to_others
from extproc.transport import grpc_aio
from extproc.transport.listen_tls import TlsFiles
from extproc.transport.seam import Rpc
from metadata_center.files import read_regular


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
        self._server: grpc.aio.Server | None = None

    async def listen(self) -> None:
        """See `RpcServer`."""
        server = self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.so_reuseport", int(self._places.is_shared)),
                ("grpc.http2.max_ping_strikes", 0),  # gateways ask each second whether we are there
            ]
        )
        server.add_generic_rpc_handlers(grpc_aio.handlers(self._rpcs))
        if self._places.socket is not None:
            self._places.socket.unlink(missing_ok=True)
            with closed_to_others():
                server.add_insecure_port(f"unix:{self._places.socket}")
        credentials = credentials_of(self._places.tls)
        for address in self._places.others:
            try:
                if credentials is None or address.startswith("unix:"):
                    server.add_insecure_port(address)
                else:
                    server.add_secure_port(address, credentials)
            except RuntimeError as error:  # with no more than that it failed; gRPC's own log has the reason
                raise OSError(f"{address}: cannot be opened; is it taken?") from error
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
            take_away(self._places.socket)
