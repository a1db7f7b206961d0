"""Markdown tables of the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from benchmarks.policies.aims import aims
from benchmarks.policies.cells import (
    EXTRA,
    ORACLE,
    OWN,
    SAID,
    SHIPPED,
    STRONG,
    WORKLOADS,
    Cell,
    CellKind,
    Workload,
)
from benchmarks.policies.chance import gateways, holding, knowing
from benchmarks.policies.figures import (
    GOODPUT,
    JUDGED,
    P90,
    P99,
    Column,
    Figures,
    Row,
    at_once_names,
    beside_best,
    best,
    compared_seeds,
    is_compared,
    means,
    of_workload,
    ratios,
    rival_names,
    rivals_at,
    shared_seeds,
    shown,
    table,
)
from benchmarks.policies.missed import missed
from benchmarks.policies.one_by_one import one_by_one
from benchmarks.policies.short import POSITIONS, gateways_and_views, near_the_knee, slower_engines
from benchmarks.policies.waiting import late_binding
from tokenway.simulator.engine.profile import PROFILES

_EVERYBODY: Final = (
    *JUDGED,
    Column("tpot_p99_s", "TPOT p99 ms", 1e3),
    Column("e2e_mean_s", "e2e s"),
    Column("shed_ratio", "shed %", 1e2),
    Column("available_ratio", "reuse available %", 1e2),
    Column("foreseen_ratio", "foreseen %", 1e2),
    Column("hit_ratio", "obtained %", 1e2),
    Column("wasted_ratio", "wasted %", 1e2),
    Column("load_spread", "spread"),
)

_OBTAINED: Final = Column("hit_ratio", "obtained", more_is_better=True)

_PROFILE: Final = "llama8b-h100"

_KERNELS_MS: Final = {64: 9.6, 256: 11.7, 512: 17.4, 1024: 29.1, 2048: 62.3}
"""Tokens of a prompt in one step -> the sum of an H100's kernels (docs/validation.md)."""


def document(rows: Sequence[Row], lines: Sequence[Cell], stale: Collection[str] = ()) -> str:
    """All tables, as one Markdown page.

    Args:
        rows: All runs.
        lines: Cells that ran, whose command lines are shown.
        stale: Names of those whose sources have changed since.
    """
    compared = [row for row in rows if is_compared(row.cell)]
    parts = ["# Policies compared", *age(lines, stale), *worst(compared), *one_by_one(compared)]
    parts += aims(compared)
    parts += missed(compared)
    for column in JUDGED:
        parts += by_column(compared, column)
    parts += [*near_the_knee(compared), *slower_engines(compared)]
    parts += limit_said(compared)
    parts += [*holding(rows), *knowing(rows), *gateways(rows)]
    extra = {workload.name for workload in EXTRA}
    parts += late_binding([*compared, *(row for row in rows if row.cell.workload in extra)])
    parts += reuse(rows)
    for workload in WORKLOADS:
        parts += everybody(compared, workload)
    for workload in EXTRA:
        parts += everybody(rows, workload)
    parts += shipped(rows)
    parts += [*gateways_and_views(rows), *beside(rows)]
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


def worst(rows: Sequence[Row]) -> list[str]:
    """The least favourable ratio to the best rival of each column, over all workloads."""
    of_means: dict[tuple[str, str, int], dict[str, float]] = {}
    of_seeds: dict[tuple[str, str, int], list[float]] = {}
    for workload in WORKLOADS:
        own = of_workload(rows, workload)
        seeds = compared_seeds(own)
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
        "Own figure over that of the column's best rival of those that decide at once (those that wait:"
        " [below](#late-binding-beside-late-binding)), geometric means over seeds; the worst workload, and in"
        " brackets the worst single seed. Below 1 is better, for goodput above 1. Percentiles are of"
        " what was answered: the last column is the most that was refused in any run.",
        table(["policy", "speed", *(column.title for column in JUDGED), "shed %"], lines),
    ]


def limit_said(rows: Sequence[Row]) -> list[str]:
    """What it is worth to say `max_num_seqs`: ratios to the best rival, learned and said."""
    lines = []
    for workload in WORKLOADS:
        own = of_workload(rows, workload)
        if not any(row.policy in SAID for row in own):
            continue
        ran = {row.policy for row in own}
        seeds = shared_seeds(own, [policy for policy in (*STRONG, *OWN, *SAID) if policy in ran])
        learned, said = ratios(own, workload, seeds), ratios(own, workload, seeds, SAID)
        for speed in workload.speeds:
            for policy, with_it in zip(OWN[1:], SAID, strict=True):
                cells = [
                    f"{learned[policy, column.field, speed]:.2f} → {said[with_it, column.field, speed]:.2f}"
                    if (policy, column.field, speed) in learned and (with_it, column.field, speed) in said
                    else "–"
                    for column in JUDGED
                ]
                of_seeds = ", ".join(str(seed) for seed in sorted(seeds))
                lines.append([workload.title, f"×{speed:g}", f"`{policy}`", *cells, of_seeds])
    if not lines:
        return []
    return [
        "## With `max_num_seqs` said",
        "Own figure over that of the column's best rival, as above: with the number learned from readings of"
        " the engines' metrics → said in clusters.json. No rival's rule has a place for it.",
        table(["workload", "speed", "policy", *(column.title for column in JUDGED), "seeds"], lines),
    ]


def by_column(rows: Sequence[Row], column: Column) -> list[str]:
    """The best rival of one column at every speed, with the product's own rules and the oracle beside it."""
    lines = []
    for workload in WORKLOADS:
        own = of_workload(rows, workload)
        seeds = compared_seeds(own)
        if not seeds:
            continue
        found = means(own, seeds)
        rivals = at_once_names(own)
        for speed in workload.speeds:
            top = best(rivals_at(found, speed, rivals), column)
            if top is None:
                continue
            line = [workload.title, f"×{speed:g}", shown(top[1], column), f"`{top[0]}`"]
            of_speed = [found.get((speed, policy), {}) for policy in (*OWN, *ORACLE)]
            line += [beside_best(figures.get(column.field), top[1], column) for figures in of_speed]
            lines.append([*line, ", ".join(str(seed) for seed in sorted(seeds))])
    names = [f"`{policy}`" for policy in (*OWN, *ORACLE)]
    return [
        f"## {column.title}",
        table(["workload", "speed", "best rival", "which", *names, "seeds"], lines),
    ]


def reuse(rows: Sequence[Row]) -> list[str]:
    """What could be found cached, what was expected, and what was found, on a workload's first seed."""
    policies = OWN[1:]
    lines = []
    for workload in (*WORKLOADS, *EXTRA):
        own = [row for row in of_workload(rows, workload) if not row.cell.pictures]
        found = means([row for row in own if row.cell.kind is not CellKind.WHOLE], workload.seeds[:1])
        rivals = rival_names([row for row in own if not row.cell.group.startswith("shipped")])
        for speed in workload.speeds:
            figures = [found.get((speed, policy), {}) for policy in policies]
            known = [value for each in figures if (value := each.get("available_ratio"))]
            if not known:
                continue
            line = [workload.title, f"×{speed:g}", _percent(known[0])]
            for each in figures:
                line += [_percent(each.get("foreseen_ratio")), _percent(each.get("hit_ratio"))]
                line.append(_percent(each.get("hit_ratio"), each.get("available_ratio")))
            top = best(rivals_at(found, speed, rivals), _OBTAINED)
            lines.append([*line, *(["–", "–"] if top is None else [_percent(top[1]), f"`{top[0]}`"])])
    if not lines:
        return []
    titles = ["workload", "speed", "available %"]
    for policy in policies:
        titles += [f"`{policy}` foreseen %", "obtained %", "of what is available %"]
    return [
        "## Reuse",
        "Prompt tokens that a cache of the whole fleet that forgets nothing would have had, those that the"
        " choice expected where it sent the request, and those that the engine found; of all prompt tokens of"
        " answered requests. More is not better by itself: what is found where others wait, they pay for.",
        table([*titles, "most that a rival obtained %", "which"], lines),
    ]


def _percent(value: float | None, of: float | None = 1.0) -> str:
    return "–" if value is None or not of else f"{100 * value / of:.1f}"


def _engine_note(workload: Workload) -> str:
    """What the engine model does to the knee, for workloads on the profile that no run measured."""
    profile = PROFILES[_PROFILE]
    over = [
        kernels_ms / (1000 * profile.step_s(tokens, tokens * tokens / 2, 0, 1))
        for tokens, kernels_ms in _KERNELS_MS.items()
    ]
    full = over[-1]
    return (
        f"Of engines `{_PROFILE}`: by the sum of an H100's kernels, a step of prefill takes"
        f" {min(over):.2f} to {max(over):.2f} times as long as here, a full one {full:.2f}. Where prefill"
        f" bounds a fleet, its knee is then at 1/{full:.2f} = {1 / full:.2f} of the rates shown"
        f" (×{workload.speeds[-1]:g} as ×{workload.speeds[-1] / full:.3g})."
    )


def everybody(rows: Sequence[Row], workload: Workload) -> list[str]:
    """Every policy at every speed on the first seed, least TTFT p90 first."""
    seed = workload.seeds[0]
    found = means(of_workload(rows, workload), [seed])
    parts: list[str] = []
    for speed in workload.speeds:
        at = {policy: figures for (of, policy), figures in found.items() if of == speed}
        if at:
            if not parts:
                parts.append(f"## {workload.title}")
                parts.append(_engine_note(workload))
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
        [f"`{policy}`", *(shown(at[policy][column.field], column) for column in _EVERYBODY)]
        for policy in sorted(at, key=order)
    ]
    return table(["policy", *(column.title for column in _EVERYBODY)], lines)


def shipped(rows: Sequence[Row]) -> list[str]:
    """Rivals as they ship, beside the same under their plain name with everybody's view, at the knee."""
    reasons = {each.entrant: each.reason for each in SHIPPED}
    lines = []
    for workload in WORKLOADS:
        knee = workload.speeds[1]
        own = [
            row
            for row in of_workload(rows, workload)
            if row.speed == knee and row.cell.seed == workload.seeds[0]
        ]
        given = {row.policy: row.figures for row in own if is_compared(row.cell)}
        for row in own:
            if not row.cell.group.startswith("shipped"):
                continue
            name = row.policy.partition("@")[0].partition(":")[0]
            beside_it = given.get(name, {})
            line = [f"{workload.title} ×{knee:g}", f"`{row.policy}`"]
            for column in (P90, P99, GOODPUT):
                line += [
                    shown(row.figures[column.field], column),
                    shown(beside_it.get(column.field), column),
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
        table(["workload", "policy", *titles, "why that view"], lines),
    ]


def beside(rows: Sequence[Row]) -> list[str]:
    """More gateways, other views and what-ifs."""
    cut = [row for row in rows if row.cell.kind is CellKind.WHOLE and not row.cell.pictures]
    if not cut:
        return []
    lines = [
        [row.cell.group, f"`{row.policy}`", f"×{row.speed:g}"]
        + [shown(row.figures[column.field], column) for column in _EVERYBODY]
        for row in cut
    ]
    return [
        "## Gateways, views, what if: conversation, 4,000 requests, seed 3",
        table(["cell", "policy", "speed", *(column.title for column in _EVERYBODY)], lines),
    ]
