"""Replays of a few requests over a fleet whose policy is scripted."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from extproc.choosing.stateful import Decision, FleetView, Sent, StatefulPolicy
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.replay.fleet import Fleet, Member
from tokenway.simulator.replay.outcome import Replayed
from tokenway.simulator.replay.run import Replay, Truth
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.trace import Trace, TraceRequest

H100 = PROFILES["llama8b-h100"]

FLEET: Fleet = (Member(H100),) * 2

EXACT = RunSettings(token_error=0.0, event_lag_s=0.0, push_delay_s=0.0)


def draws(use: str) -> Random:
    """A stream of draws for each use."""
    return Random(use)


def trace_of(*requests: TraceRequest) -> Trace:
    """A trace of these requests, blocks of 64 tokens."""
    return Trace("t", 64, requests)


def asking_at(
    arrival_s: float, blocks: int = 16, output: int = 4, first: int = 0, **more: Any
) -> TraceRequest:
    """A request of whole blocks that came at `arrival_s`."""
    return TraceRequest(arrival_s, blocks * 64, output, ((first, blocks),), blocks * 64, **more)


def replayed(
    trace: Trace,
    policy: Callable[[Truth], StatefulPolicy],
    settings: RunSettings = EXACT,
    fleet: Fleet = FLEET,
) -> Replayed:
    """What becomes of a trace under a policy."""
    return Replay(trace, fleet, policy, settings, draws, lambda: 0.0).run()


class Scripted(StatefulPolicy):
    """Answers from a list, the last for ever, and keeps its views and notifications."""

    def __init__(self, *answers: Decision | Callable[[FleetView], Decision]) -> None:
        self.answers = list(answers)
        self.views: list[dict[str, Any]] = []
        self.notified: list[tuple[Any, ...]] = []

    def choose(self, view: FleetView) -> Decision:
        """Copy what is shown, give the next answer."""
        columns = ("requests", "prefilling", "prefill_tokens", "context_tokens", "matched_blocks", "waiting")
        seen = {name: list(getattr(view, name)) for name in columns}
        self.views.append({"now_s": view.now_s, "id": view.request.request_id, **seen})
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(view) if callable(answer) else answer

    def on_sent(self, sent: Sent) -> None:
        """Note it."""
        self.notified.append(("sent", sent.request.request_id, sent.row))

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Note it."""
        self.notified.append(("first", sent.request.request_id))

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """Note it."""
        self.notified.append(("finished", sent.request.request_id, output_tokens))
