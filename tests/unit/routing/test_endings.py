"""What becomes of a decided request: moved, ended, learned from; and what must never be learned from."""

from __future__ import annotations

import random
from typing import Any

import pytest

from extproc.choosing.foreseen import foreseen_ttft_s
from extproc.errors import Reason, RouterError
from extproc.routing.cache_history import CACHED_TOLERANCE_TOKENS
from extproc.routing.endings import Endings
from extproc.routing.running import LINGER_S
from extproc.values.balancing import LoadBalancing
from extproc.values.endings import Ending
from extproc.values.evidence import NoFailure
from extproc.values.outcomes import Ended
from extproc.values.requests import Operation
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey, RequestId
from tests.builds import replaces_code
from tests.conftest import (
    CLUSTER,
    LEASE_S,
    MODEL,
    Rig,
    build_rig,
    chat,
    endpoint,
    request_end,
    request_line,
)

KEYS = tuple(endpoint(number).key for number in range(3))


GROUP = (MODEL, CLUSTER)


NOTHING = (0, 0, 0)


USAGE = {"prompt_tokens": 400, "completion_tokens": 11, "cached_tokens": 0}


def another(rig: Rig, request_id: str = "r") -> EndpointKey:
    """An endpoint that was not chosen."""
    return next(key for key in KEYS if key != rig.chosen(request_id))


def streamed(rig: Rig, request_id: str = "r", prompt: str = "x" * 1000) -> None:
    """A streamed request is decided and its first token passes 0.2 s later."""
    rig.decide(request_id, chat(prompt, stream=True))
    rig.clock.advance(0.2)
    rig.gateway.first_token(request_id, late=False)


def learned(rig: Rig) -> tuple[int, int, bool]:
    """How many TTFTs and TPOTs were learned, and whether a token ratio was."""
    calibration = rig.scheduling.predictor.calibration(GROUP)
    ttfts, tpots = (
        0 if summary is None else summary.num_observed for summary in (calibration.ttft, calibration.tpot)
    )
    return ttfts, tpots, bool(dict(rig.scheduling.predictor.token_ratios()))


def test_a_fallback_attempt_moves_the_load(rig: Rig) -> None:
    """What is still charged goes where the next attempt goes; the end then releases it there."""
    rig.decide("r", chat("x" * 1000, stream=True))
    first, second = rig.chosen(), another(rig)
    charged = rig.load(first)
    rig.started("r", second)
    assert (rig.load(first), rig.load(second)) == (NOTHING, charged)
    rig.started("r", second)
    assert rig.load(second) == charged
    rig.end("r", attempts=2)
    assert rig.load(second) == NOTHING
    assert rig.metric("tokenway_fallbacks_total", cluster=CLUSTER) == 1
    (ending,) = rig.endings
    assert (ending.outcome.endpoint, ending.outcome.attempts) == (second, 2)
    assert rig.scheduling.caches.history.size(second) > rig.scheduling.caches.history.size(first) == 0


def test_an_attempt_after_the_end_moves_nothing(rig: Rig) -> None:
    """Entries of one request come in any order."""
    rig.decide()
    second = another(rig)
    rig.end("r", endpoint=second, attempts=2)
    rig.started("r", second)
    assert all(rig.load(key) == NOTHING for key in KEYS)


def test_an_end_shows_a_fallback_by_itself(rig: Rig) -> None:
    """The end alone says which endpoint answered, even if the attempt's own entry was lost."""
    rig.decide("r", chat("x" * 1000))
    second = another(rig)
    rig.end("r", endpoint=second, attempts=2)
    outcome = rig.endings[0].outcome
    record = rig.record()
    assert outcome.endpoint == second
    row = record.row(second)
    assert row is not None
    assert outcome.predicted_cached_tokens == record.cached_tokens[row]
    assert rig.ending.endpoints[second].served == 1
    assert rig.scheduling.caches.history.size(second) == record.num_blocks


@pytest.mark.parametrize(
    "changes",
    [
        {"error": "InternalServerError 500"},
        {"response_bytes": 0},
        {"content_type": "text/html"},
        {"status": 500, "ended": Ended.UPSTREAM_ERROR},
        {"status": 404},
        {"status": 401},
        {"status": 429},
    ],
)
def test_an_engine_that_fails_fast_gets_no_more_traffic_and_teaches_nothing(changes: dict[str, Any]) -> None:
    """Of two endpoints the one that answers nothing is left out at once, though it is always idle."""
    rig = build_rig([endpoint(0), endpoint(1)])
    reached = 0
    for number in range(40):
        rig.clock.advance(0.01)
        streamed(rig, str(number), f"{number} " * 50)
        if rig.chosen(str(number)) == KEYS[0]:
            reached += 1
            rig.end(str(number), **USAGE, **changes)
            assert rig.endings[-1].outcome.ended != Ended.COMPLETED or changes.get("status", 200) >= 400
        else:
            rig.end(str(number), **USAGE)
    assert 1 <= reached <= 7
    assert rig.ending.endpoints[KEYS[0]].served == 0
    assert rig.ending.endpoints[KEYS[0]].failures == reached
    assert learned(rig)[0] <= 40 - reached


def test_an_end_of_a_request_of_ours_that_is_not_known_is_counted(rig: Rig) -> None:
    """Only an entry that names us and finds nothing says that something was lost."""
    rig.ends.take(request_end("gone"), 0.0)
    rig.ends.take(request_end("unknown", owner=None), 0.0)
    assert rig.metric("tokenway_access_log_unmatched_total") == 1
    assert rig.endings == []


def test_a_completed_stream_teaches_ttft_tpot_and_tokens(rig: Rig) -> None:
    """One answer of usage and times gives one lesson of each kind."""
    streamed(rig)
    rig.end("r", **USAGE)
    assert learned(rig) == (1, 1, True)
    ratio = dict(rig.scheduling.predictor.token_ratios())[MODEL]
    assert ratio != build_rig().scheduling.predictor.prompt_tokens(MODEL, 1000) / 1000
    assert rig.ending.endpoints[rig.chosen()].ttft_ewma_s == 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"ended": Ended.CLIENT_ABORT},
        {"ended": Ended.UPSTREAM_RESET},
        {"ended": Ended.TIMEOUT},
        {"ended": Ended.UPSTREAM_ERROR, "status": 503},
        {"status": 429},
        {"status": 404},
    ],
)
def test_nothing_is_learned_from_what_did_not_complete(rig: Rig, changes: dict[str, Any]) -> None:
    """An abort, an error or an answer other than 200 teaches nothing and shows no TTFT."""
    streamed(rig)
    rig.end("r", **USAGE, **changes)
    assert learned(rig) == (0, 0, False)
    assert rig.endings[0].outcome.ttft_s is None
    assert rig.ending.endpoints[rig.chosen()].served == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attempts": 2}, (0, 0, True)),
        ({"ttft_s": None}, (0, 1, True)),
        ({"ttft_s": 0.0}, (0, 1, True)),
        ({"ttft_s": -1.0}, (0, 1, True)),
        ({"stream_s": None}, (1, 0, True)),
        ({"stream_s": 0.0}, (1, 0, True)),
        ({"completion_tokens": 1}, (1, 0, True)),
        ({"completion_tokens": None}, (1, 0, True)),
        ({"prompt_tokens": None}, (1, 1, False)),
        ({"prompt_tokens": 0}, (1, 1, False)),
        ({"cached_tokens": None}, (1, 1, True)),
        ({"cached_tokens": 10**9}, (1, 1, True)),
        ({"address": Address("10.9.9.9", 1)}, (0, 0, True)),
    ],
)
def test_a_reading_that_makes_no_sense_teaches_nothing(
    rig: Rig, changes: dict[str, Any], expected: tuple[int, int, bool]
) -> None:
    """Each lesson needs its own readings; what is missing or absurd never raises."""
    streamed(rig)
    rig.end("r", **{**USAGE, **changes})
    assert learned(rig) == expected


def test_a_whole_answer_teaches_no_ttft(rig: Rig) -> None:
    """Its first byte is no first token."""
    rig.decide("r", chat("x" * 1000))
    rig.end("r", **USAGE)
    assert learned(rig) == (0, 0, True)
    assert rig.endings[0].outcome.ttft_s is None


@pytest.mark.parametrize(
    ("late", "seen_after_s", "expected_s"), [(False, 3.0, 0.2), (True, 3.0, 3.0), (True, None, 0.2)]
)
def test_the_first_byte_is_the_first_token_unless_others_came_first(
    rig: Rig, late: bool, seen_after_s: float | None, expected_s: float
) -> None:
    """Envoy times the first byte best; after keep-alive comments only the live signal is the token's."""
    rig.decide("r", chat("x" * 1000, stream=True))
    if seen_after_s is not None:
        rig.clock.advance(seen_after_s)
        rig.gateway.first_token("r", late=late)
        rig.clock.advance(1.0)
        rig.gateway.first_token("r", late=not late)  # only the first one is the first
    rig.end("r", ttft_s=0.2, **USAGE)
    assert rig.endings[0].outcome.ttft_s == expected_s


def test_predictions_follow_what_is_observed(rng: random.Random) -> None:
    """After many answers at a second each a second is expected; older records keep what they expected."""
    rig = build_rig([endpoint(0)])
    for number in range(200):
        request_id = str(number)
        rig.decide(request_id, chat(f"{rng.random()}" * 200, stream=True))
        rig.clock.advance(1.0)
        rig.gateway.first_token(request_id, late=False)
        if number == 0:
            before_s = foreseen_ttft_s(rig.record(request_id), 0)
        rig.end(request_id, ttft_s=1.0, prompt_tokens=900, cached_tokens=0)
    rig.decide("last", chat(f"{rng.random()}" * 200, stream=True))
    assert foreseen_ttft_s(rig.record("last"), 0) == pytest.approx(1.0, rel=0.2)
    assert before_s == foreseen_ttft_s(rig.record("0"), 0) != pytest.approx(1.0, rel=0.2)


def test_an_answer_without_a_first_token_signal_still_records_its_blocks(rig: Rig) -> None:
    """A completed answer proves that the prompt was computed; an aborted one does not."""
    rig.decide("done", chat("x" * 1000, stream=True))
    rig.decide("gone", chat("y" * 1000, stream=True))
    done, gone = rig.chosen("done"), rig.chosen("gone")
    assert done != gone
    rig.end("done")
    rig.end("gone", ended=Ended.CLIENT_ABORT)
    assert rig.scheduling.caches.history.size(done) == rig.record("done").num_blocks
    assert rig.scheduling.caches.history.size(gone) == 0


def evicted(*, missing_tokens: int) -> tuple[Rig, EndpointKey, int, int]:
    """Two prompts cached at one endpoint, then the second again, which had `missing_tokens` fewer cached.

    Returns:
        The rig, its endpoint, and how many blocks each of the two prompts has.
    """
    rig = build_rig([endpoint(0)], load_balancing=LoadBalancing())
    for request_id, letter in (("old", "o"), ("new", "n"), ("again", "n")):
        streamed(rig, request_id, letter * 4000)
        record = rig.record(request_id)
        believed = int(record.cached_tokens[0])
        rig.end(request_id, cached_tokens=max(0, believed - missing_tokens))
    assert believed > CACHED_TOLERANCE_TOKENS
    return rig, KEYS[0], rig.record("old").num_blocks, rig.record("new").num_blocks


def test_fewer_cached_tokens_than_believed_forget_what_is_older() -> None:
    """An engine that lost blocks lost all that were used no later; what this request computed is there."""
    rig, key, _, new = evicted(missing_tokens=CACHED_TOLERANCE_TOKENS + 1)
    assert rig.scheduling.caches.history.size(key) == new


def test_a_difference_of_a_block_forgets_nothing() -> None:
    """Our blocks and the engine's end at different places."""
    rig, key, old, new = evicted(missing_tokens=CACHED_TOLERANCE_TOKENS)
    assert rig.scheduling.caches.history.size(key) == old + new


def test_a_prompt_shorter_in_tokens_than_estimated_forgets_nothing() -> None:
    """Belief is in estimated tokens, a report in the engine's: shares of the prompt are what is compared."""
    rig = build_rig((endpoint(0),))
    prompt = "x" * 8_000
    for request_id in ("first", "again"):
        streamed(rig, request_id, prompt)
    record = rig.record("again")
    believed, estimated = int(record.cached_tokens[0]), record.prompt_tokens
    held = rig.scheduling.caches.history.size(KEYS[0])
    rig.end("again", prompt_tokens=estimated // 2, cached_tokens=believed // 2, completion_tokens=1)
    assert believed - believed // 2 > CACHED_TOLERANCE_TOKENS
    assert rig.scheduling.caches.history.size(KEYS[0]) == held


def test_blocks_of_a_completed_request_count_for_a_moment_longer(rig: Rig) -> None:
    """Its engine may announce them later than it answered; those of a failed one count no longer."""
    streamed(rig, "done")
    streamed(rig, "gone", "y" * 1000)
    both = len(rig.scheduling.caches.running)
    rig.end("gone", ended=Ended.UPSTREAM_RESET)
    rig.end("done")
    held = len(rig.scheduling.caches.running)
    assert 0 < held < both
    assert held == rig.record("done").num_blocks
    rig.clock.advance(LINGER_S)
    rig.scheduling.running.advance(rig.clock())
    assert len(rig.scheduling.caches.running) == 0


def test_an_endpoint_that_left_is_not_remembered(rig: Rig) -> None:
    """A request that outlives its endpoint's place in the configuration leaves nothing behind there."""
    for number in range(3):
        rig.decide(str(number), chat("x" * 1000, stream=number < 2))
    rig.configure([endpoint(7)])
    rig.gateway.first_token("0", late=False)
    rig.end("0")
    rig.end("1")
    rig.clock.advance(20.0)
    rig.scheduling.running.advance(rig.clock())
    assert rig.history.total == 0
    assert not any(key in rig.history._caches for key in KEYS)
    assert rig.shared == []


def test_totals_outlive_a_reload_and_end_with_their_endpoint(rig: Rig) -> None:
    """What an endpoint did is shown as long as it is configured; of others nothing is kept."""
    streamed(rig)
    key = rig.chosen()
    rig.end("r", ttft_s=0.2)
    rig.configure([endpoint(number) for number in range(3)])
    assert (rig.ending.endpoints[key].served, rig.ending.endpoints[key].ttft_ewma_s) == (1, 0.2)
    rig.decide("next", chat(stream=True))
    rig.end("next", endpoint=key, ttft_s=0.7)
    assert rig.ending.endpoints[key].ttft_ewma_s == pytest.approx(0.2 + 0.1 * 0.5)
    rig.configure([endpoint(7)])
    rig.configure([endpoint(number) for number in range(3)])
    assert rig.ending.endpoints[key].served == 0


def test_the_end_is_reported_with_its_decision(rig: Rig) -> None:
    """The record carries its outcome, and the log gets both."""
    streamed(rig)
    rig.end("r", flags=("DC",), details="via_upstream", **USAGE)
    (ending,) = rig.endings
    assert ending.record is rig.record()
    assert ending.record.outcome is ending.outcome
    outcome, record = ending.outcome, ending.record
    row = record.row(rig.chosen())
    assert row is not None
    assert outcome.predicted_ttft_s == foreseen_ttft_s(record, row)
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens) == (400, 11, 0)
    assert (outcome.request_bytes, outcome.response_bytes) == (100, 200)
    assert (outcome.response_flags, outcome.details, outcome.status) == (("DC",), "via_upstream", 200)
    assert (
        rig.metric("tokenway_requests_total", model=MODEL, status_class="2xx", outcome=Ended.COMPLETED) == 1
    )
    assert record.operation is Operation.CHAT


def test_a_request_that_never_went_upstream_names_no_endpoint(rig: Rig) -> None:
    """The client left between the decision and the dispatch."""
    rig.decide()
    rig.end("r", endpoint=None, attempts=0, status=0, ended=Ended.CLIENT_ABORT)
    outcome = rig.endings[0].outcome
    assert (outcome.endpoint, outcome.status, outcome.attempts) == (None, None, 0)
    assert rig.metric("tokenway_fallbacks_total", cluster=CLUSTER) == 0


def test_a_request_that_is_said_to_live_keeps_its_lease(rig: Rig) -> None:
    """A long stream is no lost one, and one that is not ours stays unknown."""
    rig.decide()
    for _ in range(10):
        rig.clock.advance(20.0)
        rig.alive("r")
        rig.alive("unknown")
        rig.scheduling.running.advance(rig.clock())
    assert rig.scheduling.load.get(RequestId("r")) is not None
    assert rig.scheduling.load.in_flight == len(rig.scheduling.running) == 1


@pytest.mark.parametrize(
    ("body", "kv_tokens", "reported", "believed"),
    [
        ({}, 0, (5, 900_000_000_000, 5), (5, 1 << 20, 5)),
        ({}, 160_000, (5, 900_000_000_000, 5), (5, 160_000, 5)),
        ({"max_tokens": 100}, 160_000, (5, 101, 0), (5, 100, 0)),
        ({"max_completion_tokens": 100, "n": 3}, 0, (5, 10**6, 0), (5, 300, 0)),
        ({"max_tokens": 100}, 160_000, (5, 99, 0), (5, 99, 0)),
        ({"max_tokens": 10**18, "n": 10**9}, 0, (5, 10**11, 0), (5, 1 << 20, 0)),
        ({}, 0, (None, None, 7), (None, None, 7)),
        ({}, 0, (10, 1, 11), (10, 1, 10)),
    ],
)
def test_counts_beyond_what_request_and_engine_allow_are_cut(
    body: dict[str, Any],
    kv_tokens: int,
    reported: tuple[int | None, int | None, int],
    believed: tuple[int | None, int | None, int],
) -> None:
    """In the record, the log, the metrics and all that is learned."""
    rig = build_rig()
    rig.decide("a", chat(**body))
    chosen = rig.record("a").chosen
    assert chosen is not None
    if kv_tokens:
        rig.scheduling.engines.observe_kv_tokens(chosen, kv_tokens)
    prompt, completion, cached = reported
    rig.end("a", prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
    outcome = rig.record("a").outcome
    assert outcome is not None
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens) == believed


def test_a_prompt_has_no_more_tokens_than_bytes_and_some() -> None:
    """What a template and pictures add is allowed for; 10^11 are not."""
    rig = build_rig()
    rig.decide("a", chat("word " * 100))
    rig.end("a", prompt_tokens=10**11, completion_tokens=1, cached_tokens=10**11)
    outcome, prompt_bytes = rig.record("a").outcome, rig.record("a").prompt_bytes
    assert outcome is not None
    assert outcome.prompt_tokens == outcome.cached_tokens == prompt_bytes + (1 << 16)


def test_one_lie_leaves_the_usual_length_of_answers() -> None:
    """Of three endpoints one says once that its answer had 9e11 tokens: the others' answers decide."""
    rig = build_rig()

    def answers(prefix: str) -> float:
        for number in range(60):
            rig.decide(f"{prefix}{number}", chat(f"{prefix}{number}"))
            rig.end(f"{prefix}{number}", prompt_tokens=5, completion_tokens=30)
        return rig.scheduling.predictor.traffic(GROUP).output_tokens

    before = answers("before")
    rig.decide("lie", chat("lie"))
    rig.end("lie", prompt_tokens=5, completion_tokens=900_000_000_000)
    assert rig.scheduling.predictor.traffic(GROUP).output_tokens < 1.4 * before
    assert answers("after") < before


def test_a_lost_request_ends_like_any_other(rig: Rig) -> None:
    """Its lease released it; listeners are called once, and not for an end that comes after all."""
    rig.decide("r", chat("x" * 1000, stream=True))
    key = rig.chosen()
    rig.clock.advance(LEASE_S)
    rig.scheduling.running.advance(rig.clock())
    rig.scheduling.running.advance(rig.clock())
    (ending,) = rig.endings
    assert (ending.outcome.ended, ending.outcome.endpoint) == (Ended.LEASE_EXPIRED, key)
    assert ending.evidence is NoFailure.UNKNOWN
    assert rig.record().outcome is ending.outcome
    assert rig.load(key) == NOTHING
    rig.end("r", endpoint=key)
    assert len(rig.endings) == 1
    assert (rig.ending.endpoints[key].served, rig.ending.endpoints[key].failures) == (0, 0)


def test_an_end_reported_twice_ends_once(rig: Rig) -> None:
    """The second finds nothing to release and calls no listener."""
    streamed(rig)
    key = rig.chosen()
    rig.end("r", endpoint=key, **USAGE)
    rig.end("r", endpoint=key, **USAGE)
    assert len(rig.endings) == 1
    assert rig.ending.endpoints[key].served == 1
    assert rig.load(key) == NOTHING


def test_a_refusal_is_an_ending(rig: Rig) -> None:
    """It has a record and an outcome, and no request that was sent."""
    rig.gateway.rejected(request_line("no"), RouterError(Reason.OVERLOADED, "busy"))
    (ending,) = rig.endings
    assert ending.request is None
    assert ending.record is rig.record("no")
    assert (ending.outcome.ended, ending.outcome.status) == (Ended.REJECTED, 429)


def test_a_listener_that_fails_takes_the_ending_from_no_other(rig: Rig) -> None:
    """The load is released, the others are called, and the fault is reported."""
    usage: dict[str, int] = {}
    faults: list[Exception] = []

    def broken(_: Ending) -> None:
        raise ValueError("a bug")

    def count(ending: Ending) -> None:
        usage[ending.record.model] = usage.get(ending.record.model, 0) + (
            ending.outcome.completion_tokens or 0
        )

    ends = Endings(rig.scheduling.running, rig.fleet, {}, lambda: None, [broken, count], [], faults.append)
    streamed(rig)
    key = rig.chosen()
    ends.take(request_end("r", address=rig.places[key], **USAGE), rig.clock())
    assert usage == {MODEL: USAGE["completion_tokens"]}
    assert [str(fault) for fault in faults] == ["a bug"]
    assert rig.load(key) == NOTHING


@replaces_code
def test_an_end_that_cannot_be_judged_leaves_nothing_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released and forgotten, whatever is raised: no lease would ever find what is left of it."""

    def broken(**_: object) -> None:
        raise ValueError("a bug")

    streamed(rig)
    key = rig.chosen()
    monkeypatch.setattr("extproc.routing.endings.evidence_of", broken)
    with pytest.raises(ValueError, match="a bug"):
        rig.end("r")
    assert rig.load(key) == NOTHING
    assert len(rig.scheduling.running) == len(rig.scheduling.caches.running) == 0
