"""Every server that serves the seam of `extproc.transport`, for tests that all of them must pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc

from extproc.transport import grpc_aio
from extproc.transport.native import NativeServer, unix_socket
from extproc.transport.seam import Rpc

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's own default."""

Serve = Callable[[Sequence[Rpc], Path], AbstractAsyncContextManager[None]]
"""Serves methods on a Unix socket while its context is open."""


@asynccontextmanager
async def _grpc_aio(rpcs: Sequence[Rpc], socket: Path) -> AsyncIterator[None]:
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{socket}")
    server.add_generic_rpc_handlers(grpc_aio.handlers(rpcs))
    await server.start()
    yield
    await server.stop(None)


@asynccontextmanager
async def _native(rpcs: Sequence[Rpc], socket: Path) -> AsyncIterator[None]:
    server = NativeServer(rpcs, MAX_MESSAGE_BYTES)
    await server.serve(unix_socket(socket))
    server.start()
    yield
    await server.stop(0.0)


SERVERS: dict[str, Serve] = {"grpc_aio": _grpc_aio, "native": _native}
