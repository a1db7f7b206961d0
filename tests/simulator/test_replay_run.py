"""The event loop: what comes of requests, what gateways learn when, held requests, oracles."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from extproc.choosing.holding import POLL_S
from extproc.choosing.stateful import Decision, FleetView, Hold, Shed, StatefulPolicy
from tests.simulator.replaying import EXACT, H100, Scripted, asking_at, replayed, trace_of
from tokenway.simulator.engine.engine import EngineRequest
from tokenway.simulator.engine.profile import EngineProfile
from tokenway.simulator.policies.registry import make
from tokenway.simulator.replay.caches import ViewKind
from tokenway.simulator.replay.fleet import Member, parse_fleet, profiles_from, scaled_kv
from tokenway.simulator.replay.oracle import Oracle, prefill_s, time_to_first_token
from tokenway.simulator.replay.replica import QueuedPrompt, Replica
from tokenway.simulator.replay.settings import RunSettings, Spread


def test_one_request_takes_what_the_engine_takes() -> None:
    """TTFT is front-end latency and one step; each further token is one step."""
    outcome = replayed(trace_of(asking_at(1.0)), lambda _: Scripted(0))
    (served,) = outcome.served
    alone_s = (H100.alpha0_ms + 1000 * H100.step_s(1024, 1024 * 512, 0, 1)) / 1000
    assert served.first_s == pytest.approx(1.0 + alone_s)
    assert served.end_s == pytest.approx(
        1.0 + alone_s + sum(H100.step_s(1, 0, context, 1) for context in (1025, 1026, 1027))
    )
    assert (served.row, served.cached_tokens, served.arrived_s, served.sent_s) == (0, 0, 1.0, 1.0)
    assert sum(row.total() for row in outcome.computed_tokens) == 1024 + 3


def test_a_repeated_prompt_hits_and_elsewhere_it_is_waste() -> None:
    """The second finds all but its last block; sent to the other engine it finds nothing that is there."""
    trace = trace_of(asking_at(0.0), asking_at(10.0))
    hit = replayed(trace, lambda _: Scripted(0)).served[1]
    assert (hit.cached_tokens, hit.best_tokens) == (1008, 896)  # best at a precision of 128 tokens
    missed = replayed(trace, lambda _: Scripted(0, 1)).served[1]
    assert (missed.cached_tokens, missed.best_tokens) == (0, 896)


def test_a_turn_waits_for_the_answer_and_its_think_time() -> None:
    """Closed loop inside a session; a refused turn counts as answered at once."""
    trace = trace_of(asking_at(1.0), asking_at(0.0, after=0, think_s=2.5))
    first, second = replayed(trace, lambda _: Scripted(0)).served
    assert second.arrived_s == pytest.approx(first.end_s + 2.5)
    first, second = replayed(trace, lambda _: Scripted(Shed(1.0), 0)).served
    assert (first.row, first.first_s, first.end_s, second.arrived_s) == (None, None, 1.0, 3.5)


def test_the_ledger_and_matches_and_observers_follow_a_request() -> None:
    """Charged at once, prefill off at the first token, gone at the end; matches count what is sent."""
    policy = Scripted(0)
    replayed(
        trace_of(asking_at(0.0, output=200), asking_at(0.001), asking_at(0.5), asking_at(9.0)),
        lambda _: policy,
    )
    views = policy.views
    assert views[0]["requests"] == [0, 0]
    assert (views[1]["requests"], views[1]["prefill_tokens"]) == ([1, 0], [1024, 0])
    assert views[1]["matched_blocks"] == [16, 0]  # pending: it was sent a millisecond ago
    assert (views[2]["requests"], views[2]["prefilling"], views[2]["context_tokens"]) == (
        [1, 0],
        [0, 0],
        [1024, 0],
    )
    assert (views[3]["requests"], views[3]["context_tokens"]) == ([0, 0], [0, 0])
    assert [notified for notified in policy.notified if notified[1] == 0] == [
        ("sent", 0, 0),
        ("first", 0),
        ("finished", 0, 200),
    ]


@pytest.mark.parametrize(
    ("kind", "soon", "later"),
    [
        (ViewKind.HISTORY, 16, 16),
        (ViewKind.HISTORY_CONFIRMED, 0, 16),
        (ViewKind.EVENTS, 0, 16),
        (ViewKind.EVENTS_PENDING, 16, 16),
    ],
)
def test_views_learn_when_production_would(kind: ViewKind, soon: int, later: int) -> None:
    """A millisecond after sending, and well after the end."""
    policy = Scripted(0)
    settings = replace(EXACT, view=kind, event_lag_s=0.05)
    replayed(trace_of(asking_at(0.0), asking_at(0.001), asking_at(9.0)), lambda _: policy, settings)
    assert [view["matched_blocks"][0] for view in policy.views] == [0, soon, later]


def test_events_come_late_by_their_lag() -> None:
    """An event-only view knows a prompt no sooner than the lag after its step."""
    for lag_s, matched in ((0.1, 16), (5.0, 0)):
        policy = Scripted(0)
        settings = replace(EXACT, view=ViewKind.EVENTS, event_lag_s=lag_s)
        replayed(trace_of(asking_at(0.0), asking_at(1.0)), lambda _, p=policy: p, settings)  # type: ignore[misc]
        assert policy.views[1]["matched_blocks"] == [matched, 0]


def test_metrics_are_as_old_as_the_last_scrape() -> None:
    """The queue of the moment shows only where engines are read directly."""
    trace = trace_of(*(asking_at(0.001 * i, first=100 * i) for i in range(4)))
    for age_s, waiting in ((0.0, [3, 0]), (1.0, [0, 0])):
        policy = Scripted(0)
        replayed(trace, lambda _, p=policy: p, replace(EXACT, metric_age_s=age_s))  # type: ignore[misc]
        assert policy.views[3]["waiting"] == waiting


@pytest.mark.parametrize(("delay_s", "seen"), [(0.2, [0, 0]), (0.0005, [1, 0])])
def test_other_gateways_are_known_after_the_push(delay_s: float, seen: list[int]) -> None:
    """Of two gateways the second learns of the first's request and of its prompt when they were pushed."""
    policies = [Scripted(0), Scripted(0)]
    making = iter(policies)
    settings = replace(EXACT, gateways=2, push_delay_s=delay_s)
    replayed(trace_of(asking_at(0.0, output=100), asking_at(0.001)), lambda _: next(making), settings)
    (view,) = policies[1].views
    assert (view["requests"], view["matched_blocks"]) == (seen, [16 * row for row in seen])


@pytest.mark.parametrize("kind", list(ViewKind))
def test_ledgers_and_views_of_every_gateway_come_to_rest(kind: ViewKind) -> None:
    """With four gateways, delays and no first tokens, nothing stays charged and all prompts are served."""
    rng = Random(2)
    requests = [asking_at(rng.random() * 5, blocks=1 + int(rng.random() * 30), first=0) for _ in range(60)]
    settings = RunSettings(gateways=4, view=kind, first_token=False, spread=Spread.RANDOM, push_delay_s=0.3)
    requests.append(asking_at(60.0))  # long after: every push has arrived
    views: list[FleetView] = []

    class Watching(StatefulPolicy):
        def choose(self, view: FleetView) -> int:
            views.append(view)
            return int(view.rng.random() * 2)

    outcome = replayed(trace_of(*requests), lambda _: Watching(), settings)
    assert len(outcome.served) == 61
    assert all(served.first_s is not None for served in outcome.served)
    last = views[-1]
    # Columns are read in place: after the run they hold the last request alone, or nothing.
    assert sum(last.requests) == 0
    assert sum(last.prefilling) == sum(last.prefill_tokens) == sum(last.context_tokens) == 0


def test_a_prefill_without_first_token_is_taken_off_when_predicted() -> None:
    """The ledger shows it before the deadline of 100 ms and no more after it, though the stream goes on."""
    policy = Scripted(0)
    settings = replace(EXACT, first_token=False)
    requests = (asking_at(0.0, output=400), asking_at(0.09, first=50), asking_at(0.5, first=90))
    replayed(trace_of(*requests), lambda _: policy, settings)
    assert policy.views[1]["prefilling"] == [1, 0]
    assert (policy.views[2]["requests"], policy.views[2]["prefilling"]) == ([1, 0], [0, 0])
    assert not [notified for notified in policy.notified if notified[0] == "first"]


def test_a_held_request_is_asked_again_when_something_frees() -> None:
    """Held at its arrival, sent at the first token of the one before; the hold is part of its TTFT."""
    policy = Scripted(0, Hold(30.0), 1)
    outcome = replayed(trace_of(asking_at(0.0), asking_at(0.001, first=90)), lambda _: policy)
    by_index = {served.index: served for served in outcome.served}
    assert by_index[1].sent_s == by_index[0].first_s
    assert by_index[1].decisions == 2
    assert by_index[1].row == 1


def test_a_held_request_is_asked_again_when_its_time_is_up() -> None:
    """With nothing else going on the timer wakes it; forever is `max_hold_s`, then it is refused."""
    policy = Scripted(Hold(2.0), 0)
    (served,) = replayed(trace_of(asking_at(1.0)), lambda _: policy).served
    assert served.sent_s == 2.0
    settings = replace(EXACT, max_hold_s=5.0)
    (served,) = replayed(trace_of(asking_at(1.0)), lambda _: Scripted(Hold(float("inf"))), settings).served
    assert (served.first_s, served.end_s) == (None, 6.0)


def test_a_held_request_that_polls_is_asked_again_every_so_often() -> None:
    """Nothing ends, and yet it is sent at the fifth poll."""
    policy = Scripted(*(Hold(9.0, polls=True),) * 5, 0)
    (served,) = replayed(trace_of(asking_at(1.0)), lambda _: policy).served
    assert served.sent_s == pytest.approx(1.0 + 5 * POLL_S)


def test_news_of_one_moment_are_heard_before_anybody_is_asked() -> None:
    """Two of the other gateway's answers end in one step: what is held here is asked once, with both gone."""
    held = Scripted(Hold(30.0), 0)
    policies = iter((Scripted(0), held))
    settings = replace(EXACT, gateways=2, push_delay_s=0.05)
    requests = (asking_at(0.0, output=1), asking_at(0.0, first=50), asking_at(0.0, first=90, output=1))
    outcome = replayed(trace_of(*requests), lambda _: next(policies), settings)
    first, other = (served for served in outcome.served if served.index != 1)
    assert first.end_s == other.end_s
    assert [view["requests"] for view in held.views] == [[0, 0], [0, 0]]
    assert held.views[1]["now_s"] == first.end_s + 0.05


def test_one_that_polls_finds_what_others_freed_by_the_next_poll() -> None:
    """An answer of the other gateway ends between two polls: as in the product, nobody is woken by it."""
    held = Scripted(lambda view: 0 if not sum(view.requests) else Hold(30.0, polls=True))
    policies = iter((Scripted(0), held))
    settings = replace(EXACT, gateways=2, push_delay_s=0.001)
    outcome = replayed(
        trace_of(asking_at(0.0, output=1), asking_at(0.005, first=50)), lambda _: next(policies), settings
    )
    first, ours = outcome.served
    polls = -(-(first.end_s + 0.001 - 0.005) // POLL_S)
    assert ours.sent_s is not None
    assert ours.sent_s == pytest.approx(0.005 + polls * POLL_S)
    assert ours.sent_s > first.end_s + 0.002


def test_a_hold_that_ends_now_does_not_stop_the_clock() -> None:
    """A policy that always wants one more moment runs into `max_hold_s`."""
    settings = replace(EXACT, max_hold_s=0.05)
    policy = Scripted(lambda view: Hold(view.now_s))
    (served,) = replayed(trace_of(asking_at(0.0)), lambda _: policy, settings).served
    assert served.end_s == pytest.approx(0.05)
    assert served.decisions <= 52


def test_no_gateway_holds_more_than_its_bound() -> None:
    """The third of three held requests is refused at once."""
    settings = replace(EXACT, max_held=2, max_hold_s=1.0)
    trace = trace_of(*(asking_at(0.1 * i, first=90 * i) for i in range(3)))
    outcome = replayed(trace, lambda _: Scripted(Hold(float("inf"))), settings)
    assert {s.index: s.end_s for s in outcome.served} == pytest.approx({2: 0.2, 0: 1.0, 1: 1.1})


def test_held_requests_are_asked_by_rank_up_to_a_closed_one() -> None:
    """Lower ranks first; a closed hold ends the round."""
    order: list[int] = []

    class ByRank(StatefulPolicy):
        def choose(self, view: FleetView) -> Decision:
            index = view.request.request_id
            if index == 0:
                return 0
            order.append(index)
            if view.now_s > 3.0:
                return 1
            return Hold(4.0 + index, rank=-index, closed=index == 2)

    replayed(trace_of(*(asking_at(0.001 * i, first=90 * i, output=1) for i in range(4))), lambda _: ByRank())
    # Arrivals; the end of 0 asks 3 and 2 and no further; the timer asks 1, and its end 3 and 2 again.
    assert order == [1, 2, 3, 3, 2, 1, 3, 2]


def test_an_engine_that_refuses_leaves_no_trace() -> None:
    """A full queue sheds; ledgers go back to zero and nothing counts as cached."""
    full = replace(H100, max_num_queued_reqs=1)
    policy = Scripted(0)
    trace = trace_of(*(asking_at(0.0001 * i, first=90 * i) for i in range(3)), asking_at(9.0, first=180))
    outcome = replayed(trace, lambda _: policy, fleet=(Member(full),))
    refused = [served.index for served in outcome.served if served.first_s is None]
    assert refused == [1, 2]
    assert ("finished", 2, 0) in policy.notified
    assert (policy.views[3]["requests"], policy.views[3]["matched_blocks"]) == ([0], [0])


def test_nothing_arrives_after_the_duration() -> None:
    """Late requests, and all that wait for them, do not come."""
    trace = trace_of(
        asking_at(1.0), asking_at(7.0), asking_at(0.0, after=1, think_s=0.1), asking_at(2.0, first=50)
    )
    outcome = replayed(trace, lambda _: Scripted(0), replace(EXACT, duration_s=5.0))
    assert sorted(served.index for served in outcome.served) == [0, 3]


def test_estimates_are_off_but_proportional() -> None:
    """With an error, lengths differ from the truth, and what is matched never exceeds the prompt."""
    seen: list[tuple[int, int]] = []

    class Reading(StatefulPolicy):
        def choose(self, view: FleetView) -> int:
            seen.append((view.request.prompt_tokens, view.matched_tokens()[0]))
            return 0

    trace = trace_of(*(asking_at(0.5 * i) for i in range(50)))
    replayed(trace, lambda _: Reading(), replace(EXACT, token_error=0.2))
    assert len({tokens for tokens, _ in seen}) > 30
    assert sum(tokens for tokens, _ in seen) / 50 == pytest.approx(1024, rel=0.1)
    assert all(matched == tokens - 1 or matched / tokens > 0.98 for tokens, matched in seen[1:])


def test_a_request_that_fits_no_cache_is_refused_before_the_run() -> None:
    """The replay does not begin."""
    with pytest.raises(ValueError, match="fit"):
        replayed(trace_of(asking_at(0.0, blocks=8000)), lambda _: Scripted(0))


def test_fleets_of_two_block_sizes_are_refused() -> None:
    """One trace id is one number of blocks everywhere."""
    mixed = (Member(H100), Member(replace(H100, block_size=32)))
    with pytest.raises(ValueError, match="block size"):
        replayed(trace_of(asking_at(0.0)), lambda _: Scripted(0), fleet=mixed)


def test_every_registered_rule_serves_every_request() -> None:
    """Rivals and our own, on a mixed fleet with two gateways."""
    from tokenway.simulator.policies.registry import REGISTRY

    rng = Random(4)
    requests = [
        asking_at(rng.random() * 2, blocks=2 + int(rng.random() * 40), first=1000 * int(rng.random() * 3))
        for _ in range(40)
    ]
    fleet = parse_fleet("llama8b-h100:2,llama8b-a100:1:0.4")
    for name in REGISTRY:
        outcome = replayed(trace_of(*requests), lambda _, n=name: make(n), RunSettings(gateways=2), fleet)  # type: ignore[misc]
        assert len(outcome.served) == 40, name
        assert all(served.first_s is not None for served in outcome.served), name


# Oracles

SMALL = EngineProfile("small", 1.0, 5.0, 0.02, 1e-6, 6e-5, 0.01, 5.0, 20_000, max_num_seqs=16)


def _busy(seed: int, requests: int) -> tuple[Replica, float]:
    """A replica some way into a random load."""
    rng, replica, now_s = Random(seed), Replica(SMALL), 0.0
    for index in range(requests):
        now_s += rng.expovariate(8.0)
        while (due_s := replica.next_step_due()) is not None and due_s <= now_s:
            replica.step(due_s)
        prompt = 16 * (1 + int(rng.random() * 150))
        replica.submit(EngineRequest(str(index), prompt, 1 + int(rng.random() * 150), []), now_s)
    return replica, now_s


@pytest.mark.parametrize("seed", range(12))
def test_an_oracle_foresees_the_engine(seed: int) -> None:
    """Its time to first token is the engine's own within a tenth, busy, full or idle."""
    replica, now_s = _busy(seed, 3 + 4 * seed)
    foreseen_s = time_to_first_token(replica, QueuedPrompt(900, 0, 10, now_s), now_s)
    replica.submit(EngineRequest("asked", 900, 10, []), now_s)
    at_s = now_s
    while True:
        due_s = replica.next_step_due()
        assert due_s is not None
        step = replica.step(max(due_s, at_s))
        at_s = step.end_s
        if "asked" in step.first_tokens:
            break
    assert foreseen_s == pytest.approx(at_s - now_s, rel=0.1)


def test_looking_ahead_ends_at_its_limit_and_changes_nothing() -> None:
    """Beyond the limit the answer only says that it is beyond; the replica is as before."""
    replica, now_s = _busy(5, 40)
    before = replica.true_state()
    prompt = QueuedPrompt(900, 0, 10, now_s)
    whole_s = time_to_first_token(replica, prompt, now_s)
    assert time_to_first_token(replica, prompt, now_s, whole_s / 4) > whole_s / 4
    assert replica.true_state() == before


def test_the_selfish_oracle_queues_where_it_is_soonest_and_the_other_where_it_costs_least() -> None:
    """A long prompt cached on a busy engine: the time is better elsewhere, the work is not."""
    hot = asking_at(0.0, blocks=300, output=1)
    busy = [asking_at(20.0 + 0.0001 * i, blocks=100, first=10_000 * (i + 1)) for i in range(6)]
    asked = asking_at(20.01, blocks=310, output=2)
    trace = trace_of(hot, *busy, asked)

    def row(work: float) -> int | None:
        class Until(Oracle):
            def choose(self, view: FleetView) -> int:
                return super().choose(view) if view.request.request_id == 7 else 0

        served = replayed(trace, lambda truth: Until(truth, work)).served
        return next(each.row for each in served if each.index == 7)

    assert (row(0.0), row(8.0)) == (1, 0)


def test_own_work_is_the_time_of_an_idle_engine() -> None:
    """Prefill alone, step by step, takes what the formula says."""
    replica = Replica(H100)
    replica.submit(EngineRequest("a", 10_000, 1, []), 0.0)
    took_s = 0.0
    while (due_s := replica.next_step_due()) is not None:
        took_s += replica.step(due_s).duration_s
    assert prefill_s(H100, 0, 10_000) == pytest.approx(took_s, rel=0.01)


# Fleets


def test_fleets_are_parsed_with_counts_and_weights() -> None:
    """`name:count[:weight]`, in order."""
    fleet = parse_fleet("llama8b-h100:2, llama8b-a100:1:0.5,demo")
    assert [(m.profile.name, m.weight) for m in fleet] == [
        ("llama8b-h100", 1.0),
        ("llama8b-h100", 1.0),
        ("llama8b-a100", 0.5),
        ("demo", 1.0),
    ]
    assert scaled_kv(fleet, 0.5)[0].profile.kv_tokens == 233_500


@pytest.mark.parametrize("text", ["", "none:2", "demo:0", "demo:x", "demo:1:0", "demo:1:y"])
def test_a_bad_fleet_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="fleet"):
        parse_fleet(text)


def test_profiles_of_ones_own_extend_known_ones() -> None:
    """`base` gives what is left out; unknown fields and names are refused."""
    found = profiles_from({"mine": {"base": "demo", "kv_tokens": 99_000}})
    assert (found["mine"].kv_tokens, found["mine"].a_ms, found["mine"].name) == (99_000, 1.0, "mine")
    cases: list[Any] = [[], {"a": 1}, {"a": {"speed": 1}}, {"a": {"base": "none"}}, {"a": {"a_ms": 1.0}}]
    for bad in cases:
        with pytest.raises(ValueError, match="profile"):
            profiles_from(bad)


@pytest.mark.parametrize(
    "change", [{"speed": 0.0}, {"gateways": 0}, {"event_lag_s": -1.0}, {"max_hold_s": 0.0}, {"max_held": -1}]
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    """Each of them at construction."""
    with pytest.raises(ValueError, match=r"positive|negative"):
        RunSettings(**change)
