"""Requests that wait at several gateways of a run go as if they waited at one, by news of each other."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from extproc.choosing.holding import POLL_S
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.policies.registry import make
from tokenway.simulator.replay.fleet import Member
from tokenway.simulator.replay.outcome import Served
from tokenway.simulator.replay.run import Replay
from tokenway.simulator.replay.settings import RunSettings, Spread
from tokenway.simulator.replay.trace import Trace, TraceRequest

H100 = PROFILES["llama8b-h100"]
BLOCKS = 100
NEAR = RunSettings(token_error=0.0, event_lag_s=0.0, push_delay_s=0.0003, spread=Spread.RANDOM)
REQUESTS = tuple(
    TraceRequest(0.05 * number, BLOCKS * 64, 4, ((BLOCKS * number, BLOCKS),), BLOCKS * 64)
    for number in range(24)
)
"""Of equal work, each its own prompt, three times as fast as one engine computes them."""


def served(spec: str, gateways: int, settings: RunSettings = NEAR) -> dict[int, Served]:
    """What became of each."""
    run = Replay(
        Trace("t", 64, REQUESTS),
        (Member(H100),),
        lambda _: make(spec),
        replace(settings, gateways=gateways),
        lambda use: Random(f"7/{use}"),
        lambda: 0.0,
    ).run()
    return {each.index: each for each in run.served}


def overtaken(those: dict[int, Served]) -> int:
    """Pairs of which the later one was sent first."""
    sent = [those[index].sent_s or 0.0 for index in sorted(those)]
    return sum(after < before for at, before in enumerate(sent) for after in sent[at + 1 :])


@pytest.mark.parametrize("gateways", [2, 4])
def test_several_gateways_are_one_line(gateways: int) -> None:
    """In the order of arrival, which each by itself does not keep; no wait is longer than at one gateway."""
    alone = served("late_completion:learn=false", 1)
    assert overtaken(alone) == 0
    apart = served("late_completion:learn=false:listens=false", gateways)
    assert overtaken(apart) > 5
    together = served("late_completion:learn=false", gateways)
    assert overtaken(together) == 0

    def longest_s(those: dict[int, Served]) -> float:
        return max(each.held_s for each in those.values())

    assert longest_s(together) <= longest_s(alone) + POLL_S
    assert longest_s(apart) > longest_s(together) + POLL_S


def test_news_that_come_late_are_no_harm() -> None:
    """They are of another time by then; all are served, in an order between the two."""
    late = served("late_completion:learn=false", 2, replace(NEAR, push_delay_s=0.05))
    assert len(late) == len(REQUESTS)
    assert all(each.first_s is not None for each in late.values())
    assert overtaken(late) <= overtaken(
        served("late_completion:learn=false:listens=false", 2, replace(NEAR, push_delay_s=0.05))
    )


def test_one_gateway_tells_nobody() -> None:
    """And hears nothing: the run is the same."""
    assert served("late_completion:learn=false", 1) == served("late_completion:learn=false:listens=false", 1)
