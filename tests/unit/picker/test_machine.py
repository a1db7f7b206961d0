"""The endpoint-picker machine, event by event."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from extproc.errors import Reason, RouterError
from extproc.picker.machine import AnswerMode, Echo, End, PickStream, SendRequest
from extproc.protocol.machine import (
    Abandon,
    Decide,
    Effect,
    Effects,
    Finish,
    MessageKind,
    Phase,
    SendContinue,
    SendImmediate,
    SendPass,
    SpuriousMessage,
)
from extproc.values.exchange import (
    NEED_BODY,
    NEED_BODY_AND_HEAD,
    AnswerAtOnce,
    LineVerdict,
    PassTo,
    RefuseAtOnce,
    RequestHeaders,
)
from extproc.values.placements import Plan

PASS = PassTo(Plan("c", ("10.0.0.1:80",)))
VERDICTS: dict[str, LineVerdict] = {
    "POST": NEED_BODY,
    "RESPONSES": NEED_BODY_AND_HEAD,
    "PASS": PASS,
    "ANSWER": AnswerAtOnce(200, b"{}"),
    "REFUSE": RefuseAtOnce(RouterError(Reason.UNKNOWN_PATH, "No.")),
}
MAX_BYTES = 10


def headers(method: str = "POST", *, end: bool = False) -> RequestHeaders:
    """Of a request that `VERDICTS` judges by its method."""
    return RequestHeaders(method, "/v1/chat/completions", {}, end)


def stream() -> PickStream:
    """A fresh one."""
    return PickStream(lambda request: VERDICTS[request.method], MAX_BYTES)


def decided_stream(mode: AnswerMode = AnswerMode.ECHOED) -> PickStream:
    """One whose request was answered."""
    machine = stream()
    machine.receive_headers(headers(), mode)
    machine.receive_body(b"ab", end_of_stream=True)
    machine.decided()
    return machine


def test_headers_are_held_until_the_body_is_whole() -> None:
    """Nothing is said before the end; then all of it is there, whatever the chunks."""
    machine = stream()
    assert machine.receive_headers(headers()) == ()
    assert machine.receive_body(b"ab", end_of_stream=False) == ()
    assert machine.receive_body(b"cd", end_of_stream=False) == ()
    (effect,) = machine.receive_body(b"", end_of_stream=True)
    assert effect == Decide(headers(), b"abcd")
    assert machine.decided() == (SendRequest(b"abcd", trailers=False),)


def test_the_end_twice_is_one_decision() -> None:
    """While it is decided and after it was, the second end is not answered."""
    machine = stream()
    machine.receive_headers(headers())
    machine.receive_body(b"ab", end_of_stream=True)
    assert machine.receive_body(b"ab", end_of_stream=True) == ()
    assert machine.decided() == (SendRequest(b"ab", trailers=False),)
    assert machine.receive_body(b"ab", end_of_stream=True) == ()
    assert machine.phase is Phase.AWAIT_FIRST_CHUNK


def test_trailers_end_the_request_and_are_answered() -> None:
    """After chunks of which none was the last."""
    machine = stream()
    machine.receive_headers(headers())
    machine.receive_body(b"ab", end_of_stream=False)
    assert machine.receive_trailers() == (Decide(headers(), b"ab"),)
    assert machine.decided() == (SendRequest(b"ab", trailers=True),)


def test_late_trailers_are_answered_too() -> None:
    """While it is decided they wait for it; afterwards they pass at once."""
    machine = stream()
    machine.receive_headers(headers())
    machine.receive_body(b"ab", end_of_stream=True)
    assert machine.receive_trailers() == ()
    assert machine.decided() == (SendRequest(b"ab", trailers=True),)
    assert machine.receive_trailers() == (SendContinue(MessageKind.REQUEST_TRAILERS),)


def test_a_request_without_a_body_is_decided_at_once() -> None:
    """And has none afterwards."""
    machine = stream()
    (effect,) = machine.receive_headers(headers(end=True))
    assert effect == Decide(headers(end=True), b"")
    assert machine.decided() == (SendRequest(None, trailers=False),)


def test_the_head_of_some_answers_is_wanted() -> None:
    """As the verdict says."""
    machine = stream()
    machine.receive_headers(headers("RESPONSES"))
    assert machine.wants_head
    assert not decided_stream().wants_head


@pytest.mark.parametrize("end", [False, True])
def test_what_passes_is_echoed_in_both_directions(end: bool) -> None:
    """No endpoint is charged, so nothing ends."""
    machine = stream()
    assert machine.receive_headers(headers("PASS", end=end)) == (SendPass(PASS),)
    if not end:
        assert machine.receive_body(b"x" * 100, end_of_stream=False) == (Echo(),)
        assert machine.receive_body(b"", end_of_stream=True) == (Echo(),)
    assert machine.receive_body(b"", end_of_stream=True) == ()
    assert machine.receive_answer_headers(end_of_stream=False) == (
        SendContinue(MessageKind.RESPONSE_HEADERS),
    )
    assert machine.receive_answer_chunk(end_of_stream=True) == (Echo(),)
    assert machine.closed() == (Finish(),)


@pytest.mark.parametrize(("method", "status"), [("ANSWER", 200), ("REFUSE", 404)])
def test_answers_of_our_own_end_the_stream(method: str, status: int) -> None:
    """The only way in which we end it."""
    effects = stream().receive_headers(headers(method, end=True))
    assert isinstance(effects[0], SendImmediate)
    assert (effects[0].status, effects[1:]) == (status, (Finish(),))


@pytest.mark.parametrize("last", [b"x", b""])
def test_a_body_beyond_its_bound_is_refused_as_it_comes(last: bytes) -> None:
    """Exactly the bound is taken."""
    machine = stream()
    machine.receive_headers(headers())
    assert machine.receive_body(b"x" * MAX_BYTES, end_of_stream=False) == ()
    effects = machine.receive_body(last, end_of_stream=True)
    if last:
        assert isinstance(effects[0], SendImmediate)
        assert (effects[0].status, effects[1]) == (413, Finish())
        assert machine.receive_body(b"x", end_of_stream=True) == ()
    else:
        assert effects == (Decide(headers(), b"x" * MAX_BYTES),)


def test_a_body_that_does_not_come_is_given_up() -> None:
    """Once it is whole, time says nothing."""
    machine = stream()
    assert machine.timed_out() == ()
    machine.receive_headers(headers())
    effects = machine.timed_out()
    assert isinstance(effects[0], SendImmediate)
    assert effects[0].status == 408
    assert decided_stream().timed_out() == ()


@pytest.mark.parametrize("ending", ["headers", "chunk", "trailers"])
def test_the_end_of_the_answer_ends_the_request_once(ending: str) -> None:
    """By whichever message comes last; the stream stays until the peer leaves."""
    machine = decided_stream()
    effects: list[Effect] = [*machine.receive_answer_headers(end_of_stream=ending == "headers")]
    if ending != "headers":
        assert End(True) not in effects
        effects += machine.receive_answer_chunk(end_of_stream=ending == "chunk")
    if ending == "trailers":
        assert End(True) not in effects
        effects += machine.receive_answer_trailers()
    assert effects[-1] == End(True)
    assert Finish() not in effects
    assert machine.receive_answer_chunk(end_of_stream=True) == ()
    assert machine.closed() == (Finish(),)


def test_a_stream_that_ends_before_its_answer_ends_the_request() -> None:
    """As one whose client left."""
    machine = decided_stream()
    assert machine.closed() == (End(False), Finish())
    assert machine.closed() == (Finish(),)
    machine = decided_stream()
    machine.receive_answer_headers(end_of_stream=False)
    machine.receive_answer_chunk(end_of_stream=False)
    assert machine.closed() == (End(False), Finish())


def test_an_answer_of_envoys_own_gives_the_request_up() -> None:
    """It came while the decision was pending, which is not wanted any more."""
    machine = stream()
    machine.receive_headers(headers())
    machine.receive_body(b"ab", end_of_stream=True)
    assert machine.receive_answer_headers(end_of_stream=True) == (
        Abandon(),
        SendContinue(MessageKind.RESPONSE_HEADERS),
    )
    with pytest.raises(SpuriousMessage):
        machine.decided()
    assert machine.closed() == (Finish(),)


def test_a_client_that_leaves_while_it_is_decided_gets_no_decision() -> None:
    """And there is no end of what was not charged."""
    machine = stream()
    machine.receive_headers(headers())
    machine.receive_body(b"ab", end_of_stream=True)
    assert machine.closed() == (Abandon(), Finish())


def test_refusals_are_whole_answers() -> None:
    """With the status of the reason."""
    machine = stream()
    machine.receive_headers(headers())
    machine.receive_body(b"ab", end_of_stream=True)
    effects = machine.refused(RouterError(Reason.OVERLOADED, "No."))
    assert isinstance(effects[0], SendImmediate)
    assert (effects[0].status, effects[1]) == (429, Finish())


def test_an_answer_that_is_wanted_back_is_never_left() -> None:
    """Envoy would lose what it handed over."""
    machine = decided_stream()
    assert machine.leave() == ()
    machine.receive_answer_headers(end_of_stream=False)
    assert machine.leave() == ()
    assert machine.closed() == (End(False), Finish())


def test_an_answer_that_is_shown_passes_at_a_word() -> None:
    """None of it is given back; it ends where it ends, or where it is left."""
    machine = decided_stream(AnswerMode.SHOWN)
    machine.receive_answer_headers(end_of_stream=False)
    passes = SendContinue(MessageKind.RESPONSE_BODY)
    assert machine.receive_answer_chunk(end_of_stream=False) == (passes,)
    assert machine.receive_answer_chunk(end_of_stream=True) == (passes, End(True))
    assert machine.leave() == ()
    machine = decided_stream(AnswerMode.SHOWN)
    machine.receive_answer_headers(end_of_stream=False)
    assert machine.receive_answer_chunk(end_of_stream=False) == (passes,)
    assert machine.leave() == (Finish(),)
    assert machine.closed() == (Finish(),)


def test_an_answer_may_be_shown_without_its_headers() -> None:
    """The gateway skips them; one that comes before the decision gives the request up."""
    machine = decided_stream(AnswerMode.SHOWN)
    passes = SendContinue(MessageKind.RESPONSE_BODY)
    assert machine.receive_answer_chunk(end_of_stream=False) == (passes,)
    assert machine.receive_answer_chunk(end_of_stream=True) == (passes, End(True))
    machine = stream()
    machine.receive_headers(headers(), AnswerMode.SHOWN)
    machine.receive_body(b"ab", end_of_stream=True)
    assert machine.receive_answer_chunk(end_of_stream=True) == (Abandon(), passes)


def test_an_answer_that_is_not_seen_ends_with_its_stream() -> None:
    """If its headers came; else its client left before there was one. Or it is left at once."""
    machine = decided_stream(AnswerMode.UNSEEN)
    assert machine.receive_answer_headers(end_of_stream=False) == (
        SendContinue(MessageKind.RESPONSE_HEADERS),
    )
    assert machine.closed() == (End(True), Finish())
    assert decided_stream(AnswerMode.UNSEEN).closed() == (End(False), Finish())
    machine = decided_stream(AnswerMode.UNSEEN)
    assert machine.leave() == (Finish(),)
    assert machine.closed() == (Finish(),)


EVENTS: dict[str, Callable[[PickStream, random.Random], Effects]] = {
    "headers": lambda machine, rng: machine.receive_headers(
        headers(rng.choice(list(VERDICTS)), end=rng.random() < 0.2), rng.choice(list(AnswerMode))
    ),
    "body": lambda machine, rng: machine.receive_body(b"ab", end_of_stream=rng.random() < 0.5),
    "trailers": lambda machine, _: machine.receive_trailers(),
    "decided": lambda machine, _: machine.decided(),
    "refused": lambda machine, _: machine.refused(RouterError(Reason.OVERLOADED, "No.")),
    "timed out": lambda machine, _: machine.timed_out(),
    "answer": lambda machine, rng: machine.receive_answer_headers(end_of_stream=rng.random() < 0.2),
    "chunk": lambda machine, rng: machine.receive_answer_chunk(end_of_stream=rng.random() < 0.2),
    "answer trailers": lambda machine, _: machine.receive_answer_trailers(),
    "leave": lambda machine, _: machine.leave(),
}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_each_charge_ends_once(seed: int) -> None:
    """Any events in any order: one answer to the request, one end per decision that was not left."""
    rng = random.Random(seed)
    for _ in range(500):
        machine = stream()
        effects: list[Effect] = []
        charges = left = 0
        for _ in range(rng.randrange(1, 14)):
            name = rng.choice(list(EVENTS))
            try:
                came = EVENTS[name](machine, rng)
            except SpuriousMessage:
                continue
            effects += came
            charges += name == "decided"
            left += name == "leave" and bool(came)
        effects += machine.closed()
        kinds = [type(effect) for effect in effects]
        assert kinds.count(End) + left == charges <= 1
        assert kinds.count(SendRequest) + kinds.count(SendImmediate) + kinds.count(SendPass) <= 1
