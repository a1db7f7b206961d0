"""Requests that wait for room, under any order of arrivals, news, departures, changes of health and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Final
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extproc.choosing.holding import POLL_S, REGRET, REGRET_S, STRETCH, HoldQueue
from extproc.choosing.lines import LINE_S
from extproc.errors import Reason, RouterError
from extproc.predicting.ttft import IDLE
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.routing.waiting import RequestQueue
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.deciding import Now, Refusal
from extproc.values.decisions import HoldEnding, HoldReason
from extproc.values.evidence import FailureKind
from extproc.values.outcomes import Ended
from extproc.values.placements import Decision
from metadata_center.types import EndpointKey, RequestId, Waiter
from tests.conftest import (
    BLOCK_BYTES,
    CLUSTER,
    MODEL,
    Promise,
    VirtualLoop,
    build_rig,
    chat,
    endpoint,
    request_line,
)

ENDPOINTS: Final = tuple(endpoint(number) for number in range(3))
KEYS: Final = tuple(member.key for member in ENDPOINTS)
KV_TOKENS: Final = 24_000
"""Of one endpoint, so that some wait for room in its cache rather than for its prefill."""

WORDS: Final = (10, 1_600, 8_000)
"""A prompt that is nothing, one of half a step, and one that fills an endpoint by itself."""

HOLDS: Final = (
    HoldSettings(max_requests=2, max_s=4.0, refuses=True),
    HoldSettings(max_requests=2, max_s=4.0),
    HoldSettings(max_requests=50, max_s=1.5, refuses=True),
    HoldSettings(max_requests=50, max_s=1.5),
    HoldSettings(max_requests=50, max_s=20.0, refuses=True),
)

MAX_HELD_BYTES: Final = 600_000
"""Some fifteen of the longest prompts."""

indices = st.integers(0, 1_000)


@dataclass(slots=True)
class Waiting:
    """What the model knows of a request that waits.

    Attributes:
        promise: Of its answer.
        asked_s: When it came.
        until_s: Envoy waits for it no longer.
        limit_s: What its client bears, from then on.
        bound_s: Of its wait, by what was foreseen for it then, had it been sent at once, and by its work.
    """

    promise: Promise
    asked_s: float
    until_s: float
    limit_s: float
    bound_s: float


class WaitingMachine(RuleBasedStateMachine):
    """Drives a worker's request path as Envoy and its clients would, in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.few_bytes = patch("extproc.routing.waiting.MAX_HELD_BYTES", MAX_HELD_BYTES)
        self.few_bytes.start()
        self.loop = VirtualLoop()
        self.rig = build_rig(
            ENDPOINTS,
            load_balancing=LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION),
            settings=RouterSettings(block_bytes=BLOCK_BYTES, hold=HOLDS[-1]),
            loop=self.loop,
        )
        self.rig.scheduling.engines.observe_kv_tokens(KEYS[0], KV_TOKENS)
        self.members = set(KEYS)
        self.waiting: dict[str, Waiting] = {}
        self.running: dict[str, EndpointKey] = {}
        self.over: set[str] = set()
        self.asked = 0
        self.in_force_s = 0.0
        self.ever_held = 0

    @property
    def queue(self) -> RequestQueue[Decision]:
        """Where requests wait."""
        assert self.rig.router.waiting is not None
        return self.rig.router.waiting

    @initialize(hold=st.sampled_from(HOLDS))
    def begin(self, hold: HoldSettings) -> None:
        """Some bounds, and every endpoint full."""
        self.change_bounds(hold)
        for _ in KEYS:
            self.arrive(WORDS[-1], stream=True, limit_ms=None)

    @rule(words=st.sampled_from(WORDS), stream=st.booleans(), limit_ms=st.sampled_from([None, 1_000, 5_000]))
    def arrive(self, words: int, stream: bool, limit_ms: int | None) -> None:
        """It is answered at once, refused, or waits."""
        self.asked += 1
        request_id = f"request-{self.asked}"
        headers = {} if limit_ms is None else {"x_slo_ttft_ms": str(limit_ms)}
        body = chat(f"{request_id} " + "word " * words, stream=stream)
        deciding = self.rig.gateway.decide(request_line(request_id, **headers), body)
        if isinstance(deciding, Refusal):
            self.refused(request_id, deciding.error)
            return
        if isinstance(deciding, Now):
            self.placed(request_id, deciding.decision)
            return
        assert deciding.patience_s is not None
        self.ever_held += 1
        now_s = self.loop.clock()
        wait = self.queue._held[self.asked_ticket(request_id)].queued.later.wait
        limit_s = inf if limit_ms is None else max(limit_ms / 1000, wait.at_once_s)
        bound_s = REGRET * wait.at_once_s + REGRET_S + STRETCH * wait.counted.work_s
        self.waiting[request_id] = Waiting(
            Promise(deciding.pending), now_s, now_s + deciding.patience_s, limit_s, bound_s
        )

    @rule(several=st.integers(3, 8))
    def burst(self, several: int) -> None:
        """More than the endpoints have room for."""
        for _ in range(several):
            self.arrive(WORDS[-1], stream=True, limit_ms=None)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def first_token(self, index: int) -> None:
        """The news wakes those that wait."""
        self.rig.gateway.first_token(self.pick(self.running, index), late=False)
        self.turn()

    @precondition(lambda self: self.running)
    @rule(
        index=indices,
        ended=st.sampled_from([Ended.COMPLETED, Ended.CLIENT_ABORT, Ended.UPSTREAM_RESET, Ended.TIMEOUT]),
    )
    def end(self, index: int, ended: Ended) -> None:
        """So does an end."""
        self.finish(self.pick(self.running, index), ended)
        self.turn()

    @precondition(lambda self: self.running)
    @rule(index=indices, to=st.sampled_from(KEYS))
    def move(self, index: int, to: EndpointKey) -> None:
        """Envoy tries another endpoint."""
        request_id = self.pick(self.running, index)
        self.rig.started(request_id, to)
        self.running[request_id] = to
        self.turn()

    @precondition(lambda self: self.waiting)
    @rule(index=indices, reports_first=st.booleans(), in_one_turn=st.booleans(), makes_room=st.booleans())
    def leave(self, index: int, reports_first: bool, in_one_turn: bool, makes_room: bool) -> None:
        """Its client goes while it waits; the stream's end and the access log come in either order."""
        request_id = self.pick(self.waiting, index)
        if makes_room and self.running:
            self.finish(self.pick(self.running, index), Ended.COMPLETED)
        promise = self.waiting.pop(request_id).promise
        if not reports_first:
            promise.cancel()
        if not (in_one_turn or reports_first):
            self.turn()
        self.rig.end(request_id, ended=Ended.CLIENT_ABORT, endpoint=None, attempts=0, status=0)
        if reports_first and not in_one_turn:
            self.turn()
        promise.cancel()
        self.over.add(request_id)
        self.turn()

    @rule(key=st.sampled_from(KEYS))
    def eject(self, key: EndpointKey) -> None:
        """What waited for it waits for another, or for nothing any more."""
        for number in range(3):
            self.rig.failed(f"other-{number}", key, FailureKind.CONNECT_FAILURE)
        self.rig.freed.notify()  # as the worker does on every change of health

    @rule(key=st.sampled_from(KEYS))
    def recover(self, key: EndpointKey) -> None:
        """A probe may end an ejection."""
        self.rig.scheduling.health.probe_succeeded(key, self.loop.clock())
        self.rig.freed.notify()

    @rule(
        key=st.sampled_from(KEYS),
        running=st.integers(0, 4),
        waiting=st.integers(0, 2),
        tokens=st.none() | st.integers(0, 50),
    )
    def read_metrics(self, key: EndpointKey, running: int, waiting: int, tokens: int | None) -> None:
        """An engine shows what it runs: a limit may be learned, refuted, or forgotten with its process."""
        self.rig.scheduling.engines.observe_occupancy(key, running, waiting, 0.5, None, tokens)
        limit, _ = self.rig.scheduling.engines.sequence_limit(key)
        assert limit == 0 or limit >= running

    @rule(key=st.sampled_from(KEYS), limit=st.integers(0, 3))
    def configure_limit(self, key: EndpointKey, limit: int) -> None:
        """The operator says a limit on sequences, perhaps a wrong one, or takes it back."""
        self.rig.scheduling.engines.configure(key, "vllm/", limit)

    @rule(members=st.sets(st.sampled_from(KEYS)))
    def change_endpoints(self, members: set[EndpointKey]) -> None:
        """Some come and some go; requests on those that go are still charged there."""
        self.members = members
        self.rig.configure([member for member in ENDPOINTS if member.key in members])

    @rule(hold=st.none() | st.sampled_from(HOLDS))
    def change_bounds(self, hold: HoldSettings | None) -> None:
        """They are in force for requests that wait already, with the next round."""
        self.rig.router.settings = RouterSettings(block_bytes=BLOCK_BYTES, hold=hold)
        self.in_force_s = self.loop.clock() + POLL_S
        self.change_endpoints(self.members)

    @rule(
        process=st.sampled_from(["gw2", "gw3"]),
        key=st.sampled_from(KEYS),
        ages_s=st.lists(st.sampled_from([-5.0, 0.0, 0.5, 30.0]), max_size=4),
        work_s=st.sampled_from([0.0, 0.1, 3.0, 1e3]),
    )
    def others_wait(self, process: str, key: EndpointKey, ages_s: list[float], work_s: float) -> None:
        """Another gateway says who waits there, true or not: older ones, later ones, with work for hours."""
        now_s = self.loop.clock()
        line = [Waiter(key, now_s - age_s, work_s, work_s) for age_s in sorted(ages_s, reverse=True)]
        if self.rig.scheduling.lines.hear(process, line, now_s):
            self.rig.freed.notify()
        self.turn()

    @rule(seconds=st.sampled_from([POLL_S, 0.1, 0.5, 2.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        """Time alone refuses requests that waited too long; then none waits longer than allowed."""
        for request_id in self.running:
            self.rig.alive(request_id)
        self.turn(seconds)
        hold = self.rig.router.settings.hold
        if hold is not None and self.loop.clock() > self.in_force_s + 1e-9:
            assert len(self.waiting) <= hold.max_requests
        for request_id, waiting in self.waiting.items():
            assert hold is not None, f"{request_id} waits though no request has to"
            limit_s = min(hold.max_s, waiting.limit_s, waiting.bound_s)
            assert self.loop.clock() - waiting.asked_s <= limit_s + POLL_S + 1e-9
            assert self.loop.clock() < waiting.until_s, f"Envoy has gone on with {request_id} by itself"

    def turn(self, seconds: float = 0.0) -> None:
        """Let the loop run, and see which were answered meanwhile."""
        self.loop.run(seconds)
        for request_id, waiting in list(self.waiting.items()):
            if not waiting.promise.done():
                continue
            del self.waiting[request_id]
            try:
                self.placed(request_id, waiting.promise.result())
            except RouterError as error:
                self.refused(request_id, error)

    def asked_ticket(self, request_id: str) -> int:
        """By which the queue knows it."""
        (ticket,) = [
            ticket for ticket, held in self.queue._held.items() if held.parsed.request_id == request_id
        ]
        return ticket

    def pick(self, among: Mapping[str, object], index: int) -> str:
        """One of them."""
        return list(among)[index % len(among)]

    def placed(self, request_id: str, decided: object) -> None:
        """Answered: from now on it is charged."""
        assert isinstance(decided, Decision)
        assert request_id not in self.running
        assert request_id not in self.over
        self.running[request_id] = self.rig.chosen(request_id)

    def refused(self, request_id: str, error: RouterError) -> None:
        """Answered with an error: it never was and never will be charged."""
        assert error.reason in (Reason.OVERLOADED, Reason.NO_HEALTHY_ENDPOINT)
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 1
        assert request_id not in self.running
        self.over.add(request_id)

    def finish(self, request_id: str, ended: Ended) -> None:
        """Its last access-log entry comes."""
        self.rig.end(request_id, ended=ended, endpoint=self.running.pop(request_id))
        self.over.add(request_id)

    def count(self, name: str, labels: tuple[tuple[str, str], ...]) -> float:
        """A sum over samples of the one model."""
        return sum(self.rig.metric(name, model=MODEL, **{key: value}) for key, value in labels)

    @invariant()
    def each_is_in_one_place(self) -> None:
        """A request that was sent is charged once, where it runs; no other is charged anything."""
        state = self.rig.scheduling
        assert state.load.in_flight == len(state.running) == len(self.running)
        for request_id, key in self.running.items():
            inflight = state.running.get(RequestId(request_id))
            assert inflight is not None
            assert inflight.endpoint == key
        for key in KEYS:
            requests, prefill_tokens, context_tokens = self.rig.load(key)
            assert requests == sum(at == key for at in self.running.values())
            assert min(prefill_tokens, context_tokens) >= 0
            assert requests > 0 or prefill_tokens == context_tokens == 0
        state.load.retain(frozenset(self.members))  # to look is to claim a slot

    @invariant()
    def the_queue_holds_what_waits(self) -> None:
        """The queue, its bytes and its metrics show exactly those whose promise is open."""
        pending = [promise for promise in map(self._promise, self.waiting) if not promise.done()]
        assert len(self.queue) == sum(self.queue.by_reason().values()) == len(pending)
        assert bool(self.queue._num_bytes) == bool(pending)
        endings = tuple(("ending", ending.value) for ending in HoldEnding)
        reasons = tuple(("reason", reason.value) for reason in HoldReason)
        assert self.count("tokenway_holds_total", reasons) == self.ever_held
        assert self.count("tokenway_hold_seconds_count", endings) == self.ever_held - len(pending)
        assert self.rig.metric("tokenway_hold_seconds_count", model=MODEL, ending="failed") == 0

    @invariant()
    def queues_hold_no_other(self) -> None:
        """No queue remembers one that was placed, refused or gone; its sum of work is theirs."""
        tickets = set(self.queue._held)
        for queue in self.queues():
            assert queue._held.keys() <= tickets
            least_s = sum(held.least_s for held in queue._held.values())
            assert abs(queue.least_s - least_s) < 1e-6
            assert queue._held or queue.least_s == 0.0

    def queues(self) -> list[HoldQueue]:
        """Those in force, and old ones that still have a request."""
        found = {id(queue): queue for queue in self.rig.router._scheduler.pools._queues.values()}
        found.update((id(held.queued.queue), held.queued.queue) for held in self.queue._held.values())
        return list(found.values())

    def _promise(self, request_id: str) -> Promise:
        return self.waiting[request_id].promise

    def teardown(self) -> None:
        """When all that run end, one that waits goes, until none is left and every counter is zero."""
        self.few_bytes.stop()
        self.change_bounds(HOLDS[-1])
        self.change_endpoints(set(KEYS))
        for key in KEYS:
            self.recover(key)
        self.turn(LINE_S)  # the others are silent from here on
        while self.waiting:
            before = len(self.waiting)
            for request_id in list(self.running):
                self.finish(request_id, Ended.COMPLETED)
            self.turn(POLL_S)
            assert len(self.waiting) < before, "no request goes though every endpoint is idle"
        for request_id in list(self.running):
            self.finish(request_id, Ended.COMPLETED)
        self.turn(1.0)
        self.each_is_in_one_place()
        self.the_queue_holds_what_waits()
        self.queues_hold_no_other()
        assert len(self.queue) == 0
        assert len(self.over) == self.asked
        assert not any(map(len, self.queues()))
        assert not self.rig.counters._rows.any()


def test_a_longer_bound_does_not_outlast_the_patience_envoy_was_asked_for() -> None:
    """A reload prolongs the waits that begin after it; one that began before ends when it would have."""
    machine = WaitingMachine()
    machine.begin(HOLDS[1])
    machine.arrive(WORDS[-1], stream=True, limit_ms=None)
    (request_id,) = machine.waiting
    machine.change_bounds(HOLDS[-1])
    machine.time_passes(HOLDS[1].max_s + POLL_S)
    assert machine.running[request_id] in KEYS
    machine.teardown()


def test_no_wait_outlasts_what_was_foreseen_at_once_by_more_than_the_bound() -> None:
    """Answers go on for ever: no endpoint's cache has room again, and the bound alone ends the wait."""
    machine = WaitingMachine()
    machine.begin(HOLDS[-1])
    for index, key in enumerate(KEYS):
        machine.first_token(index)
        machine.rig.scheduling.engines.observe_kv_tokens(key, 1)
    machine.arrive(WORDS[1], stream=True, limit_ms=None)
    ((request_id, waiting),) = machine.waiting.items()
    bound_s = waiting.bound_s
    assert bound_s < HOLDS[-1].max_s
    machine.time_passes(bound_s - 2 * POLL_S)
    assert request_id in machine.waiting
    machine.time_passes(3 * POLL_S)
    assert request_id in machine.running
    machine.teardown()


def test_a_neighbour_that_says_on_and_on_that_it_is_first_holds_nobody_beyond_the_bound() -> None:
    """Endpoints are idle, and still it goes by its own bound alone, as with no neighbour and no room."""
    machine = WaitingMachine()
    machine.begin(HOLDS[1])
    machine.arrive(WORDS[1], stream=True, limit_ms=None)
    ((request_id, waiting),) = machine.waiting.items()
    bound_s = waiting.bound_s
    for key in KEYS:
        machine.others_wait(key, key, [30.0], 1e3)
    for other in list(machine.running):
        machine.finish(other, Ended.COMPLETED)
    began_s = machine.loop.clock()
    while request_id in machine.waiting:
        for key in KEYS:
            machine.others_wait(key, key, [30.0], 1e3)
        machine.time_passes(POLL_S)
    assert bound_s - 2 * POLL_S < machine.loop.clock() - began_s <= bound_s + POLL_S
    machine.teardown()


def test_a_neighbour_that_falls_silent_costs_its_last_word_and_no_more() -> None:
    """It may have died with requests that waited first; then room goes to those that are here."""
    machine = WaitingMachine()
    machine.begin(HOLDS[1])
    machine.arrive(WORDS[1], stream=True, limit_ms=None)
    (request_id,) = machine.waiting
    for key in KEYS:
        machine.others_wait(key, key, [30.0], 1e3)
    for other in list(machine.running):
        machine.finish(other, Ended.COMPLETED)
    machine.turn(LINE_S - POLL_S)
    assert request_id in machine.waiting
    machine.turn(2 * POLL_S)
    assert request_id in machine.running
    machine.teardown()


def test_idle_endpoints_take_what_waits_though_prices_have_risen() -> None:
    """The first in the queue is so at new prices as well, and none behind it counts as ahead."""
    machine = WaitingMachine()
    machine.begin(HOLDS[-1])
    machine.burst(12)
    assert len(machine.waiting) == 12
    for _ in range(10):
        machine.rig.scheduling.predictor.observe_ttft(
            (MODEL, CLUSTER), IDLE, uncached=8_000, cached=0, predicted_s=None, actual_s=0.3
        )
    for first in (4, 7, 10, 13):
        for request_id in list(machine.running):
            machine.finish(request_id, Ended.CLIENT_ABORT)
        machine.turn()
        assert set(machine.running.values()) == set(KEYS)
        assert set(machine.running) == {f"request-{number}" for number in range(first, first + 3)}
    machine.teardown()


TestWaiting = WaitingMachine.TestCase
TestWaiting.settings = settings(max_examples=40, stateful_step_count=40)
