"""What the rivals pay that are ahead where an aim is missed.

The aims compare with the best rival of each figure by itself, another one in each column. A rule that is best
in one figure may have bought it with the others; this looks, row by row, for one that did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.policies.aims import AIMS, Aim
from benchmarks.policies.cells import WORKLOADS
from benchmarks.policies.figures import (
    JUDGED,
    Column,
    Figures,
    Row,
    at_once_names,
    best,
    compared_seeds,
    means,
    of_workload,
    rivals_at,
    table,
)
from benchmarks.policies.one_by_one import AHEAD


def missed(rows: Sequence[Row]) -> list[str]:
    """Each missed aim with the best rival of that figure, and with the best one that pays nothing for it.

    Args:
        rows: Runs of the comparison.
    """
    lines: list[list[str]] = []
    for workload in WORKLOADS:
        of_it = of_workload(rows, workload)
        found, names = means(of_it, compared_seeds(of_it)), at_once_names(of_it)
        for position, speed in enumerate(workload.speeds):
            rivals = rivals_at(found, speed, names)
            for aim in AIMS:
                own = found.get((speed, aim.policy))
                if position not in aim.positions or own is None:
                    continue
                line = _line(f"{workload.name} ×{speed:g}", aim, own, rivals)
                if line is not None:
                    lines.append(line)
    if not lines:
        return []
    free = sum(line[-1] != "–" for line in lines)
    return [
        "### What the rivals ahead pay",
        "Every row that misses an aim: the best rival of that figure, and own figures over that rival's, the"
        " missed one in bold. *For nothing*: the best of those rivals beside which the aim is missed as well"
        f" and that lose {AHEAD:.0%} or more nowhere; none in {len(lines) - free} of {len(lines)}.",
        table(
            ["policy", "row", "aim", "best rival", *(column.title for column in JUDGED), "for nothing"], lines
        ),
    ]


def _line(row: str, aim: Aim, own: Figures, rivals: Mapping[str, Figures]) -> list[str] | None:
    """None where the aim is reached."""
    top = best(rivals, aim.column)
    if top is None or _reaches(aim, own, rivals[top[0]]):
        return None
    figures = rivals[top[0]]
    cells = [f"`{aim.policy}`", row, f"{aim.column.title} {aim.bound}", f"`{top[0]}`"]
    for column in JUDGED:
        shown = _shown(_ratio(own, figures, column))
        cells.append(f"**{shown}**" if column == aim.column else shown)
    without_loss = {
        name: each
        for name, each in rivals.items()
        if not _reaches(aim, own, each) and not any(_pays(own, each, column) for column in JUDGED)
    }
    cheapest = best(without_loss, aim.column)
    cells.append("–" if cheapest is None else f"`{cheapest[0]}`")
    return cells


def _reaches(aim: Aim, own: Figures, rival: Figures) -> bool:
    """Whether the product's rule is as good as the aim asks for, measured by this rival."""
    ratio = _ratio(own, rival, aim.column)
    return ratio is None or aim.is_reached(ratio)


def _pays(own: Figures, rival: Figures, column: Column) -> bool:
    """Whether the rival is behind in a figure, or has none."""
    ratio = _ratio(own, rival, column)
    if ratio is None:
        return True
    return ratio >= 1.0 + AHEAD if column.more_is_better else ratio <= 1.0 - AHEAD


def _ratio(own: Figures, rival: Figures, column: Column) -> float | None:
    return column.ratio(own[column.field], rival[column.field])


def _shown(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"
