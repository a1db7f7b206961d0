"""Three gateways and a rendezvous whose messages are late, lost, repeated and out of order."""

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.service.reservations import reserve
from metadata_center.sharing.messages import Candidate, Reserved, Update, decode, encode, member_id
from metadata_center.sharing.peers import Peers
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.tickets import Outgoing
from metadata_center.types import Charge, EndpointKey, RequestId

KEYS = tuple(EndpointKey(f"10.0.0.{host}:8000") for host in range(3))
LEASE_S, SHARE_LEASE_S = 20.0, 6.0

members = st.sampled_from([0, 1, 2])
ids = st.sampled_from([RequestId(str(number)) for number in range(4)])
keys = st.sampled_from(KEYS)
tokens = st.integers(0, 1000)


class SharingMachine(RuleBasedStateMachine):
    """Each member charges and releases; what it says reaches the others as badly as rules allow."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.stores = [
            SharedStore(
                member_id(f"gw{number}", 0, "x"),
                Counters(capacity=4),
                PrefixIndex(10, 10),
                share_lease_s=SHARE_LEASE_S,
                bounds=LedgerBounds(lease_s=LEASE_S),
            )
            for number in range(3)
        ]
        self.slots = [store.load.slots(KEYS) for store in self.stores]
        self.rendezvous = Peers()
        self.on_the_way: list[list[Update]] = [[], [], []]

    @rule(member=members, request_id=ids, key=keys, prefill=tokens, context=tokens)
    def charge(
        self, member: int, request_id: RequestId, key: EndpointKey, prefill: int, context: int
    ) -> None:
        """A decision."""
        self.stores[member].load.charge(Charge(request_id, key, prefill, context), self.now_s, None)

    @rule(member=members, request_id=ids, key=keys, prefill=tokens)
    def reserve(self, member: int, request_id: RequestId, key: EndpointKey, prefill: int) -> None:
        """A decision that is put to the rendezvous with the next message."""
        store = self.stores[member]
        if store.load.charge(Charge(request_id, key, prefill, 9), self.now_s, None):
            candidates = [Candidate(key, 0, prefill, 9)]
            candidates += [Candidate(other, 0, prefill // 2, 9) for other in KEYS if other != key]
            store.reserve(request_id, candidates, lambda: None)

    @rule(member=members, request_id=ids, key=keys)
    def move(self, member: int, request_id: RequestId, key: EndpointKey) -> None:
        """Another endpoint serves."""
        self.stores[member].load.move(request_id, key, self.now_s)

    @rule(member=members, request_id=ids, generated=tokens)
    def refresh(self, member: int, request_id: RequestId, generated: int) -> None:
        """Progress."""
        self.stores[member].load.refresh(request_id, self.now_s, generated)

    @rule(member=members, request_id=ids)
    def release_prefill(self, member: int, request_id: RequestId) -> None:
        """First token."""
        self.stores[member].load.release_prefill(request_id)

    @rule(member=members, request_id=ids)
    def release(self, member: int, request_id: RequestId) -> None:
        """The end."""
        self.stores[member].load.release(request_id, self.now_s)

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.0, 7.0]))
    def advance(self, seconds: float) -> None:
        """Time passes, for some members long enough to be taken for dead."""
        self.now_s += seconds
        for store in self.stores:
            store.load.advance(self.now_s)
        self.rendezvous.advance(self.now_s)

    @rule(member=members)
    def say(self, member: int) -> None:
        """A message is accepted."""
        outgoing = self.stores[member].outgoing(self.now_s)
        if outgoing is not None:
            self.stores[member].accepted(outgoing, self.accept(outgoing), self.now_s)

    @rule(member=members, accepted=st.booleans())
    def say_in_vain(self, member: int, accepted: bool) -> None:
        """A message fails, at the rendezvous or on the way back."""
        outgoing = self.stores[member].outgoing(self.now_s)
        if outgoing is not None:
            if accepted:
                self.accept(outgoing)
            self.stores[member].failed(outgoing, self.now_s)

    @rule(member=members, withdrawn=st.booleans(), between=st.sampled_from(["release", "move", "charge"]))
    def say_slowly(self, member: int, withdrawn: bool, between: str) -> None:
        """While a message is under way its member goes on deciding, or gives up waiting."""
        store = self.stores[member]
        outgoing = store.outgoing(self.now_s)
        if outgoing is None:
            return
        reserved = self.accept(outgoing)
        changes: dict[str, Callable[[RequestId], Any]] = {
            "release": lambda name: store.load.release(name, self.now_s),
            "move": lambda name: store.load.move(name, KEYS[0], self.now_s),
            "charge": lambda _: store.load.charge(
                Charge(RequestId("between"), KEYS[1], 5, 5), self.now_s, None
            ),
        }
        for ticket in outgoing.tickets:
            if withdrawn:
                store.withdraw(ticket)
            changes[between](ticket.charge.request_id)
        store.accepted(outgoing, reserved, self.now_s)

    def accept(self, outgoing: Outgoing) -> list[Reserved]:
        """What the rendezvous does."""
        update = outgoing.update
        reserved: list[Reserved] = []
        if outgoing.tickets:
            reserved, update = reserve(self.rendezvous, update, outgoing.reservations(), {}, self.now_s)
        else:
            self.rendezvous.apply(update, self.now_s)
        message = decode(encode(update))
        for queue in self.on_the_way:
            queue.append(message)
        return reserved

    @rule(member=members, at=st.integers(0, 30), again=st.booleans())
    def deliver(self, member: int, at: int, again: bool) -> None:
        """Some message arrives, the oldest or not, and perhaps stays to arrive again."""
        queue = self.on_the_way[member]
        if queue:
            at %= len(queue)
            self.stores[member].incoming(queue[at] if again else queue.pop(at), self.now_s)

    @rule(member=members)
    def lose(self, member: int) -> None:
        """The connection breaks: all that was on its way is lost; then it is back, with a snapshot."""
        self.on_the_way[member].clear()
        self.stores[member].snapshot(self.rendezvous.shares(self.now_s), self.now_s)

    @invariant()
    def views_are_sums_of_what_is_believed(self) -> None:
        """A view never goes below what the member itself has in flight."""
        for store, slots in zip(self.stores, self.slots, strict=True):
            view = store.load.view(slots)
            own = Counters.own(store._counters)[:, list(slots)].tolist()
            for kind, counts in zip(own, _kinds(view), strict=True):
                assert all(count >= least >= 0 for count, least in zip(counts, kind, strict=True))
            for row, key in enumerate(KEYS):
                assert store.load.decoding(key) == view.requests[row] - view.prefill_requests[row]

    def settle(self) -> None:
        """Heartbeats of all members, in order, after all stragglers."""
        for member, store in enumerate(self.stores):
            for message in self.on_the_way[member]:
                store.incoming(message, self.now_s)
            self.on_the_way[member].clear()
        self.now_s += SHARE_LEASE_S / 3
        for store in self.stores:
            store.load.advance(self.now_s)
        self.rendezvous.advance(self.now_s)
        for member, store in enumerate(self.stores):
            while (outgoing := store.outgoing(self.now_s)) is not None:
                store.accepted(outgoing, self.accept(outgoing), self.now_s)
            assert not store.is_reserving, member
        for member, store in enumerate(self.stores):
            for message in self.on_the_way[member]:
                store.incoming(message, self.now_s)
            self.on_the_way[member].clear()

    def teardown(self) -> None:
        """After a heartbeat all views are the sum of what is in flight; and in the end, zero."""
        self.settle()
        own = [
            store._counters.own()[:, list(slots)]
            for store, slots in zip(self.stores, self.slots, strict=True)
        ]
        expected = own[0] + own[1] + own[2]
        for store, slots in zip(self.stores, self.slots, strict=True):
            assert _kinds(store.load.view(slots)) == expected.tolist()
            assert store.live_gateways == 3
        for store in self.stores:
            store.load.advance(self.now_s + LEASE_S)
            assert store.load.in_flight == 0
        self.now_s += LEASE_S
        self.settle()
        for store, slots in zip(self.stores, self.slots, strict=True):
            assert not any(map(any, _kinds(store.load.view(slots))))
            assert not store._others._ahead
        assert not self.rendezvous.totals


def _kinds(view: Any) -> list[list[int]]:
    return [
        view.requests,
        view.prefill_requests,
        view.prefill_tokens,
        view.context_tokens,
        view.generated_tokens,
    ]


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=40)
