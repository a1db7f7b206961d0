"""The endpoint-picker service over a worker's real ledger, sent by hand what a gateway says."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import Reason, RouterError
from extproc.picker.health import NOT_SERVING, SERVING, Health
from extproc.picker.service import ALIVE_S
from extproc.transport.seam import Status
from extproc.values.deciding import Later
from extproc.values.outcomes import Ended
from extproc.values.pending import Pending
from extproc.values.placements import Decision
from extproc.values.pool_policies import ModelRewrite, PoolPolicies
from tests.conftest import LEASE_S, build_rig, chat
from tests.picker_rig import UPLOAD_S, FakeCall, Gateway, Mode

NUM_STREAMS = int(os.environ.get("TOKENWAY_PICKER_STREAMS", "5000"))
"""`make test-picker` has twenty times as many."""

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


def test_an_answer_that_is_not_seen_ends_with_its_stream() -> None:
    """At no cost for its chunks; its prefill is over when it was foreseen to be."""
    gateway = Gateway()
    gateway.asks(mode=Mode.NONE)
    assert gateway.charged() == 1
    assert gateway.rig.load(gateway.rig.chosen("r0"))[1] > 0
    gateway.answers()
    gateway.rig.clock.advance(20.0)
    gateway.rig.scheduling.running.advance(gateway.rig.clock())
    assert gateway.rig.load(gateway.rig.chosen("r0"))[:2] == (1, 0)
    gateway.exchange.on_half_close()
    (ending,) = gateway.rig.endings
    assert (ending.outcome.ended, ending.outcome.status) == (Ended.COMPLETED, 200)
    assert gateway.is_clean()


@pytest.mark.parametrize("leaves", [False, True])
def test_an_answer_that_is_shown_passes_at_a_word(leaves: bool) -> None:
    """And is left after its first token, if streams are: then its end comes from elsewhere."""
    gateway = Gateway(leaves=leaves)
    gateway.asks(mode=Mode.STREAMED)
    gateway.answers()
    (answer,) = gateway.says(response_body=pb.HttpBody(body=TOKEN))
    assert answer == pb.ProcessingResponse(response_body=pb.BodyResponse())
    assert gateway.call.ended == ([Status.OK] if leaves else [])
    assert gateway.charged() == 1
    if leaves:
        assert len(gateway.picker) == 0
        gateway.rig.end("r0")
    else:
        gateway.says(response_body=pb.HttpBody(body=USAGE, end_of_stream=True))
        gateway.exchange.on_half_close()
    (ending,) = gateway.rig.endings
    assert ending.outcome.ended is Ended.COMPLETED
    assert gateway.is_clean()


@pytest.mark.parametrize(("mode", "stream"), [(Mode.NONE, True), (Mode.NONE, False), (Mode.STREAMED, False)])
def test_what_is_of_no_interest_is_left_with_the_decision(mode: int, stream: bool) -> None:
    """What is not seen, and what has no first token to look for."""
    gateway = Gateway(leaves=True)
    assert len(gateway.asks(mode=mode, stream=stream)) == 2
    assert gateway.call.ended == [Status.OK]
    assert gateway.charged() == 1
    gateway.rig.end("r0")
    assert gateway.is_clean()


def test_an_answer_that_is_wanted_back_is_never_left() -> None:
    """Though streams may be."""
    gateway = Gateway(leaves=True)
    gateway.asks(mode=Mode.FULL_DUPLEX_STREAMED)
    gateway.answers()
    gateway.says(response_body=pb.HttpBody(body=TOKEN))
    assert gateway.call.ended == []
    gateway.says(response_body=pb.HttpBody(body=USAGE, end_of_stream=True))
    gateway.exchange.on_half_close()
    assert gateway.is_clean()


def test_a_gateway_of_another_mode_hears_what_is_wrong() -> None:
    """A body that would wait for its headers' answer, and that for the body."""
    gateway = Gateway()
    config = pb.ProtocolConfiguration(request_body_mode=Mode.BUFFERED)
    gateway.says(request_headers=pb.HttpHeaders(), protocol_config=config)
    assert gateway.call.ended == [Status.INVALID_ARGUMENT]
    assert gateway.is_clean()


def test_random_streams_leave_nothing_charged() -> None:
    """Whatever gateways and clients do, and wherever they leave: every counter is exactly zero afterwards."""
    rng = random.Random(20261130)
    gateway = Gateway()
    keys = gateway.rig.fleet.keys
    at = {key: str(gateway.rig.places[key]) for key in keys}
    modes = (None, Mode.FULL_DUPLEX_STREAMED, Mode.STREAMED, Mode.NONE)
    running: list[tuple[FakeCall, Any]] = [(gateway.call, gateway.exchange)]
    for number in range(NUM_STREAMS):
        gateway.open()
        running.append((gateway.call, gateway.exchange))
        _live(gateway, rng, rng.choice(modes), at)
        gateway.rig.clock.advance(rng.random() * 0.01)
        if len(running) > 50 or number == NUM_STREAMS - 1:
            rng.shuffle(running)
            for call, exchange in running:
                if not call.ended:
                    rng.choice((exchange.on_reset, exchange.on_half_close))()
            running.clear()
            assert gateway.is_clean()
            assert {gateway.rig.load(key) for key in keys} == {(0, 0, 0)}
    decided = sum(ending.request is not None for ending in gateway.rig.endings)
    assert decided > NUM_STREAMS / 3


def _live(gateway: Gateway, rng: random.Random, mode: int | None, at: dict[Any, str]) -> None:
    """Some of a request's life, in an order that a gateway may tell it in."""
    headers = pb.HttpHeaders()
    for name, value in ((":method", "POST"), (":path", "/v1/chat/completions")):
        headers.headers.headers.add(key=name, raw_value=value.encode())
    told = {}
    if mode is not None:
        told["protocol_config"] = pb.ProtocolConfiguration(
            request_body_mode=Mode.FULL_DUPLEX_STREAMED, response_body_mode=mode
        )
    body = chat(f"prompt {rng.randrange(50)}", stream=rng.random() < 0.7)
    cut = rng.randrange(len(body))
    steps: list[Callable[[], Any]] = [
        lambda: gateway.says(request_headers=headers, **told),
        lambda: gateway.says(request_body=pb.HttpBody(body=body[:cut])),
        lambda: gateway.says(request_body=pb.HttpBody(body=body[cut:], end_of_stream=True)),
    ]
    if rng.random() < 0.2:
        steps.append(lambda: gateway.says(request_body=pb.HttpBody(body=body, end_of_stream=True)))
    steps.append(lambda: gateway.answers(rng.choice([None, "nonsense", *at.values()])))
    if mode is not Mode.NONE:
        steps += [lambda: gateway.says(response_body=pb.HttpBody(body=TOKEN))] * rng.randrange(4)
        steps.append(lambda: gateway.says(response_body=pb.HttpBody(body=USAGE, end_of_stream=True)))
    for step in steps[: rng.randrange(1, len(steps) + 1)]:
        if gateway.call.ended:
            return
        if rng.random() < 0.01:
            gateway.says(request_headers=headers)  # out of its order
        else:
            step()


def test_a_model_that_the_pool_rewrites_has_its_old_name_back() -> None:
    """By an InferenceModelRewrite; the gateway's own word goes before it."""
    gateway = Gateway()
    router = gateway.rig.router
    policies = PoolPolicies(rewrites=(ModelRewrite("", (("m", 1),)),))
    router.configure(router.table, replace(router.settings, policies=policies))
    headers = pb.HttpHeaders()
    for name, value in ((":method", "POST"), (":path", "/v1/chat/completions")):
        headers.headers.headers.add(key=name, raw_value=value.encode())
    gateway.says(request_headers=headers)
    body = pb.HttpBody(body=chat(model="theirs"), end_of_stream=True)
    _, given = gateway.says(request_body=body)
    sent = given.request_body.response.body_mutation.streamed_response.body
    assert orjson.loads(sent)["model"] == "m"
    message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
    for name, value in ((":status", "200"), ("content-type", "application/json; charset=utf-8")):
        message.response_headers.headers.headers.add(key=name, raw_value=value.encode())
    gateway.exchange.on_message(message.SerializeToString())
    (echoed,) = gateway.says(
        response_body=pb.HttpBody(body=b'{"model":"m","choices":[{}]}', end_of_stream=True)
    )
    chunk = echoed.response_body.response.body_mutation.streamed_response
    assert (chunk.body, chunk.end_of_stream) == (b'{"model":"theirs","choices":[{}]}', True)
    gateway.exchange.on_half_close()
    assert gateway.is_clean()
    gateway.open()
    headers.headers.headers.add(key="x-llm-d-model-name-rewrite", raw_value=b"unknown")
    gateway.says(request_headers=headers)
    (refused,) = gateway.says(request_body=body)
    assert refused.immediate_response.status.code == 404
    assert gateway.is_clean()
