"""One worker's state against a dictionary, under any order of decisions, reports, reloads and time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from extproc.choosing.foreseen import foreseen_ttft_s
from extproc.errors import RouterError
from extproc.routing.charging import PREFILL_DUE_FACTOR, PREFILL_DUE_FLOOR_S
from extproc.values.evidence import FailureKind
from extproc.values.outcomes import Ended
from metadata_center.types import EndpointKey, RequestId
from tests.conftest import LEASE_S, OWNER, TOMBSTONE_S, build_rig, chat, endpoint

ENDPOINTS = tuple(endpoint(number) for number in range(4))
KEYS = tuple(member.key for member in ENDPOINTS)

ids = st.sampled_from([f"request-{number}" for number in range(5)])
keys = st.sampled_from(KEYS)


@dataclass
class Charged:
    """What the model believes of one request in flight.

    Attributes:
        endpoint: Which one is charged.
        prefill_tokens: Still to be computed.
        context_tokens: Held until the end.
        due_s: When time alone ends the prefill, or None.
        lease_s: When time alone ends the request.
    """

    endpoint: EndpointKey
    prefill_tokens: int
    context_tokens: int
    due_s: float | None
    lease_s: float


class GatewayMachine(RuleBasedStateMachine):
    """Drives `Gateway` and `Endings` as Envoy would, in no sensible order."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = build_rig(ENDPOINTS)
        self.charged: dict[str, Charged] = {}
        self.tombstones: dict[str, float] = {}
        self.configured = set(KEYS)

    @property
    def now_s(self) -> float:
        """The time of both."""
        return self.rig.clock()

    @rule(request_id=ids, stream=st.booleans(), words=st.integers(1, 40))
    def decide(self, request_id: str, stream: bool, words: int) -> None:
        """Charge the choice, unless it is charged already, ended before, or there is none to choose."""
        self.expire()
        health = self.rig.scheduling.health
        available = [key for key in self.configured if health.is_available(key)]
        body = chat("some words " * words, stream=stream)
        if not available:
            with pytest.raises(RouterError, match="No endpoint"):
                self.rig.decide(request_id, body)
            return
        self.rig.decide(request_id, body)
        record = self.rig.record(request_id)
        assert record.chosen in available
        if request_id in self.charged or self.tombstones.get(request_id, self.now_s) > self.now_s:
            return
        row = record.row(record.chosen)
        assert row is not None
        predicted_s = foreseen_ttft_s(record, row)
        assert predicted_s is not None
        wait_s = max(PREFILL_DUE_FLOOR_S, PREFILL_DUE_FACTOR * predicted_s)
        self.charged[request_id] = Charged(
            record.chosen,
            record.prompt_tokens - record.cached_tokens[row],
            record.prompt_tokens,
            None if stream else self.now_s + wait_s,
            self.now_s + LEASE_S,
        )

    @rule(request_id=ids, late=st.booleans())
    def first_token(self, request_id: str, late: bool) -> None:
        """Its prefill is over, at most once."""
        self.rig.gateway.first_token(request_id, late=late)
        if request_id in self.charged:
            self.charged[request_id].prefill_tokens = 0

    @rule(request_id=ids, key=keys)
    def attempt_started(self, request_id: str, key: EndpointKey) -> None:
        """Carry the charge over, and start its lease anew if that is another endpoint."""
        self.rig.started(request_id, key)
        charge = self.charged.get(request_id)
        if charge is not None and charge.endpoint != key:
            charge.endpoint = key
            charge.lease_s = self.now_s + LEASE_S

    @rule(request_id=ids, key=keys, kind=st.sampled_from(FailureKind))
    def attempt_failed(self, request_id: str, key: EndpointKey, kind: FailureKind) -> None:
        """Failures change health, never load."""
        self.rig.failed(request_id, key, kind)

    @rule(request_id=ids)
    def alive(self, request_id: str) -> None:
        """Start the lease anew."""
        self.rig.alive(request_id)
        if request_id in self.charged:
            self.charged[request_id].lease_s = self.now_s + LEASE_S

    @rule(
        request_id=ids,
        ended=st.sampled_from([Ended.COMPLETED, Ended.CLIENT_ABORT, Ended.UPSTREAM_RESET, Ended.TIMEOUT]),
        key=st.none() | keys,
        cached=st.none() | st.integers(0, 500),
        owned=st.booleans(),
    )
    def end(
        self, request_id: str, ended: Ended, key: EndpointKey | None, cached: int | None, owned: bool
    ) -> None:
        """Release everything; an end before its decision is remembered."""
        self.rig.end(
            request_id,
            ended=ended,
            endpoint=key,
            attempts=int(key is not None),
            cached_tokens=cached,
            prompt_tokens=cached,
            owner=OWNER if owned else None,
        )
        if self.charged.pop(request_id, None) is None:
            self.tombstones[request_id] = self.now_s + TOMBSTONE_S

    @rule(members=st.sets(keys))
    def reload(self, members: set[EndpointKey]) -> None:
        """Endpoints come and go; requests on those that go are still charged there."""
        self.configured = members
        self.rig.configure([member for member in ENDPOINTS if member.key in members])

    @rule(key=keys)
    def probe(self, key: EndpointKey) -> None:
        """A probe may end an ejection."""
        self.rig.scheduling.health.probe_succeeded(key, self.now_s)

    @rule(seconds=st.sampled_from([0.01, 0.2, 3.0, TOMBSTONE_S, LEASE_S / 2, LEASE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        """Time alone releases what is due."""
        self.rig.clock.advance(seconds)
        self.rig.scheduling.running.advance(self.now_s)
        self.expire()

    def expire(self) -> None:
        """In the model, what is due is over."""
        for request_id, charge in list(self.charged.items()):
            if charge.due_s is not None and charge.due_s <= self.now_s:
                charge.prefill_tokens = 0
            if charge.lease_s <= self.now_s:
                del self.charged[request_id]

    @invariant()
    def counters_are_the_sum_of_the_charges(self) -> None:
        """Each endpoint is charged exactly its requests: never more, never less than nothing."""
        for key in KEYS:
            here = [charge for charge in self.charged.values() if charge.endpoint == key]
            expected = (
                len(here),
                sum(charge.prefill_tokens for charge in here),
                sum(charge.context_tokens for charge in here),
            )
            assert self.rig.load(key) == expected
            assert min(expected) >= 0
        self.rig.scheduling.load.retain(frozenset(self.configured))  # to look is to claim a slot

    @invariant()
    def the_books_agree(self) -> None:
        """Every charged request is followed and no other; only configured endpoints are remembered."""
        state = self.rig.scheduling
        assert state.load.in_flight == len(state.running) == len(self.charged)
        for request_id, charge in self.charged.items():
            inflight = state.running.get(RequestId(request_id))
            assert inflight is not None
            assert inflight.endpoint == charge.endpoint
        assert set(self.rig.history._caches) <= self.configured

    def teardown(self) -> None:
        """After all ends, or their leases, every counter is exactly zero."""
        for request_id in list(self.charged)[::2]:
            self.rig.end(request_id)
        self.rig.clock.advance(LEASE_S)
        self.rig.scheduling.running.advance(self.now_s)
        assert not self.rig.counters._rows.any()
        assert len(self.rig.scheduling.running) == self.rig.scheduling.load.in_flight == 0


TestGateway = GatewayMachine.TestCase
TestGateway.settings = settings(max_examples=80, stateful_step_count=40)
