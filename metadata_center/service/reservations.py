"""Places for requests, given at the rendezvous in the same step as they are charged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.load.kinds import of_charge
from metadata_center.sharing.messages import MAX_AMOUNT, Candidate, Reservation, Reserved, Row, Update
from metadata_center.sharing.peers import Peers
from metadata_center.types import EndpointKey


def reserve(
    peers: Peers,
    update: Update,
    reservations: Sequence[Reservation],
    others: Mapping[EndpointKey, int],
    now_s: float,
) -> tuple[list[Reserved], Update]:
    """Apply `update`, then charge each reservation to the member, in order, as `Transport.reserve` says.

    Args:
        peers: Shares of all members.
        update: Rows without the reservations.
        reservations: What is asked for.
        others: Requests per endpoint that are no member's and count all the same.
        now_s: Monotonic seconds.

    Returns:
        The places, and the update with its rows as charged.

    Raises:
        CapacityError: The member would have too many rows, or finds no room.
    """
    rows = {row.endpoint: row for row in update.rows}
    wanted = {candidate.endpoint for asked in reservations for candidate in asked.candidates}
    if len(rows.keys() | wanted) > MAX_ENDPOINTS:
        raise CapacityError(f"{MAX_ENDPOINTS} endpoints of one member are known")
    peers.apply(update, now_s)
    places = []
    for asked in reservations:
        place = _place(peers, asked.candidates, others)
        chosen = asked.candidates[place.index]
        added = of_charge(chosen.prefill_tokens, chosen.context_tokens)
        charged = peers.charge(update.member, chosen.endpoint, added, update.sequence)
        if charged is None:
            raise CapacityError("the member found no room, or has left")
        places.append(place)
        rows[chosen.endpoint] = Row(chosen.endpoint, *charged)
    published = Update(
        update.member, update.sequence, tuple(rows.values()), full=update.full, lease_s=update.lease_s
    )
    return places, published


def _place(peers: Peers, candidates: Sequence[Candidate], others: Mapping[EndpointKey, int]) -> Reserved:
    """The first candidate that has no more requests than believed, else the one with the fewest too many."""
    totals = [
        min(MAX_AMOUNT, peers.total(candidate.endpoint)[0] + others.get(candidate.endpoint, 0))
        for candidate in candidates
    ]
    excess = [
        max(0, total - candidate.believed_requests)
        for total, candidate in zip(totals, candidates, strict=True)
    ]
    return Reserved(excess.index(min(excess)), tuple(totals))
