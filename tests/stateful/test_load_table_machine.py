"""The load table against a dict, under any interleaving of its calls."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, EndpointKey, RequestId

KEYS = tuple(EndpointKey(f"10.0.0.{host}:8000") for host in range(3))
LEASE_S, TOMBSTONE_S = 8.0, 4.0

ids = st.sampled_from([RequestId(str(number)) for number in range(5)])
keys = st.sampled_from(KEYS)
tokens = st.integers(0, 1000)


class LoadTableMachine(RuleBasedStateMachine):
    """Drives the table and a model of it side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LoadTable(Counters(), LedgerBounds(lease_s=LEASE_S, tombstone_s=TOMBSTONE_S))
        self.now_s = 0.0
        self.charged: dict[RequestId, Charge] = {}
        self.held: set[RequestId] = set()
        self.due_s: dict[RequestId, float] = {}
        self.lease_s: dict[RequestId, float] = {}
        self.tombstones: dict[RequestId, float] = {}
        self.generated: dict[RequestId, int] = {}

    @rule(request_id=ids, key=keys, prefill=tokens, context=tokens, due=st.none() | st.integers(0, 6))
    def charge(
        self, request_id: RequestId, key: EndpointKey, prefill: int, context: int, due: int | None
    ) -> None:
        """Charge if the id is neither in flight nor buried."""
        charge = Charge(request_id, key, prefill, context)
        due_s = None if due is None else self.now_s + due
        new = request_id not in self.charged
        if self.tombstones.get(request_id, 0.0) > self.now_s:
            new = False
        assert self.table.charge(charge, self.now_s, due_s) is new
        if new:
            self.charged[request_id] = charge
            self.held.add(request_id)
            self.lease_s[request_id] = self.now_s + LEASE_S
            if due_s is not None:
                self.due_s[request_id] = due_s

    @rule(request_id=ids, key=keys)
    def move(self, request_id: RequestId, key: EndpointKey) -> None:
        """Carry the charge over."""
        old = self.charged.get(request_id)
        assert self.table.move(request_id, key, self.now_s) is (old is not None)
        if old is not None:
            self.charged[request_id] = Charge(request_id, key, old.prefill_tokens, old.context_tokens)
            self.lease_s[request_id] = self.now_s + LEASE_S

    @rule(request_id=ids, generated=st.none() | tokens)
    def refresh(self, request_id: RequestId, generated: int | None) -> None:
        """Start the lease anew, and note what was generated."""
        assert self.table.refresh(request_id, self.now_s, generated) is (request_id in self.charged)
        if request_id in self.charged:
            if generated is not None:
                self.generated[request_id] = generated
            self.lease_s[request_id] = self.now_s + LEASE_S

    @rule(request_id=ids)
    def release_prefill(self, request_id: RequestId) -> None:
        """True once."""
        assert self.table.release_prefill(request_id) is (request_id in self.held)
        self.end_prefill(request_id)

    @rule(request_id=ids)
    def release(self, request_id: RequestId) -> None:
        """Give back what is charged, or bury."""
        expected = self.charged.get(request_id)
        assert self.table.get(request_id) == expected
        assert self.table.release(request_id, self.now_s) is (expected is not None)
        if expected is None:
            self.tombstones[request_id] = self.now_s + TOMBSTONE_S
        self.forget(request_id)

    @rule(seconds=st.integers(0, 5))
    def advance(self, seconds: int) -> None:
        """Release exactly what is due."""
        self.now_s += seconds
        prefills = {i for i in self.held if self.due_s.get(i, self.now_s + 1) <= self.now_s}
        requests = {i for i in self.charged if self.lease_s[i] <= self.now_s}
        expired = self.table.advance(self.now_s)
        assert (set(expired.prefills), set(expired.requests)) == (prefills, requests)
        assert (len(expired.prefills), len(expired.requests)) == (len(prefills), len(requests))
        for request_id in prefills:
            self.end_prefill(request_id)
        for request_id in requests:
            self.forget(request_id)

    def end_prefill(self, request_id: RequestId) -> None:
        """In the model, the prefill is off."""
        if request_id in self.held:
            self.held.remove(request_id)
            old = self.charged[request_id]
            self.charged[request_id] = Charge(request_id, old.endpoint, 0, old.context_tokens)

    def forget(self, request_id: RequestId) -> None:
        """In the model, the request is over."""
        for known in (self.charged, self.due_s, self.lease_s, self.generated):
            known.pop(request_id, None)
        self.held.discard(request_id)

    @invariant()
    def counters_are_the_sum_of_the_charges(self) -> None:
        """What the view says is what the requests in flight are charged: never more, never negative."""
        view = self.table.view(self.table.slots(KEYS))
        for row, key in enumerate(KEYS):
            here = [charge for charge in self.charged.values() if charge.endpoint == key]
            ids = [charge.request_id for charge in here]
            assert view.prefill_requests[row] == len(self.held.intersection(ids))
            assert view.generated_tokens[row] == sum(self.generated.get(one, 0) for one in ids)
            assert view.requests[row] == len(here)
            assert self.table.decoding(key) == len(here) - view.prefill_requests[row]
            assert view.prefill_tokens[row] == sum(charge.prefill_tokens for charge in here)
            assert view.context_tokens[row] == sum(charge.context_tokens for charge in here)
        assert self.table.decoding(EndpointKey("10.9.9.9:8000")) == 0
        assert self.table.in_flight == len(self.charged)

    def teardown(self) -> None:
        """Once all leases are over, every counter is exactly zero."""
        self.table.advance(self.now_s + LEASE_S)
        assert not self.table._counters._rows.any()
        assert self.table.in_flight == 0


TestLoadTable = LoadTableMachine.TestCase
TestLoadTable.settings = settings(max_examples=60, stateful_step_count=40)
