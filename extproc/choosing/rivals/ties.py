"""The least of several costs, equal ones drawn among: how nearly every rule ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from extproc.values.choices import Rng

T = TypeVar("T")


def draw(rng: Rng, options: Sequence[T]) -> T:
    """One of `options`, each as likely; draws only if there is a choice.

    Args:
        rng: Drawn from at most once.
        options: At least one.
    """
    return options[0] if len(options) == 1 else options[int(rng.random() * len(options))]


def least(costs: Sequence[float], rng: Rng, among: Iterable[int] | None = None) -> int:
    """The row of the least cost, ties broken uniformly at random.

    Args:
        costs: One per row, at least one.
        rng: Drawn from once if there is a tie.
        among: Rows to look at, at least one; all if None.
    """
    rows = range(len(costs)) if among is None else tuple(among)
    lowest = min(costs[row] for row in rows)
    return draw(rng, [row for row in rows if costs[row] == lowest])
