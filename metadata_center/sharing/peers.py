"""The shares of members, and their sums.

Rules:
    1. A row applies if its sequence is newer than the last one of that member and endpoint, or than the
       member's last full update: late, repeated and disordered messages change nothing.
    2. A total is the sum over the rows of live members, kept up as rows come and go; rows are never
       negative, so neither is a total.
    3. A member is live from a message of its until `lease_s` without a newer one, or until it left. What
       it last said is remembered for `MEMORY_LEASES` more, so that a straggler does not revive it.
    4. Bounded: `max_members`, `MAX_ENDPOINTS` rows per member, `max_endpoints` totals. What does not fit
       is refused and counted; the member's next full update tries again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final

from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.load.kinds import NOTHING, NUM_KINDS, Amounts, least, replaced, sum_of
from metadata_center.sharing.messages import MAX_AMOUNT, MemberId, Row, Update, gateway_of
from metadata_center.types import EndpointKey

MAX_MEMBERS: Final = 1024
"""64 gateways of 16 workers."""

MAX_TOTALS: Final = 4 * MAX_ENDPOINTS
"""Gateways need not serve the same endpoints."""

_MOST: Final[Amounts] = (MAX_AMOUNT,) * NUM_KINDS

MEMORY_LEASES: Final = 12.0
"""A minute with leases of 5 s: far longer than any buffer on the way holds a message back."""


@dataclass(slots=True)
class _Member:
    """One member; `rows` holds sequence and amounts, and is empty unless it is live."""

    gateway: str
    lease_s: float
    until_s: float
    newest: int
    full: int = 0
    live: bool = True
    left: bool = False
    rows: dict[EndpointKey, tuple[int, Amounts]] = field(default_factory=dict)


class Peers:
    """Shares of members, in the order their messages come.

    Args:
        own_gateway: Its members are ignored: they share memory. None for a rendezvous, which has none.
        max_members: Bound, members that are no longer live included.
        max_endpoints: Bound on endpoints with load.
    """

    def __init__(
        self,
        own_gateway: str | None = None,
        *,
        max_members: int = MAX_MEMBERS,
        max_endpoints: int = MAX_TOTALS,
    ) -> None:
        self._own_gateway = own_gateway
        self._max_members = max_members
        self._max_endpoints = max_endpoints
        self._members: dict[MemberId, _Member] = {}
        self._gateways: Counter[str] = Counter()
        self._totals: dict[EndpointKey, Amounts] = {}
        self._check_s = inf  # nothing expires or is forgotten before
        self.live_members = 0
        self.refused = 0
        """Rows and members that found no room."""

    @property
    def live_gateways(self) -> int:
        """Gateways with a live member, the own one not counted."""
        return len(self._gateways)

    @property
    def gateways(self) -> frozenset[str]:
        """Names of gateways with a live member, the own one not counted."""
        return frozenset(self._gateways)

    @property
    def totals(self) -> Mapping[EndpointKey, Amounts]:
        """Sums over live members; an endpoint without load has none."""
        return self._totals

    def total(self, endpoint: EndpointKey) -> Amounts:
        """The sum over live members."""
        return self._totals.get(endpoint, NOTHING)

    def newest(self, member: MemberId) -> int:
        """Number of the newest message of a member, 0 if none was heard."""
        known = self._members.get(member)
        return 0 if known is None else known.newest

    def apply(self, update: Update, now_s: float) -> set[EndpointKey]:
        """Take what is new in an update.

        Args:
            update: From anybody.
            now_s: Monotonic seconds; the lease counts from here.

        Returns:
            Endpoints whose total changed.
        """
        gateway = gateway_of(update.member)
        if gateway == self._own_gateway:
            return set()
        member = self._members.get(update.member)
        if member is None:
            member = self._admit(update, gateway, now_s)
            if member is None:
                return set()
            if update.leaving:
                return self._end(member, update, now_s)
        elif update.sequence > member.newest:
            if member.left:
                return set()
            if update.leaving:
                return self._end(member, update, now_s)
            member.newest = update.sequence
            member.lease_s = max(member.lease_s, update.lease_s)  # a snapshot says what is left of it
            member.until_s = now_s + update.lease_s
            self._check_s = min(self._check_s, member.until_s)
            if not member.live:
                self._revive(member)
        elif not member.live:
            return set()
        changed = set()
        is_whole = update.full and update.sequence > member.full
        if is_whole:  # what is over makes room for what is new
            said = {row.endpoint for row in update.rows}
            for key in [
                key
                for key, (sequence, _) in member.rows.items()
                if sequence < update.sequence and key not in said
            ]:
                _, amounts = member.rows.pop(key)
                if self._change(key, amounts, NOTHING):
                    changed.add(key)
        for row in update.rows:
            if self._set(member, row, update.sequence):
                changed.add(row.endpoint)
        if is_whole:
            member.full = update.sequence
        return changed

    def charge(
        self, member_id: MemberId, endpoint: EndpointKey, amounts: Amounts, sequence: int
    ) -> Amounts | None:
        """Add to one row of a member, as of its message of that sequence.

        Returns:
            The row as it is now, no amount above `MAX_AMOUNT`; None if the member is not live, or there is no
            room for one more.
        """
        member = self._members.get(member_id)
        if member is None or not member.live or not self._has_room(member, endpoint):
            return None
        known, before = member.rows.get(endpoint, (0, NOTHING))
        after = least(_MOST, sum_of(before, amounts))
        member.rows[endpoint] = max(known, sequence), after
        self._change(endpoint, before, after)
        return after

    def advance(self, now_s: float) -> set[EndpointKey]:
        """End leases that are over by `now_s`; returns endpoints whose total changed. O(1) if none is."""
        if now_s < self._check_s:
            return set()
        changed: set[EndpointKey] = set()
        self._check_s = inf
        for name, member in list(self._members.items()):
            if member.live and member.until_s <= now_s:
                changed |= self._drop(member)
            if member.live:
                self._check_s = min(self._check_s, member.until_s)
                continue
            forget_s = member.until_s + MEMORY_LEASES * member.lease_s
            if forget_s <= now_s:
                del self._members[name]
            else:
                self._check_s = min(self._check_s, forget_s)
        return changed

    def shares(self, now_s: float) -> list[Update]:
        """All live shares, such that a `Peers` that applies them in order holds the same (a snapshot)."""
        self.advance(now_s)
        return [
            update
            for name, member in self._members.items()
            if member.live
            for update in share(
                name,
                member.full,
                member.until_s - now_s,
                [(sequence, Row(key, *amounts)) for key, (sequence, amounts) in member.rows.items()],
            )
        ]

    def _admit(self, update: Update, gateway: str, now_s: float) -> _Member | None:
        if len(self._members) >= self._max_members:
            dead = next((name for name, member in self._members.items() if not member.live), None)
            if dead is None:
                self.refused += 1
                return None
            del self._members[dead]
        member = _Member(gateway, update.lease_s, now_s + update.lease_s, update.sequence)
        self._members[update.member] = member
        self._revive(member)
        self._check_s = min(self._check_s, member.until_s)
        return member

    def _revive(self, member: _Member) -> None:
        member.live = True
        self.live_members += 1
        self._gateways[member.gateway] += 1

    def _end(self, member: _Member, update: Update, now_s: float) -> set[EndpointKey]:
        member.newest, member.left, member.until_s = update.sequence, True, now_s
        return self._drop(member) if member.live else set()

    def _drop(self, member: _Member) -> set[EndpointKey]:
        member.live = False
        member.full = member.newest  # what it said before it was dropped does not come back
        self.live_members -= 1
        self._gateways[member.gateway] -= 1
        if not self._gateways[member.gateway]:
            del self._gateways[member.gateway]
        changed = {key for key, (_, amounts) in member.rows.items() if self._change(key, amounts, NOTHING)}
        member.rows.clear()
        return changed

    def _set(self, member: _Member, row: Row, sequence: int) -> bool:
        known = member.rows.get(row.endpoint)
        before = NOTHING
        if known is not None:
            if known[0] >= sequence:
                return False
            before = known[1]
        elif member.full >= sequence or not self._has_room(member, row.endpoint):
            return False
        amounts = row.amounts
        member.rows[row.endpoint] = sequence, amounts
        return self._change(row.endpoint, before, amounts)

    def _has_room(self, member: _Member, endpoint: EndpointKey) -> bool:
        """Whether the member may have a row of this endpoint; counts that it may not."""
        if endpoint in member.rows or (
            len(member.rows) < MAX_ENDPOINTS
            and (endpoint in self._totals or len(self._totals) < self._max_endpoints)
        ):
            return True
        self.refused += 1
        return False

    def _change(self, key: EndpointKey, before: Amounts, after: Amounts) -> bool:
        if before == after:
            return False
        total = replaced(self._totals.get(key, NOTHING), before, after)
        if any(total):
            self._totals[key] = total
        else:
            self._totals.pop(key, None)
        return True


def share(member: MemberId, full: int, lease_s: float, rows: list[tuple[int, Row]]) -> list[Update]:
    """A member's share as updates, in the form that `Transport.snapshot` gives it.

    Args:
        member: Whose.
        full: Sequence of its last full update, 0 if it made none.
        lease_s: What is left of its lease, > 0.
        rows: Each with the sequence it was written with, none of them older than `full`.

    Returns:
        A full update if there was one, then what was written later, the newest last.
    """
    by_sequence: defaultdict[int, list[Row]] = defaultdict(list)
    if full:
        by_sequence[full] = []
    for sequence, row in rows:
        by_sequence[sequence].append(row)
    return [
        Update(member, sequence, tuple(by_sequence[sequence]), sequence == full, lease_s)
        for sequence in sorted(by_sequence)
    ]
