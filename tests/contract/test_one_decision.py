"""Gateway and replayer decide alike: one stretch of traffic through both, compared decision by decision.

The gateway's side is the whole request path over real state; the replayer's is its policy, asked at the same
moments for the same requests with what a gateway knows then. Where one of them computed anything by itself,
decisions would differ once the first answers have taught.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from typing import Any
from unittest.mock import patch

import pytest

from extproc.choosing import deciding
from extproc.choosing.deciding import SendNow, TurnDown, WaitForRoom
from extproc.choosing.replay import RecordingRng, ReplayRng
from extproc.choosing.stateful import Decision, FleetView, Hold, PolicyRequest, Sent, Shed
from extproc.routing import scheduling
from extproc.routing.parsing import ParsedRequest
from extproc.routing.scheduling import Scheduler
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Snapshot
from extproc.values.deciding import Now
from extproc.values.endpoints import Endpoint
from metadata_center.types import MANY_ROWS, RequestId
from tests.builds import replaces_code
from tests.conftest import BLOCK_BYTES, Promise, VirtualLoop, build_rig, chat, endpoint, request_line
from tokenway.simulator.policies.ours import LateCompletion, LeastCompletion

KV_TOKENS = 40_000

FLEETS = {
    "alike": [endpoint(row) for row in range(4)],
    "weights": [endpoint(row, weight=weight) for row, weight in enumerate((1, 1, 2, 4))],
    "hardware": [endpoint(row, labels={"hardware": "a" if row < 2 else "b"}) for row in range(4)],
}
MANY = [endpoint(row, weight=1 + row % 2, labels={"hardware": "ab"[row % 2]}) for row in range(MANY_ROWS + 8)]


@dataclass(slots=True)
class Answering:
    """A request that both sides sent.

    Attributes:
        sent: As the replayer's policy knows it.
        first_s: When its first token comes.
        end_s: When its last one comes.
        output_tokens: Of its answer.
    """

    sent: Sent
    first_s: float
    end_s: float
    output_tokens: int


class Both:
    """A gateway and a replayer's policy over the same endpoints, in the same virtual time."""

    def __init__(self, fleet: list[Endpoint], policy: LeastCompletion, hold: HoldSettings | None) -> None:
        self.loop = VirtualLoop()
        settings = RouterSettings(block_bytes=BLOCK_BYTES, hold=hold)
        balancing = LoadBalancing(fallbacks=0)
        self.rig = build_rig(fleet, load_balancing=balancing, settings=settings, loop=self.loop)
        self.policy = policy
        self.hold = hold
        self.token_s = 1e-3 if hold else 1e-4
        self.fleet = fleet
        self.keys = tuple(member.key for member in fleet)
        self.rng = random.Random(5)
        self.parsed: ParsedRequest | None = None
        self.decided: list[str] = []
        self.events: list[tuple[float, int, str, Answering]] = []
        self.promises: list[Promise] = []
        for key in self.keys:
            self.rig.scheduling.engines.observe_kv_tokens(key, KV_TOKENS)

    def view(self, snapshot: Snapshot, draws: tuple[float, ...]) -> FleetView:
        """What the replayer's gateway knows; of the caches it believes what the other one does, in tokens."""
        rows, state, now_s = len(self.keys), self.rig.scheduling, self.rig.clock()
        load = state.load.view(state.load.slots(self.keys))
        parsed = self.parsed
        assert parsed is not None
        since_s = state.load.prefill_since_s(state.load.slots(self.keys))
        return FleetView(
            now_s=now_s,
            rng=ReplayRng(draws),
            request=PolicyRequest(
                int(parsed.request_id), parsed.received_s, snapshot.prompt_tokens, tuple(parsed.blocks)
            ),
            gateways=1,
            block_size=1,
            keys=self.keys,
            groups=[member.labels.get("hardware", "") for member in self.fleet],
            weights=[float(member.weight) for member in self.fleet],
            kv_tokens=[KV_TOKENS] * rows,
            requests=load.requests,
            prefilling=load.prefill_requests,
            prefill_tokens=load.prefill_tokens,
            prompt_tokens=[0] * rows,
            context_tokens=load.context_tokens,
            waiting=[0] * rows,
            running=[0] * rows,
            kv_usage=[0.0] * rows,
            scraped_s=[0.0] * rows,
            matched_blocks=snapshot.cached_tokens,
            since_s=[since or now_s for since in since_s] if self.hold else (),
        )

    def decide(self, snapshot: Snapshot, settings: LoadBalancing, rng: RecordingRng, *rest: Any) -> Any:
        """In place of the gateway's decision: that, and the replayer's beside it."""
        found = deciding.decide(snapshot, settings, rng, *rest)
        view = self.view(snapshot, rng.draws)
        assert shown(self.policy.snapshot(view)) == shown(snapshot)
        other = self.policy.choose(view)
        assert kind(other) == kind(found)
        self.decided.append(type(found).__name__)
        if isinstance(found, SendNow):
            row = found.choice.order[0]
            assert other == row
            self.send(view, row, snapshot.cached_tokens[row])
        elif isinstance(found, WaitForRoom):
            assert isinstance(other, Hold)
            assert (other.rank, other.closed) == (found.wait.rank, found.wait.closed)
        return found

    def send(self, view: FleetView, row: int, cached: int) -> None:
        """The request is on its way: its answer takes some time of its own."""
        sent = Sent(view.request, row, view.now_s, cached)
        self.policy.on_sent(sent)
        uncached, output_tokens = view.request.prompt_tokens - cached, self.rng.randint(2, 120)
        first_s = view.now_s + (0.02 + uncached * self.token_s) * self.rng.uniform(0.7, 1.5)
        end_s = first_s + output_tokens * 0.01 * self.rng.uniform(0.7, 1.5)
        answering = Answering(sent, first_s, end_s, output_tokens)
        heappush(self.events, (first_s, view.request.request_id, "first", answering))
        heappush(self.events, (end_s, view.request.request_id, "end", answering))

    def advance(self, to_s: float) -> None:
        """Let time pass for both."""
        while self.events and self.events[0][0] <= to_s:
            at_s, number, what, answering = heappop(self.events)
            self.loop.run(at_s - self.rig.clock())
            if what == "first":
                self.policy.on_first_token(answering.sent, at_s)
                self.rig.gateway.first_token(str(number), late=False)
            else:
                self.end(str(number), answering)
        self.loop.run(to_s - self.rig.clock())

    def end(self, name: str, answering: Answering) -> None:
        """The answer is whole, and its usage is known."""
        sent = answering.sent
        prompt, cached = sent.request.prompt_tokens, max(0, sent.matched_tokens - self.rng.randint(0, 64))
        self.policy.on_usage(sent, prompt, cached)
        self.policy.on_finished(sent, self.rig.clock(), answering.output_tokens)
        self.rig.end(
            name,
            ttft_s=answering.first_s - sent.sent_s,
            duration_s=answering.end_s - sent.sent_s,
            stream_s=answering.end_s - answering.first_s,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=answering.output_tokens,
        )


def kind(decision: SendNow | WaitForRoom | TurnDown | Decision) -> str:
    """What a decision of either side is."""
    if isinstance(decision, (WaitForRoom, Hold)):
        return "later"
    return "no" if isinstance(decision, (TurnDown, Shed)) else "now"


def shown(snapshot: Snapshot) -> dict[str, Any]:
    """Every column but those in blocks; unknown everywhere is as good as unknown of each."""
    columns = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    del columns["matched_blocks"], columns["num_blocks"]
    columns["max_num_seqs"] = [limit for limit in columns["max_num_seqs"] if limit]
    return {
        name: list(column) if isinstance(column, tuple | array) else column
        for name, column in columns.items()
    }


@contextmanager
def compared(both: Both) -> Iterator[None]:
    """Every decision of the gateway is the replayer's as well."""
    schedule = Scheduler.schedule

    def noted(scheduler: Scheduler, parsed: ParsedRequest, *args: Any, **named: Any) -> Any:
        both.parsed = parsed
        return schedule(scheduler, parsed, *args, **named)

    with patch.object(scheduling, "decide", both.decide), patch.object(Scheduler, "schedule", noted):
        yield


def play(both: Both, seed: str, count: int, per_s: float, words: int) -> None:
    """Some requests with shared beginnings, Poisson arrivals."""
    rng = random.Random(seed)
    heads = [f"{head} " * rng.randint(100, 3_000) for head in range(6)]
    at_s = 1.0
    with compared(both):
        for number in range(count):
            at_s += rng.expovariate(per_s)
            both.advance(at_s)
            prompt = rng.choice(heads) + f"{number} " * rng.randint(1, words)
            body = chat(prompt, stream=True)
            deciding = both.rig.gateway.decide(request_line(str(number)), body)
            if isinstance(deciding, Now):
                assert both.rig.scheduling.records.get(RequestId(str(number)))
        both.advance(at_s + 60.0)


@pytest.mark.parametrize("fleet", FLEETS)
@replaces_code
def test_gateway_and_replayer_choose_alike(fleet: str) -> None:
    """300 requests: equal columns, prices and traffic, and the equal choice, while both learn."""
    both = Both(FLEETS[fleet], LeastCompletion(), None)
    play(both, fleet, 300, per_s=20.0, words=600)
    assert both.decided == ["SendNow"] * 300
    predictor = both.rig.scheduling.predictor
    assert len(predictor) == len({member.labels.get("hardware") for member in FLEETS[fleet]})


@replaces_code
def test_gateway_and_replayer_choose_alike_among_many() -> None:
    """The same where columns are arrays and prices are by kind."""
    both = Both(MANY, LeastCompletion(), None)
    play(both, "alike", 300, per_s=200.0, words=600)
    assert both.decided == ["SendNow"] * 300


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("fleet", FLEETS)
@replaces_code
def test_gateway_and_replayer_hold_alike(fleet: str, *, refuses: bool) -> None:
    """More than the fleet serves: what is placed, held and refused is so by both."""
    policy = LateCompletion(max_held=20, max_hold_s=4.0, refuse=refuses)
    both = Both(FLEETS[fleet], policy, HoldSettings(max_requests=20, max_s=4.0, refuses=refuses))
    play(both, fleet, 300, per_s=60.0, words=4_000)
    expected = {"SendNow", "WaitForRoom", "TurnDown"} if refuses else {"SendNow", "WaitForRoom"}
    assert expected == set(both.decided)
    assert len(both.rig.scheduling.running) == 0
