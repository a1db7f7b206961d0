"""Figures of stored cells as rows, means over seeds, and the compact document that is kept.

Rules:
    1. Means are over seeds that all compared policies have: a policy with fewer is not in them. They are
       geometric: the knee moves with the seed, and in a sum the one seed that is overloaded would be all.
    2. The best rival is the best of each column by itself: no rule is the best of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Final

from benchmarks.policies.cells import LATE, OWN, STRONG, WORKLOADS, Cell, CellKind, Workload

Figures = Mapping[str, float | None]

KEPT: Final = (
    *("requests", "offered_rps", "goodput_rps", "good_ratio", "shed_ratio"),
    *("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "e2e_mean_s"),
    *("hit_ratio", "wasted_ratio", "load_spread", "held_ratio", "hold_mean_s", "hold_max_s", "preemptions"),
    *("available_ratio", "foreseen_ratio", "abandoned_ratio", "retried_ratio"),
)
"""Fields of the replay's summary that are kept, in the order of the document's columns. A run that is older
than a field has None there."""

_DIGITS: Final = 4
"""Significant digits kept: a tenth of the smallest difference that means anything."""


@dataclass(frozen=True, slots=True)
class Column:
    """A figure that policies are judged by.

    Attributes:
        field: Of the summary.
        title: In tables.
        scale: Factor for display.
        more_is_better: True for goodput.
    """

    field: str
    title: str
    scale: float = 1.0
    more_is_better: bool = False

    def ratio(self, value: float | None, best: float | None) -> float | None:
        """`value` over `best`; None where either is missing or the best is zero."""
        return value / best if value is not None and best else None

    def worst(self, ratios: Iterable[float]) -> float:
        """The least favourable of some ratios, at least one."""
        return min(ratios) if self.more_is_better else max(ratios)


P90: Final = Column("ttft_p90_s", "TTFT p90 s")

P99: Final = Column("ttft_p99_s", "TTFT p99 s")

GOODPUT: Final = Column("goodput_rps", "goodput requests/s", more_is_better=True)

TPOT: Final = Column("tpot_mean_s", "TPOT mean ms", 1e3)

JUDGED: Final = (
    Column("ttft_mean_s", "TTFT mean s"),
    Column("ttft_p50_s", "TTFT p50 s"),
    *(P90, P99),
    TPOT,
    GOODPUT,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        cell: Where it is from.
        policy: As it was asked for.
        speed: Factor on the trace's own.
        figures: By name, those of `KEPT`.
    """

    cell: Cell
    policy: str
    speed: float
    figures: Figures


def rows_of(cell: Cell, document: Mapping[str, Any]) -> list[Row]:
    """The runs of a replay's document."""
    return [
        Row(cell, run["policy"], run["speed"], {name: run.get(name) for name in KEPT})
        for run in document["runs"]
    ]


def shared_seeds(rows: Sequence[Row], policies: Collection[str]) -> frozenset[int]:
    """Seeds on which all of `policies` ran."""
    seeds = [{row.cell.seed for row in rows if row.policy == policy} for policy in policies]
    return frozenset(set.intersection(*seeds)) if seeds else frozenset()


def means(rows: Sequence[Row], seeds: Collection[int]) -> dict[tuple[float, str], Figures]:
    """Geometric means over seeds by (speed, policy); only of policies that ran on all of them."""
    groups: dict[tuple[float, str], dict[int, Figures]] = {}
    for row in rows:
        if row.cell.seed in seeds:
            groups.setdefault((row.speed, row.policy), {})[row.cell.seed] = row.figures
    return {
        key: {name: _mean([figures[name] for figures in by_seed.values()]) for name in KEPT}
        for key, by_seed in groups.items()
        if by_seed.keys() == set(seeds)
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Geometric; 0 if one value is, None if one is missing: that seed cannot be left out for one policy."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return geometric_mean(known) if min(known) > 0.0 else 0.0


def best(of: Mapping[str, Figures], column: Column) -> tuple[str, float] | None:
    """The best policy of a column and its figure; None if no policy has one."""
    known = [(value, name) for name, each in of.items() if (value := each[column.field]) is not None]
    if not known:
        return None
    value, name = max(known) if column.more_is_better else min(known)
    return name, value


def rivals_at(
    found: Mapping[tuple[float, str], Figures], speed: float, rivals: Collection[str]
) -> dict[str, Figures]:
    """The figures of rivals at one speed, by name."""
    return {policy: figures for (at, policy), figures in found.items() if at == speed and policy in rivals}


def compact(stored: Sequence[tuple[Cell, str, float, Sequence[Row]]]) -> dict[str, Any]:
    """The document that is kept: every run, its figures to four digits.

    Args:
        stored: Cells with their stamp, the processor seconds they took and their runs.
    """
    return {
        "columns": ["policy", "speed", *KEPT],
        "cells": [
            {
                "name": cell.name,
                "kind": str(cell.kind),
                "line": " ".join(cell.argv),
                "stamp": stamp,
                "cpu_s": round(cpu_s, 1),
                "rows": [
                    [row.policy, row.speed, *(_short(row.figures[name]) for name in KEPT)] for row in rows
                ],
            }
            for cell, stamp, cpu_s, rows in stored
        ],
    }


def kept(document: Mapping[str, Any], cell: Cell) -> tuple[str, float, list[Row]] | None:
    """Stamp, processor seconds and runs of a cell in the document that `compact` made.

    Returns:
        None if the cell is not there, or ran with another command line.
    """
    names = document["columns"][2:]
    for found in document["cells"]:
        if found["name"] == cell.name and found["line"] == " ".join(cell.argv):
            rows = [
                Row(cell, policy, speed, dict.fromkeys(KEPT) | dict(zip(names, figures, strict=True)))
                for policy, speed, *figures in found["rows"]
            ]
            return found["stamp"], found["cpu_s"], rows
    return None


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() else short


def of_workload(rows: Sequence[Row], workload: Workload) -> list[Row]:
    """The runs of one workload."""
    return [row for row in rows if row.cell.workload == workload.name]


def rival_names(rows: Sequence[Row]) -> set[str]:
    """Rivals among the policies that ran."""
    return {row.policy for row in rows if row.cell.kind is CellKind.RIVALS}


def at_once_names(rows: Sequence[Row]) -> set[str]:
    """Those of them that decide at once: rules that let requests wait are compared in tables of their own."""
    return rival_names(rows).difference(LATE)


def shown(value: float | None, column: Column) -> str:
    """A figure of a column as tables have it."""
    return "–" if value is None else f"{value * column.scale:.3g}"


def beside_best(value: float | None, best_value: float, column: Column) -> str:
    """A figure as tables have it, and in brackets its ratio to the best rival's."""
    ratio = column.ratio(value, best_value)
    return shown(value, column) + ("" if ratio is None else f" ({ratio:.2f})")


def is_compared(cell: Cell) -> bool:
    """True for cells of the comparison itself, false for questions beside it."""
    beside = cell.kind is CellKind.WHOLE or cell.group.startswith(("shipped", "held", "known-"))
    return not beside and any(cell.workload == workload.name for workload in WORKLOADS)


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def compared_seeds(rows: Sequence[Row]) -> frozenset[int]:
    """Seeds of the strong rivals and, as far as they ran at all, of the product's own rules."""
    ran = {row.policy for row in rows}
    return shared_seeds(rows, [policy for policy in (*STRONG, *OWN) if policy in ran])


def ratios(
    rows: Sequence[Row], workload: Workload, seeds: Iterable[int], policies: Sequence[str] = OWN
) -> dict[tuple[str, str, float], float]:
    """Own figure over that of the column's best rival that decides at once, of means over `seeds`.

    Returns:
        Ratios by (policy, field, speed).
    """
    chosen = frozenset(seeds)
    found = means(rows, chosen)
    rivals = at_once_names(rows)
    result: dict[tuple[str, str, float], float] = {}
    for speed in workload.speeds:
        against = rivals_at(found, speed, rivals)
        for column in JUDGED:
            top = best(against, column)
            for policy in policies:
                figures = found.get((speed, policy))
                if top is None or figures is None:
                    continue
                ratio = column.ratio(figures[column.field], top[1])
                if ratio is not None:
                    result[policy, column.field, speed] = ratio
    return result
