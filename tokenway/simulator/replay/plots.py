"""Pictures of a sweep, as PNG files; needs matplotlib (`pip install tokenway[simulator]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenway.simulator.replay.report import averages
from tokenway.simulator.replay.summary import RunResult


def draw(results: Sequence[RunResult], folder: Path, name: str) -> list[Path]:
    """Draw the CDFs of TTFT and where it went, goodput against speed, and each engine's load over time.

    Args:
        results: Of one trace; all but goodput show the speed nearest the middle and the first seed.
        folder: Where the files go; made if it is missing.
        name: Beginning of their names.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    speeds = sorted({result.speed for result in results})
    speed, seed = speeds[len(speeds) // 2], results[0].seed
    shown = [r for r in results if r.speed == speed and r.seed == seed and r.ttft_quantiles_s]
    pictures = {
        "ttft_cdf": _ttft(plt, shown, f"{name} ×{speed:.3g}"),
        "goodput": _goodput(plt, results, name),
        "load": _load(plt, shown),
        "time": _time(plt, shown, f"{name} ×{speed:.3g}"),
    }
    paths = []
    for what, figure in pictures.items():
        paths.append(folder / f"{name}_{what}.png")
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return paths


def _ttft(plt: Any, shown: Sequence[RunResult], title: str) -> Any:
    """CDFs of TTFT."""
    figure, axes = plt.subplots(figsize=(9, 6))
    for index, result in enumerate(shown):
        share = np.linspace(0.0, 1.0, len(result.ttft_quantiles_s))
        axes.plot(result.ttft_quantiles_s, share, label=result.policy, **_style(index))
    axes.set(xscale="log", xlabel="TTFT (s)", ylabel="share of requests", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return figure


def _goodput(plt: Any, results: Sequence[RunResult], title: str) -> Any:
    """Goodput against speed."""
    means = averages(results)
    figure, axes = plt.subplots(figsize=(9, 6))
    for index, policy in enumerate(dict.fromkeys(result.policy for result in results)):
        points = sorted(
            (values["offered_rps"] or 0.0, values["goodput_rps"] or 0.0)
            for (_, of), values in means.items()
            if of == policy
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=policy, **_style(index))
    axes.set(xlabel="offered requests/s", ylabel="goodput requests/s", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return figure


def _load(plt: Any, shown: Sequence[RunResult]) -> Any:
    """What each engine computes over time, policy by policy."""
    figure, grid = plt.subplots(
        len(shown) or 1, 1, figsize=(10, 1.2 + 1.1 * len(shown)), sharex=True, squeeze=False
    )
    for axes, result in zip(grid[:, 0], shown, strict=False):
        heat = np.array(result.heat)
        extent = (0.0, heat.shape[1] * float(result.heat_s), heat.shape[0] - 0.5, -0.5)
        image = axes.imshow(heat, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
        axes.set_ylabel(result.policy, rotation=0, ha="right", fontsize=7)
        axes.set_yticks([])
        figure.colorbar(image, ax=axes, pad=0.01)
    grid[-1, 0].set_xlabel("seconds; one row per engine; colour: tokens computed per second")
    return figure


def _time(plt: Any, shown: Sequence[RunResult], title: str) -> Any:
    """Where the time to the first token went, tenth by tenth of the requests."""
    figure, grid = plt.subplots(
        1, max(1, len(shown)), figsize=(2.6 * max(2, len(shown)), 3.2), sharey=True, squeeze=False
    )
    for axes, result in zip(grid[0], shown, strict=False):
        bottom = np.zeros(len(result.waits_s))
        places = np.arange(len(result.waits_s))
        for part, label in enumerate(("held at the gateway", "in the engine's queue", "prefill")):
            height = np.array([each[part] for each in result.waits_s])
            axes.bar(places, height, bottom=bottom, width=0.9, label=label)
            bottom += height
        axes.set_title(result.policy, fontsize=8)
        axes.set_xticks([])
        axes.set_xlabel("tenths of the requests by TTFT", fontsize=7)
    grid[0, 0].set_ylabel("mean TTFT (s)")
    grid[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def _style(index: int) -> dict[str, Any]:
    """Colour and line of the nth policy; more policies than colours take another line."""
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}
