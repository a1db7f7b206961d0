"""Members' shares at their rendezvous, which also gives requests their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.load.kinds import NOTHING, bounded, of_charge, sum_of
from metadata_center.sharing.messages import (
    MAX_AMOUNT,
    Reservation,
    Reserved,
    Row,
    Update,
)
from metadata_center.sharing.peers import Peers
from metadata_center.types import EndpointKey


class Shares(Peers):
    """`Peers` of a rendezvous: all members', none its own."""

    def reserve(
        self,
        update: Update,
        reservations: Sequence[Reservation],
        others: Mapping[EndpointKey, int],
        now_s: float,
    ) -> tuple[list[Reserved], Update]:
        """Apply `update`, then charge each reservation to the member, in order, as `Transport.reserve` says.

        Args:
            update: Rows without the reservations.
            reservations: What is asked for.
            others: Requests per endpoint that are no member's and count all the same.
            now_s: Monotonic seconds.

        Returns:
            The places, and the update with its rows as charged.

        Raises:
            CapacityError: The member would be told of with too many rows, or finds no room.
        """
        rows = {row.endpoint: row for row in update.rows}
        wanted = {candidate.endpoint for asked in reservations for candidate in asked.candidates}
        if len(rows.keys() | wanted) > MAX_ENDPOINTS:
            raise CapacityError(f"{MAX_ENDPOINTS} endpoints of one member are known")
        self.apply(update, now_s)
        member = self._members.get(update.member)
        if member is None or not member.live:
            raise CapacityError("the member found no room, or has left")
        places = []
        for asked in reservations:
            totals = [
                min(MAX_AMOUNT, self.total(candidate.endpoint)[0] + others.get(candidate.endpoint, 0))
                for candidate in asked.candidates
            ]
            excess = [
                max(0, total - candidate.believed_requests)
                for total, candidate in zip(totals, asked.candidates, strict=True)
            ]
            index = excess.index(min(excess))
            places.append(Reserved(index, tuple(totals)))
            chosen = asked.candidates[index]
            sequence, before = member.rows.get(chosen.endpoint, (0, NOTHING))
            added = of_charge(chosen.prefill_tokens, chosen.context_tokens)
            after = bounded(sum_of(before, added), requests=MAX_AMOUNT, tokens=MAX_AMOUNT)
            member.rows[chosen.endpoint] = max(sequence, update.sequence), after
            self._change(chosen.endpoint, before, after)
            rows[chosen.endpoint] = Row(chosen.endpoint, *after)
        told = Update(
            update.member, update.sequence, tuple(rows.values()), full=update.full, lease_s=update.lease_s
        )
        return places, told
