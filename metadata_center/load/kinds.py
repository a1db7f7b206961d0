"""The kinds of load that are counted per endpoint: one table, from which everything else is derived.

Order matters: it is that of the counters' rows, of rows on the wire and of shares in Redis. A new kind goes
to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from operator import add, itemgetter, sub
from typing import Final


class Unit(StrEnum):
    """What is counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"


class Until(StrEnum):
    """When it is taken off."""

    PREFILLED = "prefilled"
    RELEASED = "released"


class Adds(StrEnum):
    """What a charge adds to it."""

    ONE = "one"
    PREFILL_TOKENS = "prefill_tokens"
    CONTEXT_TOKENS = "context_tokens"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class LoadKind:
    """One kind of load.

    Attributes:
        name: Of the field that holds it, in views, rows and shares.
        unit: What is counted.
        adds: What a charge adds; a kind that gets nothing by charges is set by refreshes.
        until: When what was added is taken off.
        meaning: One sentence.
    """

    name: str
    unit: Unit
    adds: Adds
    until: Until
    meaning: str


KINDS: Final = (
    LoadKind("requests", Unit.REQUESTS, Adds.ONE, Until.RELEASED, "In flight."),
    LoadKind(
        "prefill_requests",
        Unit.REQUESTS,
        Adds.ONE,
        Until.PREFILLED,
        "Of these, not yet known to be prefilled.",
    ),
    LoadKind(
        "prefill_tokens",
        Unit.TOKENS,
        Adds.PREFILL_TOKENS,
        Until.PREFILLED,
        "Charged and not yet known to be prefilled.",
    ),
    LoadKind(
        "context_tokens",
        Unit.TOKENS,
        Adds.CONTEXT_TOKENS,
        Until.RELEASED,
        "Prompt tokens of all in flight.",
    ),
    LoadKind(
        "generated_tokens",
        Unit.TOKENS,
        Adds.NOTHING,
        Until.RELEASED,
        "Generated so far by all in flight, as far as refreshes reported.",
    ),
)

NUM_KINDS: Final = len(KINDS)

NAMES: Final = tuple(kind.name for kind in KINDS)

Amounts = tuple[int, ...]
"""One number per kind, in the order of `KINDS`."""

NOTHING: Final[Amounts] = (0,) * NUM_KINDS


def of_charge(prefill_tokens: int, context_tokens: int, times: int = 1) -> Amounts:
    """What a charge adds, before any of it is taken off, `times` times."""
    return _added((times, times * prefill_tokens, times * context_tokens, 0))


def sum_of(one: Amounts, other: Amounts) -> Amounts:
    """Both together."""
    return tuple(map(add, one, other))


def difference(one: Amounts, other: Amounts) -> Amounts:
    """The first without the second."""
    return tuple(map(sub, one, other))


def replaced(whole: Amounts, before: Amounts, after: Amounts) -> Amounts:
    """A sum of which one part was `before` and is `after` now."""
    return tuple(map(add, whole, map(sub, after, before)))


def least(one: Amounts, other: Amounts) -> Amounts:
    """The smaller of each two."""
    return tuple(map(min, one, other))


def each(*, requests: int, tokens: int) -> Amounts:
    """One amount per unit, for every kind that is counted in it."""
    return tuple(requests if kind.unit is Unit.REQUESTS else tokens for kind in KINDS)


_ORDER: Final = (Adds.ONE, Adds.PREFILL_TOKENS, Adds.CONTEXT_TOKENS, Adds.NOTHING)
"""Of what `of_charge` picks from."""

_added: Final[Callable[[Amounts], Amounts]] = itemgetter(*(_ORDER.index(kind.adds) for kind in KINDS))
