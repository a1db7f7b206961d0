"""What the product's rules are to reach, and in which rows they do.

A row is a workload at one speed. A figure is the rule's own over that of the row's best rival that decides at
once, of geometric means over seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.policies.cells import OWN, WORKLOADS
from benchmarks.policies.figures import (
    GOODPUT,
    P90,
    P99,
    TPOT,
    Column,
    Row,
    at_once_names,
    best,
    compared_seeds,
    means,
    of_workload,
    ratios,
    rivals_at,
    table,
)

_IMMEDIATE, _HELD = OWN[1:]

_HUNDREDTH: Final = 0.005
"""Ratios are shown to the hundredth, and reach an aim that they are shown to reach."""


@dataclass(frozen=True, slots=True)
class Aim:
    """One figure of one rule.

    Attributes:
        policy: The rule.
        column: The figure.
        positions: Of the speed: 0 below the knee, 1 at it, 2 past it.
        ratio: At most so much of the best rival's; at least, where more is better.
    """

    policy: str
    column: Column
    positions: tuple[int, ...]
    ratio: float

    @property
    def bound(self) -> str:
        """As tables have it."""
        return f"{'≥' if self.column.more_is_better else '≤'} {self.ratio:g}"

    def is_reached(self, ratio: float) -> bool:
        """Whether a row's ratio is within the aim."""
        if self.column.more_is_better:
            return ratio > self.ratio - _HUNDREDTH
        return ratio < self.ratio + _HUNDREDTH


_PLACES: Final = {(0, 1): "below and at the knee", (2,): "past the knee", (0, 1, 2): "everywhere"}

AIMS: Final = (
    Aim(_IMMEDIATE, P90, (0, 1), 1.0),
    Aim(_IMMEDIATE, P90, (2,), 0.95),
    Aim(_IMMEDIATE, P99, (0, 1, 2), 1.05),
    Aim(_IMMEDIATE, GOODPUT, (0, 1, 2), 1.0),
    Aim(_IMMEDIATE, TPOT, (0, 1, 2), 1.05),
    Aim(_HELD, P90, (0, 1), 0.95),
    Aim(_HELD, P90, (2,), 0.5),
    Aim(_HELD, P99, (0, 1, 2), 1.0),
    Aim(_HELD, GOODPUT, (0, 1), 1.0),
    Aim(_HELD, GOODPUT, (2,), 1.15),
    Aim(_HELD, TPOT, (0, 1, 2), 1.05),
)


def aims(rows: Sequence[Row]) -> list[str]:
    """Each aim, in how many rows it is reached, and the others, worst first; nothing if nothing ran.

    Args:
        rows: Runs of the comparison.
    """
    found: dict[tuple[str, str, int], list[tuple[float, str]]] = {}
    for workload in WORKLOADS:
        own = of_workload(rows, workload)
        seeds = compared_seeds(own)
        most = _most_goodput(own, seeds)
        for (policy, field, speed), ratio in ratios(own, workload, seeds).items():
            of_place = found.setdefault((policy, field, workload.speeds.index(speed)), [])
            bound = f" (of {most[speed]:.2f})" if field == GOODPUT.field and speed in most else ""
            of_place.append((ratio, f"{workload.name} ×{speed:g}{bound}"))
    lines = [_line(aim, [each for at in aim.positions for each in _of(aim, found, at)]) for aim in AIMS]
    if not found:
        return []
    return [
        "## Aims",
        "Own figure over that of the row's best rival of those that decide at once, geometric means over"
        " seeds. A row misses an aim whatever its scatter. In brackets what goodput would be over the best"
        " rival's if the most that any rule was offered were all good.",
        table(["policy", "figure", "speed", "aim", "rows that reach it", "the others, worst first"], lines),
    ]


def _most_goodput(rows: Sequence[Row], seeds: Collection[int]) -> dict[float, float]:
    """The most that any rule was offered over the goodput of the best rival that decides at once, by speed.

    Rules are offered alike, but where a turn of a session comes only after the answer to the last one.
    """
    found, rivals = means(rows, seeds), at_once_names(rows)
    offered: dict[float, float] = {}
    for (speed, _), figures in found.items():
        offered[speed] = max(offered.get(speed, 0.0), figures["offered_rps"] or 0.0)
    tops = {speed: best(rivals_at(found, speed, rivals), GOODPUT) for speed in offered}
    return {speed: offered[speed] / top[1] for speed, top in tops.items() if top is not None and top[1] > 0.0}


def _of(
    aim: Aim, found: dict[tuple[str, str, int], list[tuple[float, str]]], at: int
) -> list[tuple[float, str]]:
    return found.get((aim.policy, aim.column.field, at), [])


def _line(aim: Aim, ratios_of_rows: Sequence[tuple[float, str]]) -> list[str]:
    missed = [each for each in ratios_of_rows if not aim.is_reached(each[0])]
    missed.sort(reverse=not aim.column.more_is_better)
    return [
        f"`{aim.policy}`",
        aim.column.title,
        _PLACES[aim.positions],
        aim.bound,
        f"{len(ratios_of_rows) - len(missed)} of {len(ratios_of_rows)}",
        ", ".join(f"{row} {ratio:.2f}" for ratio, row in missed) or "–",
    ]
