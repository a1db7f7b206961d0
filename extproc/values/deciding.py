"""What deciding about a request comes to: now, later or no."""

from __future__ import annotations

from typing import Generic, TypeVar

from extproc.errors import RouterError
from extproc.values.pending import Pending
from metadata_center.types import value

D_co = TypeVar("D_co", covariant=True)
D = TypeVar("D")


@value
class Now(Generic[D_co]):
    """It is decided, and charged."""

    decision: D_co


@value
class Later(Generic[D_co]):
    """It will be.

    Attributes:
        pending: Given the decision; or failed, with `RouterError` if the request cannot be served. Cancelled
            when the client leaves meanwhile: then nothing is charged any more.
        patience_s: It is there after this long at the latest; None if it comes before Envoy would ask.
    """

    pending: Pending[D_co]
    patience_s: float | None = None


@value
class Refusal:
    """The request cannot be served; nothing was charged."""

    error: RouterError


Deciding = Now[D] | Later[D] | Refusal


def settle(pending: Pending[D], deciding: Deciding[D]) -> None:
    """Let `pending` be what a step of it came to; of patience, that of the whole was given before."""
    match deciding:
        case Now(decision):
            pending.give(decision)
        case Later(later):
            pending.follow(later)
        case Refusal(error):
            pending.fail(error)
