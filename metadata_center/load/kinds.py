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
        meaning: One sentence, of one endpoint.
        aigw: Its name in AIGW's API.
        metric: Its series in a gateway, which also shows it by `name` in the admin JSON; empty if it is shown
            in neither.
    """

    name: str
    unit: Unit
    adds: Adds
    until: Until
    meaning: str
    aigw: str
    metric: str = ""


KINDS: Final = (
    LoadKind(
        "requests",
        Unit.REQUESTS,
        Adds.ONE,
        Until.RELEASED,
        "Requests charged to the endpoint now.",
        aigw="queued_req_num",
        metric="tokenway_requests_in_flight",
    ),
    LoadKind(
        "prefill_requests",
        Unit.REQUESTS,
        Adds.ONE,
        Until.PREFILLED,
        "Requests charged to the endpoint and not yet known to be prefilled.",
        aigw="prefill_req_num",
    ),
    LoadKind(
        "prefill_tokens",
        Unit.TOKENS,
        Adds.PREFILL_TOKENS,
        Until.PREFILLED,
        "Uncached prompt tokens charged to the endpoint and not yet known to be prefilled.",
        aigw="prefill_tokens",
        metric="tokenway_prefill_tokens_pending",
    ),
    LoadKind(
        "context_tokens",
        Unit.TOKENS,
        Adds.CONTEXT_TOKENS,
        Until.RELEASED,
        "Prompt tokens of the requests in flight at the endpoint.",
        aigw="input_tokens",
        metric="tokenway_context_tokens",
    ),
    LoadKind(
        "generated_tokens",
        Unit.TOKENS,
        Adds.NOTHING,
        Until.RELEASED,
        "Tokens generated so far by the requests in flight, as far as refreshes reported.",
        aigw="generated_tokens",
    ),
)

NUM_KINDS: Final = len(KINDS)

NAMES: Final = tuple(kind.name for kind in KINDS)

PREFILL_REQUESTS: Final = NAMES.index("prefill_requests")
PREFILL_TOKENS: Final = NAMES.index("prefill_tokens")
"""Where an `Amounts` has them."""

Amounts = tuple[int, ...]
"""One number per kind, in the order of `KINDS`."""

NOTHING: Final[Amounts] = (0,) * NUM_KINDS


def of_charge(prefill_tokens: int, context_tokens: int, times: int = 1) -> Amounts:
    """What a charge adds, before any of it is taken off, `times` times."""
    return _added((times, times * prefill_tokens, times * context_tokens, 0))


def of_leg(
    prefill_tokens: int, context_tokens: int, generated_tokens: int, *, prefill_held: bool = True
) -> Amounts:
    """What a leg counts for now, refreshes included; `prefill_held` until its prefill is taken off."""
    amounts = _added((1, prefill_tokens, context_tokens, generated_tokens))
    return amounts if prefill_held else difference(amounts, of_prefill(amounts))


def of_prefill(amounts: Amounts) -> Amounts:
    """The part of a leg's amounts that ends with its prefill."""
    return tuple(
        amount if kind.until is Until.PREFILLED else 0 for kind, amount in zip(KINDS, amounts, strict=True)
    )


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
"""Of what `of_charge` and `of_leg` pick from."""

_added: Final[Callable[[Amounts], Amounts]] = itemgetter(*(_ORDER.index(kind.adds) for kind in KINDS))
