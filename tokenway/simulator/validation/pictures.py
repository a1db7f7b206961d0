"""A measured run beside the same run played, as a PNG; needs matplotlib (`tokenway[simulator]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenway.simulator.validation.comparing import tpots_s, ttfts_s
from tokenway.simulator.validation.measured import Run


def draw(path: Path, title: str, measured: Run, played: Run, judged: Sequence[int]) -> None:
    """Draw the distributions of TTFT and TPOT of the requests `judged`, and all gauges over time.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    runs = (("measured", measured, "C0", "-"), ("played", played, "C1", "--"))
    figure, (ttft, tpot, gauges) = plt.subplots(1, 3, figsize=(13, 3.6))
    for axes, of, unit in ((ttft, ttfts_s, 1.0), (tpot, tpots_s, 1e3)):
        for label, run, color, style in runs:
            values = unit * np.sort(of(run, judged))
            shares = np.arange(1, len(values) + 1) / len(values)
            axes.plot(values, shares, label=label, color=color, linestyle=style)
        axes.set_ylabel("share of requests")
    ttft.set_xlabel("TTFT (s)")
    tpot.set_xlabel("TPOT (ms)")
    for label, run, _, style in runs:
        times = [gauge.time_s for gauge in run.gauges]
        gauges.plot(times, [g.running for g in run.gauges], "C2", linestyle=style, label=f"running, {label}")
        gauges.plot(times, [g.waiting for g in run.gauges], "C3", linestyle=style, label=f"waiting, {label}")
    gauges.set(xlabel="time (s)", ylabel="requests")
    for axes in (ttft, tpot, gauges):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)
