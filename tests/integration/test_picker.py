"""The endpoint-picker service over a worker's real ledger, sent by hand what a gateway says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import Reason, RouterError
from extproc.picker.dialect import PickerDialect
from extproc.picker.health import NOT_SERVING, SERVING, Health
from extproc.picker.service import ALIVE_S, Picker
from extproc.transport.seam import Status
from extproc.values.deciding import Deciding, Later
from extproc.values.endings import RequestEvent
from extproc.values.outcomes import Ended
from extproc.values.pending import Pending
from extproc.values.placements import Decision
from tests.conftest import LEASE_S, OWNER, Rig, build_rig, chat

UPLOAD_S = 30.0
MAX_BYTES = 10_000


class FakeCall:
    """Keeps what a service does to a call."""

    peer = "test"

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.ended: list[Status] = []

    def send(self, message: bytes, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        self.sent.append(message)

    def finish(self, last: bytes | None = None) -> None:
        """See `Call`."""
        self.ended.append(Status.OK)

    def abort(self, status: Status, detail: str) -> None:
        """See `Call`."""
        self.ended.append(status)


class Gateway:
    """A foreign gateway before a rig.

    Attributes:
        rig: Decides.
        events: What the ledger was given.
        picker: The service.
    """

    def __init__(self, decide: Callable[..., Deciding[Decision]] | None = None) -> None:
        self.rig: Rig = build_rig()
        self.events: list[RequestEvent] = []
        if decide is not None:
            self.rig.gateway.decide = decide
        numbers = iter(range(100_000))
        self.picker = Picker(
            self.rig.gateway.judge_for_picker,
            self.rig.gateway,
            self._noted,
            PickerDialect(1, (), lambda: f"r{next(numbers)}"),
            OWNER,
            MAX_BYTES,
            UPLOAD_S,
            lambda: True,
            self.rig.clock,
        )
        self.call = FakeCall()
        self.exchange = self.picker.open(self.call)

    def _noted(self, event: RequestEvent) -> None:
        self.events.append(event)
        self.rig.ends.take(event, self.rig.clock())

    def says(self, **message: Any) -> list[pb.ProcessingResponse]:
        """One message of the gateway; what was answered."""
        before = len(self.call.sent)
        self.exchange.on_message(pb.ProcessingRequest(**message).SerializeToString())
        return [pb.ProcessingResponse.FromString(raw) for raw in self.call.sent[before:]]

    def asks(self, *, stream: bool = True) -> list[pb.ProcessingResponse]:
        """A whole chat request."""
        headers = pb.HttpHeaders()
        for name, value in ((":method", "POST"), (":path", "/v1/chat/completions")):
            headers.headers.headers.add(key=name, raw_value=value.encode())
        assert self.says(request_headers=headers) == []
        body = chat(stream=stream)
        return self.says(request_body=pb.HttpBody(body=body, end_of_stream=True))

    def answers(self, served: str | None = None) -> None:
        """The headers of an answer."""
        message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
        message.response_headers.headers.headers.add(key=":status", raw_value=b"200")
        if served is not None:
            message.metadata_context.filter_metadata["envoy.lb"].update(
                {"x-gateway-destination-endpoint-served": served}
            )
        self.exchange.on_message(message.SerializeToString())

    def charged(self) -> int:
        """Requests that are."""
        return self.rig.scheduling.load.in_flight

    def is_clean(self) -> bool:
        """Nothing is charged, held or open."""
        return not (self.charged() or len(self.picker) or len(self.rig.scheduling.running))


TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'


def test_a_stream_from_end_to_end() -> None:
    """Charged when it is decided, its prefill released by the first token, all of it by the end."""
    gateway = Gateway()
    first, second = gateway.asks()
    assert first.WhichOneof("response") == "request_headers"
    assert second.request_body.response.body_mutation.streamed_response.end_of_stream
    assert gateway.charged() == 1
    gateway.rig.clock.advance(0.5)
    gateway.answers()
    gateway.says(response_body=pb.HttpBody(body=TOKEN))
    gateway.rig.clock.advance(1.0)
    gateway.says(response_body=pb.HttpBody(body=USAGE))
    gateway.says(response_body=pb.HttpBody(end_of_stream=True))
    assert gateway.charged() == 0
    (ending,) = gateway.rig.endings
    outcome = ending.outcome
    assert (outcome.ended, outcome.status, outcome.attempts) == (Ended.COMPLETED, 200, 1)
    assert (outcome.ttft_s, outcome.duration_s, ending.stream_s) == (0.5, 1.5, 1.0)
    assert (outcome.completion_tokens, outcome.response_bytes) == (2, len(TOKEN + USAGE))
    assert gateway.call.ended == []
    gateway.exchange.on_half_close()
    assert gateway.call.ended == [Status.OK]
    assert gateway.is_clean()


def test_a_stream_that_ends_early_is_the_clients_leaving() -> None:
    """Whenever; the endpoint is not blamed."""
    gateway = Gateway()
    gateway.asks()
    gateway.answers()
    gateway.says(response_body=pb.HttpBody(body=TOKEN))
    gateway.exchange.on_reset()
    gateway.exchange.on_reset()
    (ending,) = gateway.rig.endings
    assert ending.outcome.ended is Ended.CLIENT_ABORT
    assert gateway.is_clean()


def test_the_endpoint_that_served_is_charged() -> None:
    """From the moment that the gateway says so."""
    gateway = Gateway()
    gateway.asks()
    chosen = gateway.rig.chosen("r0")
    other = next(key for key in gateway.rig.fleet.keys if key != chosen)
    gateway.answers(str(gateway.rig.places[other]))
    loads = gateway.rig.scheduling.load.view(gateway.rig.scheduling.load.slots([chosen, other]))
    assert list(loads.requests) == [0, 1]
    gateway.says(response_body=pb.HttpBody(body=USAGE, end_of_stream=True))
    assert gateway.rig.endings[0].outcome.endpoint == other
    gateway.exchange.on_half_close()
    assert gateway.is_clean()


@pytest.mark.parametrize("served", ["", "nonsense", "1.2.3.4", "[::"])
def test_nonsense_about_the_endpoint_served_is_passed_over(served: str) -> None:
    """The choice stands."""
    gateway = Gateway()
    gateway.asks()
    gateway.answers(served)
    assert gateway.events == []
    gateway.exchange.on_reset()
    assert gateway.is_clean()


def test_a_long_answer_keeps_its_lease() -> None:
    """As long as its stream is there."""
    gateway = Gateway()
    gateway.asks()
    for _ in range(int(3 * LEASE_S / ALIVE_S) + 1):
        gateway.rig.clock.advance(ALIVE_S)
        gateway.picker.tick()
        gateway.rig.scheduling.running.advance(gateway.rig.clock())
    assert gateway.charged() == 1
    gateway.exchange.on_reset()
    assert gateway.rig.endings[0].outcome.ended is Ended.CLIENT_ABORT
    assert gateway.is_clean()


def test_a_body_that_does_not_come_is_refused() -> None:
    """Once, after its time."""
    gateway = Gateway()
    headers = pb.HttpHeaders()
    for name, value in ((":method", "POST"), (":path", "/v1/chat/completions")):
        headers.headers.headers.add(key=name, raw_value=value.encode())
    gateway.says(request_headers=headers)
    gateway.picker.tick()
    assert gateway.call.sent == []
    gateway.rig.clock.advance(UPLOAD_S)
    gateway.picker.tick()
    gateway.picker.tick()
    (raw,) = gateway.call.sent
    assert pb.ProcessingResponse.FromString(raw).immediate_response.status.code == 408
    assert gateway.call.ended == [Status.OK]
    assert gateway.is_clean()


@pytest.mark.parametrize("how", ["given", "refused", "faulty", "left"])
def test_decisions_that_come_later(how: str) -> None:
    """Are answered when they are there; one that is not waited for any more is cancelled."""
    pending: Pending[Decision] = Pending()
    gateway = Gateway(lambda *_: Later(pending))
    assert gateway.asks() == []
    if how == "given":
        pending.give(build_rig().decide())
        assert pb.ProcessingResponse.FromString(gateway.call.sent[0]).HasField("request_headers")
        gateway.exchange.on_reset()
    elif how == "refused":
        pending.fail(RouterError(Reason.OVERLOADED, "No."))
        answer = pb.ProcessingResponse.FromString(gateway.call.sent[0]).immediate_response
        assert answer.status.code == 429
    elif how == "faulty":
        pending.fail(ValueError("a bug"))
        assert gateway.call.ended == [Status.UNKNOWN]
    else:
        gateway.exchange.on_reset()
        assert pending.is_over
    assert gateway.is_clean()


def test_what_the_protocol_does_not_allow_ends_the_stream_and_the_charge() -> None:
    """Headers twice, after the decision."""
    gateway = Gateway()
    gateway.asks()
    gateway.says(request_headers=pb.HttpHeaders())
    assert gateway.call.ended == [Status.INVALID_ARGUMENT]
    assert gateway.is_clean()


def test_a_watch_of_health_gets_each_change() -> None:
    """At once how it is, and then only news; leaving ends it."""
    is_ready = True
    health = Health(lambda: is_ready)
    call = FakeCall()
    _, watch = health.rpcs
    receiver = watch.open(call)
    receiver.on_message(b"")
    receiver.on_half_close()
    health.review()
    assert call.sent == [SERVING]
    is_ready = False
    health.review()
    assert call.sent == [SERVING, NOT_SERVING]
    health.close()
    assert call.ended == [Status.UNAVAILABLE]
