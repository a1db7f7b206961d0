"""Short tables, for documents that do not show all of docs/policies.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.policies.cells import OWN, WORKLOADS, CellKind, Workload
from benchmarks.policies.figures import (
    P90,
    Figures,
    Row,
    at_once_names,
    beside_best,
    best,
    compared_seeds,
    means,
    of_workload,
    rivals_at,
    shown,
    table,
)

POSITIONS: Final = ("below the knee", "at the knee", "past the knee")
"""Of the three speeds of a workload."""

SLOWER: Final = 1.2
"""How many times as long an engine's steps may take as its model says (docs/validation.md)."""

_LEAST_SLOWER: Final = 1.1

_MOST_SLOWER: Final = 1.3

_SHOWN: Final = ("gateways-", "view-", "half-the-kv")
"""Which cells of the short conversation have a row, by the start of their group."""


def near_the_knee(rows: Sequence[Row]) -> list[str]:
    """TTFT p90 of every workload at its knee and past it, the least favourable of the held rule first."""
    lines = []
    for workload in WORKLOADS:
        for speed, position in zip(workload.speeds[1:], POSITIONS[1:], strict=True):
            if (found := _p90(rows, workload, speed)) is None:
                continue
            (rival, best_s), own = found
            line = [workload.title, position, f"{shown(best_s, P90)} `{rival}`"]
            line += [beside_best(own[policy], best_s, P90) for policy in OWN]
            lines.append(((own[OWN[-1]] or 0.0) / best_s, line))
    lines.sort(key=lambda ranked: -ranked[0])
    titles = [P90.title, "rate", "best rival", *(f"`{policy}`" for policy in OWN)]
    return ["## At the knee and past it", table(titles, [line for _, line in lines])]


def slower_engines(rows: Sequence[Row]) -> list[str]:
    """Where workloads stand if engines are slower than their model: at a higher speed, if one is near it."""
    lines = []
    for workload in WORKLOADS:
        for speed in workload.speeds:
            near = min(workload.speeds, key=lambda other: abs(other / speed - SLOWER))
            here, there = _p90(rows, workload, speed), _p90(rows, workload, near)
            if here is None or there is None or not _LEAST_SLOWER < near / speed < _MOST_SLOWER:
                continue
            ratio, ratio_there = ((own[OWN[-1]] or 0.0) / best_s for (_, best_s), own in (here, there))
            line = [workload.title, f"×{speed:g}", f"{ratio:.2f}", f"{near / speed:.2f}"]
            lines.append([*line, f"×{near:g}", f"{ratio_there:.2f}"])
    return [
        "## If engines are slower",
        f"TTFT p90 of `{OWN[-1]}` over that of the best rival that decides at once: at a speed, and where"
        " engines stand at the same rate whose steps all take so many times as long: at a higher speed, that"
        f" nearest to {SLOWER:g} times, if one is near.",
        table(["workload", "speed", "ratio", "times as long", "as at", "ratio there"], lines),
    ]


def _p90(rows: Sequence[Row], workload: Workload, speed: float) -> tuple[tuple[str, float], Figures] | None:
    """The best rival that decides at once and its TTFT p90, and own ones by policy; None if none ran."""
    ran = of_workload(rows, workload)
    found = means(ran, compared_seeds(ran))
    top = best(rivals_at(found, speed, at_once_names(ran)), P90)
    own = {policy: found.get((speed, policy), {}).get(P90.field) for policy in OWN}
    return None if top is None or own[OWN[-1]] is None else (top, own)


def gateways_and_views(rows: Sequence[Row]) -> list[str]:
    """TTFT p90 with several gateways and other views of the caches: a column per policy and speed."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.cell.kind is CellKind.WHOLE and row.cell.group.startswith(_SHOWN):
            title = f"`{row.policy}` ×{row.speed:g}"
            lines.setdefault(row.cell.group, {})[title] = shown(row.figures[P90.field], P90)
    titles = list(dict.fromkeys(title for line in lines.values() for title in line))
    if not lines:
        return []
    return [
        "## Gateways and views: TTFT p90 s",
        table(
            ["conversation, 4,000 requests, seed 3", *titles],
            [[group, *(line.get(title, "–") for title in titles)] for group, line in lines.items()],
        ),
    ]
