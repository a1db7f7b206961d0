"""Rules that let requests wait, compared with each other.

Rules:
    1. A row is a workload at one speed. Its means are over the seeds that all rules of the row have: a speed
       at which those that wait ran on fewer seeds does not shorten the other rows.
    2. Ratios are the product's own figure over the rival's. What is worse for the product is bold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.policies.cells import EXTRA, IMMEDIATE, LATE, LATE_GROUPS, STRONG, WORKLOADS, Workload, cells
from benchmarks.policies.figures import (
    GOODPUT,
    JUDGED,
    P90,
    P99,
    TPOT,
    Column,
    Figures,
    Row,
    at_once_names,
    best,
    means,
    of_workload,
    rival_names,
    rivals_at,
    shared_seeds,
    shown,
    table,
)

OWN_LATE: Final = "late_completion"

_AT_ONCE: Final = frozenset((*STRONG, *IMMEDIATE))
"""Of those that decide at once, who are asked for all seeds."""

_SHED: Final = Column("shed_ratio", "refused %", 1e2)

_HUNDREDTH: Final = 0.005
"""Ratios are shown to the hundredth; less than half of one is no difference."""


@dataclass(frozen=True, slots=True)
class _At:
    """One row's figures.

    Attributes:
        workload: Which.
        speed: Factor on the trace's own.
        own: Of `OWN_LATE`.
        late: Of rivals that wait, by name.
        at_once: Of rivals that decide at once, by name.
        seeds: Of all of them.
    """

    workload: Workload
    speed: float
    own: Figures
    late: Mapping[str, Figures]
    at_once: Mapping[str, Figures]
    seeds: str


def late_binding(rows: Sequence[Row]) -> list[str]:
    """Rules that let requests wait, beside each other and beside those that decide at once."""
    found = list(_rows(rows))
    if not found:
        return []
    return ["## Late binding beside late binding", _not_run(rows), *_best(found), *_each(found)]


def _rows(rows: Sequence[Row]) -> Iterator[_At]:
    """Every row in which the product's own late binding and a rival's ran."""
    for workload in (*WORKLOADS, *EXTRA):
        for speed in workload.speeds:
            of_row = [row for row in of_workload(rows, workload) if row.speed == speed]
            ran = {row.policy for row in of_row}
            if not ran & set(LATE) or OWN_LATE not in ran:
                continue
            seeds = shared_seeds(of_row, [*(ran & {*LATE, *_AT_ONCE}), OWN_LATE])
            found = means(of_row, seeds)
            against = rivals_at(found, speed, rival_names(of_row))
            late: dict[str, Figures] = {policy: against[policy] for policy in LATE if policy in against}
            at_once = rivals_at(found, speed, at_once_names(of_row))
            if late:
                of_seeds = ", ".join(map(str, sorted(seeds)))
                yield _At(workload, speed, found[speed, OWN_LATE], late, at_once, of_seeds)


def _best(found: Sequence[_At]) -> Iterator[str]:
    """A table for each column: own figure, the best that waits and the best that decides at once."""
    titles = ["workload", "speed", f"`{OWN_LATE}`", "best that waits", "which", "ratio"]
    titles += ["best that decides at once", "which", "ratio", "seeds"]
    for column in (P90, P99, TPOT, GOODPUT):
        lines = []
        for at in found:
            value = at.own[column.field]
            line = [at.workload.title, f"×{at.speed:g}", shown(value, column)]
            for top in (best(at.late, column), best(at.at_once, column)):
                ratio = None if top is None else column.ratio(value, top[1])
                line += ["–", "–"] if top is None else [shown(top[1], column), f"`{top[0]}`"]
                line.append("–" if ratio is None else f"{ratio:.2f}")
            lines.append([*line, at.seeds])
        yield f"### {column.title}: those that wait"
        yield table(titles, lines)


def _each(found: Sequence[_At]) -> Iterator[str]:
    """Every rival that waits in every row, with the ratio of the product's own figure to its."""
    lines = []
    for at in found:
        own = [shown(at.own[column.field], column) for column in (*JUDGED, _SHED)]
        lines.append([f"**{at.workload.title}, ×{at.speed:g}**", f"`{OWN_LATE}`", *own, at.seeds])
        for policy, figures in at.late.items():
            line = ["", f"`{policy}`"]
            line += [_against(at.own[column.field], figures[column.field], column) for column in JUDGED]
            lines.append([*line, shown(figures[_SHED.field], _SHED), ""])
    yield "### Every rival that waits, in every row"
    yield (
        "In brackets the product's own figure over the rival's; **bold** is what is worse for the product."
        " Percentiles are of what was answered."
    )
    yield table(["workload", "policy", *(column.title for column in (*JUDGED, _SHED)), "seeds"], lines)


def _against(own: float | None, rival: float | None, column: Column) -> str:
    ratio = column.ratio(own, rival)
    if ratio is None:
        return shown(rival, column)
    worse = ratio <= 1.0 - _HUNDREDTH if column.more_is_better else ratio >= 1.0 + _HUNDREDTH
    return f"{shown(rival, column)} ({f'**{ratio:.2f}**' if worse else f'{ratio:.2f}'})"


def _not_run(rows: Sequence[Row]) -> str:
    """Which rows the rivals that wait were not run on."""
    ran = {row.cell.name for row in rows if row.cell.group in LATE_GROUPS}
    titles = {workload.name: workload.title for workload in (*WORKLOADS, *EXTRA)}
    open_seeds: dict[tuple[str, float], list[str]] = {}
    for cell in cells():
        if cell.group in LATE_GROUPS and cell.name not in ran:
            for speed in cell.speeds:
                open_seeds.setdefault((titles[cell.workload], speed), []).append(str(cell.seed))
    text = (
        "Ratios are those of the product's own rule to the best of either kind, on the seeds that all have."
    )
    if not open_seeds:
        return text
    missing = "; ".join(
        f"{title} ×{speed:g} (seed {', '.join(seeds)})" for (title, speed), seeds in open_seeds.items()
    )
    return f"{text} Rivals that wait were not run on: {missing}."
