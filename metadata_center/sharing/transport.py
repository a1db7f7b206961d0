"""How messages travel between members: the contract of every transport.

Rules:
    1. All members, the sender included, receive the messages that were accepted, all in the same order:
       when a member hears itself, it has heard everything that was accepted before.
    2. Every wait may be cancelled, as by `asyncio.timeout`, at any point: the transport stays usable, and
       what was under way happened or did not. `sequence` makes saying it again harmless.
    3. A transport keeps no state of its own that its rendezvous does not have: after a fault it is used
       on as if nothing had been.
    4. A failure is a `TransportError`; its text never holds a password or a token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from metadata_center.errors import MetadataError
from metadata_center.sharing.messages import Reservation, Reserved, Update


class TransportError(MetadataError):
    """The rendezvous cannot be reached, refused, or answered what it never should."""


class Transport(Protocol):
    """A rendezvous of members."""

    @property
    def refused(self) -> int:
        """Messages and shares received that were none (`MessageError`), and skipped."""
        ...

    @property
    def had_share(self) -> bool:
        """False if at the last accepted update the rendezvous had nothing yet, or any more, of its member.

        Of a member that published within its lease it should have; True where that is not known.
        """
        ...

    async def publish(self, update: Update) -> None:
        """Write the member's share at the rendezvous and inform all subscribers.

        An update that is not newer than what the rendezvous has of an endpoint leaves that endpoint as
        it is. Returns once it is accepted.

        Raises:
            TransportError: It may not have been accepted.
        """
        ...

    async def reserve(self, update: Update, reservations: Sequence[Reservation]) -> list[Reserved]:
        """`publish(update)`, and give each of `reservations` a place, in order, in the same step.

        Each one is charged (one request, one prefill, its tokens) to the member's row of its first
        candidate whose total over all live members is not above what the member believed; if there is
        none, of the one that exceeds by the least, the earliest of several. What subscribers get has
        the rows as charged.

        Args:
            update: Rows without the reservations; it shares no blocks and does not leave.
            reservations: 1..`MAX_RESERVATIONS`.

        Returns:
            One place per reservation.

        Raises:
            TransportError: Some may have been given, none is known. The member's next update of these
                endpoints, whose rows are absolute, makes good whichever it was.
        """
        ...

    async def snapshot(self) -> list[Update]:
        """The shares of all live members, to be applied in this order.

        A member has one full update, and for endpoints it wrote later further ones, each with the sequence
        it was written with; `lease_s` is what is left of the lease.

        A share of another form is left out and counted in `refused`: one damaged key keeps no member out.

        Raises:
            TransportError: It cannot be read.
        """
        ...

    def subscribe(self) -> AbstractAsyncContextManager[AsyncIterator[Update]]:
        """All messages accepted after the context was entered.

        Entering and iterating raise `TransportError` when the subscription does not stand or was lost;
        messages may then have been missed. A subscriber too slow for its bounded buffer is cut off.
        """
        ...

    async def close(self) -> None:
        """Give up all connections."""
        ...


class DirectMessages(Protocol):
    """What one member sends to another alone, by the same rendezvous. Nothing is kept for who is away."""

    async def send_to(self, name: str, payload: bytes) -> bool:
        """Send to all that listen under a name; False if nobody does.

        Raises:
            TransportError: It may not have arrived.
        """
        ...

    def addressed_to(self, names: Iterable[str]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """All that is sent to these names from now on; see `Transport.subscribe`."""
        ...

    async def close(self) -> None:
        """Give up all connections."""
        ...
