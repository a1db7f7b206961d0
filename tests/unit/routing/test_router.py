"""The decision over real state: what it chooses, charges, answers, records and refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.choosing.foreseen import foreseen_ttft_s
from extproc.errors import Reason, RouterError
from extproc.observing.explain import recompute, render, to_json
from extproc.request.rules import ModelRules, Rule
from extproc.request.sanitize import STEERING_FIELDS
from extproc.routing.charging import PREFILL_DUE_FACTOR, PREFILL_DUE_FLOOR_S
from extproc.routing.settings import RouterSettings
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.evidence import FailureKind
from extproc.values.exchange import PassTo
from extproc.values.headers import DEBUG_HEADER, REQUEST_ID_HEADER
from extproc.values.outcomes import Ended
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from metadata_center.types import RequestId
from tests.conftest import (
    BLOCK_BYTES,
    CLUSTER,
    DIALECT,
    LEASE_S,
    MODEL,
    OWNER,
    TOMBSTONE_S,
    WALL_S,
    Rig,
    answer_of,
    build_rig,
    chat,
    decided,
    endpoint,
    identities,
    request_line,
)

KEYS = tuple(endpoint(number).key for number in range(3))
NOTHING = (0, 0, 0)


def headers_of(decision: Decision) -> dict[str, str]:
    """The headers that the answer sets."""
    options = answer_of(decision).request_body.response.header_mutation.set_headers
    return {option.header.key: option.header.raw_value.decode() for option in options}


def metadata_of(decision: Decision) -> dict[str, Any]:
    """The answer's dynamic metadata."""
    plain: dict[str, Any] = MessageToDict(answer_of(decision).dynamic_metadata)
    return plain


def body_of(decision: Decision) -> dict[str, Any] | None:
    """The body sent instead of the client's, with the length it must announce; None if there is none."""
    body = answer_of(decision).request_body.response.body_mutation.body
    assert headers_of(decision).get("content-length") == (str(len(body)) if body else None)
    return orjson.loads(body) if body else None


def everything(rig: Rig) -> list[tuple[int, int, int]]:
    """The counters of all endpoints."""
    return [rig.load(key) for key in KEYS]


def test_a_rival_has_the_last_word() -> None:
    """Our own choice is recorded as ever and can be recomputed; the charge goes where the rival says."""
    rig = build_rig(load_balancing=LoadBalancing(rival="round_robin"))
    chosen = []
    for number in range(6):
        decision = rig.decide(f"r{number}", chat("x" * 500, stream=True))
        record = rig.record(f"r{number}")
        assert record.chosen is not None
        chosen.append(record.chosen)
        assert rig.load(record.chosen)[0] == 1 + number // 3
        first = metadata_of(decision)["envoy.lb"]["x-gateway-destination-endpoint"].split(",")[0]
        assert first == str(rig.fleet.address(record.chosen))
        shown = to_json(record)
        assert recompute(shown) == record.choice.order  # type: ignore[union-attr]
        if record.placed is not None:
            assert "by the rival round_robin" in render(shown)
    assert chosen[:3] == chosen[3:]
    assert set(chosen) == set(KEYS)
    assert len(rig.scheduling.rivals) == 6
    for number in range(6):
        rig.end(f"r{number}")
    assert len(rig.scheduling.rivals) == 0


def test_a_decision_charges_its_endpoint(rig: Rig) -> None:
    """One request, its uncached prompt as prefill and its whole prompt as context; the others stay idle."""
    rig.decide("r", chat("x" * 500, stream=True))
    record = rig.record()
    assert rig.load(rig.chosen()) == (1, record.prompt_tokens, record.prompt_tokens)
    assert record.prompt_tokens > 0
    assert sorted(everything(rig))[:2] == [NOTHING, NOTHING]
    assert len(rig.scheduling.running) == rig.scheduling.load.in_flight == 1
    chosen = rig.chosen()
    assert (
        rig.metric(
            "tokenway_decisions_total", model=MODEL, algorithm=Algorithm.LEAST_COMPLETION, endpoint=chosen
        )
        == 1
    )


def test_the_answer_names_the_choice_and_its_fallbacks(rig: Rig) -> None:
    """Endpoints in order of choice, as many groups, one more try whatever fails, and our name."""
    decision = rig.decide()
    order = [KEYS[row] for row in rig.record().choice.order]  # type: ignore[union-attr]
    metadata = metadata_of(decision)
    assert identities(metadata["envoy.lb"]["x-gateway-destination-endpoint"]) == order
    assert len(metadata["tokenway.route"]["priority_groups"]) == len(order) == 3
    headers = headers_of(decision)
    assert headers["x-envoy-max-retries"] == "1"
    assert headers["x-tokenway-owner"] == OWNER
    assert body_of(decision) is None
    assert "tokenway" not in metadata


def test_the_only_endpoint_is_tried_twice() -> None:
    """A stale connection to the only endpoint must not cost the request."""
    rig = build_rig([endpoint(0)])
    decision = rig.decide()
    named = metadata_of(decision)["envoy.lb"]["x-gateway-destination-endpoint"]
    assert named == "10.0.0.0:8000,10.0.0.0:8000"
    assert headers_of(decision)["x-envoy-max-retries"] == "1"


@pytest.mark.parametrize(
    ("stream", "name", "milliseconds"),
    [
        (True, "x-envoy-upstream-rq-per-try-timeout-ms", "2500"),
        (False, "x-envoy-upstream-rq-timeout-ms", "9001"),
    ],
)
def test_streams_and_whole_answers_have_their_own_bound(stream: bool, name: str, milliseconds: str) -> None:
    """A stream is bounded to its first byte, a whole answer to its last; never both."""
    rig = build_rig(settings=RouterSettings(timeout_s=9.0001, first_byte_timeout_s=2.5))
    decision = rig.decide(body=chat(stream=stream))
    headers = headers_of(decision)
    assert headers[name] == milliseconds
    assert len([header for header in headers if "timeout" in header]) == 1
    assert decision.stream is stream


@pytest.mark.parametrize(
    ("path", "operation"),
    [("/v1/responses", Operation.RESPONSES), ("/v1/chat/completions", Operation.CHAT)],
)
def test_a_decision_names_its_api(path: str, operation: Operation) -> None:
    """By it the first token of the answer is found."""
    body = chat(input="hi", stream=True)
    decision = decided(build_rig().gateway.decide(request_line("r", path), body))
    assert decision.operation is operation


def test_ejected_and_draining_endpoints_are_no_candidates() -> None:
    """They are left out with their reason, and come back as soon as their state does."""
    rig = build_rig([endpoint(0, draining=True), endpoint(1), endpoint(2)])
    rig.scheduling.health.attempt_failed(KEYS[1], FailureKind.CONNECT_FAILURE, 0.0)
    rig.decide()
    record = rig.record()
    assert record.chosen == KEYS[2]
    assert record.filtered == ((KEYS[0], "draining"), (KEYS[1], "traffic failed: connect_failure"))
    rig.scheduling.health.probe_succeeded(KEYS[1], 1e6)
    rig.decide("r2")
    assert rig.record("r2").filtered == ((KEYS[0], "draining"),)


def test_without_an_endpoint_the_request_is_refused() -> None:
    """503 with `retry-after`, and nothing is charged."""
    rig = build_rig(settings=RouterSettings(retry_after_s=4))
    for key in KEYS:
        rig.scheduling.health.attempt_failed(key, FailureKind.CONNECT_FAILURE, 0.0)
    with pytest.raises(RouterError) as refusal:
        rig.decide()
    assert (refusal.value.reason, refusal.value.retry_after_s) == (Reason.NO_HEALTHY_ENDPOINT, 4)


def test_more_than_may_be_in_flight_are_refused() -> None:
    """429 with `retry-after`, charged nowhere; there is room again when one ends."""
    rig = build_rig(max_requests=2)
    for number in range(2):
        rig.decide(f"r{number}")
    with pytest.raises(RouterError) as refusal:
        rig.decide("r2")
    assert (refusal.value.reason, refusal.value.retry_after_s) == (Reason.OVERLOADED, 1)
    assert sum(requests for requests, _, _ in everything(rig)) == rig.scheduling.load.in_flight == 2
    rig.end("r0")
    rig.decide("r3")


DEEP = b'{"model":"m","messages":[' + b"[" * 300 + b"]" * 300 + b"]}"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Reason.INVALID_JSON),
        (b"{", Reason.INVALID_JSON),
        (b"[]", Reason.INVALID_REQUEST),
        (b"{}", Reason.MISSING_MODEL),
        (b'{"model":"m","messages":[]}', Reason.EMPTY_MESSAGES),
        (chat(model="x"), Reason.MODEL_NOT_FOUND),
        (chat("x" * 5000), Reason.BODY_TOO_LARGE),
        (DEEP, Reason.INVALID_REQUEST),
    ],
)
def test_a_refusal_leaves_no_trace(body: bytes, reason: Reason) -> None:
    """What fails before the charge raises its reason; counters, ledger and records stay empty."""
    rig = build_rig(settings=RouterSettings(max_body_bytes=4096))
    with pytest.raises(RouterError) as refusal:
        rig.decide(body=body)
    assert refusal.value.reason is reason
    assert everything(rig) == [NOTHING] * 3
    assert len(rig.scheduling.running) == rig.scheduling.load.in_flight == len(rig.scheduling.records) == 0


def test_a_rejection_is_counted_recorded_and_reported(rig: Rig) -> None:
    """The gateway records a refusal under its reason, with the request's id where one is known."""
    error = RouterError(Reason.EMPTY_MESSAGES, "None.", param="messages")
    rig.gateway.rejected(request_line("r"), error)
    rig.gateway.rejected(None, error)
    assert rig.record().rejected is Reason.EMPTY_MESSAGES
    assert rig.record("").outcome is not None
    assert rig.metric("tokenway_rejections_total", reason="empty_messages") == 2


@pytest.mark.parametrize(
    "algorithm", [Algorithm.INFERENCE_LB, Algorithm.LEAST_REQUEST, Algorithm.ROUND_ROBIN]
)
@pytest.mark.parametrize("seed", range(3))
def test_equal_endpoints_share_equally(algorithm: Algorithm, seed: int) -> None:
    """64 decisions over 8 equal endpoints, each seeing those before it: no two differ by more than one."""
    endpoints = [endpoint(number) for number in range(8)]
    rig = build_rig(endpoints, load_balancing=LoadBalancing(algorithm=algorithm), seed=seed)
    for number in range(64):
        rig.decide(f"r{number}", chat(f"{number:03} question of its own"))
    loads = Counter(rig.load(member.key)[0] for member in endpoints)
    assert max(loads) - min(loads) <= 1


def test_models_asked_for_in_turn_each_take_turns() -> None:
    """Two models and an alias by round-robin over one pool: what alternates does not keep step with it."""
    round_robin = LoadBalancing(algorithm=Algorithm.ROUND_ROBIN)
    names = ("a", "b", "b-alias")
    rig = build_rig(
        [endpoint(0), endpoint(1)],
        models=[
            ModelRules("a", (Rule(CLUSTER),), load_balancing=round_robin),
            ModelRules("b", (Rule(CLUSTER),), ("b-alias",), load_balancing=round_robin),
        ],
    )
    seen: Counter[tuple[str, str | None]] = Counter()
    for number in range(20):
        for name in names:
            rig.decide(f"{name}{number}", chat(model=name))
            seen[name, rig.record(f"{name}{number}").chosen] += 1
    assert seen == {(name, endpoint(row).key): 10 for name in names for row in (0, 1)}


@pytest.mark.parametrize("weights", [(1, 9), (9, 1), (1, 1)])
def test_round_robin_knows_weights_and_new_ones(weights: tuple[int, int]) -> None:
    """Requests are shared by weight, by the new ones after a reload, and the ejected have none."""
    rig = build_rig(
        [endpoint(0, weight=3), endpoint(1)], load_balancing=LoadBalancing(algorithm=Algorithm.ROUND_ROBIN)
    )

    def shares(prefix: str, count: int) -> list[int]:
        for number in range(count):
            rig.decide(f"{prefix}{number}")
        seen = Counter(rig.record(f"{prefix}{number}").chosen for number in range(count))
        return [seen[endpoint(row).key] for row in (0, 1)]

    assert shares("first", 40) == [30, 10]
    rig.configure([endpoint(row, weight=weight) for row, weight in enumerate(weights)])
    total = sum(weights)
    assert shares("then", 10 * total) == [10 * weight for weight in weights]
    rig.configure([endpoint(0)])
    assert shares("alone", 3) == [3, 0]


@pytest.mark.parametrize("seed", range(8))
def test_a_known_prefix_goes_back_to_its_holder(seed: int) -> None:
    """After one completed request the next one of the same conversation finds its cache."""
    rig = build_rig(seed=seed)
    prompt = "conversation " * 100
    rig.decide("first", chat(prompt, stream=True))
    holder = rig.chosen("first")
    rig.gateway.first_token("first", late=False)
    rig.end("first")
    rig.decide("second", chat(prompt + "and more " * 20, stream=True))
    record = rig.record("second")
    row = record.row(holder)
    assert record.chosen == holder
    assert row is not None
    assert record.snapshot is not None
    assert record.snapshot.matched_blocks[row] == rig.record("first").num_blocks < record.num_blocks
    assert 0 < record.cached_tokens[row] < record.prompt_tokens
    assert rig.load(holder)[1] == record.prompt_tokens - record.cached_tokens[row]


@pytest.mark.parametrize(
    ("first", "second", "headers"),
    [
        ({}, {"model": "other"}, {}),
        ({}, {}, {"x_tuned": "yes"}),
        ({}, {"cache_salt": "tenant"}, {}),
        ({"cache_salt": "a"}, {"cache_salt": "b"}, {}),
    ],
)
def test_caches_are_not_shared_across_models_adapters_and_salts(
    first: dict[str, str], second: dict[str, str], headers: dict[str, str]
) -> None:
    """Equal prompts under another model, adapter or salt share no block."""
    tuned = Rule(CLUSTER, headers={"x-tuned": "yes"}, lora="adapter")
    rig = build_rig(models=[ModelRules(MODEL, (Rule(CLUSTER), tuned)), ModelRules("other", (Rule(CLUSTER),))])
    rig.decide("first", chat("x" * 1000, **first))
    rig.end("first")
    rig.decide("second", chat("x" * 1000, **second), **headers)
    assert (rig.record("second").lora is None) is (not headers)
    snapshot = rig.record("second").snapshot
    assert snapshot is not None
    assert not any(snapshot.matched_blocks)


@settings(max_examples=50)
@given(
    prompt=st.text(max_size=400)
    | st.integers(1, 8).map(lambda blocks: "x" * BLOCK_BYTES * blocks)  # cached to its last byte
    | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200)
    | st.integers(1, 8).map(lambda blocks: [7] * (BLOCK_BYTES // 4) * blocks),
    reported=st.integers(1, 5000),
)
def test_cached_tokens_leave_at_least_one_to_compute(prompt: str | list[int], reported: int) -> None:
    """However much is cached and however tokens are estimated, an engine always computes the last one."""
    rig = build_rig()
    line = request_line("a", "/v1/completions")
    body = orjson.dumps({"model": MODEL, "prompt": prompt})
    rig.gateway.decide(line, body)
    rig.end("a", prompt_tokens=reported)
    rig.gateway.decide(replace(line, headers={REQUEST_ID_HEADER: "b"}), body)
    record = rig.record("b")
    assert all(0 <= cached <= max(0, record.prompt_tokens - 1) for cached in record.cached_tokens)
    assert min(rig.load(rig.chosen("b"))) >= 0


def test_a_first_token_releases_the_prefill_once(rig: Rig) -> None:
    """Its prefill is off, its context stays, its blocks are known; a second signal changes nothing."""
    rig.decide("r", chat("x" * 1000, stream=True))
    key, tokens = rig.chosen(), rig.record().prompt_tokens
    for _ in range(2):
        rig.gateway.first_token("r", late=False)
        assert rig.load(key) == (1, 0, tokens)
    assert rig.scheduling.caches.history.size(key) == rig.record().num_blocks >= 1000 // BLOCK_BYTES
    assert [place for place, _ in rig.shared] == [key]


def test_a_first_token_of_an_unknown_request_is_ignored(rig: Rig) -> None:
    """Its request may have ended before, or never been decided here."""
    rig.gateway.first_token("unknown", late=False)
    assert everything(rig) == [NOTHING] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_without_its_signal_a_prefill_ends_when_predicted(stream: bool) -> None:
    """A whole answer, or a stream that is not watched, is taken for prefilled once its prediction is over."""
    rig = build_rig(settings=RouterSettings(first_chunk=not stream, block_bytes=BLOCK_BYTES))
    rig.decide("r", chat("x" * 4000, stream=stream))
    record, key = rig.record(), rig.chosen()
    row = record.row(key)
    assert row is not None
    predicted_s = foreseen_ttft_s(record, row)
    assert predicted_s is not None
    due_s = max(PREFILL_DUE_FLOOR_S, PREFILL_DUE_FACTOR * predicted_s)
    rig.clock.advance(due_s - 1e-6)
    rig.scheduling.running.advance(rig.clock())
    assert rig.load(key)[1] == record.prompt_tokens
    assert rig.scheduling.caches.history.size(key) == 0
    rig.clock.advance(2e-6)
    rig.scheduling.running.advance(rig.clock())
    assert rig.load(key) == (1, 0, record.prompt_tokens)
    assert rig.scheduling.caches.history.size(key) == record.num_blocks


def test_a_watched_stream_keeps_its_prefill_until_its_token(rig: Rig) -> None:
    """Time alone ends no prefill whose end will be seen."""
    rig.decide("r", chat("x" * 1000, stream=True))
    rig.clock.advance(LEASE_S - 0.1)
    rig.scheduling.running.advance(rig.clock())
    assert rig.load(rig.chosen())[1] == rig.record().prompt_tokens


def test_the_end_releases_everything(rig: Rig) -> None:
    """After its end a request is charged nothing, however it ended and however often that is reported."""
    for ended in (Ended.COMPLETED, Ended.CLIENT_ABORT, Ended.UPSTREAM_RESET):
        rig.decide(ended, chat("x" * 1000, stream=True))
        for _ in range(2):
            rig.end(ended, ended=ended)
            assert everything(rig) == [NOTHING] * 3
    assert len(rig.scheduling.running) == 0
    assert [ending.outcome.ended for ending in rig.endings] == [
        Ended.COMPLETED,
        Ended.CLIENT_ABORT,
        Ended.UPSTREAM_RESET,
    ]


def test_an_end_before_its_decision_voids_the_charge(rig: Rig) -> None:
    """The client left while the decision was made: nothing is charged, but not for ever."""
    rig.end("r", owner=None, endpoint=None)
    for _ in range(2):
        rig.decide("r")
        assert everything(rig) == [NOTHING] * 3
        assert len(rig.scheduling.running) == 0
    rig.end("late", owner=None, endpoint=None)
    rig.clock.advance(TOMBSTONE_S)
    rig.decide("late")
    assert rig.load(rig.chosen("late"))[0] >= 1


def test_a_request_decided_twice_is_charged_once(rig: Rig) -> None:
    """Envoy may ask again for one request, as after a lost stream."""
    rig.decide("r")
    rig.decide("r")
    assert sum(requests for requests, _, _ in everything(rig)) == 1
    rig.end("r")
    assert everything(rig) == [NOTHING] * 3


def test_lost_requests_are_released_by_their_lease(rig: Rig) -> None:
    """A request without any report is given up after its lease, at the next decision, and counted."""
    rig.decide("lost", chat("x" * 1000, stream=True))
    rig.decide("alive", chat("y" * 1000, stream=True))
    rig.clock.advance(LEASE_S - 1)
    rig.alive("alive")
    rig.clock.advance(1)
    rig.decide("next")
    assert rig.scheduling.load.get(RequestId("lost")) is None
    assert rig.scheduling.load.get(RequestId("alive")) is not None
    outcome = rig.record("lost").outcome
    assert outcome is not None
    assert (outcome.ended, outcome.duration_s) == (Ended.LEASE_EXPIRED, LEASE_S)
    assert rig.metric("tokenway_lease_expirations_total") == 1
    assert len(rig.scheduling.running) == 2


def test_an_adapter_is_asked_for_by_its_own_name() -> None:
    """The body goes out with the adapter's name and the length that goes with it."""
    rig = build_rig(models=[ModelRules(MODEL, (Rule(CLUSTER, lora="adapter"),))])
    body = body_of(rig.decide(body=chat(temperature=0.5)))
    assert body is not None
    assert body["model"] == "adapter"
    assert {**body, "model": MODEL} == orjson.loads(chat(temperature=0.5))
    record = rig.record()
    assert (record.model, record.lora, record.upstream_model) == (MODEL, "adapter", "adapter")


def test_an_alias_is_rewritten_and_the_name_itself_is_not() -> None:
    """Only a body that must change is sent again."""
    rig = build_rig(models=[ModelRules(MODEL, (Rule(CLUSTER),), aliases=("alias",))])
    body = body_of(rig.decide("a", chat(model="alias")))
    assert body is not None
    assert body["model"] == MODEL
    assert body_of(rig.decide("b", chat())) is None
    assert rig.record("a").model == MODEL


@pytest.mark.parametrize("name", STEERING_FIELDS)
def test_steering_fields_are_removed(name: str) -> None:
    """What would steer the engine never reaches it, unless the operator allows it by name."""
    fields: dict[str, Any] = {name: {"x": 1}, "temperature": 0.5}
    body = chat(**fields)
    assert body_of(build_rig().decide(body=body)) == orjson.loads(chat(temperature=0.5))
    assert body_of(build_rig(allowed_fields=frozenset({name})).decide(body=body)) is None


@pytest.mark.parametrize("stream", [True, False])
def test_usage_is_asked_for_where_configured(stream: bool) -> None:
    """Streams whose client did not ask for usage are made to report it; whole answers always do."""
    rig = build_rig(settings=RouterSettings(usage_injection=True))
    body = body_of(rig.decide(body=chat(stream=stream)))
    assert (body is not None) is stream
    assert body is None or body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("token", "sent", "shown"),
    [
        ("s3cret", "s3cret", True),
        ("s3cret", "guess", False),
        ("s3cret", None, False),
        (None, "s3cret", False),
    ],
)
def test_the_decision_id_is_shown_to_operators_alone(
    token: str | None, sent: str | None, shown: bool
) -> None:
    """The debug token must be configured and match; the answer then names the request."""
    rig = build_rig(settings=RouterSettings(debug_token=token))
    headers = {} if sent is None else {DEBUG_HEADER: sent}
    metadata = metadata_of(rig.decide("id-1", None, **headers))
    assert metadata.get("tokenway") == ({"debug": "id-1"} if shown else None)


def test_rules_see_the_headers_and_subsets_narrow_the_pool() -> None:
    """A header picks the rule, its labels pick the endpoints, the rest is filtered as `subset`."""
    gold = Rule(CLUSTER, headers={"x-tier": "gold"}, subset={"tier": "gold"}, route_name="gold")
    endpoints = [endpoint(0), endpoint(1, labels={"tier": "gold"}), endpoint(2)]
    rig = build_rig(endpoints, models=[ModelRules(MODEL, (gold, Rule(CLUSTER)))])
    rig.decide("r", x_tier="gold")
    record = rig.record()
    assert (record.chosen, record.route_name) == (KEYS[1], "gold")
    assert record.filtered == ((KEYS[0], "subset"), (KEYS[2], "subset"))
    rig.decide("r2", x_tier="iron")
    assert rig.record("r2").filtered == ()


def test_a_pass_is_routed_without_endpoints_or_charge(rig: Rig) -> None:
    """What is no inference goes to its cluster by Envoy's own policy."""
    message = pb.ProcessingResponse.FromString(DIALECT.pass_to(PassTo(Plan("other"))))
    metadata = MessageToDict(message.dynamic_metadata)
    assert message.request_headers.response.clear_route_cache
    assert message.request_headers.response.header_mutation.set_headers
    assert list(metadata) == ["tokenway.route"]
    assert everything(rig) == [NOTHING] * 3


def test_a_new_endpoint_set_takes_effect_at_the_next_decision(rig: Rig) -> None:
    """After a reload removed endpoints are never chosen; requests on them still release what they hold."""
    rig.decide("old")
    old = rig.chosen("old")
    rig.configure([endpoint(7)])
    rig.decide("new")
    assert rig.chosen("new") == endpoint(7).key
    rig.end("old")
    assert rig.load(old) == NOTHING
    assert rig.load(endpoint(7).key)[0] == 1


def test_a_reload_that_changes_no_endpoint_takes_effect_as_well(rig: Rig) -> None:
    """New weights of the same endpoints are seen at the next decision."""
    rig.decide("old")
    rig.configure([endpoint(number, weight=5) for number in range(3)])
    rig.decide("new")
    before, after = rig.record("old").snapshot, rig.record("new").snapshot
    assert before is not None
    assert after is not None
    assert (list(before.weights), list(after.weights)) == ([1.0] * 3, [5.0] * 3)


def test_a_record_shows_the_age_of_what_it_looked_at(rig: Rig) -> None:
    """Times in a record come from the clocks given, not from the machine's."""
    rig.scheduling.ages.health_changed(1.0)
    rig.clock.advance(5.0)
    rig.decide()
    record = rig.record()
    assert record.time_unix_s == WALL_S + 5.0
    assert record.data_age_s == {"load": 0.0, "health": 4.0, "configuration": 5.0}
    assert record.decision_us == 0.0


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_record_makes_the_same_choice_again(algorithm: Algorithm) -> None:
    """The JSON of any decision holds all it took: recomputed, it comes out the same."""
    endpoints = [endpoint(number, weight=1 + number % 2) for number in range(6)]
    rig = build_rig(endpoints, load_balancing=LoadBalancing(algorithm=algorithm, candidate_percent=60))
    for number in range(40):
        request_id = f"r{number}"
        rig.decide(request_id, chat("shared words " * (number % 7) + str(number), stream=number % 3 > 0))
        rig.clock.advance(0.01)
        if number % 3 == 1:
            rig.gateway.first_token(request_id, late=False)
        if number % 4 == 0:
            rig.end(request_id)
        record = rig.record(request_id)
        assert record.choice is not None
        stored = orjson.loads(orjson.dumps(to_json(record)))
        assert recompute(stored) == record.choice.order
    assert any(rig.record(f"r{number}").draws for number in range(40)) or algorithm is Algorithm.ROUND_ROBIN


def test_a_decision_does_not_write_to_an_earlier_record(rig: Rig) -> None:
    """Columns of a record are the decision's own: later charges do not change them."""
    rig.decide("a")
    snapshot = rig.record("a").snapshot
    assert snapshot is not None
    before = list(snapshot.requests)
    for number in range(5):
        rig.decide(str(number))
    assert list(snapshot.requests) == before


def test_equal_choices_share_one_plan(rig: Rig) -> None:
    """An order that was chosen before is not rendered again; another order is another plan."""
    plans = [rig.decide(f"r{i}", chat("x" * 600)).plan for i in range(64)]
    answers = {plan.endpoints for plan in plans}
    assert len({id(plan) for plan in plans}) == len(answers) < len(plans)
