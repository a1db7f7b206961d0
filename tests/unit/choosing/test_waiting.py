"""Requests that wait for room: which is let go, in which order, and that none is lost or charged twice."""

from __future__ import annotations

import re
from math import inf
from typing import Any

import pytest

from extproc.choosing.deciding import TurnDown
from extproc.choosing.holding import LONG_LAST, POLL_S, REGRET, REGRET_S, SHORT_FIRST, STRETCH
from extproc.choosing.max_num_seqs import SURE_VISITS
from extproc.errors import Reason, RouterError
from extproc.observing.explain import render, to_json, verdict
from extproc.request.rules import ModelRules, Rule, RuleTable
from extproc.routing.caches import Caches
from extproc.routing.scheduling import _crowded
from extproc.routing.settings import RouterSettings
from extproc.routing.table import RoutingTable
from extproc.values.deciding import Later
from extproc.values.decisions import HoldReason
from extproc.values.evidence import FailureKind
from extproc.values.placements import Decision
from metadata_center.types import Charge, RequestId
from tests.builds import replaces_code
from tests.conftest import (
    BLOCK_BYTES,
    CLUSTER,
    MODEL,
    THREE,
    Promise,
    chat,
    endpoint,
    request_end,
    request_line,
)
from tests.unit.held import LONG, Held


def test_an_idle_fleet_holds_no_request() -> None:
    """A request goes at once while its endpoint has less than two steps of prefill ahead."""
    held = Held(2)
    assert isinstance(held.ask("a"), Decision)
    assert isinstance(held.ask("b"), Decision)
    assert len(held.waiting) == 0


def test_a_request_waits_while_every_endpoint_is_full_and_goes_when_one_is_not() -> None:
    """It is charged nowhere while it waits, and once when it goes."""
    held = Held()
    held.ask("a")
    promise = held.hold("b")
    assert held.rig.scheduling.load.in_flight == 1
    assert held.waiting.by_reason() == {
        HoldReason.PREFILL: 1,
        HoldReason.KV_CACHE: 0,
        HoldReason.MAX_NUM_SEQS: 0,
    }
    held.loop.run(0.1)
    assert not promise.done()
    held.first_token("a")
    assert isinstance(promise.result(), Decision)
    assert held.rig.scheduling.load.in_flight == 2
    assert len(held.waiting) == 0
    assert held.rig.metric("tokenway_hold_seconds_count", model="m", ending="placed") == 1
    assert held.rig.metric("tokenway_hold_seconds_sum", model="m", ending="placed") == pytest.approx(0.1)
    assert held.rig.metric("tokenway_holds_total", model="m", reason="prefill") == 1


def test_the_record_of_a_held_request_says_so_and_can_be_recomputed() -> None:
    """Time and reason of the wait are recorded; those that wait too are part of the recomputed choice."""
    held = Held()
    held.ask("a")
    held.hold("b")
    held.hold("c")
    held.loop.run(0.25)
    held.first_token("a")
    record = held.rig.record("b")
    assert record.held_s == pytest.approx(0.25)
    assert record.hold is not None
    assert (record.hold.reason, record.hold.endpoint) == (HoldReason.PREFILL, THREE[0].key)
    assert record.hold.yields_s == 0.0
    assert record.snapshot is not None
    assert record.snapshot.held_s > 0.0
    json = to_json(record)
    assert verdict(json) == "recomputed: same choice, same place in line"
    assert json["hold"]["reason"] == "prefill"
    assert json["hold"]["foreseen_at_once_s"] == pytest.approx(record.hold.at_once_s)
    assert json["hold"]["bound_s"] == pytest.approx(
        REGRET * record.hold.at_once_s + REGRET_S + STRETCH * record.hold.counted.work_s
    )
    assert json["hold"]["foreseen_s"] == pytest.approx(0.25 + json["predicted_ttft_s"][0])
    page = render(json)
    assert f"waited for {THREE[0].key}   short of prefill" in page
    assert f"sent at once {record.hold.at_once_s * 1e3:.1f} ms; as it went" in page
    assert f"; at most {json['hold']['bound_s'] * 1e3:.1f} ms here\n" in page
    work = f"{record.hold.counted.work_s * 1e3:.1f} ms"
    once = "counted once, for no work of others waited"
    assert f"in line    {work} after its arrival   its work, {work}, {once}\n" in page


def test_the_record_says_how_long_the_request_might_have_waited() -> None:
    """By the least of its bounds."""
    held = Held(max_s=0.3)
    held.ask("a")
    held.hold("b")
    held.first_token("a")
    assert to_json(held.rig.record("b"))["hold"]["bound_s"] == pytest.approx(0.3)


def test_the_record_says_how_often_the_work_counted_and_that_is_recomputed() -> None:
    """By the least that waited while it did: once for the first of all, and for the last."""
    held = Held()
    held.ask("a")
    names = ["b", "c", "d"]
    for name in names:
        held.hold(name)
    for name in ("a", "b", "c"):
        held.first_token(name)
    shown = [to_json(held.rig.record(name)) for name in names]
    times = [json["hold"]["counted"]["times"] for json in shown]
    assert times[0] == times[2] == 1.0 < times[1]
    for json in shown:
        hold, counted = json["hold"], json["hold"]["counted"]
        assert verdict(json) == "recomputed: same choice, same place in line"
        length = counted["work_s"] / counted["mean_s"]
        assert counted["times"] == 1.0 + SHORT_FIRST * counted["waiting_s"] * (
            1.0 + LONG_LAST * length * length
        )
        assert hold["place_s"] == pytest.approx(counted["times"] * counted["work_s"])
        assert not counted["are_turns"]
    assert "counted once, for no work of others waited" in render(shown[2])
    waiting = f"{shown[1]['hold']['counted']['waiting_s'] * 1e3:.1f} ms"
    assert (
        f"counted {times[1]:.2f} times, for {waiting} of work waited per endpoint and the mean request had"
        in render(shown[1])
    )


def _altered(json: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    hold = {name: changes.get(name, each) for name, each in json["hold"].items()}
    counted = {name: changes.get(name, each) for name, each in hold["counted"].items()}
    return {**json, "hold": {**hold, "counted": counted}}


def test_a_place_that_the_rules_do_not_give_is_reported() -> None:
    """Another factor, another cause, another place, or one worse than the decision saw."""
    held = Held()
    held.ask("a")
    held.hold("b")
    held.hold("c")
    held.hold("d")
    held.first_token("a")
    held.first_token("b")
    json = to_json(held.rig.record("c"))
    hold, counted = json["hold"], json["hold"]["counted"]
    assert verdict(_altered(json, {})) == "recomputed: same choice, same place in line"
    once = f"recomputed: DIFFERENT (work counts {counted['times']:.2f} times)"
    assert verdict(_altered(json, {"times": counted["times"] + 1.0})) == once
    for changes in (
        {"are_turns": True},
        {"waiting_s": counted["waiting_s"] + 1.0},
        {"place_s": hold["place_s"] - 0.001},
        {"yields_s": 5.0},
        {"fairness_lag_s": 0.1},
        {"work_s": 60.0, "place_s": 60.0 * counted["times"]},
    ):
        assert str(verdict(_altered(json, changes))).startswith("recomputed: DIFFERENT (")


def test_the_place_of_one_that_is_sent_as_the_gateway_stops_is_that_of_when_it_was_last_asked_for() -> None:
    """It is asked no more who waits, and its record can be recomputed all the same."""
    held = Held()
    held.ask("a")
    held.hold("b")
    held.hold("c")
    held.waiting.close()
    for name in "bc":
        json = to_json(held.rig.record(name))
        assert verdict(json) == "recomputed: same choice, same place in line"
        assert json["hold"]["place_s"] > 0.0


def test_the_record_of_one_that_yielded_says_by_how_much() -> None:
    """More waits than can be in time, and this one has no time any more: it is later by 5 s, not by 1.5."""
    held = Held()
    held.ask("a")
    for number in range(14):
        held.hold(f"w{number}")
    held.hold("late", **{"x-slo-ttft-ms": "1500"})
    held.waiting.close()
    json = to_json(held.rig.record("late"))
    assert json["hold"]["yielded"]
    assert json["hold"]["yields_s"] == 5.0
    assert verdict(json) == "recomputed: same choice, same place in line"
    assert "behind those that could still be in time: 5000.0 ms later" in render(json)


def test_time_that_a_prefill_has_had_counts_as_done() -> None:
    """A request goes when the prefill ahead must be almost over, in time for the end of it."""
    held = Held()
    held.loop.run(1.0)  # a host's clock is never at 0, which says that nothing was ever computed
    held.ask("a")
    promise = held.hold("b")
    held.loop.run(1.0)
    assert promise.done()


def test_the_limit_of_an_engine_that_began_anew_is_forgotten() -> None:
    """Another process may have another: it is learned again, though no probe saw the engine away."""
    engines = Held().rig.scheduling.engines
    key = THREE[0].key

    def learn(started_s: float | None) -> None:
        for running in (2, 1) * SURE_VISITS:
            engines.observe_occupancy(key, running, 2 - running + 1, 0.1, started_s)

    learn(100.0)
    assert engines.max_num_seqs((key,)) == (2,)
    engines.observe_occupancy(key, 1, 0, 0.1, 100.0)
    engines.observe_occupancy(key, 1, 0, 0.1, None)
    assert engines.max_num_seqs((key,)) == (2,)
    engines.observe_occupancy(key, 1, 0, 0.1, 200.0)
    assert not any(engines.max_num_seqs((key,)))
    learn(200.0)
    assert engines.max_num_seqs((key,)) == (2,)
    engines.retain(frozenset())
    assert not engines._started_s


def test_a_refusal_says_how_long_the_wait_would_have_been() -> None:
    """In its message, which `tokenway explain` shows, and when to come back."""
    held = Held(max_s=0.3, refuses=True)
    held.ask("a")
    with pytest.raises(RouterError) as refused:
        held.ask("b")
    assert refused.value.reason is Reason.OVERLOADED
    assert re.search(r"the wait would be \d+\.\d s, and 0\.3 s is the most", refused.value.message)
    assert refused.value.retry_after_s == 1


@pytest.mark.parametrize(
    ("foreseen_s", "said_s"), [(0.2, 1), (19.2, 20), (119.5, 120), (3_555.0, 120), (inf, 120)]
)
def test_a_refusal_asks_for_no_longer_wait_than_clients_heed(foreseen_s: float, said_s: int) -> None:
    """Whole seconds, two minutes at most."""
    assert _crowded("m", TurnDown(foreseen_s, foreseen_s, 1.0), 0.0).retry_after_s == said_s


def test_an_engine_full_by_number_is_full() -> None:
    """Once its limit is learned, a request waits for a sequence to end, whatever the prefill ahead."""
    held = Held()
    for _ in range(SURE_VISITS):
        held.rig.scheduling.engines.observe_occupancy(THREE[0].key, running=2, waiting=1, kv_usage_ratio=0.1)
        held.rig.scheduling.engines.observe_occupancy(THREE[0].key, running=1, waiting=0, kv_usage_ratio=0.1)
    for number in range(3):  # the third is ready when a sequence ends
        assert isinstance(held.ask(f"a{number}", "short"), Decision)
        held.first_token(f"a{number}")
    promise = held.hold("b", "short")
    assert held.waiting.by_reason()[HoldReason.MAX_NUM_SEQS] == 1
    held.rig.ends.take(request_end("a0"), held.rig.clock())
    held.loop.run()
    assert promise.done()


def test_an_engine_is_full_by_the_number_that_the_operator_says() -> None:
    """From its first request on; what runs beyond it shows that it is wrong, and nothing waits for it."""
    held = Held()
    engines = held.rig.scheduling.engines
    engines.configure(THREE[0].key, "vllm/", 2)
    for number in range(3):
        assert isinstance(held.ask(f"a{number}", "short"), Decision)
        held.first_token(f"a{number}")
    promise = held.hold("b", "short")
    assert held.waiting.by_reason()[HoldReason.MAX_NUM_SEQS] == 1
    engines.observe_occupancy(THREE[0].key, running=3, waiting=0, kv_usage_ratio=0.1)
    held.loop.run(2 * POLL_S)
    assert promise.done()


def test_short_work_goes_before_long_work_that_came_a_little_earlier() -> None:
    """The order is by arrival plus work."""
    held = Held()
    held.ask("a")
    long, short = held.hold("long"), held.hold("short", "short " * 2_000)
    held.first_token("a")
    assert short.done()
    assert not long.done()


def test_no_request_is_overtaken_by_what_comes_later_than_its_own_work_takes() -> None:
    """A stream of short requests does not starve a long one."""
    held = Held()
    held.ask("a", LONG * 6)
    long = held.hold("long")
    held.loop.run(2.0)
    short = held.hold("short", "short " * 2_000)
    held.first_token("a")
    assert long.done()
    assert not short.done()


def test_news_that_never_comes_is_looked_for() -> None:
    """Another worker or gateway frees room without a word: the poll finds it."""
    held = Held()
    held.ask("a")
    promise = held.hold("b")
    held.rig.scheduling.load.release_prefill(RequestId("a"))
    held.loop.run(POLL_S)
    assert promise.done()


def test_a_client_that_left_is_never_charged() -> None:
    """Its place in the queue is free at once, for a request that waited behind it as well."""
    held = Held()
    held.ask("a")
    gone, behind = held.hold("gone"), held.hold("behind")
    gone.cancel()
    held.first_token("a")
    assert behind.done()
    assert held.rig.scheduling.records.get(RequestId("gone")) is None
    assert held.rig.scheduling.load.in_flight == 2
    assert held.rig.metric("tokenway_hold_seconds_count", model="m", ending="gone") == 1
    left = {"outcome": "client_abort", "status_class": "none"}
    assert held.rig.metric("tokenway_requests_total", model="m", **left) == 1
    assert len(held.waiting) == 0


def test_one_too_many_is_refused_with_the_time_to_come_back() -> None:
    """The bound on the number held is kept, and the answer is early."""
    held = Held(max_requests=1, refuses=True)
    held.ask("a")
    held.hold("b")
    with pytest.raises(RouterError) as refused:
        held.ask("c")
    assert (refused.value.reason, refused.value.status) == (Reason.OVERLOADED, 429)
    assert refused.value.retry_after_s == 1


def test_one_too_many_comes_again_when_a_place_should_be_free() -> None:
    """Not sooner, though its wait would fit the bound: the first that waits goes after what is ahead."""
    held = Held(max_requests=1, refuses=True)
    held.ask("a", LONG * 4)  # some eight seconds
    held.hold("b", LONG * 4)
    with pytest.raises(RouterError) as refused:
        held.ask("c")
    assert "too many requests wait" in refused.value.message
    assert refused.value.retry_after_s in {8, 9}


def test_what_cannot_be_answered_within_its_own_limit_is_refused_early() -> None:
    """`x-slo-ttft-ms` bounds the wait: the prefill ahead alone exceeds it."""
    held = Held(refuses=True)
    held.ask("a", LONG * 4)
    with pytest.raises(RouterError) as refused:
        held.ask("b", x_slo_ttft_ms="700")
    assert refused.value.reason is Reason.OVERLOADED


@pytest.mark.parametrize("limit_ms", ["0.0001", "1", "1e-300", "700"])
def test_who_says_a_limit_that_nobody_can_keep_overtakes_nobody(limit_ms: str) -> None:
    """The header is the client's own to write: what came before is sent before."""
    held = Held()
    held.ask("a")
    before = [held.hold(f"before {number}") for number in range(4)]
    hurried = held.hold("hurried", x_slo_ttft_ms=limit_ms)
    for name in ("a", "before 0", "before 1"):
        assert not hurried.done()
        held.first_token(name)
    assert [promise.done() for promise in before] == [True, True, True, False]
    assert not hurried.done()


def test_what_cannot_be_served_in_time_any_more_is_refused_then() -> None:
    """Load that came from elsewhere makes the wait too long: the answer does not wait for its end."""
    held = Held(max_s=2.0, refuses=True)
    held.ask("a")
    promise = held.hold("b")
    held.rig.scheduling.load.charge(Charge(RequestId("x"), THREE[0].key, 200_000, 200_000), 0.0, None)
    held.loop.run(POLL_S)
    assert promise.done()
    with pytest.raises(RouterError) as refused:
        promise.result()
    assert refused.value.reason is Reason.OVERLOADED
    assert held.rig.metric("tokenway_hold_seconds_count", model="m", ending="refused") == 1


def test_no_request_is_refused_for_its_wait_unless_that_is_asked_for() -> None:
    """One too many is sent at once, one whose time is up then: the engine's own queue takes both."""
    held = Held(max_requests=1, max_s=0.3)
    held.ask("a", LONG * 4)
    promise = held.hold("b")
    assert isinstance(held.ask("c"), Decision)
    held.loop.run(0.3)
    assert isinstance(promise.result(), Decision)
    assert held.rig.scheduling.load.in_flight == 3
    assert held.rig.metric("tokenway_hold_seconds_count", model="m", ending="placed") == 1


def test_what_waits_goes_elsewhere_when_its_endpoint_is_ejected() -> None:
    """A change of health makes a new queue, and every request is in it or gone from it."""
    held = Held(2)
    held.ask("a")
    held.ask("b")
    promises = [held.hold(f"c{number}") for number in range(4)]
    lost = held.rig.chosen("a")
    for _ in range(3):
        held.rig.scheduling.health.attempt_failed(lost, FailureKind.CONNECT_FAILURE, held.rig.clock())
    held.rig.ends.take(request_end("b"), held.rig.clock())
    held.loop.run(POLL_S)
    done = [number for number, promise in enumerate(promises) if promise.done()]
    assert len(done) == 1
    assert held.rig.chosen(f"c{done[0]}") != lost


def test_no_endpoint_left_answers_what_waits() -> None:
    """No request waits for endpoints that are gone."""
    held = Held()
    held.ask("a")
    promise = held.hold("b")
    held.rig.configure([])
    held.loop.run(POLL_S)
    with pytest.raises(RouterError) as refused:
        promise.result()
    assert refused.value.reason is Reason.NO_HEALTHY_ENDPOINT


def test_a_new_endpoint_takes_what_waits() -> None:
    """A configuration with more room is used at the next round."""
    held = Held()
    held.ask("a")
    promise = held.hold("b")
    held.rig.configure(THREE[:2])
    held.loop.run(POLL_S)
    assert promise.done()
    assert held.rig.chosen("b") == endpoint(1).key


def test_switching_it_off_lets_everybody_go() -> None:
    """Settings are those in force when a request is placed again."""
    held = Held()
    held.ask("a")
    promises = [held.hold("b"), held.hold("c")]
    held.rig.router.settings = RouterSettings(block_bytes=BLOCK_BYTES)
    held.loop.run(POLL_S)
    assert all(promise.done() for promise in promises)


def test_closing_schedules_all_at_once_and_holds_none_any_more() -> None:
    """A worker that stops loses no request."""
    held = Held()
    held.ask("a")
    promises = [held.hold("b"), held.hold("c")]
    held.waiting.close()
    assert all(isinstance(promise.result(), Decision) for promise in promises)
    assert isinstance(held.ask("d"), Decision)
    assert held.rig.scheduling.load.in_flight == 4


def test_what_waits_for_a_cluster_that_goes_is_scheduled_there_before() -> None:
    """In its order, and nothing else is; what comes later waits as before."""
    held = Held()
    held.ask("a")
    promises = [held.hold("b"), held.hold("c")]
    held.waiting.place({"another"})
    assert not any(promise.done() for promise in promises)
    held.waiting.place({CLUSTER})
    assert all(isinstance(promise.result(), Decision) for promise in promises)
    assert held.rig.scheduling.load.in_flight == 3
    held.hold("d")


@replaces_code
def test_a_failure_is_that_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug met by one that waits fails its stream and leaves the others waiting their turn."""
    held = Held()
    held.ask("a")
    broken, whole = held.hold("broken"), held.hold("whole")
    estimate = Caches.estimate

    def fail_once(*args: Any) -> Any:
        monkeypatch.setattr(Caches, "estimate", estimate)
        raise ZeroDivisionError

    monkeypatch.setattr(Caches, "estimate", fail_once)
    held.first_token("a")
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert whole.done()
    assert held.rig.metric("tokenway_hold_seconds_count", model="m", ending="failed") == 1


@replaces_code
def test_bodies_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound on bytes a request is placed at once rather than held."""
    monkeypatch.setattr("extproc.routing.waiting.MAX_HELD_BYTES", 1)
    held = Held()
    held.ask("a")
    held.hold("b")
    assert isinstance(held.ask("c"), Decision)


@replaces_code
def test_passes_rest_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that took long delays the next one by four times as much."""
    held = Held()
    held.ask("a")
    promise = held.hold("b")
    estimate = Caches.estimate

    def slow(self: Caches, *args: Any) -> Any:
        held.loop.clock.advance(0.1)
        return estimate(self, *args)

    monkeypatch.setattr(Caches, "estimate", slow)
    held.loop.run(POLL_S)
    began_s = held.loop.clock.now_s
    held.first_token("a")
    assert not promise.done()
    assert held.loop.clock.now_s == began_s
    held.loop.run(0.4)
    assert promise.done()


TURN_OF_AN_AGENT = "a turn of an agent " * 20_000


def test_a_large_body_is_understood_in_one_turn_of_the_loop_and_scheduled_in_the_next() -> None:
    """Nothing is charged in between, and nothing at all for a client that left meanwhile."""
    held = Held(2)
    promise, left = (
        Promise(deciding.pending)
        for deciding in (
            held.rig.gateway.decide(request_line(name), chat(TURN_OF_AN_AGENT)) for name in ("a", "b")
        )
        if isinstance(deciding, Later)
    )
    assert held.rig.scheduling.load.in_flight == 0
    left.cancel()
    held.loop.run()
    assert isinstance(promise.result(), Decision)
    assert held.rig.scheduling.load.in_flight == 1
    assert len(held.waiting) == 0


def test_a_large_body_goes_by_the_rules_of_the_turn_in_which_it_is_scheduled() -> None:
    """A configuration that comes in between has taken its cluster away."""
    held = Held()
    router = held.rig.router
    deciding = held.rig.gateway.decide(request_line("a"), chat(TURN_OF_AN_AGENT))
    assert isinstance(deciding, Later)
    promise = Promise(deciding.pending)
    renamed = RoutingTable(
        rules=RuleTable([ModelRules(MODEL, (Rule("renamed"),))]),
        clusters={"renamed": THREE[:1]},
        models=[MODEL],
        default_cluster=None,
        allowed_fields=frozenset(),
        slots_of=held.rig.scheduling.load.slots,
        loaded_unix_s=0.0,
    )
    router.configure(renamed, router.settings)
    held.loop.run()
    decision = promise.result()
    assert isinstance(decision, Decision)
    assert decision.plan.cluster == "renamed"


def test_a_large_body_is_refused_or_waits_as_any_other() -> None:
    """It is refused a turn later, and waits for room."""
    held = Held()
    held.ask("a")
    waits = held.hold("b", TURN_OF_AN_AGENT)
    assert len(held.waiting) == 1
    held.first_token("a")
    assert isinstance(waits.result(), Decision)
    held.rig.configure([])
    with pytest.raises(RouterError):
        held.ask("c", TURN_OF_AN_AGENT)
