"""A store whose load and routing history are shared with other gateways, each member owning its share.

Rules:
    1. What is published of the own share is found by comparing the counters with what was last published:
       no path that charges or releases can be forgotten, and equal counters cost no message.
    2. A view is the sum of the own gateway's rows (exact), the shares of members of other gateways (as old
       as their last message), and the optimistic increment.
    3. Optimistic increment: other gateways place requests in the same moment by the same view and thus on
       the same endpoints. Until the own message that carries a charge comes back, by when everything
       accepted before it was heard, the charge counts once per live gateway (vLLM's data-parallel
       coordinator scales by its API servers in the same way). At most `OPTIMISM_S`: if no message comes
       back the transport is down, and then leases say who is alive.
    4. Compare and set: a charge is made at once, like any other, and then put to the rendezvous. What
       awaits that answer is left out of published rows, because the rendezvous adds it itself. Without
       an answer in time the charge stays where it was made and is published as any other.
    5. A message that may not have been accepted is followed by a full one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from metadata_center.errors import CapacityError
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import MAX_ENDPOINTS, NUM_KINDS, Counters, IntArray
from metadata_center.load.table import Expired, LoadTable
from metadata_center.sharing.messages import (
    MAX_CANDIDATES,
    MAX_RESERVATIONS,
    MAX_SHARED_BLOCKS,
    RESPONSES_MARK,
    Candidate,
    Chain,
    MemberId,
    Reservation,
    Reserved,
    Row,
    Update,
    gateway_of,
)
from metadata_center.sharing.peers import Amounts, Peers
from metadata_center.types import Charge, EndpointKey, RequestId

OPTIMISM_S: Final = 0.5
"""More than a round trip through a slow Redis (200 ms) and the pause between two messages."""

HEARTBEATS_PER_LEASE: Final = 3
"""Two may be lost before a living member loses its share."""

MAX_UNHEARD: Final = 65_536
"""Charges with an optimistic increment: 130,000 a second for `OPTIMISM_S`. Further ones get none."""

MAX_OTHERS_REQUESTS: Final = 1 << 24
"""Of all other gateways, at one endpoint: what 64 of them hold in all at their default bound. More is not
believed: a thousand members of which each may say 2**53 - 1 would not fit into the counters."""

MAX_OTHERS_TOKENS: Final = 1 << 44
"""As many requests of a million tokens."""

MAX_WAITING: Final = 4_096
"""Reservations not yet sent or answered."""


def _tell_nobody() -> None:
    """Nobody waits for news yet."""


def _ignore(_endpoint: EndpointKey, _chain: list[int]) -> None:
    """Nobody asks where responses live."""


class Ticket:
    """A charge that was put to the rendezvous.

    Attributes:
        charge: As it was made, on the first candidate.
        candidates: Where it may go.
        place: Where it is charged now; None while that is not known, and when nobody confirmed it.
        answered: Nothing more will come.
    """

    __slots__ = ("answered", "candidates", "charge", "on_answer", "place")

    def __init__(
        self, charge: Charge, candidates: tuple[Candidate, ...], on_answer: Callable[[], None]
    ) -> None:
        self.charge = charge
        self.candidates = candidates
        self.on_answer = on_answer
        self.place: EndpointKey | None = None
        self.answered = False

    def answer(self, place: EndpointKey | None) -> None:
        """The end of it, once."""
        if not self.answered:
            self.answered, self.place = True, place
            self.on_answer()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to be sent, and the charges it puts to the rendezvous."""

    update: Update
    tickets: tuple[Ticket, ...]

    def reservations(self) -> list[Reservation]:
        """As the transport takes them."""
        return [Reservation(ticket.candidates) for ticket in self.tickets]


class _SharedLoad(LoadTable):
    """A load table that says when something changed."""

    def __init__(
        self,
        counters: Counters,
        store: SharedStore,
        *,
        lease_s: float,
        tombstone_s: float,
        max_tombstones: int,
        max_requests: int,
    ) -> None:
        super().__init__(
            counters,
            lease_s=lease_s,
            tombstone_s=tombstone_s,
            max_tombstones=max_tombstones,
            max_requests=max_requests,
        )
        self._store = store

    def retain(self, keys: frozenset[EndpointKey]) -> None:
        super().retain(keys)
        self._store.retained = keys

    def charge(self, charge: Charge, now_s: float, prefill_due_s: float | None) -> bool:
        charged = super().charge(charge, now_s, prefill_due_s)
        if charged:
            self._store.charged(charge, now_s)
        return charged

    def move(
        self, request_id: RequestId, to: EndpointKey, now_s: float, *, prefill_tokens: int | None = None
    ) -> bool:
        moved = super().move(request_id, to, now_s, prefill_tokens=prefill_tokens)
        if moved:
            self._store.wake()
        return moved

    def refresh(self, request_id: RequestId, now_s: float, generated_tokens: int | None = None) -> bool:
        refreshed = super().refresh(request_id, now_s, generated_tokens)
        if refreshed and generated_tokens is not None:
            self._store.wake()
        return refreshed

    def release_prefill(self, request_id: RequestId) -> bool:
        released = super().release_prefill(request_id)
        if released:
            self._store.wake()
        return released

    def release(self, request_id: RequestId, now_s: float) -> Charge | None:
        released = super().release(request_id, now_s)
        if released is not None:
            self._store.wake()
        return released

    def advance(self, now_s: float) -> Expired:
        self._store.advance(now_s)
        expired = super().advance(now_s)
        if expired.requests or expired.prefills:
            self._store.wake()
        return expired


class SharedStore:
    """Load and prefixes of one member, and what it knows of the others. Costs no wait anywhere.

    Args:
        member: Who this process is.
        counters: Of this process, and of its siblings if they share memory; at most `MAX_ENDPOINTS` slots.
        prefixes: What this gateway believes cached; what other gateways record is recorded here too.
        share_lease_s: Others drop this member's share after this long without a word; also how long
            theirs lasts when the rendezvous is gone. A third of it passes between two heartbeats.
        optimistic: Rule 3; pointless where every charge is put to the rendezvous.
        lease_s: See `LoadTable`.
        tombstone_s: See `LoadTable`.
        max_tombstones: See `LoadTable`.
        max_requests: See `LoadTable`.
        on_responses: Told where other gateways saw stored responses live; a chain that begins with
            `RESPONSES_MARK`.
        told: What is known of that here, for somebody, this member included, who may have missed it.
    """

    def __init__(
        self,
        member: MemberId,
        counters: Counters,
        prefixes: PrefixIndex,
        *,
        share_lease_s: float = 5.0,
        optimistic: bool = True,
        lease_s: float = 180.0,
        tombstone_s: float = 60.0,
        max_tombstones: int = 100_000,
        max_requests: int = 200_000,
        on_responses: Callable[[EndpointKey, list[int]], None] = _ignore,
        told: Callable[[], Mapping[EndpointKey, Sequence[int]]] = dict,
    ) -> None:
        if counters.capacity > MAX_ENDPOINTS:
            raise ValueError(f"{counters.capacity} slots; a message has room for {MAX_ENDPOINTS}")
        self.member = member
        self.prefixes = prefixes
        self.peers = Peers(gateway_of(member))
        self.retained: frozenset[EndpointKey] = frozenset()
        self.wake: Callable[[], None] = _tell_nobody
        """Called when there may be something to send; replaced by who sends."""
        self.dropped_blocks = 0
        """Block hashes that found no room: to be sent, or in the index."""
        self.namesakes = 0
        """Messages of another process with this gateway name and worker number: its predecessor's last ones,
        or, if it goes on growing, another gateway of the same name, which neither counts."""
        self._on_responses = on_responses
        self._told = told
        self.share_lease_s = share_lease_s
        self._seat = f"{member.rpartition('/')[0]}/"
        self._counters = counters
        self._optimistic = optimistic
        self.load = _SharedLoad(
            counters,
            self,
            lease_s=lease_s,
            tombstone_s=tombstone_s,
            max_tombstones=max_tombstones,
            max_requests=max_requests,
        )
        self._sequence = 0
        self._sent: IntArray = np.zeros((NUM_KINDS, counters.capacity), np.int64)
        self._names: dict[int, EndpointKey] = {}
        self._gone: list[EndpointKey] = []
        self._full_s = -np.inf
        self._chains: list[Chain] = []
        self._num_blocks = 0
        self._ahead: dict[EndpointKey, Amounts] = {}
        self._unheard: deque[tuple[int, float, EndpointKey, Amounts]] = deque()
        self._waiting: dict[RequestId, Ticket] = {}
        counters.add_others(self._claimed)

    @property
    def live_gateways(self) -> int:
        """Gateways that are alive, this one included."""
        return 1 + self.peers.live_gateways

    @property
    def heartbeat_s(self) -> float:
        """When the next full message is due, on the clock of `now_s`."""
        return self._full_s

    @property
    def is_reserving(self) -> bool:
        """Some charge waits to be put to the rendezvous."""
        return bool(self._waiting)

    def share(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """Tell other gateways what was just recorded in `prefixes`, as seen by this process itself."""
        chain = Chain.of(endpoint, list(blocks))
        if self._num_blocks + chain.num_blocks > MAX_SHARED_BLOCKS or len(self._chains) >= MAX_ENDPOINTS:
            self.dropped_blocks += chain.num_blocks
            return
        self._chains.append(chain)
        self._num_blocks += chain.num_blocks
        self.wake()

    # What the other side of the transport says.

    def incoming(self, update: Update, now_s: float) -> None:
        """Take a message in, whoever sent it and however late it is."""
        if update.member == self.member:
            self._heard(update.sequence)
            return
        if update.member.startswith(self._seat):
            self.namesakes += 1
        members = self.peers.live_members
        for key in self.peers.apply(update, now_s):
            self._counters.set_others(key, self._others(key))
        if self.peers.live_members > members and self._tells(update.member):
            self._share_told()
        if update.blocks and gateway_of(update.member) != gateway_of(self.member):
            for chain in update.blocks:
                if chain.endpoint in self.retained:
                    self._record(chain)

    def snapshot(self, updates: Sequence[Update], now_s: float) -> None:
        """Catch up with what was missed; the next message sent is a full one."""
        for update in updates:
            self.incoming(update, now_s)
        self._share_told()
        self._full_s = now_s
        self.wake()

    def advance(self, now_s: float) -> None:
        """End shares and increments that are over by `now_s`; O(1) when none is."""
        for key in self.peers.advance(now_s):
            self._counters.set_others(key, self._others(key))
        while self._unheard and self._unheard[0][1] <= now_s:
            self._forget_ahead()

    # What this side says.

    def outgoing(self, now_s: float) -> Outgoing | None:
        """The next message; None when nothing changed and no heartbeat is due.

        It counts as accepted until `failed` says otherwise. The next one is made after `accepted` or
        `failed`, not before.
        """
        own = self._counters.own()
        for request_id, ticket in list(self._waiting.items()):
            if self.load.get(request_id) != ticket.charge:  # ended or served elsewhere before the answer
                del self._waiting[request_id]
                ticket.answer(None)
                continue
            slot = self._counters.slot(ticket.charge.endpoint)
            own[:, slot] -= (1, 1, ticket.charge.prefill_tokens, ticket.charge.context_tokens, 0)
        tickets = tuple(self._waiting.values())[:MAX_RESERVATIONS]
        full = now_s >= self._full_s
        rows = self._all(own) if full else self._changed(own)
        blocks: tuple[Chain, ...] = ()
        if not tickets:
            blocks, self._chains, self._num_blocks = tuple(self._chains), [], 0
        if not (full or rows or blocks or tickets):
            return None
        if full:
            self._full_s = now_s + self.share_lease_s / HEARTBEATS_PER_LEASE
        return Outgoing(self._update(rows, full=full, blocks=blocks), tickets)

    def accepted(self, outgoing: Outgoing, reserved: Sequence[Reserved], now_s: float) -> None:
        """The rendezvous has it; each ticket's place in `reserved`, shape (tickets,)."""
        for ticket, given in zip(outgoing.tickets, reserved, strict=True):
            self._waiting.pop(ticket.charge.request_id, None)
            candidate = ticket.candidates[given.index]
            try:
                slot = self._counters.slot(candidate.endpoint)
            except CapacityError:
                self._full_s = now_s  # the rendezvous has a charge that no comparison would find
                ticket.answer(None)
                continue
            self._sent[:, slot] += (1, 1, candidate.prefill_tokens, candidate.context_tokens, 0)
            if not ticket.answered and given.index:
                self.load.move(
                    ticket.charge.request_id,
                    candidate.endpoint,
                    now_s,
                    prefill_tokens=candidate.prefill_tokens,
                )
            ticket.answer(candidate.endpoint)
        if outgoing.tickets:
            self.wake()

    def failed(self, outgoing: Outgoing, now_s: float) -> None:
        """Nobody knows whether the rendezvous has it: say it all again; its tickets stay local."""
        self._full_s = now_s
        for ticket in outgoing.tickets:
            self._waiting.pop(ticket.charge.request_id, None)
            ticket.answer(None)
        self.wake()

    def leave(self) -> Update:
        """The last message: the share is void."""
        self._sequence += 1
        return Update(self.member, self._sequence, lease_s=self.share_lease_s, leaving=True)

    # Compare and set.

    def reserve(
        self, request_id: RequestId, candidates: Sequence[Candidate], on_answer: Callable[[], None]
    ) -> Ticket | None:
        """Put a charge just made to the rendezvous with the next message.

        Args:
            request_id: Charged on the first candidate, with that one's tokens.
            candidates: Best first; those after the first `MAX_CANDIDATES` are not asked about.
            on_answer: Called when `place` of the ticket is known or never will be.

        Returns:
            None if there is no such charge (it ended before) or too many wait.
        """
        charge = self.load.get(request_id)
        if charge is None or request_id in self._waiting or len(self._waiting) >= MAX_WAITING:
            return None
        ticket = Ticket(charge, tuple(candidates[:MAX_CANDIDATES]), on_answer)
        self._waiting[request_id] = ticket
        self.wake()
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Wait no longer: the charge stays where it is. Published as such, or as corrected if it was sent."""
        ticket.on_answer = _tell_nobody
        if not ticket.answered:
            ticket.answer(None)
            self._waiting.pop(ticket.charge.request_id, None)
            self.wake()

    # Inside.

    def charged(self, charge: Charge, now_s: float) -> None:
        """The load table charged this; for it alone."""
        others = self.peers.live_gateways
        if others and self._optimistic and len(self._unheard) < MAX_UNHEARD:
            key = charge.endpoint
            amounts = (others, others, others * charge.prefill_tokens, others * charge.context_tokens, 0)
            self._unheard.append((self._sequence + 1, now_s + OPTIMISM_S, key, amounts))
            ahead = self._ahead.get(key)
            self._ahead[key] = amounts if ahead is None else _sum(ahead, amounts)
            self._counters.set_others(key, self._others(key))
        self.wake()

    def _heard(self, sequence: int) -> None:
        while self._unheard and self._unheard[0][0] <= sequence:
            self._forget_ahead()

    def _forget_ahead(self) -> None:
        _, _, key, (a, b, c, d, _) = self._unheard.popleft()
        ahead = _sum(self._ahead[key], (-a, -b, -c, -d, 0))
        if ahead[0]:
            self._ahead[key] = ahead
        else:
            del self._ahead[key]
        self._counters.set_others(key, self._others(key))

    def _others(self, key: EndpointKey) -> Amounts:
        total = self.peers.total(key)
        ahead = self._ahead.get(key)
        a, b, c, d, e = total if ahead is None else _sum(total, ahead)
        requests, tokens = MAX_OTHERS_REQUESTS, MAX_OTHERS_TOKENS
        return min(a, requests), min(b, requests), min(c, tokens), min(d, tokens), min(e, tokens)

    def _share_told(self) -> None:
        for endpoint, chain in self._told().items():
            self.share(endpoint, chain)

    def _tells(self, newcomer: MemberId) -> bool:
        """One member tells a newcomer what all know: worker 0 of the first gateway by name but its own."""
        gateway, worker, _ = self.member.split("/")
        others = self.peers.gateways - {gateway_of(newcomer)}
        return worker == "0" and all(gateway < other for other in others)

    def _record(self, chain: Chain) -> None:
        blocks = chain.blocks()
        if blocks and blocks[0] == RESPONSES_MARK:
            self._on_responses(chain.endpoint, blocks)
            return
        try:
            self.prefixes.record(chain.endpoint, blocks)
        except CapacityError:
            self.dropped_blocks += chain.num_blocks

    def _update(self, rows: tuple[Row, ...], *, full: bool, blocks: tuple[Chain, ...]) -> Update:
        self._sequence += 1
        return Update(self.member, self._sequence, rows, full, self.share_lease_s, blocks)

    def _claimed(self, key: EndpointKey) -> Amounts:
        """An endpoint got a slot, perhaps one that was another's when something was last said of it."""
        slot = self._counters.slot(key)
        before = self._names.get(slot, key)
        if before != key and self._sent[:, slot].any():
            self._gone.append(before)
        self._names[slot] = key
        self._sent[:, slot] = 0
        return self._others(key)

    def _all(self, own: IntArray) -> tuple[Row, ...]:
        self._gone.clear()
        self._sent[:, : own.shape[1]] = own
        return self._rows(own, np.flatnonzero(own.any(axis=0)).tolist())

    def _changed(self, own: IntArray) -> tuple[Row, ...]:
        sent = self._sent[:, : own.shape[1]]
        rows = self._rows(own, np.flatnonzero((own != sent).any(axis=0)).tolist())
        sent[:] = own
        if not self._gone:
            return rows
        said = {row.endpoint for row in rows}
        gone = [key for key in dict.fromkeys(self._gone) if key not in said]
        self._gone.clear()
        return (*(Row(key) for key in gone), *rows)

    def _rows(self, own: IntArray, slots: list[int]) -> tuple[Row, ...]:
        return tuple(Row(self._names[slot], *own[:, slot].tolist()) for slot in slots)


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return (
        one[0] + other[0],
        one[1] + other[1],
        one[2] + other[2],
        one[3] + other[3],
        one[4] + other[4],
    )
