"""Every rival's rule against decisions worked out by hand from its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from extproc.choosing.policies.inference_lb import inference_scores
from extproc.choosing.rivals.aibrix import AibrixPrefixCache
from extproc.choosing.rivals.aigw import Aigw
from extproc.choosing.rivals.chwbl import Chwbl
from extproc.choosing.rivals.dynamo import DynamoLinear
from extproc.choosing.rivals.llmd_observed import LlmdObserved
from extproc.choosing.rivals.llmd_predicted import LlmdPredicted
from extproc.choosing.rivals.llmd_sticky import LlmdSticky
from extproc.choosing.rivals.llmd_weights import LlmdWeights
from extproc.choosing.rivals.lmetric import LMetric
from extproc.choosing.rivals.preble import Preble
from extproc.choosing.rivals.sglang import SglangCacheAware
from extproc.choosing.rivals.smetric import SMetric
from extproc.choosing.rivals.vllm_dp import VllmDp
from extproc.choosing.stateful import Decision, FleetView, Sent, StatefulPolicy
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Snapshot
from tests.simulator.asking import ROWS, Draws, request, view
from tokenway.simulator.policies.product import Product
from tokenway.simulator.policies.registry import REGISTRY, make


def conversation(rng: Random) -> list[int]:
    """The first blocks of one of nine conversations."""
    stem = 1000 * rng.randrange(9)
    return [*range(stem, stem + rng.randrange(1, 20))]


def send(policy: StatefulPolicy, seen: FleetView) -> Sent:
    """Choose, and notify the policy that the request went there."""
    row = policy.choose(seen)
    assert isinstance(row, int)
    sent = Sent(seen.request, row, seen.now_s, seen.matched_tokens()[row])
    policy.on_sent(sent)
    return sent


@pytest.mark.parametrize("name", REGISTRY)
def test_every_rule_places_a_request_on_an_idle_fleet(name: str) -> None:
    """Every name makes a rule that answers a row, for prompts without a full block and one endpoint too."""
    for rows in (1, ROWS):
        policy = make(name)
        for number, tokens in enumerate((160, 5, 160)):
            sent = send(policy, view(request(tokens, name=number), rows=rows, rng=Random(1)))
            assert 0 <= sent.row < rows
            policy.on_first_token(sent, 1.0)
            policy.on_finished(sent, 2.0, 10)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_rule_that_starts_again_decides_the_same(name: str) -> None:
    """With equal histories and equal draws, two objects of a rule agree on every decision."""

    def decisions(seed: int) -> list[Decision]:
        rng, policy = Random(seed), make(name)
        truth = Random(5)
        chosen: list[Decision] = []
        running: list[Sent] = []
        for number in range(60):
            loads = [truth.randrange(4) for _ in range(ROWS)]
            seen = view(
                request(160, name=number, blocks=conversation(truth), session=f"s{number % 5}"),
                rng=rng,
                now_s=float(number),
                requests=loads,
                prefill_tokens=[100 * load for load in loads],
                matched_blocks=[truth.randrange(2) for _ in range(ROWS)],
            )
            chosen.append(policy.choose(seen))
            if isinstance(row := chosen[-1], int):
                running.append(Sent(seen.request, row, seen.now_s, seen.matched_tokens()[row]))
                policy.on_sent(running[-1])
            if number % 3 == 2 and running:
                done = running.pop(0)
                policy.on_first_token(done, number + 0.5)
                policy.on_finished(done, number + 0.75, 5)
        return chosen

    assert decisions(1) == decisions(1)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_rule_changes_and_keeps_nothing_of_the_view(name: str) -> None:
    """Columns are the caller's: they are as before, and writing to them later changes no decision."""
    kept, fresh = make(name), make(name)
    columns: dict[str, Any] = {
        "requests": [1, 2, 0],
        "matched_blocks": [0, 9, 3],
        "waiting": [0, 1, 0],
        "kv_usage": [0.1] * 3,
    }
    given: dict[str, Any] = {column: list(values) for column, values in columns.items()}
    send(kept, view(**given))
    assert given == columns
    send(fresh, view(**columns))
    for values in given.values():
        values[:] = [7] * ROWS
    later = request(name=1)
    assert kept.choose(view(later, requests=[2, 2, 1])) == fresh.choose(view(later, requests=[2, 2, 1]))


def test_random_draws_one_row() -> None:
    """A draw of 0.7 among three rows is the last."""
    assert make("random").choose(view(rng=Draws(0.7))) == 2


def test_round_robin_goes_on_from_a_drawn_row() -> None:
    """From row 1: 1, 2, 0, 1."""
    policy = make("round_robin")
    assert [policy.choose(view(rng=Draws(0.5))) for _ in range(4)] == [1, 2, 0, 1]


def test_least_request_counts_relative_to_weight() -> None:
    """4 requests on twice the capacity are fewer than 3."""
    assert make("least_request").choose(view(requests=[3, 4, 9], weights=[1.0, 2.0, 1.0])) == 1


def test_vllm_dp_weighs_waiting_four_times() -> None:
    """(1 waiting, 0 running) = 4 loses to (0, 3) = 3."""
    assert VllmDp().choose(view(waiting=[1, 0, 9], running=[0, 3, 0])) == 1


def test_vllm_dp_counts_its_own_until_new_counts_come() -> None:
    """One sent by one of two gateways counts as two waiting, 8, and nothing once the metrics are newer."""
    policy = VllmDp()
    first = view(running=[0, 5, 20], gateways=2)
    assert [send(policy, first).row for _ in range(2)] == [0, 1]
    newer = view(running=[1, 6, 20], gateways=2, scraped_s=[0.1, 0.1, 0.1])
    assert policy.choose(newer) == 0


def test_vllm_dp_breaks_ties_from_its_start() -> None:
    """A gateway that starts at row 1 fills an idle fleet as 1, 2, 0."""
    policy = VllmDp()
    idle = view(rng=Draws(0.4))
    assert [send(policy, idle).row for _ in range(3)] == [1, 2, 0]


def test_aigw_scores_as_in_its_source() -> None:
    """(requests, pending bytes, hit) = (3, 2048, .8), (1, 0, 0), (10, 512, 1): -1.8444, 0, -0.75."""
    seen = view(requests=[3, 1, 10], prompt_tokens=[512, 0, 128], matched_blocks=[8, 0, 10])
    assert Aigw().scores(seen) == pytest.approx([-1.8444444, 0.0, -0.75])
    assert Aigw().choose(seen) == 1


def test_aigw_draws_among_the_best_percent() -> None:
    """Of 40 endpoints the best two are drawn from: a draw over a half takes the second."""
    requests = [*range(40)]
    seen = view(rows=40, requests=requests, rng=Draws(0.6, 0.0))
    assert Aigw().choose(seen) == 1


def test_aigw_knows_only_the_longest_holders() -> None:
    """With the top 1, a shorter match on an idle endpoint counts for nothing."""
    seen = view(matched_blocks=[10, 9, 0], requests=[6, 0, 0])
    assert Aigw(top_k=3).choose(seen) == 1
    assert Aigw(top_k=1).scores(seen)[1] == 0.0


def test_the_products_inference_lb_is_aigw_with_tokens() -> None:
    """Where no prompt waits for its first token, both score alike."""
    seen = view(requests=[3, 1, 10], matched_blocks=[8, 0, 10])
    snapshot = Snapshot(
        seen.keys,
        seen.requests,
        seen.prefill_tokens,
        seen.context_tokens,
        seen.matched_blocks,
        10,
        seen.weights,
    )
    assert inference_scores(snapshot, LoadBalancing()) == pytest.approx(Aigw().scores(seen))
    assert Product().choose(seen) == Aigw().choose(seen)


def test_aibrix_takes_the_longest_match_within_a_deviation() -> None:
    """Requests 0, 0, 6: mean 2, deviation 2.83: the holder of all is over the limit of 4.83, not of 7.66."""
    seen = view(matched_blocks=[1, 5, 10], requests=[0, 0, 6])
    assert AibrixPrefixCache().choose(seen) == 1
    assert AibrixPrefixCache(sigmas=2.0).choose(seen) == 2


def test_aibrix_ignores_the_cache_out_of_balance() -> None:
    """A spread of 9 is over 8 and not over 16."""
    seen = view(matched_blocks=[0, 10, 0], requests=[0, 9, 9])
    assert AibrixPrefixCache().choose(seen) == 0
    assert AibrixPrefixCache(imbalance=16).choose(seen) == 1


def test_aibrix_without_a_match_takes_the_least_loaded() -> None:
    """Less than one percent of the prompt is no match."""
    asked = request(16 * 200)
    assert AibrixPrefixCache().choose(view(asked, matched_blocks=[1, 0, 0], requests=[2, 1, 0])) == 2


def test_aibrix_remembers_what_it_routed_for_twenty_minutes() -> None:
    """Its own table gives the follow-up to the same endpoint; what it says is forgotten when it expires."""
    policy = AibrixPrefixCache(own=True)
    assert send(policy, view(requests=[1, 0, 1])).row == 1
    assert policy.choose(view(requests=[0, 1, 1])) == 1
    assert policy.choose(view(requests=[0, 1, 1], now_s=1201.0)) == 0


def test_aibrix_table_is_small_as_shipped() -> None:
    """200,000 entries of 4 characters are 12,500 blocks of 16 tokens: a longer prompt pushes others out."""
    policy = AibrixPrefixCache(own=True)
    send(policy, view(requests=[1, 0, 1]))
    send(policy, view(request(16 * 12_495, name=1), requests=[0, 1, 1]))
    assert policy.choose(view(requests=[1, 1, 0])) == 2


def test_llmd_weights_adds_three_scores() -> None:
    """2·queue + 2·free + 3·match: (4, .5, 1) = 0+1+3, (0, .5, 0) = 2+1+0, (2, 0, .5) = 1+2+1.5."""
    seen = view(waiting=[4, 0, 2], kv_usage=[0.5, 0.5, 0.0], matched_blocks=[10, 0, 5])
    assert LlmdWeights().scores(seen) == pytest.approx([4.0, 3.0, 4.5])
    assert LlmdWeights().choose(seen) == 2


def test_llmd_weights_spreads_what_matches_nowhere() -> None:
    """With the guide's fourth scorer, cold requests go to the one that had none the longest."""
    policy = LlmdWeights(no_hit_lru=2.0)
    assert sorted(policy.choose(view()) for _ in range(3)) == [0, 1, 2]
    assert policy.choose(view(kv_usage=[0.0, 0.1, 0.1])) == 0


@pytest.mark.parametrize(
    ("matched", "pending", "chosen"),
    [
        ([8, 0, 0], [200_000, 0, 0], 0),  # 80 % matched, 12.6 s behind: sticks
        ([7, 0, 0], [200_000, 0, 0], 1),  # 70 % is not sticky: least tokens, first of a tie
        ([8, 0, 0], [300_000, 0, 0], 1),  # 18.8 s behind: let go
        ([8, 9, 0], [1000, 900, 0], 1),  # two sticky: the fewer tokens
    ],
)
def test_llmd_sticky_keeps_to_holders_until_they_are_behind(
    matched: Sequence[int], pending: Sequence[int], chosen: int
) -> None:
    """0.80 and 18 s at 15,928 tokens/s."""
    assert LlmdSticky().choose(view(matched_blocks=matched, prefill_tokens=pending)) == chosen


def test_llmd_sticky_counts_the_requests_own_tokens() -> None:
    """100 pending and 16 to compute are less than 0 pending and 160 to compute."""
    assert LlmdSticky(threshold=1.0).choose(view(matched_blocks=[9, 0, 0], prefill_tokens=[100, 0, 0])) == 0


def observe(policy: StatefulPolicy, row: int, times: Sequence[tuple[int, float]], now_s: float) -> None:
    """Let the policy see (in flight, TTFT) on `row`, by choosing it as the only one with room."""
    for load, ttft_s in times:
        loads = [load if at == row else 99 for at in range(ROWS)]
        policy.choose(view(requests=loads, now_s=now_s, rng=Draws(0.99)))
        sent = Sent(request(name=1), row, now_s, 0)
        policy.on_sent(sent)
        policy.on_first_token(sent, now_s + ttft_s)


def test_llmd_observed_predicts_along_its_line() -> None:
    """Row 0: 1 s at 2 in flight; row 1: 1 s at 8. At 4 each, row 1 is predicted sooner."""
    policy = LlmdObserved(exploration=0.0)
    fast = [(1, 0.1)] * 3 + [(8, 1.0)] * 17
    slow = [(1, 0.1)] * 3 + [(2, 1.0)] * 17
    for row, times in ((0, slow), (1, fast), (2, slow)):
        observe(policy, row, times, 1.0)
    assert policy.choose(view(requests=[4, 4, 4], now_s=10.0)) == 1
    assert policy.choose(view(requests=[0, 20, 4], now_s=10.0)) == 0


def test_llmd_observed_avoids_what_it_does_not_know_but_for_exploration() -> None:
    """With two endpoints known, the third is taken only when the coin says so."""
    known = [(1, 0.1)] * 3 + [(4, 1.0)] * 17
    policy = LlmdObserved()
    for row in (0, 1):
        observe(policy, row, known, 1.0)
    loads = [4, 8, 0]
    assert policy.choose(view(requests=loads, now_s=10.0, rng=Draws(0.99))) == 0
    assert policy.choose(view(requests=loads, now_s=10.0, rng=Draws(0.05, 0.99))) == 2


def test_llmd_predicted_starts_with_the_composite() -> None:
    """Without samples: free KV + relative queue + match, (1 + 0 + 1)/3 against (1 + 1 + 0.5)/3."""
    seen = view(waiting=[4, 0, 4], matched_blocks=[10, 5, 0])
    assert LlmdPredicted().choose(seen) == 1


def taught() -> LlmdPredicted:
    """A model that saw TTFT grow with pending prefill, 1 s per 1000 tokens, and TPOT with what runs."""
    policy = LlmdPredicted()
    rng = Random(3)
    for number in range(150):
        pending, running = (
            [rng.randrange(8000) for _ in range(ROWS)],
            [rng.randrange(1, 20) for _ in range(ROWS)],
        )
        seen = view(
            request(name=number),
            prefill_tokens=pending,
            running=running,
            requests=running,
            now_s=float(number) / 100,
            rng=rng,
        )
        sent = send(policy, seen)
        first_s = seen.now_s + pending[sent.row] / 1000
        policy.on_first_token(sent, first_s)
        policy.on_finished(sent, first_s + 9 * running[sent.row] / 100, 10)
    return policy


def test_llmd_predicted_learns_what_takes_long() -> None:
    """Without limits the least predicted latency wins, and an idle endpoint before any other."""
    policy = taught()
    later: dict[str, Any] = {"now_s": 20.0, "running": [5, 5, 5]}
    assert policy.choose(view(**later, prefill_tokens=[4000, 1000, 7000], requests=[1, 1, 1])) == 1
    assert policy.choose(view(**later, prefill_tokens=[4000, 1000, 7000], requests=[0, 1, 1])) == 0


def test_llmd_predicted_packs_within_the_limits() -> None:
    """With limits that several endpoints meet, the one closest to them is taken."""
    policy = taught()
    asked = request(slo_ttft_s=5.0, slo_tpot_s=1.0)
    seen = view(asked, now_s=20.0, prefill_tokens=[4000, 1000, 7000], requests=[1, 1, 1], running=[5, 5, 5])
    assert policy.choose(seen) == 0


def test_sglang_follows_a_match_over_the_threshold() -> None:
    """4 of 10 blocks are over 0.3; 3 are not, and the least loaded gets it."""
    assert SglangCacheAware().choose(view(matched_blocks=[0, 4, 0], requests=[0, 5, 1])) == 1
    assert SglangCacheAware().choose(view(matched_blocks=[0, 3, 0], requests=[0, 5, 1])) == 0


def test_sglang_needs_both_thresholds_for_imbalance() -> None:
    """70 against 0 is out of balance; 170 against 120 differs by 50; 300 against 220 is 1.36 times."""
    for requests, chosen in (([0, 70, 70], 0), ([120, 170, 170], 1), ([220, 300, 300], 1)):
        assert SglangCacheAware().choose(view(matched_blocks=[0, 10, 0], requests=requests)) == chosen


def test_sglangs_own_tree_names_the_engine_sent_the_prefix_last() -> None:
    """A conversation goes on where it began, whatever the given view says."""
    policy = SglangCacheAware(own=True)
    assert send(policy, view(requests=[1, 0, 1])).row == 1
    follow_up = request(192, blocks=[*request().blocks, 7, 8])
    assert send(policy, view(follow_up, requests=[0, 3, 3], matched_blocks=[12, 0, 0])).row == 1


def test_sglangs_older_miss_goes_to_the_smallest_tree() -> None:
    """Blind to load: rows 0 and 1 hold something, so row 2 gets it though it is busiest."""
    policy = SglangCacheAware(own=True, smallest_tree=True)
    assert [send(policy, view(request(name=name), requests=[0, 0, 9])).row for name in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="smallest_tree"):
        SglangCacheAware(smallest_tree=True)


def test_dynamo_adds_prefill_and_held_blocks() -> None:
    """Of 160 tokens: (320 + 160 - 159 + 640 + 160)/16 = 70.06, idle 320/16 = 20, with a match 10.06."""
    seen = view(matched_blocks=[10, 0, 10], prefill_tokens=[320, 0, 0], context_tokens=[640, 0, 0])
    assert DynamoLinear().costs(seen) == pytest.approx([70.0625, 20.0, 10.0625])
    assert DynamoLinear().choose(seen) == 2


def test_dynamo_fades_credit_with_excess_prefill() -> None:
    """With a decay of 1 and 320 tokens more than the least, the credit is 159/(1 + 2) = 53 tokens."""
    seen = view(matched_blocks=[10, 0, 0], prefill_tokens=[320, 0, 0])
    assert DynamoLinear(decay=1.0).costs(seen)[0] == pytest.approx((320 + 160 - 53 + 160) / 16)


def test_dynamos_product_multiplies() -> None:
    """(160/16)·((160 + 160)/16 + 1) = 210 with 160 tokens held."""
    assert DynamoLinear(product=True).costs(view(context_tokens=[160, 0, 0]))[0] == pytest.approx(210.0)


def test_lmetric_multiplies_prefill_and_requests() -> None:
    """(0 + 16)·4 = 64 with a match, 160·1 idle, (320 + 160)·1; the port sees no pending: 160·1 twice."""
    seen = view(matched_blocks=[9, 0, 0], requests=[3, 0, 0], prefill_tokens=[0, 320, 0])
    assert LMetric().choose(seen) == 0
    busy = view(matched_blocks=[9, 0, 0], requests=[12, 0, 0], prefill_tokens=[0, 320, 0])
    assert LMetric().choose(busy) == 2
    assert LMetric(pending=False).choose(busy) == 1


def test_smetric_counts_attention_as_work() -> None:
    """Of 200 tokens 100 uncached, at 1000 tokens of balance: 100 + 100·150/1000 = 115."""
    assert SMetric(attention_tokens=1000.0).work(100, 200) == 115


def finish_first_tokens(policy: StatefulPolicy, row: int, number: int, elapsed_s: float) -> None:
    """Let `number` requests of 160 tokens pass on `row`, `elapsed_s` each to their first token."""
    for name in range(number):
        seen = view(request(name=name), rows=ROWS, requests=[0 if at == row else 9 for at in range(ROWS)])
        policy.choose(seen)
        sent = Sent(seen.request, row, 0.0, 0)
        policy.on_sent(sent)
        policy.on_first_token(sent, elapsed_s)


def test_smetric_leaves_home_only_when_its_budget_is_broken() -> None:
    """At 10 tokens/s, 32 tokens take over 1.01 s; an endpoint whose speed is unknown meets any budget."""
    policy = SMetric()
    first = view(request(session="a"), requests=[0, 1, 1])
    sent = send(policy, first)
    assert sent.row == 0
    policy.on_first_token(sent, 1.0)
    follow_up = view(request(192, session="a"), matched_blocks=[10, 0, 0], requests=[9, 1, 1])
    assert policy.choose(follow_up) == 0
    finish_first_tokens(policy, 0, 8, 16.0)
    assert policy.choose(follow_up) != 0
    for row in (1, 2):
        finish_first_tokens(policy, row, 8, 160.0)
    assert policy.choose(follow_up) == 0  # no request meets it: the cache decides


def test_smetric_lets_a_first_turn_go_to_the_least_work() -> None:
    """A session never seen does not follow a match; pending·requests does."""
    policy = SMetric()
    fresh = view(request(session="new"), matched_blocks=[10, 0, 0], requests=[5, 0, 5])
    assert policy.choose(fresh) == 1


def test_smetric_takes_an_evicted_conversation_for_a_new_one() -> None:
    """Half of the previous prompt must still be there."""
    policy = SMetric()
    send(policy, view(request(session="a"), requests=[0, 1, 1]))
    lost = view(request(192, session="a"), matched_blocks=[5, 0, 0], requests=[5, 0, 5])
    assert policy.choose(lost) == 1


def test_preble_exploits_what_is_most_of_the_prompt() -> None:
    """6 of 10 blocks cached: the holder, loaded or not; 5 of 10: the least cost."""
    policy = Preble()
    for name in range(3):
        assert policy.choose(view(request(name=name), matched_blocks=[0, 10, 0])) == 1
        policy.on_sent(Sent(request(name=name), 1, 0.0, 0))
    seen = request(name=9)
    assert policy.choose(view(seen, matched_blocks=[0, 6, 0], rng=Draws(0.0))) == 1
    assert policy.choose(view(seen, matched_blocks=[0, 5, 0], rng=Draws(0.0))) == 0


def test_prebles_load_is_prefill_and_decode_of_the_window() -> None:
    """One request of 160 tokens: 8 + 0.022·160 + 1.3e-6·160·80 ms of prefill, and 45 tokens at 150 ms."""
    policy = Preble(eviction=False)
    sent = send(policy, view())
    prefill_s = (8.0 + 0.022 * 160 + 1.3e-6 * 160 * 80) / 1000
    assert policy._cost_s(sent.row, 0) == pytest.approx(prefill_s + 45 * 0.15)
    policy.on_first_token(sent, 1.0)
    policy.on_finished(sent, 2.0, 11)
    assert policy._cost_s(sent.row, 0) == pytest.approx(prefill_s)
    policy.choose(view(request(name=1), now_s=181.0))
    assert policy._cost_s(sent.row, 0) == pytest.approx(0.0)


def test_prebles_eviction_costs_what_it_drops() -> None:
    """Room for 10 blocks on row 0 drops its one idle node: miss rate 1 · 1 request · its prefill time."""
    policy = Preble()
    sent = send(policy, view())
    policy.on_first_token(sent, 1.0)
    policy.on_finished(sent, 1.0, 1)
    prefill_s = (8.0 + 0.022 * 160 + 1.3e-6 * 160 * 80) / 1000
    assert policy._cost_s(sent.row, 10) == pytest.approx(2 * prefill_s)


def test_prebles_own_tree_follows_the_conversation() -> None:
    """A short addition goes where the prefix is allocated; one that doubles the prompt goes by cost."""
    policy = Preble(own=True)
    first = send(policy, view())
    longer = request(192, name=5, blocks=[*request().blocks, 7, 8])
    assert send(policy, view(longer, matched_blocks=[0, 0, 12])).row == first.row
    almost_equal = request(165, name=4, blocks=request().blocks)
    assert send(policy, view(almost_equal)).row == first.row
    doubled = request(320, name=6, blocks=[*request().blocks, *range(10)])
    assert send(policy, view(doubled)).row != first.row


def test_prebles_loads_return_to_nothing() -> None:
    """After any history, once all ended and the window passed, no load is left on any endpoint."""
    for own in (False, True):
        policy, truth = Preble(own=own), Random(11)
        stems = [[100 * stem + depth for depth in range(40)] for stem in range(4)]
        running: list[Sent] = []
        for number in range(300):
            stem = truth.choice(stems)[: truth.randrange(41)]
            blocks = [*stem, *(10_000 + 50 * number + depth for depth in range(truth.randrange(20)))]
            asked = request(16 * len(blocks) + 3, name=number, blocks=blocks)
            running.append(send(policy, view(asked, now_s=float(number), rng=truth, kv_tokens=[3200] * ROWS)))
            if truth.random() < 0.9:
                policy.on_finished(
                    running.pop(truth.randrange(len(running))), number + 0.5, truth.randrange(1, 9)
                )
        for sent in running:
            policy.on_finished(sent, 300.0, 3)
        policy.choose(view(now_s=1000.0))
        assert [value for load in policy._loads for value in load] == pytest.approx(
            [0.0] * 2 * ROWS, abs=1e-6
        )
        assert policy._larges == {}
        assert len(policy._refs) == policy._tree.nodes


def test_chwbl_keeps_a_session_and_spills_clockwise() -> None:
    """A session has one home while there is room: (n + 1) <= 1.25·(total + 1)/3."""
    policy = Chwbl()
    asked = request(session="a")
    (home,) = {policy.choose(view(asked)) for _ in range(5)}
    even = [4] * ROWS
    assert policy.choose(view(asked, requests=even)) == home
    over = [6 if row == home else 4 for row in range(ROWS)]  # 7 > 1.25·15/3
    assert policy.choose(view(asked, requests=over)) != home


def test_chwbl_hashes_the_head_of_a_prompt_without_a_session() -> None:
    """Prompts that share their first two blocks share a home, and homes are spread."""
    policy = Chwbl()
    for _ in range(3):
        shared = [request(name=name, blocks=[1, 2, name]) for name in range(9)]
        assert len({policy.choose(view(asked)) for asked in shared}) == 1
    homes = Counter(policy.choose(view(request(name=name))) for name in range(300))
    assert len(homes) == ROWS
    assert min(homes.values()) > 50


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unknown", "no policy is called 'unknown'"),
        ("lmetric:weight=1", "lmetric has no parameter 'weight=1'; it has pending"),
        ("lmetric:pending", "lmetric has no parameter 'pending'"),
        ("random:seed=1", "it has none"),
        ("aigw:top_k=many", "aigw:top_k cannot be 'many'; it is 5 by default"),
        ("lmetric:pending=yes", "lmetric:pending cannot be 'yes'"),
    ],
)
def test_a_bad_specification_says_what_there_is(spec: str, message: str) -> None:
    """Unknown names, parameters and values are distinguished."""
    with pytest.raises(ValueError, match=message):
        make(spec)


def test_parameters_are_given_over_presets() -> None:
    """`name:parameter=value` changes that one; the name's presets stay."""
    assert REGISTRY["aibrix_manifest"].parameters() == {
        "own": False,
        "block_characters": 4,
        "imbalance": 16,
        "sigmas": 2.0,
    }
    policy = make("aibrix_manifest:sigmas=0.5")
    assert isinstance(policy, AibrixPrefixCache)
    assert (policy._sigmas, policy._imbalance) == (0.5, 16)
