"""The transport's floor: a gRPC servicer that answers Tokenway's messages with constants, no more.

    python -m benchmarks.floor [--first-chunk] [--plain] SOCKET CLUSTER ENDPOINT...       until killed

What Tokenway costs above it is Tokenway's own; what it costs itself is gRPC, asyncio and Python. `--plain` is
the servicer as gRPC's own examples have it: every answer written, nothing returned. (The environment decides
whether gRPC also runs with its own settings: `GRPC_EXPERIMENTS=` set to nothing keeps Tokenway's away.)
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

# Tokenway's settings for gRPC, which reads them when imported; without them the floor costs a fifth more.
import tokenway.cli  # noqa: F401 - for its effect

# isort: split
import grpc

from extproc.protocol import wire
from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.protocol.machine import Kind
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from metadata_center.types import RequestId

MAX_MESSAGE_BYTES = 64 << 20
"""Above any body that Envoy lets through."""


async def serve(
    socket: str, cluster: str, endpoints: list[str], *, first_chunk: bool, plain: bool = False
) -> None:
    """Be the servicer until killed.

    Args:
        socket: Path of the Unix socket to listen on.
        cluster: The Envoy cluster that every request is sent to.
        endpoints: Its endpoints that every request may use: `ip:port`, best first.
        first_chunk: Ask for the first chunk of streamed answers, as `signals.first_chunk` does.
        plain: Write every answer, instead of returning the last one with the status.
    """
    dialect = BootstrapDialect("0.floor")
    decision = Decision(RequestId(""), Operation.CHAT, True, Plan(cluster, tuple(endpoints)))
    answer = dialect.decision(decision, to_trailers=False)
    await_body = dialect.await_body(first_chunk=first_chunk)

    async def process(_: Any, context: Any) -> bytes:
        await context.read()
        await context.write(await_body)
        body = await context.read()
        if first_chunk and b'"stream":true' in body:
            await context.write(answer)
            await context.read()
            return wire.CONTINUE[Kind.RESPONSE_BODY]
        return answer

    async def process_plainly(_: Any, context: Any) -> None:
        await context.read()
        await context.write(await_body)
        body = await context.read()
        await context.write(answer)
        if first_chunk and b'"stream":true' in body:
            await context.read()

    handler = (
        grpc.stream_stream_rpc_method_handler(process_plainly)
        if plain
        else grpc.stream_unary_rpc_method_handler(process)
    )

    async def drop(_: Any, context: Any) -> bytes:
        while await context.read() is not grpc.aio.EOF:
            pass
        return b""

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(wire.SERVICE, {"Process": handler}),
            grpc.method_handlers_generic_handler(
                "envoy.service.accesslog.v3.AccessLogService",
                {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(drop)},
            ),
        )
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
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("socket")
    parser.add_argument("cluster")
    parser.add_argument("endpoints", nargs="+")
    options = parser.parse_args()
    asyncio.run(
        serve(
            options.socket,
            options.cluster,
            options.endpoints,
            first_chunk=options.first_chunk,
            plain=options.plain,
        )
    )


if __name__ == "__main__":
    main()
