"""Charges that are put to the rendezvous: compare and set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metadata_center.sharing.messages import Candidate, Reservation, Update
from metadata_center.types import Charge, EndpointKey


class Ticket:
    """A charge that was put to the rendezvous.

    Attributes:
        charge: As it was made, on the first candidate.
        candidates: Where it may go.
        place: Where it is charged now; None while that is not known, and when it was not confirmed.
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
