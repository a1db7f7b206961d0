"""Requests whose bodies are compressed: decoded first, decided then, and sent on as what they were before.

Rules:
    1. A request without `content-encoding` passes through at the price of one look-up.
    2. What may take longer than a few milliseconds is decoded in a thread, and Envoy is asked to wait for it;
       the decoders give up the interpreter's lock. No other request waits.
    3. What waits for a thread is bounded in number and bytes; beyond that it is refused at once. The smallest
       waits the shortest: a client with large bodies cannot make others' wait for them.
    4. The decoded body replaces the client's, unless the decision has a body of its own, and the header
       `content-encoding` goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from extproc.errors import Reason, RouterError
from extproc.request.compression import ALWAYS_BYTES, MAX_RATIO, codings_of, decode
from extproc.routing.gateway import Decide
from extproc.routing.settings import RouterSettings
from extproc.server.bodies.turns import Turns
from extproc.server.process.background import Background
from extproc.values.deciding import Deciding, Later, Now, Refusal, settle
from extproc.values.exchange import Body, RequestHeaders
from extproc.values.headers import CONTENT_ENCODING
from extproc.values.pending import Pending
from extproc.values.placements import Decision

INLINE_BYTES: Final = ALWAYS_BYTES // MAX_RATIO
"""Larger bodies go to a thread: those up to here become a MiB at most, whatever is in them."""

MAX_WAITING: Final = 256
MAX_WAITING_BYTES: Final = 256 * 1024 * 1024
"""Compressed bytes that wait for a thread or are in one."""

_SMALL_BYTES: Final = 256 * 1024
_ROOMS: Final = (None, _SMALL_BYTES)
"""Most compressed bytes of a body per thread: one takes all, one is kept for small ones."""

_PATIENCE_S: Final = 59.0
"""A second less than `max_message_timeout` of envoy/bootstrap.yaml, beyond which Envoy does not wait."""

_MAX_WAIT_S: Final = 20.0
"""Until a body is decoded; the worst 32 MiB take a second of a busy core."""


def unpacked(decision: Decision, body: bytes | None) -> Decision:
    """A decision about a decoded body, for a request that came with `content-encoding`.

    Args:
        decision: As it is for the decoded body; if it has a new body, that one is sent.
        body: The decoded one; None if the client's is compressed by name only.
    """
    new_body = decision.new_body
    if new_body is None and body is not None:
        new_body = (body,)
    return replace(decision, new_body=new_body, drops_encoding=True)


def _busy() -> RouterError:
    return RouterError(Reason.READERS_BUSY, "Too many compressed requests are being read.", retry_after_s=1)


class Unpacking:
    """Decodes what is compressed before it is decided.

    Args:
        decide: Decides about bodies as they are.
        settings: Those in force.
    """

    def __init__(self, decide: Decide, settings: Callable[[], RouterSettings]) -> None:
        self._decide = decide
        self._settings = settings
        self._background = Background()
        self._turns = Turns(_ROOMS, "decode")
        self._waiting = 0
        self._waiting_bytes = 0

    def decide(self, request: RequestHeaders, body: Body) -> Deciding[Decision]:
        """Decide, now or later, or refuse."""
        header = request.headers.get(CONTENT_ENCODING)
        if header is None:
            return self._decide(request, body)
        try:
            return self._decode_and_decide(request, body, header)
        except RouterError as error:
            return Refusal(error.untraced())

    def close(self) -> None:
        """Begin nothing more; what is being decoded is finished for no one."""
        self._turns.close()

    def _decode_and_decide(self, request: RequestHeaders, body: Body, header: str) -> Deciding[Decision]:
        codings = codings_of(header)
        if not codings or not body:  # `identity`, or nothing, which the decision refuses
            return self._unpacked(self._decide(request, body), None)
        settings = self._settings()
        body = bytes(body)  # a view, if it is large: see `wire.LargeBody`
        if len(body) <= INLINE_BYTES:
            decoded = decode(body, codings, settings.max_body_bytes)
            return self._unpacked(self._decide(request, decoded), decoded)
        if self._waiting >= MAX_WAITING or self._waiting_bytes + len(body) > MAX_WAITING_BYTES:
            raise _busy()
        decoding = self._begin(body, codings, settings)
        decision: Pending[Decision] = Pending(decoding.cancel)

        def decide(decoded: bytes) -> None:
            try:
                settle(decision, self._unpacked(self._decide(request, decoded), decoded))
            except Exception as error:  # a bug: this stream fails alone
                decision.fail(error)

        decoding.then(decide, decision.fail)
        return Later(decision, _PATIENCE_S)

    def _begin(self, body: bytes, codings: tuple[str, ...], settings: RouterSettings) -> Pending[bytes]:
        """Counted at once: others of the same turn are not to find the room that it takes."""

        def ended() -> None:
            self._waiting -= 1
            self._waiting_bytes -= len(body)

        self._waiting += 1
        self._waiting_bytes += len(body)
        return self._background.begin(self._decoded(body, codings, settings), ended)

    async def _decoded(self, body: bytes, codings: tuple[str, ...], settings: RouterSettings) -> bytes:
        held_s = 0.0 if settings.hold is None else settings.hold.max_s
        try:
            async with asyncio.timeout(min(_MAX_WAIT_S, _PATIENCE_S - held_s)):
                return await self._turns.work(
                    len(body), partial(decode, body, codings, settings.max_body_bytes)
                )
        except TimeoutError:
            raise _busy() from None

    @staticmethod
    def _unpacked(deciding: Deciding[Decision], body: bytes | None) -> Deciding[Decision]:
        match deciding:
            case Now(decision):
                return Now(unpacked(decision, body))
            case Later(pending, patience_s):
                later: Pending[Decision] = Pending(pending.cancel)
                pending.then(lambda decision: later.give(unpacked(decision, body)), later.fail)
                return Later(later, patience_s)
        return deciding
