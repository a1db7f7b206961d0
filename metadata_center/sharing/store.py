"""A store whose load and routing history are shared with other gateways, each member owning its share.

Rules:
    1. What is published of the own share is found by comparison, see `published.py`.
    2. A view is the sum of the own gateway's rows (exact) and of what others count, see `others.py`.
    3. Compare and set: a charge is made at once, like any other, and then put to the rendezvous. What
       awaits that answer is left out of published rows, because the rendezvous adds it itself. Without
       an answer in time the charge stays where it was made and is published as any other.
    4. A message that may not have been accepted is followed by a full one.
    5. Who waits is told at most once with each message, as it was last, and never with a reservation.
    6. A share has at most `MAX_ENDPOINTS` rows, as many as fit into a message: endpoints that are there go
       before those that left with requests still running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Final

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS, Counters
from metadata_center.load.kinds import Amounts, of_charge
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.sharing.lines import heard, told
from metadata_center.sharing.load import SharedLoad
from metadata_center.sharing.messages import (
    MAX_CANDIDATES,
    MAX_RESERVATIONS,
    MAX_SHARED_BLOCKS,
    RESPONSES_MARK,
    Candidate,
    Chain,
    Line,
    MemberId,
    MessageError,
    Reserved,
    Row,
    Update,
    gateway_of,
)
from metadata_center.sharing.others import Others
from metadata_center.sharing.peers import Peers
from metadata_center.sharing.published import Published
from metadata_center.sharing.tickets import Outgoing, Ticket
from metadata_center.store import PrefixStore
from metadata_center.types import EndpointKey, RequestId, Waiter

_DEFAULTS: Final = LedgerBounds()


def _hear_nobody(_member: MemberId, _line: list[Waiter]) -> None:
    """No request waits here, whoever waits elsewhere."""


HEARTBEATS_PER_LEASE: Final = 3
"""Two may be lost before a living member loses its share."""

MAX_WAITING: Final = 4_096
"""Reservations not yet sent or answered."""


def _ignore_news() -> None:
    """No request waits for news yet."""


def _ignore(_endpoint: EndpointKey, _chain: Sequence[int]) -> None:
    """No part asks where responses live."""


class SharedStore:
    """Load and prefixes of one member, and what it knows of the others. Costs no wait anywhere.

    Args:
        member: The name of this process.
        counters: Of this process, and of its siblings if they share memory.
        prefixes: What this gateway believes cached; what other gateways record is recorded here too.
        share_lease_s: Others drop this member's share after this long without a word; also how long
            theirs lasts when the rendezvous is gone. A third of it passes between two heartbeats.
        optimistic: See `Others`.
        bounds: Lifetimes and bounds of the ledger.
        on_responses: Called with where other gateways saw stored responses live; a chain that begins with
            `RESPONSES_MARK`.
        known: What is known of that here, for members, this one included, that may have missed it.
        on_line: Called with who waits at a member of another gateway, first in line first, nobody included.
    """

    def __init__(
        self,
        member: MemberId,
        counters: Counters,
        prefixes: PrefixStore,
        *,
        share_lease_s: float = 5.0,
        optimistic: bool = True,
        bounds: LedgerBounds = _DEFAULTS,
        on_responses: Callable[[EndpointKey, Sequence[int]], None] = _ignore,
        known: Callable[[], Mapping[EndpointKey, Sequence[int]]] = dict,
        on_line: Callable[[MemberId, list[Waiter]], None] = _hear_nobody,
    ) -> None:
        self.member = member
        self.prefixes = prefixes
        self._senders: list[Callable[[], None]] = []
        self.dropped_blocks = 0
        """Block hashes that found no room: to be sent, or in the index."""
        self.namesakes = 0
        """Messages of another process with this gateway name and worker number: its predecessor's last ones,
        or, if it goes on growing, another gateway of the same name, which neither counts."""
        self._on_responses = on_responses
        self._known = known
        self._on_line = on_line
        self._line: Sequence[Waiter] | None = None
        self.share_lease_s = share_lease_s
        self._own_gateway = f"{member.rpartition('/')[0]}/"
        self._counters = counters
        self._others = Others(gateway_of(member), counters, optimistic=optimistic)
        self.load = SharedLoad(LoadTable(counters, bounds), self._others, self._wake)
        self._published = Published(counters.capacity)
        self._sequence = 0
        self._full_s = -inf
        self._chains: list[Chain] = []
        self._num_blocks = 0
        self._waiting: dict[RequestId, Ticket] = {}
        counters.add_others(self._claimed)

    @property
    def peers(self) -> Peers:
        """Shares of other gateways' members."""
        return self._others.peers

    def listen(self, sender: Callable[[], None]) -> None:
        """Have `sender` called from now on when there may be something to send."""
        self._senders.append(sender)

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
        """Send other gateways what was just recorded in `prefixes`, as seen by this process itself."""
        chain = Chain.of(endpoint, blocks)
        if self._num_blocks + chain.num_blocks > MAX_SHARED_BLOCKS or len(self._chains) >= MAX_ENDPOINTS:
            self.dropped_blocks += chain.num_blocks
            return
        self._chains.append(chain)
        self._num_blocks += chain.num_blocks
        self._wake()

    def tell_line(self, line: Sequence[Waiter]) -> None:
        """Tell other gateways who waits in this process now, first in line first."""
        self._line = line
        self._wake()

    # What the other side of the transport says.

    def incoming(self, update: Update, now_s: float) -> None:
        """Take a message in, from any member and however late it is."""
        if update.member == self.member:
            self._others.heard(update.sequence)
            return
        if update.member.startswith(self._own_gateway):
            self.namesakes += 1
        members = self.peers.live_members
        if update.line is not None or update.leaving:
            self._hear_line(update, now_s)
        self._others.apply(update, now_s)
        if self.peers.live_members > members and self._informs(update.member):
            self._share_known()
        if update.blocks and gateway_of(update.member) != gateway_of(self.member):
            for chain in update.blocks:
                if chain.endpoint in self.load.retained:
                    self._record(chain)

    def snapshot(self, updates: Sequence[Update], now_s: float) -> None:
        """Catch up with what was missed; the next message sent is a full one."""
        for update in updates:
            self.incoming(update, now_s)
        self._share_known()
        self._full_s = now_s
        self._wake()

    def advance(self, now_s: float) -> None:
        """End shares and increments that are over by `now_s`; O(1) when none is."""
        self._others.advance(now_s)

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
            slot = self._counters.place(ticket.charge.endpoint)
            own[:, slot] -= of_charge(ticket.charge.prefill_tokens, ticket.charge.context_tokens)
        self._counters.leave_out(own, MAX_ENDPOINTS)
        tickets = tuple(self._waiting.values())[:MAX_RESERVATIONS]
        full = now_s >= self._full_s
        rows = self._published.all(own) if full else self._published.changed(own)
        if len(rows) > MAX_ENDPOINTS:  # many came and as many ended
            full, rows = True, self._published.all(own)
        blocks: tuple[Chain, ...] = ()
        line: tuple[Line, ...] | None = None
        if not tickets:
            blocks, self._chains, self._num_blocks = tuple(self._chains), [], 0
            if self._line is not None:
                line, self._line = told(self._line, now_s), None
        if not (full or rows or blocks or tickets or line is not None):
            return None
        if full:
            self._full_s = now_s + self.share_lease_s / HEARTBEATS_PER_LEASE
        return Outgoing(self._update(rows, full=full, blocks=blocks, line=line), tickets)

    def accepted(self, outgoing: Outgoing, reserved: Sequence[Reserved], now_s: float) -> None:
        """The rendezvous has it; each ticket's place in `reserved`, shape (tickets,)."""
        for ticket, given in zip(outgoing.tickets, reserved, strict=True):
            self._waiting.pop(ticket.charge.request_id, None)
            candidate = ticket.candidates[given.index]
            try:
                slot = self._counters.place(candidate.endpoint)
            except CapacityError:
                self._full_s = now_s  # the rendezvous has a charge that no comparison would find
                ticket.answer(None)
                continue
            self._published.add(slot, of_charge(candidate.prefill_tokens, candidate.context_tokens))
            if not ticket.answered and given.index:
                self.load.move(
                    ticket.charge.request_id,
                    candidate.endpoint,
                    now_s,
                    prefill_tokens=candidate.prefill_tokens,
                )
            ticket.answer(candidate.endpoint)
        if outgoing.tickets:
            self._wake()

    def failed(self, outgoing: Outgoing, now_s: float) -> None:
        """It is not known whether the rendezvous has it: say it all again; its tickets stay local."""
        self._full_s = now_s
        for ticket in outgoing.tickets:
            self._waiting.pop(ticket.charge.request_id, None)
            ticket.answer(None)
        self._wake()

    def tell_all(self, now_s: float) -> None:
        """The rendezvous has lost this member's share: the next message is a full one, and due."""
        self._full_s = now_s
        self._wake()

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
        self._wake()
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Wait no longer: the charge stays where it is. Published as such, or as corrected if it was sent."""
        ticket.on_answer = _ignore_news
        if not ticket.answered:
            ticket.answer(None)
            self._waiting.pop(ticket.charge.request_id, None)
            self._wake()

    # Inside.

    def _wake(self) -> None:
        for sender in self._senders:
            sender()

    def _share_known(self) -> None:
        for endpoint, chain in self._known().items():
            self.share(endpoint, chain)

    def _informs(self, newcomer: MemberId) -> bool:
        """One member sends a newcomer what all know: worker 0 of the first gateway by name but its own."""
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

    def _hear_line(self, update: Update, now_s: float) -> None:
        """Siblings tell each other by themselves, and an older message than the last is of no interest."""
        if (
            gateway_of(update.member) == gateway_of(self.member)
            or self.peers.newest(update.member) >= update.sequence
        ):
            return
        with suppress(MessageError):  # as good as none
            self._on_line(update.member, heard(update.line or (), now_s))

    def _update(
        self,
        rows: tuple[Row, ...],
        *,
        full: bool,
        blocks: tuple[Chain, ...],
        line: tuple[Line, ...] | None,
    ) -> Update:
        self._sequence += 1
        self._others.said(self._sequence)
        return Update(self.member, self._sequence, rows, full, self.share_lease_s, blocks, line=line)

    def _claimed(self, key: EndpointKey) -> Amounts:
        self._published.claimed(key, self._counters.place(key))
        return self._others.amounts(key)
