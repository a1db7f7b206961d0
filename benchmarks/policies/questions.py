"""Cells of the product's own rules alone: is holding ever worse, and do several gateways lose by it?

Rules:
    1. Rivals are not asked, so these rows have more seeds than the comparison and fewer speeds.
    2. A cell of several gateways has a workload name of its own: its runs are in no mean of the comparison.
"""

from __future__ import annotations

from typing import Final

from benchmarks.policies.cells import OWN, SAID, SHORT, WORKLOADS, Cell, CellKind, cells

CHANCE: Final = "least_completion:bias=1.01"
"""The immediate rule with prefill thought 1 % dearer, a tenth of what it is off anyway: what differs between
the two is chance."""

IN_QUESTION: Final[dict[str, tuple[float, ...]]] = {"bursty": (2.5, 3.25), "multi-tenant": (2.5, 2.75)}
"""Workload -> speeds at which holding lost to deciding at once on the one seed of the comparison."""

SEEDS: Final = (3, 4, 5)
"""Of these cells, also where rivals have fewer."""

NEAR: Final = ("--push-delay-ms", "5")
"""News of another gateway are no older, but for one in a hundred; 0.3 ms is usual (docs/adr/0015)."""

AT_KNEE: Final[dict[str, float]] = {"azure": 16.0, "low-sharing": 1.55, "conversation": 2.75}
"""Workload -> its knee, for several gateways; of the conversation the first 4,000 requests, on one seed."""

GATEWAYS: Final = (1, 2, 4)


KNOWN: Final[dict[str, tuple[str, ...]]] = {
    "caches": ("--event-lag-ms", "0"),
    "lengths": ("--token-error", "0"),
    "limits": (),
    "all": ("--event-lag-ms", "0", "--token-error", "0"),
}
"""What a gateway is late or wrong about -> options with which it is not: what engines have cached, how many
tokens a prompt has, how many sequences an engine runs (`max_num_seqs`, by the policy's parameter)."""


def every_cell() -> tuple[Cell, ...]:
    """All cells: those of the comparison first."""
    return (*cells(), *held_cells(), *near_cells(), *known_cells())


def known_cells() -> list[Cell]:
    """Holding at and past the knee, with each thing known at once and exactly, and with all of them."""
    return [
        Cell(
            workload.name,
            f"known-{what}",
            CellKind.OWN,
            seed,
            (SAID[1] if what in {"limits", "all"} else OWN[2],),
            workload.speeds[1:],
            (*workload.line, *options),
        )
        for at in range(len(SEEDS))
        for workload in WORKLOADS
        for seed in workload.seeds[at : at + 1]
        for what, options in KNOWN.items()
        if at == 0 or workload.name != "conversation"
    ]


def held_cells() -> list[Cell]:
    """What chance does to the rows in question on one seed, and those rows on seeds of no rival."""
    workloads = {workload.name: workload for workload in WORKLOADS}
    found = []
    for seed in SEEDS:
        for name, speeds in IN_QUESTION.items():
            policies = (CHANCE,) if seed in workloads[name].seeds else OWN[1:]
            found.append(Cell(name, "held", CellKind.OWN, seed, policies, speeds, workloads[name].line))
    return found


def near_cells() -> list[Cell]:
    """Several gateways that are as near to each other as the product's are."""
    lines = {workload.name: workload.line for workload in WORKLOADS} | {"conversation": SHORT}
    return [
        Cell(
            near_name(name),
            f"gateways-{count}",
            CellKind.OWN,
            seed,
            OWN[1:],
            (speed,),
            (*lines[name], "--gateways", str(count), *NEAR),
        )
        for seed in SEEDS
        for name, speed in AT_KNEE.items()
        for count in GATEWAYS
        if seed == SEEDS[0] or name != "conversation"
    ]


def near_name(workload: str) -> str:
    """A workload's name in its cells of several gateways."""
    return f"{workload}-near"
