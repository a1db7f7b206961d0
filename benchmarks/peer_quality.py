"""How well routers of others choose, beside `least_completion`: real ones, before engines in real time.

    python -m benchmarks.peer_quality [--rates 3.52,5.53] [--seeds 1,2,3] [--seconds 60] [--only NAME,...]

Engines, conversations and arrivals are those of `benchmarks.real_path`. All gateways of a batch (a rate and
a seed) run at the same time, each before four engines of its own, and `least_completion` is one of them in
every batch: compare within a batch, for other work on the machine falls on all of it alike. Warm-up requests
count nowhere but in the requests per engine. Where the client was late by more than some hundredths of a
second, the machine was too busy and the figures are its own. Announcements of caches go to Tokenway and to
`vllm-router kv_aware`.

What is unfair to the others: engines run at an eighth of an H100's speed, and some have guards in absolute
seconds, which then act too early. What is unfair to Tokenway: nothing known.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from tokenizers import Tokenizer

from benchmarks import processes
from benchmarks.conversations import conversations, one_token_words, prompts
from benchmarks.peer_routers import add_only, chosen
from benchmarks.real_engines import WARMUP_S, Gateway, Real, measure_together
from benchmarks.real_path import KNEE_REQUESTS, schedule
from benchmarks.real_path_setups import SETUPS
from testbed.tokenizer_folder import write_tokenizer

OURS: Final = "least_completion"

RATES: Final = (3.52, 5.53)
"""Requests per second: 0.7 and 1.1 of the knee that `benchmarks.real_path` finds for the best rival."""

HEAD: Final = (
    "| requests/s | seed | | n | TTFT mean s | × least_completion | p50 | p90 | p99 | TPOT ms | cached "
    "| errors | max-min per engine | cores: engines, gateway | busy | client late at worst s |\n"
    + "|---" * 16
    + "|"
)


def row(rate: float, seed: int, name: str, run: Real | TimeoutError, ours: Real | TimeoutError) -> str:
    """A line of the table of batches.

    Args:
        rate: Requests per second.
        seed: Of conversations and arrivals.
        name: Of the gateway.
        run: What became of it.
        ours: `least_completion` of the same batch.
    """
    if isinstance(run, TimeoutError):
        return f"| {rate:g} | {seed} | {name} | does not start: {run} |" + " |" * 12
    of = run.figures
    ratio = ratios(run, ours)
    times = [_s(value) for value in (of.ttft_p50_s, of.ttft_p90_s, of.ttft_p99_s)]
    gateway = sum(used for role, used in run.used.cores.items() if role not in ("engines", "client"))
    return (
        f"| {rate:g} | {seed} | {name} | {of.requests} | {_s(of.ttft_mean_s)} "
        f"| {'–' if ratio is None else f'{ratio[0]:.2f}'} | {' | '.join(times)} "
        f"| {'–' if of.tpot_mean_s is None else f'{1e3 * of.tpot_mean_s:.0f}'} | {of.cached_ratio:.3f} "
        f"| {of.errors + of.refused} | {max(run.engine_requests) - min(run.engine_requests)} "
        f"| {run.used.cores['engines']:.2f}, {gateway:.3f} | {run.used.busy_ratio:.0%} "
        f"| {of.late_max_s:.2f} |"
    )


def ratios(run: Real, ours: Real | TimeoutError) -> tuple[float, float, float] | None:
    """TTFT mean, its p90 and TPOT over those of another run; None where one of them answered nothing."""
    if isinstance(ours, TimeoutError):
        return None
    pairs = [
        (getattr(run.figures, name), getattr(ours.figures, name))
        for name in ("ttft_mean_s", "ttft_p90_s", "tpot_mean_s")
    ]
    found = [theirs / base for theirs, base in pairs if theirs and base]
    return (found[0], found[1], found[2]) if len(found) == 3 else None


def summary(of_rate: Mapping[int, Mapping[str, Real | TimeoutError]]) -> str:
    """Ratios to `least_completion` of the same batch: geometric means over seeds, worst of ours first.

    Args:
        of_rate: By seed, by gateway.
    """
    by_name: dict[str, list[tuple[float, float, float]]] = {}
    for runs in of_rate.values():
        for name, run in runs.items():
            ratio = None if isinstance(run, TimeoutError) or name == OURS else ratios(run, runs[OURS])
            if ratio is not None:
                by_name.setdefault(name, []).append(ratio)
    lines = [
        "| × least_completion of the same batch | TTFT mean (each seed) | p90 | TPOT |",
        "|---" * 4 + "|",
    ]
    for name, found in sorted(by_name.items(), key=lambda item: _mean(item[1], 0)):
        each = ", ".join(f"{ratio[0]:.2f}" for ratio in found)
        lines.append(
            f"| {name} | {_mean(found, 0):.2f} ({each}) | {_mean(found, 1):.2f} | {_mean(found, 2):.2f} |"
        )
    return "\n".join(lines)


def _mean(found: Sequence[tuple[float, float, float]], column: int) -> float:
    return statistics.geometric_mean(ratio[column] for ratio in found)


def _s(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


async def compare(
    gateways: Sequence[Gateway], rates: Sequence[float], seeds: Sequence[int], seconds: float
) -> dict[str, Any]:
    """All batches, printed on the way; what the last line holds.

    Args:
        gateways: At the same time in each batch, `OURS` among them.
        rates: Requests per second.
        seeds: Of conversations and arrivals.
        seconds: How long arrivals count, after the warm-up.
    """
    until_s = WARMUP_S + seconds
    report: dict[str, Any] = {"machine": processes.machine(), "seconds": seconds, "rates": {}}
    print(f"{json.dumps(report['machine'])}\n\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory(prefix="twq", dir="/tmp", ignore_cleanup_errors=True) as folder:
        tokenizer = write_tokenizer(Path(folder) / "tokenizer")
        words = one_token_words(Tokenizer.from_file(str(tokenizer)))
        found: dict[float, dict[int, dict[str, Real | TimeoutError]]] = {rate: {} for rate in rates}
        for rate in rates:
            for seed in seeds:
                trace = conversations(Random(f"{seed}/trace"), KNEE_REQUESTS)
                first = tuple(each for each in trace.requests if each.arrival_s <= until_s * rate)
                trace = replace(trace, requests=first)
                asked = schedule(trace, prompts(trace, words), rate, until_s)
                runs = await measure_together(gateways, Path(folder), tokenizer, asked, until_s)
                found[rate][seed] = runs
                for gateway in gateways:
                    print(row(rate, seed, gateway.name, runs[gateway.name], runs[OURS]), flush=True)
    for rate, of_rate in found.items():
        print(f"\n{rate:g} requests/s\n\n{summary(of_rate)}", flush=True)
        report["rates"][str(rate)] = {
            seed: {
                name: str(run) if isinstance(run, TimeoutError) else asdict(run.figures)
                for name, run in runs.items()
            }
            for seed, runs in of_rate.items()
        }
    return report


def main() -> None:
    """Install what can be had, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="requests per second, by comma")
    parser.add_argument("--seeds", default="1", help="by comma (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="that count (default: %(default)s)")
    add_only(parser)
    options = parser.parse_args()
    routers = chosen(parser, options.only)
    ours = next(setup for setup in SETUPS if setup.name == OURS)
    rates = [float(rate) for rate in options.rates.split(",")]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    print(json.dumps(asyncio.run(compare((ours, *routers), rates, seeds, options.seconds))))


if __name__ == "__main__":
    main()
