"""Reads large bodies in a process of its own: `python -m extproc.server.bodies.reading_process FD`.

Rules:
    1. One order at a time, over the socket it was given; when that ends, the process does.
    2. Messages are a length, a head in MessagePack of closed types, and raw bytes; nothing is unpickled.
    3. It runs below the priority of the gateway, for which it works.
"""

from __future__ import annotations

import gc
import mmap
import os
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from extproc.errors import Reason, RouterError
from extproc.request.reading import BodyRead, ReadOrder, read_body
from extproc.values.exchange import Body
from extproc.values.requests import InferenceRequest, Operation
from metadata_center import signals

_HEAD: Final = struct.Struct("<IQQQ")  # bytes of the head, and of up to three raw pieces

_READY: Final = b"!"

_LARGE_BYTES: Final = 1024 * 1024

_NICENESS: Final = 5
"""Below the gateway's own: decoding large bodies is not to take the time of deciding about small ones."""


class Order(msgspec.Struct, array_like=True):
    """A `ReadOrder`; the body follows."""

    path: str
    allowed: list[str]
    usage_injection: bool
    rewritten: list[str]
    max_prompt_bytes: int
    is_renamed: bool


class Refused(msgspec.Struct, array_like=True, tag=True):
    """A `RouterError`."""

    reason: Reason
    message: str
    param: str | None


class Answered(msgspec.Struct, array_like=True, tag=True):
    """A `BodyRead`; its prompt, and the body to send before and after the model's name, follow."""

    operation: Operation
    model: str
    stream: bool
    prompt_tokens: int | None
    max_tokens: int | None
    cache_salt: str | None
    is_multimodal: bool
    widths: list[tuple[int, int]]
    more_bytes: int
    kept: dict[str, Any]
    is_changed: bool
    is_encoded: bool
    fingerprint: int
    is_form: bool
    choices: int


_ORDER: Final = msgspec.msgpack.Decoder(Order)
_ANSWER: Final = msgspec.msgpack.Decoder(Answered | Refused)
_ENCODER: Final = msgspec.msgpack.Encoder()


def ask(channel: socket.socket, order: ReadOrder, body: Body) -> BodyRead:
    """Have a body read at the other end; blocks, and holds Python's lock for none of the copying.

    Raises:
        RouterError: The body is refused.
        OSError, EOFError: The other end is gone, or too slow (TimeoutError).
    """
    head = Order(
        order.path,
        list(order.allowed),
        order.usage_injection,
        list(order.rewritten),
        order.max_prompt_bytes,
        order.is_renamed,
    )
    _send(channel, _ENCODER.encode(head), (body,))
    encoded, (prompt, before, after) = _receive(channel)
    answer = _ANSWER.decode(encoded)
    if isinstance(answer, Refused):
        raise RouterError(answer.reason, answer.message, param=answer.param)
    request = InferenceRequest(
        operation=answer.operation,
        model=answer.model,
        stream=answer.stream,
        prompt=bytes(prompt),
        prompt_tokens=answer.prompt_tokens,
        max_tokens=answer.max_tokens,
        cache_salt=answer.cache_salt,
        body=answer.kept,
        is_multimodal=answer.is_multimodal,
        widths=tuple(answer.widths),
        more_bytes=answer.more_bytes,
        has_body=False,
        choices=answer.choices,
    )
    around_model = (before, after) if answer.is_encoded else None
    return BodyRead(request, answer.is_changed, around_model, answer.fingerprint, answer.is_form)


def await_ready(channel: socket.socket) -> None:
    """Wait until the other end takes orders, or has died, as the first order finds; raises TimeoutError."""
    with suppress(ConnectionError):
        channel.recv(len(_READY))


def answer_all(channel: socket.socket) -> None:
    """Answer orders until the other end is gone."""
    while True:
        try:
            encoded, (body, _, _) = _receive(channel)
        except EOFError:
            return
        _answer(channel, encoded, bytes(body))
        del body


def _answer(channel: socket.socket, encoded: memoryview, body: bytes) -> None:
    said = _ORDER.decode(encoded)
    order = ReadOrder(
        said.path,
        frozenset(said.allowed),
        said.usage_injection,
        frozenset(said.rewritten),
        said.max_prompt_bytes,
        said.is_renamed,
    )
    head: Answered | Refused
    try:
        read = read_body(order, body)
    except RouterError as error:
        head, pieces = Refused(error.reason, error.message, error.param), ()
    else:
        request = read.request
        head = Answered(
            request.operation,
            request.model,
            request.stream,
            request.prompt_tokens,
            request.max_tokens,
            request.cache_salt,
            request.is_multimodal,
            list(request.widths),
            request.more_bytes,
            request.body,
            read.is_changed,
            read.around_model is not None,
            read.fingerprint,
            read.is_form,
            request.choices,
        )
        pieces = (request.prompt, *(read.around_model or ()))
    _send(channel, _ENCODER.encode(head), pieces)


def _send(channel: socket.socket, head: bytes, pieces: Sequence[Body]) -> None:
    lengths = [*map(len, pieces), 0, 0, 0][:3]
    channel.sendall(_HEAD.pack(len(head), *lengths) + head)
    for piece in pieces:
        channel.sendall(piece)


def _receive(channel: socket.socket) -> tuple[memoryview, tuple[memoryview, memoryview, memoryview]]:
    of_head, *lengths = _HEAD.unpack(_exactly(channel, _HEAD.size))
    head = _exactly(channel, of_head)
    first, second, third = (_exactly(channel, length) for length in lengths)
    return head, (first, second, third)


def _exactly(channel: socket.socket, length: int) -> memoryview:
    """So many bytes; raises EOFError where they end before."""
    # A bytearray is cleared at once, under Python's lock; of a mapping each page is, as it is written to.
    room = memoryview(mmap.mmap(-1, length) if length > _LARGE_BYTES else bytearray(length))
    left = room
    while left:
        received = channel.recv_into(left)
        if not received:
            raise EOFError("the other end is gone")
        left = left[received:]
    return room


def main() -> None:
    """Serve the socket whose file descriptor is the argument."""
    signals.ignore()  # they are meant for the gateway, which ends us with it
    os.nice(_NICENESS)
    gc.disable()  # decoded bodies have no cycles, and looking for some takes longer than decoding
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        channel.setblocking(True)
        channel.sendall(_READY)
        answer_all(channel)


if __name__ == "__main__":
    main()
