"""Compressed bodies on their way to a decision: at once or in a thread, bounded, and gone with the client."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from extproc.errors import Reason, RouterError
from extproc.request.compression import decode
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.server.bodies import unpacking
from extproc.server.bodies.unpacking import INLINE_BYTES, Unpacking
from extproc.values.deciding import Deciding, Later, Now, Refusal
from extproc.values.exchange import Body, RequestHeaders
from extproc.values.pending import Pending
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from metadata_center.types import RequestId
from tests.conftest import request_line, result_of

SMALL = b'{"model": "m"}'
LARGE = Random(1).randbytes(200_000).hex().encode()


PLAIN = Decision(RequestId("r"), Operation.CHAT, True, Plan("pool"))
"""What is decided about any body."""


class Decider:
    """Decides at once, later or when asked again, and keeps what it was given.

    Attributes:
        bodies: What was decided about.
        answer: What comes of it.
    """

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.answer: Any = Now(PLAIN)

    def __call__(self, request: RequestHeaders, body: Body) -> Deciding[Decision]:
        """Decide."""
        assert request.path
        self.bodies.append(bytes(body))
        answer: Deciding[Decision] = self.answer
        return answer


def made(decider: Decider, **settings: Any) -> Unpacking:
    """In front of it."""
    return Unpacking(decider, lambda: RouterSettings(**settings))


def gzipped(**headers: str) -> RequestHeaders:
    """A request whose body is said to be gzip."""
    return request_line("r", **{"content_encoding": "gzip", **headers})


def sent(decision: Decision) -> bytes:
    """The body that is sent in place of the client's, whose encoding is said to be none."""
    assert decision.drops_encoding
    return b"".join(decision.new_body or ())


def decided(deciding: Deciding[Decision]) -> Decision:
    """What was decided at once."""
    assert isinstance(deciding, Now)
    return deciding.decision


async def test_an_uncompressed_body_passes_through() -> None:
    """What has no coding is not touched, nor is its decision."""
    decider = Decider()
    assert made(decider).decide(request_line("r"), SMALL) is decider.answer
    assert decider.bodies == [SMALL]


async def test_a_small_body_is_decoded_on_the_spot() -> None:
    """Its decision is there at once, and says of itself what the plain body's does."""
    decider = Decider()
    decision = decided(made(decider).decide(gzipped(), gzip.compress(SMALL)))
    assert decision == replace(PLAIN, new_body=(SMALL,), drops_encoding=True)
    assert decider.bodies == [SMALL]


async def test_a_large_body_is_decoded_later() -> None:
    """Envoy is asked to wait; what comes then may itself come later."""
    answers: tuple[Callable[[Pending[Decision]], Deciding[Decision]], ...]
    answers = (lambda _: Now(PLAIN), Later, lambda soon: Later(soon, 1.0))
    for answer in answers:
        decider, soon = Decider(), Pending[Decision]()
        decider.answer = answer(soon)
        packed = gzip.compress(LARGE)
        assert len(packed) > INLINE_BYTES
        deciding = made(decider).decide(gzipped(), packed)
        assert isinstance(deciding, Later)
        assert deciding.patience_s is not None
        assert decider.bodies == []
        asyncio.get_running_loop().call_later(0.05, soon.give, PLAIN)
        unpacked = await result_of(deciding.pending)
        assert (decider.bodies, sent(unpacked)) == ([LARGE], LARGE)


async def test_a_small_body_that_has_to_wait_keeps_its_patience() -> None:
    """What is pending about a decoded body is so for the same time."""
    for patience_s in (7.0, None):
        decider, pending = Decider(), Pending[Decision]()
        decider.answer = Later(pending, patience_s)
        deciding = made(decider).decide(gzipped(), gzip.compress(SMALL))
        assert isinstance(deciding, Later)
        assert deciding.patience_s == patience_s
        pending.give(PLAIN)
        assert sent(await result_of(deciding.pending)) == SMALL


async def test_identity_is_no_coding() -> None:
    """The body stays the client's, the header goes. An empty body is refused later."""
    decider = Decider()
    decision = decided(made(decider).decide(gzipped(content_encoding="identity"), SMALL))
    assert decision == replace(PLAIN, drops_encoding=True)
    made(decider).decide(gzipped(), b"")
    assert decider.bodies == [SMALL, b""]


async def test_a_new_body_of_the_decision_wins() -> None:
    """A rewritten decoded body is what is sent."""
    decider = Decider()
    decider.answer = Now(replace(PLAIN, new_body=(b"new",)))
    decision = decided(made(decider).decide(gzipped(), gzip.compress(SMALL)))
    assert sent(decision) == b"new"


@pytest.mark.parametrize("body", [gzip.compress(LARGE)[:-1], gzip.compress(SMALL)[:-1]])
async def test_refusals_come_out_of_a_thread_as_well(body: bytes) -> None:
    """Whether at once or later, a damaged body is refused and no decision is made."""
    decider = Decider()
    assert (await refused(made(decider).decide(gzipped(), body))).reason is Reason.INVALID_REQUEST
    assert decider.bodies == []


async def refused(deciding: Deciding[Decision]) -> RouterError:
    """The refusal, at once or later."""
    if isinstance(deciding, Refusal):
        return deciding.error
    assert isinstance(deciding, Later)
    with pytest.raises(RouterError) as caught:
        await result_of(deciding.pending)
    return caught.value


async def test_an_unknown_coding_is_refused() -> None:
    """By its name, before anything is decoded."""
    decider = Decider()
    refusal = await refused(made(decider).decide(gzipped(content_encoding="compress"), SMALL))
    assert refusal.reason is Reason.UNSUPPORTED_ENCODING
    assert decider.bodies == []


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many or so large, a body is refused at once; there is room again when they are done."""
    decider, packed = Decider(), gzip.compress(LARGE)
    monkeypatch.setattr(unpacking, "MAX_WAITING_BYTES", 2 * len(packed))
    front = made(decider)
    waiting = []
    for _ in range(2):
        deciding = front.decide(gzipped(), packed)
        assert isinstance(deciding, Later)
        waiting.append(result_of(deciding.pending))
    third = front.decide(gzipped(), packed)  # in the same turn, so neither is done, however quick its thread
    refusal = await refused(third)
    assert (refusal.reason, refusal.retry_after_s) == (Reason.READERS_BUSY, 1)
    await asyncio.gather(*waiting)
    again = front.decide(gzipped(), packed)
    assert isinstance(again, Later)
    assert sent(await result_of(again.pending)) == LARGE
    monkeypatch.setattr(unpacking, "MAX_WAITING", 0)
    assert isinstance(front.decide(gzipped(), packed), Refusal)
    front.close()


async def test_a_small_body_waits_for_no_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them came before it: one thread is for small ones."""
    large, small = gzip.compress(Random(1).randbytes(400_000)), gzip.compress(LARGE)
    assert len(small) < 256 * 1024 < len(large)
    may_end = threading.Event()

    def slowly(body: bytes, codings: Sequence[str], most: int) -> bytes:
        if body == large:
            may_end.wait(30.0)
        return decode(body, codings, most)

    monkeypatch.setattr(unpacking, "decode", slowly)
    front = made(Decider())
    waiting = []
    for _ in range(3):
        deciding = front.decide(gzipped(), large)
        assert isinstance(deciding, Later)
        waiting.append(result_of(deciding.pending))
    await asyncio.sleep(0.05)
    last = front.decide(gzipped(), small)
    assert isinstance(last, Later)
    try:
        assert sent(await asyncio.wait_for(result_of(last.pending), 20.0)) == LARGE
    finally:
        may_end.set()
    await asyncio.gather(*waiting)
    front.close()


async def test_a_client_that_leaves_at_once_leaves_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before anything was begun for it."""
    packed = gzip.compress(LARGE)
    monkeypatch.setattr(unpacking, "MAX_WAITING", 1)
    front = made(Decider())
    for _ in range(3):
        deciding = front.decide(gzipped(), packed)
        assert isinstance(deciding, Later)
        deciding.pending.cancel()
        await asyncio.sleep(0.01)
    front.close()


async def test_a_client_that_leaves_takes_its_decision_along() -> None:
    """Cancelled while decoding, nothing is decided; cancelled later, what was waited for is cancelled."""
    decider, pending = Decider(), Pending[Decision]()
    decider.answer = Later(pending, 5.0)
    front = made(decider, hold=HoldSettings())
    decoding = front.decide(gzipped(), gzip.compress(LARGE))
    assert isinstance(decoding, Later)
    await asyncio.sleep(0)
    decoding.pending.cancel()
    waiting = front.decide(gzipped(), gzip.compress(SMALL))
    assert isinstance(waiting, Later)
    waiting.pending.cancel()
    assert pending.is_over
    await asyncio.sleep(0.05)
    assert decider.bodies == [SMALL]
