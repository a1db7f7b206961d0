"""The transport's floor: a servicer that answers Tokenway's messages with constants, no more.

    python -m benchmarks.floor [--first-chunk] TRANSPORT SOCKET CLUSTER ENDPOINT...       until killed

What Tokenway costs above it is Tokenway's own; what it costs itself is gRPC, asyncio and Python. TRANSPORT is
`native` or `grpcio`, both behind the seam of Tokenway's services, or `plain`, the servicer as gRPC's own
examples have it: every answer written, nothing returned. (The environment decides whether gRPC also runs with
its own settings: `GRPC_EXPERIMENTS=` set to nothing keeps Tokenway's away.)
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tokenway's settings for gRPC, which reads them when imported; without them the floor costs a fifth more.
import tokenway.cli  # noqa: F401 - for its effect

# isort: split
import grpc

from extproc.protocol import wire
from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.protocol.machine import MessageKind
from extproc.transport import grpc_aio
from extproc.transport.native import NativeServer, unix_socket
from extproc.transport.seam import Call, Received, Rpc, joined
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from metadata_center.types import RequestId

MAX_MESSAGE_BYTES = 64 << 20
"""Above any body that Envoy lets through."""

ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService", "StreamAccessLogs"
STREAMED = b'"stream":true'
_TAIL_BYTES = 256
"""Where `benchmarks.traffic` says it. A large message is a view, and a view is searched item by item."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What is answered to everybody.

    Attributes:
        await_body: To the headers.
        answer: To the body.
        first_chunk: The first chunk of streamed answers is asked for, and answered.
    """

    await_body: bytes
    answer: bytes
    first_chunk: bool


class _Answering:
    """Answers the messages of one request."""

    __slots__ = ("_call", "_constants", "_num_messages")

    def __init__(self, constants: Constants, call: Call) -> None:
        self._constants = constants
        self._call = call
        self._num_messages = 0

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self._num_messages += 1
        if self._num_messages == 1:
            self._call.send(self._constants.await_body)
        elif self._num_messages == 3:
            self._call.finish(wire.CONTINUE[MessageKind.RESPONSE_BODY])
        elif self._constants.first_chunk and STREAMED in bytes(message[-_TAIL_BYTES:]):
            self._call.send(self._constants.answer)
        else:
            self._call.finish(self._constants.answer)

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self._call.finish(b"")

    def on_reset(self) -> None:
        """See `Receiver`."""


class _Dropping:
    """Takes access logs and does nothing with them."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self._call.finish(b"")

    def on_reset(self) -> None:
        """See `Receiver`."""


def rpcs(constants: Constants) -> Sequence[Rpc]:
    """The services, for any server of the seam."""
    return (
        Rpc(wire.SERVICE, "Process", lambda call: _Answering(constants, call), has_last=True),
        Rpc(*ACCESS_LOG, _Dropping, has_last=True),
    )


def plain_handlers(constants: Constants) -> tuple[grpc.GenericRpcHandler, ...]:
    """The same as coroutines that read and write."""

    async def process(_: Any, context: Any) -> None:
        await context.read()
        await context.write(constants.await_body)
        body = await context.read()
        await context.write(constants.answer)
        if constants.first_chunk and STREAMED in body:
            await context.read()

    async def drop(_: Any, context: Any) -> bytes:
        while await context.read() is not grpc.aio.EOF:
            pass
        return b""

    service, method = ACCESS_LOG
    return (
        grpc.method_handlers_generic_handler(
            wire.SERVICE, {"Process": grpc.stream_stream_rpc_method_handler(process)}
        ),
        grpc.method_handlers_generic_handler(service, {method: grpc.stream_unary_rpc_method_handler(drop)}),
    )


async def serve(transport: str, socket: Path, constants: Constants) -> None:
    """Be the servicer until killed.

    Args:
        transport: `native`, `grpcio` or `plain`.
        socket: The Unix socket to listen on.
        constants: The answers.
    """
    if transport == "native":
        native = NativeServer(rpcs(constants), MAX_MESSAGE_BYTES)
        await native.serve(unix_socket(socket))
        native.start()
    else:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        server.add_generic_rpc_handlers(
            plain_handlers(constants) if transport == "plain" else grpc_aio.handlers(rpcs(constants))
        )
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
    await asyncio.Event().wait()


def main() -> None:
    """Be the servicer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first-chunk", action="store_true")
    parser.add_argument("transport", choices=("native", "grpcio", "plain"))
    parser.add_argument("socket", type=Path)
    parser.add_argument("cluster")
    parser.add_argument("endpoints", nargs="+")
    options = parser.parse_args()
    dialect = BootstrapDialect("0.floor")
    plan = Plan(options.cluster, tuple(options.endpoints))
    answer = dialect.decision(Decision(RequestId(""), Operation.CHAT, True, plan), to_trailers=False)
    await_body = dialect.await_body(first_chunk=options.first_chunk)
    constants = Constants(await_body, joined(answer), options.first_chunk)
    asyncio.run(serve(options.transport, options.socket, constants))


if __name__ == "__main__":
    main()
