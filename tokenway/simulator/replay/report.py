"""Results as a Markdown table and as one JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from math import fsum
from typing import Any

from tokenway.simulator.replay.summary import RunResult, Summary

_COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "ttft_mean_s": ("TTFT mean s", 1.0, ".2f"),
    "ttft_p50_s": ("p50", 1.0, ".2f"),
    "ttft_p90_s": ("p90", 1.0, ".2f"),
    "ttft_p99_s": ("p99", 1.0, ".2f"),
    "tpot_mean_s": ("TPOT mean ms", 1e3, ".1f"),
    "tpot_p99_s": ("p99", 1e3, ".1f"),
    "e2e_mean_s": ("e2e s", 1.0, ".2f"),
    "available_ratio": ("reuse available %", 1e2, ".1f"),
    "foreseen_ratio": ("foreseen %", 1e2, ".1f"),
    "hit_ratio": ("obtained %", 1e2, ".1f"),
    "wasted_ratio": ("wasted %", 1e2, ".1f"),
    "goodput_rps": ("goodput rps", 1.0, ".2f"),
    "good_ratio": ("good %", 1e2, ".1f"),
    "shed_ratio": ("shed %", 1e2, ".1f"),
    "abandoned_ratio": ("left %", 1e2, ".1f"),
    "load_spread": ("spread", 1.0, ".2f"),
    "hold_mean_s": ("hold s", 1.0, ".2f"),
}


def averages(results: Iterable[RunResult]) -> dict[tuple[float, str], dict[str, float | None]]:
    """Means over seeds, by (speed, policy), in the order of the results."""
    groups: dict[tuple[float, str], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.speed, result.policy), []).append(result)
    return {key: _means([result.summary for result in group]) for key, group in groups.items()}


def _means(summaries: Sequence[Summary]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for field in fields(Summary):
        values = [getattr(summary, field.name) for summary in summaries]
        known = [float(value) for value in values if value is not None]
        means[field.name] = fsum(known) / len(known) if known else None
    return means


def markdown(results: Sequence[RunResult]) -> str:
    """One table per speed; means over seeds, best TTFT p90 first."""
    rows = averages(results)
    cost_us: dict[tuple[float, str], list[float]] = {}
    for result in results:
        cost_us.setdefault((result.speed, result.policy), []).append(result.cost.mean_us)
    parts = []
    for speed in dict.fromkeys(result.speed for result in results):
        of_speed = [(policy, means) for (at, policy), means in rows.items() if at == speed]
        of_speed.sort(key=lambda row: (row[1]["ttft_p90_s"] is None, row[1]["ttft_p90_s"]))
        offered = of_speed[0][1]["offered_rps"] or 0.0
        titles = ["policy", *(title for title, _, _ in _COLUMNS.values()), "decision µs"]
        lines = [
            f"### Speed ×{speed:.3g}: {offered:.2f} requests/s",
            "",
            "| " + " | ".join(titles) + " |",
            "|" + "---|" + "---:|" * (len(titles) - 1),
        ]
        for policy, means in of_speed:
            mean_us = sum(cost_us[speed, policy]) / len(cost_us[speed, policy])
            cells = [policy, *(_cell(means[name], *how) for name, how in _COLUMNS.items()), f"{mean_us:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(value: float | None, _: str, scale: float, form: str) -> str:
    return "–" if value is None else format(value * scale, form)


def document(command: Mapping[str, Any], results: Sequence[RunResult], *, timings: bool) -> dict[str, Any]:
    """The JSON document.

    Args:
        command: What was asked for: everything that the results depend on.
        results: All runs.
        timings: With what decisions cost; those figures alone differ from run to run.
    """
    runs: list[dict[str, Any]] = []
    for result in results:
        run = {"policy": result.policy, "speed": result.speed, "seed": result.seed, **asdict(result.summary)}
        if timings:
            run["decision"] = asdict(result.cost)
        runs.append(run)
    means = [
        {"policy": policy, "speed": speed, **values} for (speed, policy), values in averages(results).items()
    ]
    return {"command": dict(command), "means": means, "runs": runs}
