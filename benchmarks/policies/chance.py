"""The held rule beside itself: deciding at once, by chance, with more known, and by several gateways.

Rules:
    1. Runs of one workload differ from seed to seed, and two runs of one rule that differ by nothing that
       matters (`questions.CHANCE`) differ by chance: one request sent elsewhere moves all that follow.
    2. A ratio is a geometric mean over the seeds on which both ran. It is worse by more than chance where the
       mean of its logarithms is, by Student's one-sided test at 5 %; on one seed nothing can be said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log, sqrt
from statistics import fmean, stdev
from typing import Final

from benchmarks.policies.cells import OWN, SAID, WORKLOADS
from benchmarks.policies.figures import JUDGED, Column, Figures, Row, table
from benchmarks.policies.questions import AT_KNEE, CHANCE, GATEWAYS, KNOWN, near_name

_IMMEDIATE, _HELD = OWN[1:]

_SURE: Final = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86}
"""Runs -> standard errors that a mean is off by chance once in twenty times, to one side."""

_LEAST: Final = 0.02
"""Of a ratio's logarithm: a loss under 2 % is none."""

BySeed = Mapping[int, Figures]


def by_seed(rows: Iterable[Row], workload: str, groups: Sequence[str], speed: float, policy: str) -> BySeed:
    """Figures of one policy at one speed, seed by seed, from cells of some groups."""
    return {
        row.cell.seed: row.figures
        for row in rows
        if row.cell.workload == workload
        and row.cell.group in groups
        and row.speed == speed
        and row.policy == policy
    }


def logs(over: BySeed, under: BySeed, column: Column) -> list[float]:
    """Logarithms of the ratio of a figure, one per seed on which both have it."""
    pairs = [(over[seed][column.field], under[seed][column.field]) for seed in sorted(over.keys() & under)]
    return [log(mine / theirs) for mine, theirs in pairs if mine and theirs]


def is_loss(found: Sequence[float], column: Column) -> bool:
    """Whether logarithms of a ratio, one per seed, are worse than 0 by 2 % and more than chance: Rule 2."""
    if len(found) not in _SURE:
        return False
    loss = -fmean(found) if column.more_is_better else fmean(found)
    return loss > max(_LEAST, _SURE[len(found)] * stdev(found) / sqrt(len(found)))


def ratio(found: Sequence[float], column: Column) -> str:
    """A mean ratio and those of the single seeds, least to greatest; bold where `is_loss`.

    Args:
        found: Logarithms of the ratio, one per seed.
        column: Of which.
    """
    if not found:
        return "–"
    text = f"{exp(fmean(found)):.2f}"
    if len(found) > 1:
        text += f" ({exp(min(found)):.2f}–{exp(max(found)):.2f})"
    return f"**{text}**" if is_loss(found, column) else text


def holding(rows: Sequence[Row]) -> list[str]:
    """Held over immediate on every row that ran; nothing if none did."""
    lines, groups = [], ("own", "held")
    for workload in WORKLOADS:
        of_all: dict[str, list[float]] = {column.field: [] for column in JUDGED}
        for speed in workload.speeds:
            at_once, *others = (
                by_seed(rows, workload.name, groups, speed, policy) for policy in (_IMMEDIATE, _HELD, CHANCE)
            )
            for policy, other in zip((_HELD, CHANCE), others, strict=True):
                seeds = sorted(at_once.keys() & other)
                if seeds:
                    found = [logs(other, at_once, column) for column in JUDGED]
                    ratios = [ratio(of, column) for of, column in zip(found, JUDGED, strict=True)]
                    of_seeds = ", ".join(map(str, seeds))
                    lines.append([workload.title, f"×{speed:g}", f"`{policy}`", *ratios, of_seeds])
                    if policy == _HELD:
                        for of, column in zip(found, JUDGED, strict=True):
                            of_all[column.field] += of
        if runs := max(map(len, of_all.values())):
            ratios = [ratio(of_all[column.field], column) for column in JUDGED]
            lines.append([workload.title, "all", f"`{_HELD}`", *ratios, f"{runs} runs"])
    if not lines:
        return []
    return [
        "## Held over immediate",
        f"Figures over those of `{_IMMEDIATE}`: geometric means over seeds, and in brackets the least and the"
        " greatest of the single seeds. Bold is worse by 2 % and by more than the scatter of the seeds"
        f" explains (Student, one-sided, 5 %). `{CHANCE}` is `{_IMMEDIATE}` with predictions 1 % longer: how"
        " it differs is chance.",
        table(["workload", "speed", "policy", *(column.title for column in JUDGED), "seeds"], lines),
    ]


def knowing(rows: Sequence[Row]) -> list[str]:
    """Holding with what it is late or wrong about known, over holding; nothing if none of that ran."""
    lines = []
    for workload in WORKLOADS:
        for speed in workload.speeds[1:]:
            without = by_seed(rows, workload.name, ["own", "held"], speed, _HELD)
            for what in KNOWN:
                runs = (
                    by_seed(rows, workload.name, [f"known-{what}"], speed, policy)
                    for policy in (_HELD, SAID[1])
                )
                known = next(filter(None, runs), {})
                seeds = sorted(known.keys() & without)
                if seeds:
                    ratios = [ratio(logs(known, without, column), column) for column in JUDGED]
                    lines.append([workload.title, f"×{speed:g}", what, *ratios, ", ".join(map(str, seeds))])
    if not lines:
        return []
    return [
        "## What knowing more would be worth",
        f"`{_HELD}` with one thing known at once and exactly, over `{_HELD}`: what engines have cached (else"
        " 50 ms late), how long prompts are in tokens (else 10 % off), how many sequences an engine runs"
        " (else learned), and all of these. What is left of a gap then is not for want of knowledge. Means,"
        " brackets and bold as above.",
        table(["workload", "speed", "known", *(column.title for column in JUDGED), "seeds"], lines),
    ]


def gateways(rows: Sequence[Row]) -> list[str]:
    """Several gateways over one, news between them 5 ms old; nothing if none ran."""
    lines = []
    titles = {workload.name: workload.title for workload in WORKLOADS}
    for name, speed in AT_KNEE.items():
        for policy in OWN[1:]:
            one, *more = (
                by_seed(rows, near_name(name), [f"gateways-{count}"], speed, policy) for count in GATEWAYS
            )
            for count, several in zip(GATEWAYS[1:], more, strict=True):
                seeds = sorted(one.keys() & several)
                if seeds:
                    ratios = [ratio(logs(several, one, column), column) for column in JUDGED]
                    of_seeds = ", ".join(map(str, seeds))
                    lines.append([f"{titles[name]} ×{speed:g}", f"`{policy}`", str(count), *ratios, of_seeds])
    if not lines:
        return []
    return [
        "## Several gateways over one",
        "News between gateways 5 ms old, as the product's are at most (docs/adr/0015); means, brackets and"
        " bold as above. Of the conversation the first 4,000 requests.",
        table(["workload", "policy", "gateways", *(column.title for column in JUDGED), "seeds"], lines),
    ]
