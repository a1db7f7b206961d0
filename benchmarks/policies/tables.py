"""Markdown tables of the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from benchmarks.policies.cells import ORACLE, OWN, SHIPPED, STRONG, WORKLOADS, Cell, CellKind, Workload
from benchmarks.policies.figures import (
    GOODPUT,
    JUDGED,
    P90,
    P99,
    Column,
    Figures,
    Row,
    best,
    is_compared,
    means,
    rivals_at,
    shared_seeds,
)

POSITIONS: Final = ("below the knee", "at the knee", "past the knee")
"""Of the three speeds of a workload."""

_EVERYBODY: Final = (
    *JUDGED,
    Column("tpot_p99_s", "TPOT p99 ms", 1e3),
    Column("e2e_mean_s", "e2e s"),
    Column("shed_ratio", "shed %", 1e2),
    Column("hit_ratio", "hit %", 1e2),
    Column("wasted_ratio", "wasted %", 1e2),
    Column("load_spread", "spread"),
)


def document(rows: Sequence[Row], lines: Sequence[Cell], stale: Collection[str] = ()) -> str:
    """All tables, as one Markdown page.

    Args:
        rows: All runs.
        lines: Cells that ran, whose command lines are shown.
        stale: Names of those whose sources have changed since.
    """
    compared = [row for row in rows if is_compared(row.cell)]
    parts = ["# Policies compared", *age(lines, stale), *worst(compared)]
    for column in JUDGED:
        parts += by_column(compared, column)
    for workload in WORKLOADS:
        parts += everybody(compared, workload)
    parts += shipped(rows)
    parts += beside(rows)
    parts += ["## Command lines", "```sh\n" + "\n".join(" ".join(cell.argv) for cell in lines) + "\n```"]
    return "\n\n".join(parts) + "\n"


def age(lines: Sequence[Cell], stale: Collection[str]) -> list[str]:
    """What was not run again since sources that its figures depend on have changed; nothing if all was."""
    old = Counter(str(cell.kind) for cell in lines if cell.name in stale)
    if not old:
        return []
    every = Counter(str(cell.kind) for cell in lines)
    counts = ", ".join(f"{count} of {every[kind]} `{kind}`" for kind, count in sorted(old.items()))
    return [
        f"Of the command lines below, {counts} were run before what their figures depend on changed last."
        " `python -m benchmarks.policies --verify CELL` runs one again and says what differs."
    ]


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def _value(value: float | None, column: Column) -> str:
    return "–" if value is None else f"{value * column.scale:.3g}"


def _of(rows: Sequence[Row], workload: Workload) -> list[Row]:
    return [row for row in rows if row.cell.workload == workload.name]


def _rivals(rows: Sequence[Row]) -> set[str]:
    return {row.policy for row in rows if row.cell.kind is CellKind.RIVALS}


def _seeds(rows: Sequence[Row]) -> frozenset[int]:
    """Seeds of the strong rivals and, as far as they ran at all, of the product's own rules."""
    ran = {row.policy for row in rows}
    return shared_seeds(rows, [policy for policy in (*STRONG, *OWN) if policy in ran])


def ratios(
    rows: Sequence[Row], workload: Workload, seeds: Iterable[int]
) -> dict[tuple[str, str, float], float]:
    """Own figure over that of the column's best rival, by (policy, field, speed), of means over `seeds`."""
    chosen = frozenset(seeds)
    found = means(rows, chosen)
    rivals = _rivals(rows)
    result: dict[tuple[str, str, float], float] = {}
    for speed in workload.speeds:
        against = rivals_at(found, speed, rivals)
        for column in JUDGED:
            top = best(against, column)
            for policy in OWN:
                figures = found.get((speed, policy))
                if top is None or figures is None:
                    continue
                ratio = column.ratio(figures[column.field], top[1])
                if ratio is not None:
                    result[policy, column.field, speed] = ratio
    return result


def worst(rows: Sequence[Row]) -> list[str]:
    """The least favourable ratio to the best rival of each column, over all workloads."""
    of_means: dict[tuple[str, str, int], dict[str, float]] = {}
    of_seeds: dict[tuple[str, str, int], list[float]] = {}
    for workload in WORKLOADS:
        own = _of(rows, workload)
        seeds = _seeds(own)
        for (policy, field, speed), ratio in ratios(own, workload, seeds).items():
            at = workload.speeds.index(speed)
            of_means.setdefault((policy, field, at), {})[workload.name] = ratio
        for seed in seeds:
            for (policy, field, speed), ratio in ratios(own, workload, [seed]).items():
                of_seeds.setdefault((policy, field, workload.speeds.index(speed)), []).append(ratio)
    sheds: dict[tuple[str, int], list[float]] = {}
    positions = {(each.name, speed): at for each in WORKLOADS for at, speed in enumerate(each.speeds)}
    for row in rows:
        shed = row.figures["shed_ratio"]
        if row.policy in OWN and shed is not None:
            sheds.setdefault((row.policy, positions[row.cell.workload, row.speed]), []).append(shed)
    lines = []
    for policy in OWN:
        for at, position in enumerate(POSITIONS):
            line = [f"`{policy}`", position]
            for column in JUDGED:
                known = of_means.get((policy, column.field, at))
                if not known:
                    line.append("–")
                    continue
                ratio = column.worst(known.values())
                (name, *_) = [name for name, each in known.items() if each == ratio]
                of_one = column.worst(of_seeds[policy, column.field, at])
                line.append(f"{ratio:.2f} {name} ({of_one:.2f})")
            line.append(f"{100 * max(sheds[policy, at]):.3g}" if (policy, at) in sheds else "–")
            lines.append(line)
    return [
        "## Worst ratio to the best rival",
        "Own figure over that of the column's best rival, geometric means over seeds; the worst workload,"
        " and in brackets the worst single seed. Below 1 is better, for goodput above 1. Percentiles are of"
        " what was answered: the last column is the most that was refused in any run.",
        _table(["policy", "speed", *(column.title for column in JUDGED), "shed %"], lines),
    ]


def by_column(rows: Sequence[Row], column: Column) -> list[str]:
    """The best rival of one column at every speed, with the product's own rules and the oracle beside it."""
    lines = []
    for workload in WORKLOADS:
        own = _of(rows, workload)
        seeds = _seeds(own)
        if not seeds:
            continue
        found = means(own, seeds)
        rivals = _rivals(own)
        for speed in workload.speeds:
            top = best(rivals_at(found, speed, rivals), column)
            if top is None:
                continue
            line = [workload.title, f"×{speed:g}", _value(top[1], column), f"`{top[0]}`"]
            for policy in (*OWN, *ORACLE):
                value = found.get((speed, policy), {}).get(column.field)
                ratio = column.ratio(value, top[1])
                line.append(_value(value, column) + ("" if ratio is None else f" ({ratio:.2f})"))
            lines.append([*line, ", ".join(str(seed) for seed in sorted(seeds))])
    names = [f"`{policy}`" for policy in (*OWN, *ORACLE)]
    return [
        f"## {column.title}",
        _table(["workload", "speed", "best rival", "which", *names, "seeds"], lines),
    ]


def everybody(rows: Sequence[Row], workload: Workload) -> list[str]:
    """Every policy at every speed on the first seed, least TTFT p90 first."""
    seed = workload.seeds[0]
    found = means(_of(rows, workload), [seed])
    parts = []
    for speed in workload.speeds:
        at = {policy: figures for (of, policy), figures in found.items() if of == speed}
        if at:
            offered = next(iter(at.values()))["offered_rps"] or 0.0
            parts += [
                f"### {workload.title}, ×{speed:g}: {offered:.2f} requests/s, seed {seed}",
                _everybody(at),
            ]
    return parts


def _everybody(at: Mapping[str, Figures]) -> str:
    def order(policy: str) -> tuple[bool, float]:
        p90_s = at[policy]["ttft_p90_s"]
        return p90_s is None, p90_s or 0.0

    lines = [
        [f"`{policy}`", *(_value(at[policy][column.field], column) for column in _EVERYBODY)]
        for policy in sorted(at, key=order)
    ]
    return _table(["policy", *(column.title for column in _EVERYBODY)], lines)


def shipped(rows: Sequence[Row]) -> list[str]:
    """Rivals as they ship, beside the same under their plain name with everybody's view, at the knee."""
    reasons = {each.entrant: each.reason for each in SHIPPED}
    lines = []
    for workload in WORKLOADS:
        knee = workload.speeds[1]
        own = [row for row in _of(rows, workload) if row.speed == knee and row.cell.seed == workload.seeds[0]]
        given = {row.policy: row.figures for row in own if is_compared(row.cell)}
        for row in own:
            if not row.cell.group.startswith("shipped"):
                continue
            name = row.policy.partition("@")[0].partition(":")[0]
            beside_it = given.get(name, {})
            line = [f"{workload.title} ×{knee:g}", f"`{row.policy}`"]
            for column in (P90, P99, GOODPUT):
                line += [
                    _value(row.figures[column.field], column),
                    _value(beside_it.get(column.field), column),
                ]
            lines.append([*line, reasons[row.policy]])
    if not lines:
        return []
    titles = [
        text
        for column in (P90, P99, GOODPUT)
        for text in (f"{column.title}, as shipped", "with `events+pending`")
    ]
    return [
        "## Rivals with the view they ship with",
        _table(["workload", "policy", *titles, "why that view"], lines),
    ]


def beside(rows: Sequence[Row]) -> list[str]:
    """More gateways, other views and what-ifs."""
    cut = [row for row in rows if row.cell.kind is CellKind.WHOLE and not row.cell.pictures]
    if not cut:
        return []
    lines = [
        [row.cell.group, f"`{row.policy}`", f"×{row.speed:g}"]
        + [_value(row.figures[column.field], column) for column in _EVERYBODY]
        for row in cut
    ]
    return [
        "## Gateways, views, what if: conversation, 4,000 requests, seed 3",
        _table(["cell", "policy", "speed", *(column.title for column in _EVERYBODY)], lines),
    ]
