"""Shares of members: what applies, what is void, what is bounded."""

from itertools import permutations

from metadata_center.load.kinds import NOTHING
from metadata_center.sharing.messages import MemberId, Row, Update, member_id
from metadata_center.sharing.peers import MEMORY_LEASES, Peers, share
from metadata_center.types import EndpointKey

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
ONE, TWO = member_id("gw1", 0, "x"), member_id("gw2", 0, "x")


def update(sequence: int, a: int = -1, b: int = -1, *, member: MemberId = ONE, full: bool = False) -> Update:
    """An update with so many requests on A and B; -1 leaves the endpoint out."""
    rows = tuple(Row(key, count, count, 10 * count) for key, count in ((A, a), (B, b)) if count >= 0)
    return Update(member, sequence, rows, full)


def requests(peers: Peers) -> tuple[int, int]:
    """Total requests on A and B."""
    return peers.total(A)[0], peers.total(B)[0]


def test_totals_are_sums_over_members() -> None:
    """Every kind of count is summed, and zero leaves no trace."""
    peers = Peers()
    assert peers.apply(Update(ONE, 1, (Row(A, 1, 2, 3, 4, 5),)), 0.0) == {A}
    assert peers.apply(Update(TWO, 1, (Row(A, 1, 1, 1, 1, 1),)), 0.0) == {A}
    assert peers.total(A) == (2, 3, 4, 5, 6)
    assert peers.apply(Update(TWO, 2, (Row(A, 1, 1, 1, 1, 1),)), 0.0) == set()
    peers.apply(Update(ONE, 2, (Row(A),)), 0.0)
    peers.apply(Update(TWO, 3, full=True), 0.0)
    assert peers.total(A) == NOTHING
    assert not peers.totals


def test_any_order_and_repetition_gives_the_newest() -> None:
    """Messages in any order, each twice, end in the same totals."""
    messages = [
        update(1, 1, 1, full=True),
        update(2, 5),
        update(3, b=7),
        update(4, 0, 3, full=True),
        update(5, 2),
    ]
    for order in permutations(messages):
        peers = Peers()
        for message in order:
            peers.apply(message, 0.0)
            peers.apply(message, 0.0)
        assert requests(peers) == (2, 3), order


def test_a_full_update_zeroes_only_what_is_older() -> None:
    """A row written after a full update stays when that one arrives late."""
    peers = Peers()
    peers.apply(update(3, a=4), 0.0)
    peers.apply(update(2, b=1, full=True), 0.0)
    assert requests(peers) == (4, 1)
    peers.apply(update(1, 9, 9, full=True), 0.0)
    assert requests(peers) == (4, 1)


def test_members_of_the_own_gateway_are_ignored() -> None:
    """Siblings share memory and would count twice."""
    peers = Peers("gw1")
    assert peers.apply(update(1, 5), 0.0) == set()
    assert peers.apply(update(1, 5, member=member_id("gw1", 1, "y")), 0.0) == set()
    assert requests(peers) == (0, 0)
    assert peers.live_gateways == 0


def test_a_silent_member_loses_its_share() -> None:
    """At the end of its lease and not before; only newer messages renew it."""
    peers = Peers()
    peers.apply(update(1, 5), 0.0)
    peers.apply(update(1, 5), 4.0)
    assert peers.advance(4.999) == set()
    assert peers.advance(5.0) == {A}
    assert requests(peers) == (0, 0)
    assert (peers.live_gateways, peers.live_members) == (0, 0)


def test_a_straggler_does_not_revive_a_silent_member_but_its_return_does() -> None:
    """What was said before the end of the lease stays void; newer words count."""
    peers = Peers()
    peers.apply(update(3, 5), 0.0)
    peers.advance(5.0)
    assert peers.apply(update(2, b=5, full=True), 6.0) == set()
    assert peers.apply(update(3, 5), 6.0) == set()
    assert peers.apply(update(4, 7), 6.0) == {A}
    assert requests(peers) == (7, 0)
    assert peers.apply(update(2, b=5), 6.0) == set()
    assert (peers.live_gateways, peers.live_members) == (1, 1)


def test_what_left_stays_away() -> None:
    """A leaving member's share is void at once; neither stragglers nor anything else revives it."""
    goodbye = Update(ONE, 9, leaving=True)
    for before in ([update(7, 5)], []):
        peers = Peers()
        for message in before:
            peers.apply(message, 0.0)
        assert peers.apply(goodbye, 0.0) == ({A} if before else set())
        for late in (update(8, 5), goodbye, update(10, 5)):
            assert peers.apply(late, 0.0) == set()
        assert (requests(peers), peers.live_members) == ((0, 0), 0)


def test_members_are_forgotten_and_bounded() -> None:
    """A full table makes room by forgetting the dead, refuses the rest, and empties itself with time."""
    peers = Peers(max_members=2)
    third = member_id("gw3", 0, "x")
    peers.apply(update(1, 1), 0.0)
    peers.apply(update(1, 1, member=TWO), 1.0)
    peers.apply(update(1, 1, member=third), 1.0)
    assert (peers.refused, requests(peers)) == (1, (2, 0))
    peers.advance(5.0)
    peers.apply(update(2, 1, member=third), 5.0)
    assert requests(peers) == (2, 0)
    peers.advance(20.0)
    peers.advance(20.0 + 5.0 * MEMORY_LEASES)
    assert not peers._members
    assert peers.advance(1e9) == set()


def test_endpoints_are_bounded() -> None:
    """An endpoint too many is refused and counted; those known go on."""
    peers = Peers(max_endpoints=1)
    peers.apply(update(1, 1, 1, full=True), 0.0)
    assert (peers.refused, requests(peers)) == (1, (1, 0))
    peers.apply(update(2, 0, 1, full=True), 0.0)
    peers.apply(update(3, 0, 1, full=True), 0.0)
    assert requests(peers) == (0, 1)


def test_gateways_are_counted_once() -> None:
    """Two workers of a gateway are one gateway, until both are gone."""
    peers = Peers("own")
    for worker in (0, 1):
        peers.apply(update(1, 1, member=member_id("gw1", worker, "x")), float(worker))
    assert (peers.live_gateways, peers.live_members) == (1, 2)
    peers.advance(5.0)
    assert (peers.live_gateways, peers.live_members) == (1, 1)
    peers.advance(6.0)
    assert peers.live_gateways == 0


def test_a_snapshot_carries_each_row_with_its_sequence() -> None:
    """Applied after newer messages it changes nothing, before late ones it does not hide them."""
    peers = Peers()
    peers.apply(update(1, 1, 1, full=True), 0.0)
    peers.apply(update(3, a=3), 1.0)
    taken = peers.shares(2.0)
    assert [(one.sequence, one.full, one.lease_s) for one in taken] == [(1, True, 4.0), (3, False, 4.0)]

    other = Peers()
    for one in taken:
        other.apply(one, 0.0)
    assert other.totals == peers.totals
    other.apply(update(2, b=9), 0.0)
    assert requests(other) == (3, 9)
    other.apply(update(4, 6, 6), 0.0)
    for one in taken:
        other.apply(one, 0.0)
    assert requests(other) == (6, 6)


def test_a_share_without_full_update_is_partial() -> None:
    """A member that was never heard in full is passed on as it was heard."""
    assert share(ONE, 0, 1.0, [(4, Row(A, 1))]) == [Update(ONE, 4, (Row(A, 1),), False, 1.0)]
    assert share(ONE, 2, 1.0, []) == [Update(ONE, 2, (), True, 1.0)]
