"""Pictures of the comparison, as PNG files; needs matplotlib (`tokenway[simulator]`)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.policies.cells import ORACLE, OWN, SIMPLE, STRONG, WORKLOADS, Cell
from benchmarks.policies.figures import Row, is_compared, means, shared_seeds
from benchmarks.policies.running import pictures_of

_COLUMNS: Final = 4

_FROM_REPLAY: Final = ("ttft_cdf", "load", "time")
"""What is kept of the pictures of a cell: of one speed, goodput against the rate says nothing."""


def draw(rows: Sequence[Row], cells: Sequence[Cell], results: Path, folder: Path) -> list[Path]:
    """Draw goodput against rate for each workload, and take over what `tokenway replay` drew.

    Args:
        rows: All runs.
        cells: Those that are stored.
        results: Where they are.
        folder: Where the pictures go.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: A file cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_goodput([row for row in rows if is_compared(row.cell)], folder / "policies_goodput.png")]
    for cell in cells:
        if cell.pictures:
            for kept in _FROM_REPLAY:
                for drawn in pictures_of(cell, results).glob(f"*_{kept}.png"):
                    paths.append(folder / f"policies_{cell.workload}_{kept}.png")
                    shutil.copyfile(drawn, paths[-1])
    return paths


def _goodput(rows: Sequence[Row], path: Path) -> Path:
    """One panel per workload; means over the seeds that all shown policies have."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [*OWN, *STRONG, *ORACLE, SIMPLE[-1]]
    ran = [workload for workload in WORKLOADS if any(row.cell.workload == workload.name for row in rows)]
    height = -(-len(ran) // _COLUMNS)
    figure, grid = plt.subplots(
        max(1, height), _COLUMNS, figsize=(4 * _COLUMNS, 3.6 * max(1, height)), squeeze=False
    )
    lines: dict[str, Any] = {}
    for axes in grid.flat[len(ran) :]:
        axes.set_axis_off()
    for axes, workload in zip(grid.flat, ran, strict=False):
        own = [row for row in rows if row.cell.workload == workload.name]
        seeds = shared_seeds(own, {row.policy for row in own} & set(shown))
        found = means(own, seeds)
        for index, policy in enumerate(shown):
            points = sorted(
                (speed, figures["good_ratio"] or 0.0)
                for (speed, of), figures in found.items()
                if of == policy
            )
            if points:
                (lines[policy],) = axes.plot(*zip(*points, strict=True), **_style(index, policy in OWN))
        axes.set_title(f"{workload.title}; seeds {', '.join(map(str, sorted(seeds)))}", fontsize=9)
        axes.set_xlabel("speed: factor on the trace's rate", fontsize=8)
        axes.grid(alpha=0.3)
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel("goodput, share of what is offered")
    figure.tight_layout()
    figure.legend(
        lines.values(), lines.keys(), loc="upper center", ncols=6, fontsize=8, bbox_to_anchor=(0.5, 0.0)
    )
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)
    return path


def _style(index: int, own: bool) -> dict[str, Any]:
    """Colour and line of the nth policy; the product's own are thick."""
    return {
        "color": f"C{index % 10}",
        "linestyle": "-" if own else ("--", "-.")[index // 10 % 2],
        "linewidth": 2.2 if own else 1.0,
        "marker": "o" if own else ".",
    }
