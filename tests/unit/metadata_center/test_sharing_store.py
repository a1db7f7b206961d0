"""One member's store: what it says, what it hears, and what its views show in between."""

from pathlib import Path
from typing import Any

import pytest

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import MAX_ENDPOINTS, Counters
from metadata_center.load.shared_counters import SharedCounters, create
from metadata_center.load.table import LoadTable
from metadata_center.sharing.lines import told
from metadata_center.sharing.messages import (
    MAX_SHARED_BLOCKS,
    RESPONSES_MARK,
    Candidate,
    Chain,
    Line,
    MemberId,
    Reserved,
    Row,
    Update,
    decode,
    encode,
    member_id,
)
from metadata_center.sharing.others import MAX_OTHERS_REQUESTS, MAX_OTHERS_TOKENS, OPTIMISM_S
from metadata_center.sharing.store import MAX_WAITING, SharedStore
from metadata_center.sharing.tickets import Ticket
from metadata_center.store import EmbeddedStore, MetadataStore
from metadata_center.types import Charge, EndpointKey, RequestId, Waiter

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
ONE, TWO, THREE = (member_id(f"gw{number}", 0, "x") for number in (1, 2, 3))


def store(
    member: MemberId = ONE, *, optimistic: bool = True, capacity: int = 16, **ports: Any
) -> SharedStore:
    """A store that said its first, full word and knows A and B."""
    made = SharedStore(
        member, Counters(capacity=capacity), PrefixIndex(100, 100), optimistic=optimistic, **ports
    )
    made.load.retain(frozenset([A, B]))
    assert made.outgoing(0.0) is not None
    return made


def charge(made: SharedStore, request_id: str, endpoint: EndpointKey = A, now_s: float = 0.0) -> None:
    """Charge 10 prefill and 20 context tokens."""
    assert made.load.charge(Charge(RequestId(request_id), endpoint, 10, 20), now_s, None)


def sent(made: SharedStore, now_s: float = 0.0) -> Update | None:
    """The next message."""
    outgoing = made.outgoing(now_s)
    return None if outgoing is None else outgoing.update


def requests(made: SharedStore) -> list[int]:
    """The view of A and B."""
    return list(made.load.view(made.load.slots([A, B])).requests)


def test_only_changes_are_said() -> None:
    """A message has the rows that differ from the last one; without any there is no message."""
    one = store()
    assert sent(one) is None
    charge(one, "1")
    one.load.refresh(RequestId("1"), 0.0, 7)
    assert sent(one) == Update(ONE, 2, (Row(A, 1, 1, 10, 20, 7),))
    assert sent(one) is None
    one.load.move(RequestId("1"), B, 0.0)
    moved = sent(one)
    assert moved is not None
    assert set(moved.rows) == {Row(A), Row(B, 1, 1, 10, 20, 7)}
    charge(one, "2")
    one.load.release(RequestId("2"), 0.0)
    assert sent(one) is None


def test_a_heartbeat_is_full() -> None:
    """After a third of the lease everything is said, zeros left out."""
    one = store()
    charge(one, "1")
    charge(one, "2", B)
    assert sent(one) is not None
    one.load.release(RequestId("2"), 0.0)
    assert one.heartbeat_s == pytest.approx(5.0 / 3)
    assert sent(one, 2.0) == Update(ONE, 3, (Row(A, 1, 1, 10, 20),), True)


def test_what_failed_is_said_again_in_full() -> None:
    """A message that may be lost is followed by a full one at once."""
    one = store()
    charge(one, "1")
    outgoing = one.outgoing(0.0)
    assert outgoing is not None
    one.failed(outgoing, 0.5)
    assert sent(one, 0.5) == Update(ONE, 3, (Row(A, 1, 1, 10, 20),), True)


def test_a_slot_that_changed_hands_says_so() -> None:
    """An endpoint whose slot went to another one between two messages is said to be empty."""
    one = store(capacity=1)
    one.load.retain(frozenset([A]))
    charge(one, "1", A)
    assert sent(one) is not None
    one.load.release(RequestId("1"), 0.0)
    one.load.retain(frozenset([B]))
    charge(one, "2", B)
    assert sent(one) == Update(ONE, 3, (Row(A), Row(B, 1, 1, 10, 20)))


def left() -> SharedStore:
    """A store whose two endpoints left, empty, after a message in which they were not."""
    one = store()
    charge(one, "1", A)
    charge(one, "2", B)
    assert sent(one) is not None
    one.load.release(RequestId("1"), 0.0)
    one.load.release(RequestId("2"), 0.0)
    one.load.retain(frozenset())
    return one


def test_an_endpoint_that_comes_back_to_another_slot_has_one_row() -> None:
    """A message with two rows of an endpoint is refused whole."""
    one = left()
    charge(one, "3", B)
    update = sent(one)
    assert update is not None
    assert decode(encode(update)).rows == (Row(A), Row(B, 1, 1, 10, 20))
    charge(one, "4", A)
    charge(one, "5", B)
    update = sent(one)
    assert update is not None
    assert decode(encode(update)).rows == (Row(B, 2, 2, 20, 40), Row(A, 1, 1, 10, 20))


def test_an_endpoint_that_comes_back_empty_is_said_to_be_empty() -> None:
    """To the slot that it had, or to another."""
    for keys in ([A, B], [B, A]):
        one = left()
        one.load.slots(keys)
        update = sent(one)
        assert update is not None
        assert set(update.rows) == {Row(A), Row(B)}


def test_views_add_what_other_gateways_count() -> None:
    """Messages, their leases, and snapshots show in the view, on endpoints known before and after."""
    one = store()
    one.load.slots([A])
    one.incoming(Update(TWO, 1, (Row(A, 3), Row(B, 4)), True), 0.0)
    one.incoming(Update(member_id("gw1", 1, "sibling"), 1, (Row(A, 100),), True), 0.0)
    assert requests(one) == [3, 4]
    one.snapshot([Update(THREE, 1, (Row(A, 1),), True, 2.0)], 0.0)
    assert requests(one) == [4, 4]
    assert one.live_gateways == 3
    again = sent(one)
    assert again is not None
    assert again.full
    one.load.advance(2.0)
    assert requests(one) == [3, 4]
    one.load.advance(5.0)
    assert requests(one) == [0, 0]
    assert one.live_gateways == 1


def test_a_gateway_of_the_same_name_is_noticed() -> None:
    """Its load is not counted, since it looks like a sibling's, but an operator can see why."""
    one = store()
    one.incoming(Update(member_id("gw1", 0, "other"), 1, (Row(A, 3),)), 0.0)
    one.incoming(Update(member_id("gw1", 1, "sibling"), 1, (Row(A, 3),)), 0.0)
    one.incoming(Update(ONE, 1), 0.0)
    assert (requests(one), one.namesakes) == ([0, 0], 1)


def test_a_charge_counts_once_per_gateway_until_it_is_heard() -> None:
    """The increment ends with the echo of the message that carries the charge, not with an earlier one."""
    one = store()
    one.incoming(Update(TWO, 1), 0.0)
    one.incoming(Update(THREE, 1), 0.0)
    charge(one, "1")
    assert requests(one) == [3, 0]
    first = sent(one)
    assert first is not None
    charge(one, "2")
    assert requests(one) == [6, 0]
    view = one.load.view(one.load.slots([A]))
    assert (view.prefill_requests, view.prefill_tokens, view.context_tokens) == ([6], [60], [120])
    one.incoming(first, 0.0)
    assert requests(one) == [4, 0]
    second = sent(one)
    assert second is not None
    one.incoming(second, 0.0)
    assert requests(one) == [2, 0]
    assert not one._others._ahead


def test_an_increment_without_an_echo_ends_by_itself() -> None:
    """With the transport down a charge counts more than once for `OPTIMISM_S` only."""
    one = store()
    one.incoming(Update(TWO, 1), 0.0)
    charge(one, "1")
    assert requests(one) == [2, 0]
    one.load.advance(OPTIMISM_S)
    assert requests(one) == [1, 0]


def test_a_slow_store_has_no_request_count_that_has_ended() -> None:
    """Requests of 60 ms, of which each is told after 200: where all have ended, nothing keeps others away."""
    one = store()
    one.incoming(Update(TWO, 1), 0.0)
    for number in range(100):
        charge(one, str(number))
        one.load.release(RequestId(str(number)), 0.0)
    assert requests(one)[0] > 0
    one.load.advance(0.06)
    assert requests(one) == [0, 0]


def test_without_others_or_when_switched_off_nothing_is_added() -> None:
    """A lone gateway, and one that does not want it, count what is there."""
    alone, plain = store(), store(optimistic=False)
    plain.incoming(Update(TWO, 1), 0.0)
    for one in (alone, plain):
        charge(one, "1")
        assert requests(one) == [1, 0]


def test_every_sender_is_woken_by_every_change() -> None:
    """Charges, moves, releases, progress, expiry and shared blocks wake; what changes nothing does not."""
    one = store()
    woken: list[bool] = []
    one.listen(lambda: woken.append(True))

    def wakes() -> bool:
        found = bool(woken)
        woken.clear()
        return found

    load, r1 = one.load, RequestId("1")
    load.charge(Charge(r1, A, 10, 20), 0.0, 1.0)
    assert wakes()
    load.charge(Charge(r1, A, 10, 20), 0.0, 1.0)
    load.refresh(r1, 0.0)
    load.advance(0.5)
    load.release(RequestId("unknown"), 0.0)
    assert not wakes()
    for change in (
        lambda: load.refresh(r1, 0.0, 5),
        lambda: load.advance(1.0),
        lambda: load.move(r1, B, 1.0),
        lambda: load.release(r1, 1.0),
        lambda: one.share(A, [1]),
    ):
        change()
        assert wakes()
    load.charge(Charge(r1, A, 10, 20), 1.0, None)
    wakes()
    assert load.release_prefill(r1)
    assert wakes()
    assert not load.release_prefill(r1)
    assert not wakes()


def test_routing_history_is_shared() -> None:
    """Chains go out once, and come in for endpoints that exist; a sibling's come by another way."""
    one, two = store(ONE), store(TWO)
    one.share(A, [1, 2, 3])
    one.share(EndpointKey("gone:1"), [4])
    message = sent(one)
    assert message is not None
    assert sent(one) is None
    two.incoming(message, 0.0)
    two.incoming(Update(member_id("gw2", 1, "sibling"), 1, blocks=(Chain.of(B, [1]),)), 0.0)
    assert two.prefixes.match([1, 2, 3], (A, B)) == [3, 0]
    assert [two.prefixes.size(key) for key in (A, B)] == [3, 0]


def test_history_beyond_the_bound_is_dropped_and_counted() -> None:
    """What waits to be sent has the size of one message."""
    one = store()
    one.share(A, list(range(MAX_SHARED_BLOCKS)))
    one.share(A, [1, 2])
    assert one.dropped_blocks == 2
    message = sent(one)
    assert message is not None
    assert [chain.num_blocks for chain in message.blocks] == [MAX_SHARED_BLOCKS]


def reserve(made: SharedStore, request_id: str, answers: list[str]) -> Ticket:
    """Ask whether the request may stay on A or should go to B, where only 3 tokens are not cached."""
    candidates = [Candidate(A, 0, 10, 20), Candidate(B, 0, 3, 20)]
    ticket = made.reserve(RequestId(request_id), candidates, lambda: answers.append(request_id))
    assert ticket is not None
    return ticket


def test_a_reservation_goes_where_the_rendezvous_says() -> None:
    """It is charged at once, left out of the rows, and moved with the tokens of its place."""
    one = store()
    answers: list[str] = []
    charge(one, "0")
    charge(one, "1")
    charge(one, "2")
    tickets = [reserve(one, "1", answers), reserve(one, "2", answers)]
    assert requests(one) == [3, 0]

    outgoing = one.outgoing(0.0)
    assert outgoing is not None
    assert outgoing.update.rows == (Row(A, 1, 1, 10, 20),)
    assert len(outgoing.reservations()) == 2
    one.accepted(outgoing, [Reserved(0, (1, 0)), Reserved(1, (2, 0))], 0.0)

    assert answers == ["1", "2"]
    assert [ticket.place for ticket in tickets] == [A, B]
    assert requests(one) == [2, 1]
    assert one.load.get(RequestId("2")) == Charge(RequestId("2"), B, 3, 20)
    assert sent(one) is None
    one.load.release(RequestId("2"), 0.0)
    assert sent(one) == Update(ONE, 3, (Row(B),))


def test_a_reservation_withdrawn_in_time_is_an_ordinary_charge() -> None:
    """Before it is sent it goes into the rows; no caller gets an answer."""
    one = store()
    answers: list[str] = []
    charge(one, "1")
    one.withdraw(reserve(one, "1", answers))
    assert sent(one) == Update(ONE, 2, (Row(A, 1, 1, 10, 20),))
    assert not answers


def test_a_reservation_withdrawn_too_late_is_set_right() -> None:
    """The charge stays where the request was sent; the next message says so of both endpoints."""
    one = store()
    charge(one, "1")
    ticket = reserve(one, "1", [])
    outgoing = one.outgoing(0.0)
    assert outgoing is not None
    one.withdraw(ticket)
    one.accepted(outgoing, [Reserved(1, (1, 0))], 0.0)

    assert ticket.place is None
    assert requests(one) == [1, 0]
    correction = sent(one)
    assert correction is not None
    assert set(correction.rows) == {Row(A, 1, 1, 10, 20), Row(B)}


def test_a_reservation_that_failed_stays_local() -> None:
    """Without an answer the charge is where it was made, and the next message is full."""
    one = store()
    answers: list[str] = []
    charge(one, "1")
    ticket = reserve(one, "1", answers)
    outgoing = one.outgoing(0.0)
    assert outgoing is not None
    one.failed(outgoing, 0.0)
    assert (ticket.place, answers) == (None, ["1"])
    assert sent(one) == Update(ONE, 3, (Row(A, 1, 1, 10, 20),), True)


def test_a_request_that_ends_before_its_answer_leaves_no_load() -> None:
    """Ended before it was sent it is not asked for; ended later, what it got is given back."""
    one = store()
    answers: list[str] = []
    charge(one, "1")
    reserve(one, "1", answers)
    one.load.release(RequestId("1"), 0.0)
    assert sent(one) is None
    assert answers == ["1"]

    charge(one, "2")
    reserve(one, "2", answers)
    outgoing = one.outgoing(0.0)
    assert outgoing is not None
    one.load.release(RequestId("2"), 0.0)
    one.accepted(outgoing, [Reserved(1, (0, 0))], 0.0)
    assert requests(one) == [0, 0]
    assert sent(one) == Update(ONE, 3, (Row(B),))


def test_a_place_at_an_endpoint_that_is_gone_is_set_right() -> None:
    """An endpoint without a slot here keeps nothing of ours at the rendezvous."""
    one = store(capacity=1)
    one.load.retain(frozenset([A]))
    charge(one, "1")
    ticket = reserve(one, "1", [])
    outgoing = one.outgoing(0.0)
    assert outgoing is not None
    one.accepted(outgoing, [Reserved(1, (1, 0))], 0.0)
    assert ticket.place is None
    assert sent(one) == Update(ONE, 3, (Row(A, 1, 1, 10, 20),), True)


def test_reservations_are_bounded() -> None:
    """One without a charge, a second one of a request, and one too many are refused."""
    one = store()
    assert one.reserve(RequestId("none"), [Candidate(A, 0, 0, 0)], lambda: None) is None
    for number in range(MAX_WAITING + 1):
        charge(one, str(number))
        ticket = one.reserve(RequestId(str(number)), [Candidate(A, 0, 0, 0)], lambda: None)
        assert (ticket is None) == (number == MAX_WAITING)
    assert one.reserve(RequestId("0"), [Candidate(A, 0, 0, 0)], lambda: None) is None
    asked = 0
    while one.is_reserving:
        outgoing = one.outgoing(0.0)
        assert outgoing is not None
        assert outgoing.update.rows == () or outgoing.update.rows[0].requests == 1 + asked
        one.accepted(outgoing, [Reserved(0, (0,))] * len(outgoing.tickets), 0.0)
        asked += len(outgoing.tickets)
    assert asked == MAX_WAITING


def test_goodbye_is_the_last_word() -> None:
    """It voids the share at the others."""
    one, two = store(ONE), store(TWO)
    charge(one, "1")
    message = sent(one)
    assert message is not None
    two.incoming(message, 0.0)
    two.incoming(one.leave(), 0.0)
    assert requests(two) == [0, 0]


def test_siblings_share_memory_and_say_each_their_own(tmp_path: Path) -> None:
    """Two workers of a gateway see each other at once; each one's messages have its own row."""
    create(tmp_path / "load", workers=2)
    one, two = (
        SharedStore(
            member_id("gw1", worker, "x"),
            SharedCounters(tmp_path / "load", worker),
            PrefixIndex(10, 10),
        )
        for worker in (0, 1)
    )
    charge(one, "1")
    charge(two, "2", B)
    assert requests(one) == requests(two) == [1, 1]
    two.incoming(Update(TWO, 1, (Row(A, 5),)), 0.0)
    assert (requests(one), requests(two)) == ([1, 1], [6, 1])
    message = sent(one)
    assert message is not None
    assert message.rows == (Row(A, 1, 1, 10, 20),)
    two.incoming(message, 0.0)
    assert requests(two) == [6, 1]


def test_workers_know_of_each_others_prefills(tmp_path: Path) -> None:
    """Since when the one at the head of a queue is under way, whichever worker saw the one before end."""
    create(tmp_path / "load", workers=2)
    one, two = (LoadTable(SharedCounters(tmp_path / "load", worker)) for worker in (0, 1))
    slots = [load.slots([A, B]) for load in (one, two)]
    assert list(two.prefill_since_s(slots[1])) == [0.0, 0.0]
    one.prefill_turned(A, 7.0)
    two.prefill_turned(A, 5.0)
    two.prefill_turned(B, 6.0)
    for load, at in zip((one, two), slots, strict=True):
        assert list(load.prefill_since_s(at)) == [7.0, 6.0]
    one.prefill_turned(EndpointKey("unknown"), 9.0)  # it left, and a request still runs there


def test_gateways_know_of_each_others_prefills() -> None:
    """One that ended, or began where there was none, is under way from when that was heard."""
    one = store()
    slots = one.load.slots([A, B])

    def since_s(now_s: float, sequence: int, prefills: int, at: EndpointKey = A) -> list[float]:
        one.incoming(Update(TWO, sequence, (Row(at, prefills, prefills),)), now_s)
        return list(one.load.prefill_since_s(slots))

    assert since_s(1.0, 1, 1) == [1.0, 0.0]
    assert since_s(2.0, 2, 3) == [1.0, 0.0]  # two more wait behind it
    assert since_s(3.0, 3, 2) == [3.0, 0.0]
    one.load.advance(9.0)  # its lease is over, and so are its prefills
    assert list(one.load.prefill_since_s(slots)) == [9.0, 0.0]
    charge(one, "own", B)
    one.load.prefill_turned(B, 9.5)
    assert since_s(10.0, 4, 1, B) == [9.0, 9.5]  # it waits behind ours


def test_both_kinds_are_metadata_stores() -> None:
    """A router may hold either."""
    embedded: MetadataStore = EmbeddedStore(store().load, PrefixIndex(10, 10))
    shared: MetadataStore = store()
    for made in (embedded, shared):
        made.share(A, [1])
        assert made.load.in_flight == 0


def test_a_share_fits_into_a_message_whatever_still_runs_on_endpoints_that_left() -> None:
    """All are replaced while they have requests: others hear of those that are there, and nothing twice."""
    one, two = store(capacity=2 * MAX_ENDPOINTS), store(TWO, capacity=2 * MAX_ENDPOINTS)
    former, present = (
        [EndpointKey(f"10.{tens}.{number // 250}.{number % 250}:1") for number in range(MAX_ENDPOINTS)]
        for tens in (1, 2)
    )
    heard = []
    for turn, keys in enumerate((former, present)):
        one.load.retain(frozenset(keys))
        one.load.slots(keys)
        for number, key in enumerate(keys):
            charge(one, f"{turn}-{number}", key)
        message = sent(one)
        assert message is not None
        two.incoming(message, 0.0)
        heard.append({row.endpoint for row in message.rows if row.requests})
    assert heard == [set(former), set(present)]
    assert two.peers.refused == 0
    assert sent(one) is None
    two.load.retain(frozenset(present))
    assert list(two.load.view(two.load.slots(present)).requests) == [1] * MAX_ENDPOINTS
    for number in range(MAX_ENDPOINTS):
        one.load.release(RequestId(f"1-{number}"), 0.0)
    last = sent(one)
    assert last is not None
    two.incoming(last, 0.0)
    assert list(two.load.view(two.load.slots(present)).requests) == [0] * MAX_ENDPOINTS


def test_responses_are_not_blocks() -> None:
    """A chain that begins with the mark goes to the table of where responses live, not to the index."""
    heard: list[tuple[EndpointKey, list[int]]] = []
    one = store(on_responses=lambda endpoint, chain: heard.append((endpoint, list(chain))))
    chains = (Chain.of(A, [RESPONSES_MARK, 7]), Chain.of(A, [1, 2]))
    one.incoming(Update(TWO, 1, blocks=chains), 0.0)
    assert heard == [(A, [RESPONSES_MARK, 7])]
    assert one.prefixes.record(A, [RESPONSES_MARK, 7]) != one.prefixes.record(A, [1, 2])


@pytest.mark.parametrize(
    ("member", "others", "newcomer", "informs"),
    [
        ("gw1/0/x", (), "gw2/0/x", True),
        ("gw2/0/x", (), "gw1/0/x", True),  # its own name does not count: it knows nothing
        ("gw2/0/x", ("gw1/0/x",), "gw3/0/x", False),
        ("gw2/0/x", ("gw1/0/x",), "gw1/0/restarted", True),
        ("gw1/1/x", (), "gw2/0/x", False),
        ("gw1/0/x", ("gw2/0/x",), "gw3/1/x", True),
    ],
)
def test_one_member_informs_a_newcomer(
    member: str, others: tuple[str, ...], newcomer: str, informs: bool
) -> None:
    """The first worker of the first gateway that is not the newcomer's own, and none twice."""
    known: dict[EndpointKey, list[int]] = {}
    made = store(MemberId(member), known=lambda: known)
    for other in others:
        made.incoming(Update(MemberId(other), 1), 0.0)
    known[A] = [RESPONSES_MARK, 7]
    for sequence in (1, 2):
        made.incoming(Update(MemberId(newcomer), sequence), 0.0)
    update = sent(made)
    assert ([] if update is None else list(update.blocks)) == [Chain.of(A, known[A])] * informs


def test_a_member_that_was_away_sends_what_it_knows() -> None:
    """After each snapshot: what was shared meanwhile may have been lost."""
    one = store(known=lambda: {A: [RESPONSES_MARK, 7]})
    one.snapshot([Update(TWO, 1)], 0.0)
    update = sent(one)
    assert update is not None
    assert Chain.of(A, [RESPONSES_MARK, 7]) in update.blocks


def test_absurd_shares_of_many_members_are_bounded() -> None:
    """A thousand members that each say the largest numbers there are: views stay whole and finite."""
    made = store()
    most = 2**53 - 1
    for number in range(1024):
        made.incoming(Update(member_id(f"g{number}", 0, "x"), 1, (Row(A, *[most] * 5),), full=True), 0.0)
    view = made.load.view(made.load.slots([A, B]))
    assert view.requests == [MAX_OTHERS_REQUESTS, 0]
    assert view.context_tokens == [MAX_OTHERS_TOKENS, 0]
    made.advance(1e9)
    assert requests(made) == [0, 0]


def test_who_waits_is_told_with_the_next_message_as_it_was_last() -> None:
    """Once; nobody is told as such, and a reservation takes no line with it."""
    made = store()
    assert sent(made) is None
    made.tell_line([Waiter(A, 1.0, 0.5, 0.5)])
    made.tell_line([Waiter(B, 2.0, 0.5, 0.5)])
    update = sent(made)
    assert update is not None
    assert update.line == told([Waiter(B, 2.0, 0.5, 0.5)], 0.0)
    assert not update.full
    assert sent(made) is None
    made.tell_line([])
    charge(made, "r")
    assert made.reserve(RequestId("r"), [Candidate(A, 0, 10, 20)], lambda: None) is not None
    reserving = sent(made)
    assert reserving is not None
    assert reserving.line is None
    made.load.release(RequestId("r"), 0.0)
    update = sent(made)
    assert update is not None
    assert update.line == ()


def test_a_line_is_heard_from_others_and_never_late() -> None:
    """Siblings have a wire of their own; one that leaves has nobody waiting; what is no line is none."""
    lines: list[tuple[MemberId, list[Waiter]]] = []
    made = store(on_line=lambda member, line: lines.append((member, line)))
    waits = told([Waiter(A, 1.0, 0.5, 0.5)], 3.0)
    made.incoming(Update(TWO, 5, line=waits), 10.0)
    assert lines == [(TWO, [Waiter(A, 8.0, 0.5, 0.5)])]
    made.incoming(Update(TWO, 4, line=()), 10.0)
    made.incoming(Update(TWO, 5, line=()), 10.0)
    made.incoming(Update(TWO, 6), 10.0)
    made.incoming(Update(member_id("gw1", 1, "x"), 9, line=waits), 10.0)
    made.incoming(Update(ONE, 9, line=waits), 10.0)
    made.incoming(Update(THREE, 1, line=(Line(A, b"short"),)), 10.0)
    assert len(lines) == 1
    made.incoming(Update(TWO, 7, leaving=True), 10.0)
    assert lines[1:] == [(TWO, [])]
