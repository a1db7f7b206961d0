"""The rivals that let requests wait, against decisions worked out by hand from their sources."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from extproc.choosing.rivals.dynamo_queue import DynamoQueue
from extproc.choosing.rivals.line import Line
from extproc.choosing.rivals.llmd_affinity import LlmdAffinity
from extproc.choosing.rivals.llmd_flow import LlmdFlow
from extproc.choosing.rivals.quartz import Quartz
from extproc.choosing.rivals.registry import LATE, RIVALS, make
from extproc.choosing.rivals.smg_priority import SmgPriority
from extproc.choosing.stateful import Decision, FleetView, Hold, PolicyRequest, Sent, Shed, StatefulPolicy
from tests.simulator.asking import request, view


def asked(name: int, arrived_s: float = 0.0, tokens: int = 160, session: str | None = None) -> PolicyRequest:
    """A request that came at `arrived_s`."""
    return replace(request(tokens, name=name, session=session), arrived_s=arrived_s)


def held(decision: Decision) -> Hold:
    """It is held."""
    assert isinstance(decision, Hold)
    return decision


def first_token(policy: StatefulPolicy, seen: FleetView, row: int, now_s: float) -> None:
    """`seen.request` was sent to `row` at the view's time and answers."""
    sent = Sent(seen.request, row, seen.now_s, seen.matched_tokens()[row])
    policy.on_sent(sent)
    policy.on_first_token(sent, now_s)


def test_late_rivals_are_not_for_live_traffic() -> None:
    """A gateway asks a rival once: the names of those that wait are unknown there."""
    assert not LATE.keys() & RIVALS.keys()
    with pytest.raises(ValueError, match="no policy is called"):
        make("llmd_flow")


def test_a_line_lets_its_head_go_alone() -> None:
    """By rank, then by id; a newcomer only if nobody waits; a place is given up after the longest wait."""
    line = Line(10.0)
    assert line.may_go(1, 0.0)
    line.wait(1, 5.0, 0.0, inf)
    line.wait(2, 3.0, 4.0, inf)
    assert (line.may_go(1, 4.0), line.may_go(2, 4.0), line.may_go(3, 4.0)) == (False, True, False)
    assert held(line.wait(2, 99.0, 5.0, inf)).rank == 3.0  # the rank that it came with
    line.leave(2)
    assert line.may_go(1, 5.0)
    assert not line.may_go(3, 10.0)
    assert line.may_go(3, 10.1)  # 1 never came again
    assert len(line) == 0


def test_llmd_flow_holds_while_the_mean_of_the_fleet_is_saturated() -> None:
    """(10/5 + 0.4/0.8 + 0)/3 = 0.83 lets pass; (10/5 + 0.8/0.8 + 0)/3 = 1 does not."""
    policy = LlmdFlow()
    below = view(asked(1), waiting=[10, 0, 0], kv_usage=[0.1, 0.4, 0.0])
    assert policy.saturation(below) == pytest.approx(2.5 / 3)
    assert policy.choose(below) == 2  # nobody waits there, and it has the most room
    full = view(asked(2, 1.0), now_s=1.0, waiting=[10, 0, 0], kv_usage=[0.1, 0.8, 0.0])
    hold = held(policy.choose(full))
    assert (hold.rank, hold.until_s, hold.closed, hold.polls) == (1.0, 61.0, True, True)


def test_llmd_flow_sends_one_a_millisecond_in_the_order_of_arrival() -> None:
    """The head goes a tick after saturation ended, the next a tick later; a newcomer joins the line."""
    policy = LlmdFlow()
    for name, arrived_s in ((1, 0.0), (2, 0.1), (3, 0.2)):
        held(policy.choose(view(asked(name, arrived_s), now_s=1.0, waiting=[5, 5, 5])))
    held(policy.choose(view(asked(2, 0.1), now_s=1.01)))  # not the head
    held(policy.choose(view(asked(1), now_s=1.0005)))  # half a tick
    assert policy.choose(view(asked(1), now_s=1.0011)) in (0, 1, 2)
    held(policy.choose(view(asked(2, 0.1), now_s=1.0012)))
    held(policy.choose(view(asked(4, 1.0013), now_s=1.0013)))  # its coming gives the head a turn
    assert policy.choose(view(asked(2, 0.1), now_s=1.0013)) in (0, 1, 2)
    assert policy.choose(view(asked(3, 0.2), now_s=1.0031)) in (0, 1, 2)


def test_llmd_flow_refuses_after_a_minute() -> None:
    """The time to live, from arrival; whoever left is in nobody's way."""
    policy = LlmdFlow()
    full: dict[str, Any] = {"waiting": [5, 5, 5]}
    held(policy.choose(view(asked(1), now_s=59.9, **full)))
    held(policy.choose(view(asked(2, 30.0), now_s=59.9, **full)))
    assert isinstance(policy.choose(view(asked(1), now_s=60.0, **full)), Shed)
    held(policy.choose(view(asked(3, 61.0), now_s=61.0, **full)))
    policy.on_left(asked(2, 30.0))
    assert policy.choose(view(asked(3, 61.0), now_s=62.0)) in (0, 1, 2)


def test_llmd_flow_in_turns_gives_each_session_one() -> None:
    """Two of one session and one of another that came last: it goes second."""
    policy = LlmdFlow(fairness="round_robin")
    full: dict[str, Any] = {"waiting": [5, 5, 5], "now_s": 1.0}
    ranks = [
        held(policy.choose(view(asked(name, session=session), **full))).rank
        for name, session in ((1, "a"), (2, "a"), (3, "b"))
    ]
    assert ranks == [1.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="fairness"):
        LlmdFlow(fairness="none")


def test_llmd_affinity_scores_the_sticky_alone() -> None:
    """Without the filter row 2 has 2 + 2 + 0 against 0 + 2·0.1 + 3·0.9: 18 s of 15,928 tokens/s undo it."""
    loads: dict[str, Any] = {"matched_blocks": [9, 0, 0], "waiting": [4, 4, 0], "kv_usage": [0.9, 0.9, 0.0]}
    assert LlmdAffinity().choose(view(**loads, prefill_tokens=[286_704, 0, 0])) == 0
    assert LlmdAffinity().choose(view(**loads, prefill_tokens=[286_705, 0, 0])) == 2


def test_dynamo_waits_while_every_worker_has_sixteen_steps_of_prefill() -> None:
    """More than 16·2,048 = 32,768 tokens on all; the cost then places what goes."""
    policy = DynamoQueue()
    assert policy.choose(view(asked(1), prefill_tokens=[40_000, 32_768, 40_000])) == 1
    hold = held(policy.choose(view(asked(2, 3.0), now_s=3.0, prefill_tokens=[32_769] * 3)))
    assert (hold.rank, hold.closed, hold.polls) == (3.0, True, False)
    held(policy.choose(view(asked(3, 4.0), now_s=4.0)))  # not before those that wait
    assert policy.choose(view(asked(2, 3.0), now_s=5.0, prefill_tokens=[0, 16, 16])) == 0


def test_dynamos_shortest_processing_time_counts_uncached_tokens_where_they_are_fewest() -> None:
    """160 tokens, 9 of 10 blocks of 16 cached at one worker: 16; it goes before an older one of 32 tokens."""
    policy = DynamoQueue(policy="wspt")
    busy: dict[str, Any] = {"prefill_tokens": [40_000] * 3}
    old = held(policy.choose(view(asked(1, 0.0, tokens=32), **busy)))
    new = held(policy.choose(view(asked(2, 1.0), now_s=1.0, matched_blocks=[0, 9, 5], **busy)))
    assert (old.rank, new.rank) == (32.0, 16.0)
    held(policy.choose(view(asked(1, 0.0, tokens=32), now_s=2.0)))
    assert policy.choose(view(asked(2, 1.0), now_s=2.0)) in (0, 1, 2)
    latest = DynamoQueue(policy="lcfs")
    assert held(latest.choose(view(asked(3, 7.0), now_s=7.0, **busy))).rank == -7.0
    with pytest.raises(ValueError, match="policy is one of"):
        DynamoQueue(policy="sjf")


def test_smg_gives_slots_but_for_those_that_others_have_reserved() -> None:
    """Of 3·64 = 192: interactive 192 - 32; default 192 - 32 - 128; of 16 workers a quarter is 256."""
    assert SmgPriority().slots(3) == (192, 160)
    assert SmgPriority(interactive=False).slots(3) == (192, 32)
    assert SmgPriority(interactive=False).slots(16) == (1024, 1024 - 32 - 256)


def test_smg_waits_for_a_slot_and_a_starved_head_takes_a_reserved_one() -> None:
    """160 in flight: full; after 5 s the head goes, up to 192; after 30 s it is refused."""
    policy = SmgPriority()
    assert policy.choose(view(asked(1), requests=[60, 50, 49])) == 2  # no match: the least loaded
    full: dict[str, Any] = {"requests": [60, 50, 50]}
    assert held(policy.choose(view(asked(2), **full))).until_s == pytest.approx(5.001)
    held(policy.choose(view(asked(3, 1.0), now_s=1.0, **full)))
    assert held(policy.choose(view(asked(2), now_s=5.0, **full))).rank == 0.0
    assert policy.choose(view(asked(2), now_s=5.001, **full)) == 1
    assert held(policy.choose(view(asked(3, 1.0), now_s=7.0, requests=[64] * 3))).until_s == 31.0
    assert isinstance(policy.choose(view(asked(3, 1.0), now_s=31.0, requests=[64] * 3)), Shed)


def test_smg_refuses_what_finds_the_queue_full() -> None:
    """256 wait; one more is refused at once."""
    policy = SmgPriority()
    for name in range(256):
        held(policy.choose(view(asked(name), requests=[64] * 3)))
    assert isinstance(policy.choose(view(asked(256), requests=[64] * 3)), Shed)
    held(policy.choose(view(asked(5), now_s=1.0, requests=[64] * 3)))


def test_quartz_prices_prompts_by_the_ninth_decile_of_their_size() -> None:
    """Ten prompts of 160 tokens, 0.016 s each but one of 0.16 s: the slow one's 1 ms per token counts."""
    policy = Quartz()
    assert policy.cost_s(160) == pytest.approx(0.01)  # 16,000 tokens/s until something was seen
    for name, took_s in enumerate([0.016] * 9 + [0.16]):
        seen = view(asked(name), now_s=100.0 * name)
        assert policy.choose(seen) in (0, 1, 2)
        first_token(policy, seen, 0, seen.now_s + took_s)
    assert policy.cost_s(160) == pytest.approx(0.16)
    assert policy.cost_s(1600) == pytest.approx(0.1)  # another size


def test_quartz_waits_for_the_worker_of_least_backlog() -> None:
    """3,216 tokens are 0.201 s there: more than the window; short ones go first of what waits."""
    policy = Quartz()
    for name in range(3):
        seen = view(asked(name, tokens=3216))
        assert policy.choose(seen) == name or name == 0
        policy.on_sent(Sent(seen.request, name, 0.0, 0))
    hold = held(policy.choose(view(asked(3, 1.0), now_s=1.0)))
    assert hold.rank == pytest.approx(1.01)
    assert hold.closed
    policy.on_finished(Sent(asked(1, tokens=3216), 1, 0.0, 0), 2.0, 0)
    assert policy.choose(view(asked(3, 1.0), now_s=2.0)) == 1
