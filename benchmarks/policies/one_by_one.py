"""The product's rules beside one rival at a time: the question of somebody who has to pick one rule.

A row of the comparison is a workload at one speed. `aims` compares with the best rival of a figure, another
one in each column; a rule that anybody can run is one of them, in all rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Final

from benchmarks.policies.cells import OWN, WORKLOADS
from benchmarks.policies.figures import (
    JUDGED,
    Column,
    Figures,
    Row,
    at_once_names,
    compared_seeds,
    means,
    of_workload,
    rivals_at,
    table,
)

AHEAD: Final = 0.05
"""Less is noise (docs/benchmarks.md)."""

_OWN: Final = OWN[1:]


def one_by_one(rows: Sequence[Row]) -> list[str]:
    """Each rival that decides at once, over all rows that it ran in; nothing if nothing ran.

    Args:
        rows: Runs of the comparison.
    """
    found: dict[str, list[tuple[Mapping[str, Figures], Figures]]] = {}
    for workload in WORKLOADS:
        of_it = of_workload(rows, workload)
        by_policy = means(of_it, compared_seeds(of_it))
        for speed in workload.speeds:
            own = rivals_at(by_policy, speed, _OWN)
            if len(own) == len(_OWN):
                for rival, figures in rivals_at(by_policy, speed, at_once_names(of_it)).items():
                    found.setdefault(rival, []).append((own, figures))
    if not found:
        return []
    lines = [
        (_mean(pairs, _OWN[-1], JUDGED[0]), rival, policy, pairs)
        for rival, pairs in found.items()
        for policy in _OWN
    ]
    lines.sort(key=lambda line: (-line[0], line[1], line[2]))
    titles = ["rival", "own rule", "rows", *(column.title for column in JUDGED)]
    titles += ["ahead in all", "behind in all"]
    return [
        "## One rival at a time",
        "Own figure over the rival's, geometric mean over the rows that the rival ran in on all seeds; in"
        f" brackets in how many of them the rival is ahead by {AHEAD:.0%} or more. Below 1 is better, for"
        " goodput above 1. *Ahead in all*: rows in which no own figure is better than the rival's; *behind in"
        " all*: in which no figure of the rival is better than our own. Nearest in the mean first.",
        table(titles, [_line(rival, policy, pairs) for _, rival, policy, pairs in lines]),
    ]


def _line(rival: str, policy: str, pairs: Sequence[tuple[Mapping[str, Figures], Figures]]) -> list[str]:
    cells = [f"`{rival}`", f"`{policy}`", str(len(pairs))]
    for column in JUDGED:
        ahead = sum(_is_ahead(ratio, column) for ratio in _ratios(pairs, policy, column))
        cells.append(f"{_mean(pairs, policy, column):.2f} ({ahead})")
    for is_rivals in (True, False):
        rows = sum(_is_ahead_in_all(own[policy], figures, is_rivals) for own, figures in pairs)
        cells.append(str(rows))
    return cells


def _ratios(
    pairs: Sequence[tuple[Mapping[str, Figures], Figures]], policy: str, column: Column
) -> list[float]:
    found = (column.ratio(own[policy][column.field], figures[column.field]) for own, figures in pairs)
    return [ratio for ratio in found if ratio is not None]


def _mean(pairs: Sequence[tuple[Mapping[str, Figures], Figures]], policy: str, column: Column) -> float:
    return geometric_mean(_ratios(pairs, policy, column))


def _is_ahead(ratio: float, column: Column) -> bool:
    return ratio <= 1.0 - AHEAD if column.more_is_better else ratio >= 1.0 + AHEAD


def _is_ahead_in_all(own: Figures, rival: Figures, is_rivals: bool) -> bool:
    """Whether no figure of the other side is better: the side is the rival's, or the product's."""
    for column in JUDGED:
        ratio = column.ratio(own[column.field], rival[column.field])
        if ratio is None:
            return False
        is_own_better = ratio > 1.0 if column.more_is_better else ratio < 1.0
        if ratio != 1.0 and is_own_better is is_rivals:
            return False
    return True
