"""What clients do that are not served at once, what reuse there was to be had, and what goes wrong."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from extproc.choosing.stateful import FleetView, Hold, PolicyRequest, Shed
from tests.simulator.asking import request, view
from tests.simulator.replaying import EXACT, H100, Scripted, asking_at, replayed, trace_of
from tokenway.simulator.policies.ours import LeastCompletion
from tokenway.simulator.policies.registry import make
from tokenway.simulator.replay.clients import Clients
from tokenway.simulator.replay.fleet import Member
from tokenway.simulator.replay.reuse import EverSeen
from tokenway.simulator.replay.run import Truth
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.summary import Slo, summarise
from tokenway.simulator.replay.trace import Timing, with_tide

IMPATIENT = replace(EXACT, abandon_after_s=1.0, abandon_share=1.0)


class Leaving(Scripted):
    """Notes who left, too."""

    def on_left(self, request: PolicyRequest) -> None:
        """Note it."""
        self.notified.append(("left", request.request_id))


def test_a_client_that_leaves_an_engine_gives_up_its_room() -> None:
    """A prompt of two seconds is cut off after one: charge released, prefill wasted, and no token counted."""
    policy = Leaving(0)
    trace = trace_of(asking_at(0.0, blocks=1600), asking_at(1.1, first=9000))
    outcome = replayed(trace, lambda _: policy, IMPATIENT)
    left, served = outcome.served
    assert (left.index, left.is_abandoned, left.first_s, left.end_s) == (0, True, None, 1.0)
    assert served.first_s is not None
    assert policy.views[1]["requests"] == [0, 0]
    assert ("finished", 0, 0) in policy.notified
    assert ("first", 0) not in policy.notified
    computed = sum(row.total() for row in outcome.computed_tokens)
    assert 10_000 < computed - 1024 < 1600 * 64  # what was computed of it, and no more
    figures = summarise(outcome, [(None, None)] * 2, Slo(), 0.0)
    assert (figures.abandoned_ratio, figures.shed_ratio, figures.good_ratio) == (0.5, 0.0, 0.5)


def test_a_client_that_has_its_first_token_stays() -> None:
    """However long the answer takes."""
    (served,) = replayed(trace_of(asking_at(0.0, output=400)), lambda _: Scripted(0), IMPATIENT).served
    assert (served.is_abandoned, served.end_s > 2.0) == (False, True)


def test_a_client_that_leaves_while_held_is_in_nobodys_way() -> None:
    """The rule hears of it, and a turn that waited for the answer comes."""
    policy = Leaving(Hold(99.0), 0)
    trace = trace_of(asking_at(0.0), asking_at(0.0, after=0, think_s=0.5))
    left, served = replayed(trace, lambda _: policy, IMPATIENT).served
    assert (left.is_abandoned, left.row, left.held_s, served.arrived_s) == (True, None, 1.0, 1.5)
    assert policy.notified[0] == ("left", 0)


@pytest.mark.parametrize("name", ["late_completion", "llmd_flow", "dynamo_queue", "smg_priority", "quartz"])
def test_rules_that_hold_go_on_when_clients_leave(name: str) -> None:
    """All is over at the end, those that left included, though a line was blocked by them before."""
    rng = Random(4)
    requests = [asking_at(0.02 * at, rng.randrange(50, 900), 40, first=1000 * at) for at in range(120)]
    one = (Member(replace(H100, max_num_seqs=4)),)
    settings = replace(IMPATIENT, abandon_share=0.5)
    outcome = replayed(trace_of(*requests), lambda _: make(name), settings, one)
    assert len(outcome.served) == 120
    left = [each for each in outcome.served if each.is_abandoned]
    assert 20 < len(left) < 70
    assert all(each.end_s == pytest.approx(each.arrived_s + 1.0) for each in left)


def test_a_refused_client_comes_again_after_whole_seconds() -> None:
    """`Retry-After: 3` for 2.5 s; the request is one, and its time began when it first came."""
    policy = Scripted(Shed(2.5), Shed(0.2), 0)
    outcome = replayed(trace_of(asking_at(1.0)), lambda _: policy, replace(EXACT, retries=2))
    (served,) = outcome.served
    assert [view["now_s"] for view in policy.views] == [1.0, 4.0, 5.0]
    assert (served.arrived_s, served.sent_s, served.tries, served.decisions) == (1.0, 5.0, 3, 3)
    figures = summarise(outcome, [(None, None)], Slo(), 0.0)
    assert (figures.requests, figures.shed_ratio, figures.retried_ratio) == (1, 0.0, 1.0)
    assert figures.held_ratio == 0.0
    assert figures.ttft_p50_s == pytest.approx(4.0, abs=0.1)


def test_it_gives_up_in_the_end() -> None:
    """Two more tries, then the turn after it comes."""
    trace = trace_of(asking_at(1.0), asking_at(0.0, after=0, think_s=0.5))
    settings = replace(EXACT, retries=2)
    policy = Scripted(Shed(1.0), Shed(1.0), Shed(1.0), 0)
    refused, served = replayed(trace, lambda _: policy, settings).served
    assert (refused.tries, refused.end_s, served.arrived_s) == (3, 3.0, 3.5)


def test_one_that_waits_to_come_again_may_leave() -> None:
    """It does not come again."""
    policy = Leaving(Shed(5.0), 0)
    (left,) = replayed(trace_of(asking_at(0.0)), lambda _: policy, replace(IMPATIENT, retries=2)).served
    assert (left.is_abandoned, left.end_s, len(policy.views)) == (True, 1.0, 1)


def test_who_is_impatient_depends_on_the_seed_alone() -> None:
    """A fifth of them, the same for every rule."""
    trace = trace_of(*(asking_at(float(at)) for at in range(1000)))
    settings = RunSettings(abandon_share=0.2)

    def impatient(seed: int) -> list[int]:
        clients = Clients(trace, settings, Random(seed))
        return [at for at in range(1000) if clients.leaves_s(at, 5.0) == 15.0]

    assert impatient(1) == impatient(1) != impatient(2)
    assert 150 < len(impatient(1)) < 250


@pytest.mark.parametrize("bad", [{"abandon_after_s": 0.0}, {"abandon_share": 1.5}, {"retries": -1}])
def test_settings_of_clients_have_ranges(bad: dict[str, Any]) -> None:
    """Out of it is an error."""
    with pytest.raises(ValueError, match="abandon_after_s"):
        RunSettings(**bad)


def test_what_was_ever_seen_is_found_to_the_block() -> None:
    """Ids of four blocks of 16: two whole ids and one block of the third; the last token never."""
    ever = EverSeen(4, 16)
    ever.add(list(range(40, 49)))
    assert ever.found_tokens(list(range(40, 56)), 256) == 9 * 16
    assert ever.found_tokens(list(range(40, 49)), 144) == 8 * 16  # its last block holds the last token
    assert ever.found_tokens([*range(40, 44), *range(80, 84)], 128) == 4 * 16
    assert ever.found_tokens(list(range(80, 84)), 64) == 0
    ever.add([*range(40, 44), 44])  # less of an id than is known already
    assert ever.found_tokens(list(range(40, 56)), 256) == 9 * 16


def test_reuse_available_foreseen_and_obtained() -> None:
    """The second prompt goes where nothing is, the others where all is."""
    trace = trace_of(asking_at(0.0), asking_at(10.0), asking_at(20.0), asking_at(20.001))
    first, second, third, fourth = replayed(trace, lambda _: Scripted(0, 1, 0, 1)).served
    assert (first.available_tokens, first.foreseen_tokens, first.cached_tokens) == (0, 0, 0)
    assert (second.available_tokens, second.foreseen_tokens, second.cached_tokens) == (1008, 0, 0)
    for each in (third, fourth):
        assert (each.available_tokens, each.foreseen_tokens, each.cached_tokens) == (1008, 1023, 1008)


def test_foreseen_counts_real_tokens() -> None:
    """A prompt whose length is estimated a tenth off is foreseen to the same share."""
    policy = Scripted(0)
    trace = trace_of(asking_at(0.0), asking_at(10.0))
    seen: list[int] = []

    def answer(view: FleetView) -> int:
        seen.append(view.request.prompt_tokens)
        return 0

    policy.answers = [answer]
    outcome = replayed(trace, lambda _: policy, replace(EXACT, token_error=0.1))
    assert seen[1] != 1024
    assert outcome.served[1].foreseen_tokens == pytest.approx(1024, abs=8)


def test_a_tide_lets_requests_come_by_day() -> None:
    """Of 1,000 in a day of even rate a quarter of the day has 250 - 1000·0.6·sin(2π/4)/2π = 154.5 by dawn."""
    even = trace_of(*(asking_at(float(at)) for at in range(1001)), asking_at(0.0, after=0))
    tidal = with_tide(even, 0.6)
    came = [request.arrival_s for request in tidal.requests[:-1]]
    assert came == sorted(came)
    assert came[0] == pytest.approx(0.0, abs=1e-9)
    assert came[-1] == pytest.approx(1000.0)
    assert sum(at <= 250.0 for at in came) == 155
    assert sum(at <= 500.0 for at in came) == 501
    assert tidal.requests[-1].after == 0
    assert [request.runs for request in tidal.requests] == [request.runs for request in even.requests]
    assert with_tide(even, 0.0).requests[500].arrival_s == pytest.approx(500.0)
    for bad, depth in ((even, 1.5), (replace(even, timing=Timing.SESSIONS), 0.5)):
        with pytest.raises(ValueError, match="tide"):
            with_tide(bad, depth)


def test_lost_events_are_never_heard() -> None:
    """With all of them lost nothing is known to be cached once a request has ended."""
    trace = trace_of(asking_at(0.0), asking_at(10.0))
    for loss, matched in ((0.0, [16, 0]), (1.0, [0, 0])):
        policies: list[Scripted] = []

        def make_one(_: Truth, made: list[Scripted] = policies) -> Scripted:
            made.append(Scripted(0))
            return made[-1]

        outcome = replayed(trace, make_one, replace(EXACT, event_loss=loss))
        assert policies[0].views[1]["matched_blocks"] == matched
        assert outcome.served[1].cached_tokens == 1008  # the engine knows


def test_a_biased_predictor_prices_prefill_by_its_factor() -> None:
    """Three times as dear, and nothing else."""
    seen = view(request(1600), prefill_tokens=[800, 0, 0], prefilling=[1, 0, 0], requests=[1, 0, 0])
    fair, wrong = (LeastCompletion(bias=bias).snapshot(seen).learned for bias in (1.0, 3.0))
    assert fair is not None
    assert wrong is not None
    assert wrong.prefill_prices_s == pytest.approx([3.0 * price for price in fair.prefill_prices_s])
