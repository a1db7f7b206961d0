"""Serves the seam by grpc.aio, which knows TLS and any peer.

Rules:
    1. A call is one coroutine, gRPC's own. It reads plainly: a message that is answered while it is delivered
       costs no task. Only what is sent unasked is written by a task.
    2. A read cannot be taken back from gRPC. To end a call unasked, its coroutine is cancelled while it
       reads, and returns; the read ends with the call.
    3. Where `Rpc.has_last`, a method is a stream-unary one to gRPC: what its coroutine returns travels with
       the status, one operation and one turn of two threads less (docs/adr/0007); the peer sees the same.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from extproc.transport.seam import Message, Receiver, Rpc, Status, joined

_CODES = {code.value[0]: code for code in grpc.StatusCode}


def handlers(rpcs: Iterable[Rpc]) -> tuple[grpc.GenericRpcHandler, ...]:
    """For `grpc.aio.Server.add_generic_rpc_handlers`."""
    services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = defaultdict(dict)
    for rpc in rpcs:
        kind = grpc.stream_unary_rpc_method_handler if rpc.has_last else grpc.stream_stream_rpc_method_handler
        services[rpc.service][rpc.method] = kind(_Served(rpc).serve)
    return tuple(
        grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items()
    )


class _Gone(Exception):  # noqa: N818 - the name says what happened
    """The peer takes no more messages."""


class _Served:
    """One method."""

    __slots__ = ("_rpc",)

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def serve(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes | None:
        """Serve one call; returns its last message."""
        call = _AioCall(context)
        receiver = self._rpc.open(call)
        try:
            await call.run(receiver)
        except (asyncio.CancelledError, _Gone):
            if not call.is_over:
                call.is_over = True
                receiver.on_reset()
            raise
        finally:
            call.is_over = True
        if call.failure is not None:
            status, detail = call.failure
            await context.abort(_CODES[status], detail)
        if self._rpc.has_last or call.last is None:
            return call.last
        await context.write(call.last)
        return None


class _AioCall:
    """A call; see `extproc.transport.seam.Call`."""

    __slots__ = ("_context", "_is_idle", "_out", "_task", "_writer", "failure", "is_over", "last")

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._task = asyncio.current_task()
        self._out: deque[tuple[bytes, Callable[[], None] | None]] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._is_idle = False
        self.is_over = False
        self.last: bytes | None = None
        self.failure: tuple[Status, str] | None = None

    @property
    def peer(self) -> str:
        """See `Call`."""
        peer: str = self._context.peer()
        return peer

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        if self.is_over:
            return
        self._out.append((joined(message), sent))
        if self._is_idle and self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    def finish(self, last: Message | None = None) -> None:
        """See `Call`."""
        if not self.is_over:
            self.last = None if last is None else joined(last)
            self._end()

    def abort(self, status: Status, detail: str) -> None:
        """See `Call`."""
        if not self.is_over:
            self.failure = status, detail
            self._end()

    async def run(self, receiver: Receiver) -> None:
        """Call the receiver with what happens and write what it sends, until the call is over."""
        read, task = self._context.read, self._task
        assert task is not None
        is_open = True
        while True:
            if self._out and self._writer is None:
                await self._write_all()
            if self.is_over:
                break
            self._is_idle = True
            try:
                message = await (read() if is_open else asyncio.get_running_loop().create_future())
            except asyncio.CancelledError:
                if not self.is_over or task.uncancel():
                    raise
                break
            finally:
                self._is_idle = False
            if self.is_over:
                break
            if message is grpc.aio.EOF:
                is_open = False
                receiver.on_half_close()
            else:
                receiver.on_message(message)
        if self._writer is not None:
            await self._writer

    def _end(self) -> None:
        self.is_over = True
        if self._is_idle:
            assert self._task is not None
            self._task.cancel()

    async def _write_all(self) -> None:
        out, write = self._out, self._context.write
        while out:
            message, sent = out[0]
            try:
                await write(message)
            except Exception as error:  # whatever gRPC says of a peer that is gone
                raise _Gone from error
            out.popleft()
            if sent is not None and not self.is_over:
                sent()

    async def _write(self) -> None:
        """Write what was sent unasked."""
        try:
            await self._write_all()
        except _Gone:
            if not self.is_over:
                assert self._task is not None
                self._task.cancel()
        finally:
            self._writer = None
