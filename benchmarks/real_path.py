"""The order of policies on the real path: Envoy, Tokenway and simulated engines over HTTP, in real time.

    python -m benchmarks.real_path [--rates 3.6,5.6] [--seconds 90] [--only round_robin,...]

For each rate and each set-up in turn: four simulated engines (a process each, an H100 slowed by
`SLOWDOWN`) that announce their caches, `tokenway serve`, and Envoy are started afresh, so that no cache and
nothing learned is carried over. All get the very same requests at the very same times: conversations behind
tenants' system prompts (`benchmarks.conversations`), Poisson arrivals, streamed completions. Warm-up requests
count nowhere but in the requests per engine. Rates are `BELOW_KNEE` and `PAST_KNEE` of the highest rate at
which the best rival of least completion still answers nine of ten requests within the limits, found in
virtual time. `announced` is the share of decisions in which the chosen engine's cache was known from its
announcements.

The same trace, fleet and rules are then replayed in virtual time through `tokenway.simulator.replay`,
`SIM_RUNS` times with arrivals moved by a few milliseconds: how far those runs are apart is what one run's
figure is good for. The last table of a rate has both beside each other.

CPU is user + system time from /proc from the end of the warm-up to the last arrival, in cores. `busy` is that
of the whole machine over its cores, `waited` the share of the time in which some process waited for a core:
much of it makes latencies those of the machine.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson
from tokenizers import Tokenizer

from benchmarks import processes
from benchmarks.conversations import conversations, one_token_words, prompts
from benchmarks.real_engines import ENGINES, MODEL, PROFILE, SLOWDOWN, WARMUP_S, Real, measure
from benchmarks.real_path_setups import SETUPS, Setup, refusal
from benchmarks.streaming import ScheduledRequest
from testbed.tokenizer_folder import write_tokenizer
from tokenway.simulator.engine.profile import PROFILES, EngineProfile
from tokenway.simulator.replay.fleet import Fleet, Member
from tokenway.simulator.replay.lineup import Entrant
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.summary import Slo, Summary
from tokenway.simulator.replay.sweep import Job, find_knee, full_speed, pool, run_all
from tokenway.simulator.replay.trace import Trace

SEED: Final = 1
SIM_RUNS: Final = 20
"""Past the knee five of them were too few: they spanned a quarter of what twenty did."""

JITTER_S: Final = 0.01
"""Arrivals are moved by up to so much in all virtual runs but the first: about what a busy machine does."""

SLO: Final = Slo(ttft_s=5.0, tpot_s=0.1 * SLOWDOWN)
"""That of `tokenway.simulator.replay`; a step takes so many times as long here, and a queue of 5 s is one
anywhere."""

BELOW_KNEE: Final = 0.7
PAST_KNEE: Final = 1.1
"""Of the knee: the first and the last of `tokenway.simulator.replay.sweep.AUTO_SPEEDS`."""

KNEE_REQUESTS: Final = 4_000
"""As many as come in the longest run at any speed that the search may try."""

WORKERS_NEWS_S: Final = 0.000_05
"""From one worker to another: counters are one memory, and a frame on a Unix socket takes about so long."""

GATEWAYS_NEWS_S: Final = 0.000_3
"""From one gateway to another by Redis: the product's median (docs/adr/0015)."""

SCRAPE_S: Final = 5.0
"""Tokenway's default `health.interval_s`."""


def slowed(profile: EngineProfile, factor: float) -> EngineProfile:
    """The profile of an engine whose every second takes `factor` seconds."""
    times = {
        name: factor * getattr(profile, name)
        for name in (
            "a_ms",
            "w0_ms",
            "b_ms_per_token",
            "c_ms_per_pair",
            "d_ms_per_context_token",
            "e_ms_per_seq",
            "alpha0_ms",
        )
    }
    return replace(profile, **times)


def fleet() -> Fleet:
    """The engines in virtual time."""
    return (Member(slowed(PROFILES[PROFILE], SLOWDOWN)),) * ENGINES


def schedule(trace: Trace, texts: Sequence[str], rate: float, until_s: float) -> list[ScheduledRequest]:
    """The requests of a run.

    Args:
        trace: One request per second on average, from time 0.
        texts: Their prompts.
        rate: Requests per second.
        until_s: None comes later.
    """
    return [
        ScheduledRequest(
            request.arrival_s / rate,
            orjson.dumps(
                {
                    "model": MODEL,
                    "prompt": text,
                    "max_tokens": request.output_tokens,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ),
            request.prompt_tokens,
            request.output_tokens,
        )
        for request, text in zip(trace.requests, texts, strict=True)
        if request.arrival_s / rate <= until_s
    ]


# Virtual time


def job(setup: Setup, trace: Trace, rate: float, until_s: float) -> Job:
    """The replay of a run: what the real path does, as far as the simulator has it.

    Lengths are known and announcements matched to the engine's block: all words are about equally long here,
    so the errors that the simulator assumes of other prompts are left out.
    """
    settings = RunSettings(
        speed=rate,
        metric_age_s=SCRAPE_S,
        router_block_tokens=PROFILES[PROFILE].block_size,
        token_error=0.0,
        warmup_s=WARMUP_S,
        duration_s=until_s,
        gateways=setup.workers * setup.gateways,
        push_delay_s=WORKERS_NEWS_S if setup.gateways == 1 else GATEWAYS_NEWS_S,
    )
    return Job(Entrant(setup.name, setup.replayed), trace, fleet(), settings, SEED, SLO)


def knee(rivals: Sequence[Setup], trace: Trace, until_s: float) -> float:
    """Requests per second that the best rival just carries, in virtual time."""
    with pool(os.cpu_count() or 1) as executor:
        return find_knee(
            lambda rate: [job(rival, trace, rate, until_s) for rival in rivals],
            full_speed(trace, fleet()),
            executor,
        ).speed


def moved(trace: Trace, rng: Random, by: float) -> Trace:
    """The trace with each arrival moved by -`by`..`by` seconds of its own time, not before 0."""
    return replace(
        trace,
        requests=tuple(
            replace(request, arrival_s=max(0.0, request.arrival_s + rng.uniform(-by, by)))
            for request in trace.requests
        ),
    )


def replayed(
    setup: Setup, trace: Trace, rate: float, until_s: float, executor: Executor | None = None
) -> list[Summary]:
    """A set-up in virtual time, `SIM_RUNS` times: as it is first, then with arrivals moved.

    Args:
        setup: Which.
        trace: One request per second on average.
        rate: Requests per second.
        until_s: None comes later.
        executor: Where; None runs them here.
    """
    traces = [trace, *(moved(trace, Random(run), JITTER_S * rate) for run in range(1, SIM_RUNS))]
    jobs = [job(setup, each, rate, until_s) for each in traces]
    return [result.summary for result in run_all(jobs, executor, lambda _: None)]


# Reports


def real_row(name: str, run: Real) -> str:
    """A line of the table of the real path."""
    of, cores = run.figures, run.used.cores
    return (
        f"| {name} | {of.requests} | {_s(of.ttft_mean_s)} | {_s(of.ttft_p50_s)} | {_s(of.ttft_p90_s)} "
        f"| {_s(of.ttft_p99_s)} | {_ms(of.tpot_mean_s)} | {of.cached_ratio:.3f} | {of.errors} | {of.refused} "
        f"| {max(run.engine_requests) - min(run.engine_requests)} {run.engine_requests} "
        f"| {run.announced:.3f} | {run.held} | {cores['engines']:.2f} {cores['tokenway']:.2f} "
        f"{cores['envoy']:.2f} {cores['client']:.2f} | {run.used.busy_ratio:.0%} {run.used.waited_ratio:.0%} "
        f"| {run.drained_s:.0f} |"
    )


REAL_HEAD: Final = (
    "| set-up | n | TTFT s mean | p50 | p90 | p99 | TPOT ms | cached | errors | 429 | max-min per engine "
    "| announced | held | cores: engines tokenway envoy client | busy waited | drain s |\n"
    + "|---" * 16
    + "|"
)


def both_row(name: str, run: Real, summaries: Sequence[Summary]) -> str:
    """A line of the table that has the real path and the simulator beside each other."""
    of = run.figures
    cells = (
        _both(of.ttft_mean_s, [each.ttft_mean_s for each in summaries], 1.0),
        _both(of.ttft_p90_s, [each.ttft_p90_s for each in summaries], 1.0),
        _both(of.tpot_mean_s, [each.tpot_mean_s for each in summaries], 1e3),
        _both(of.cached_ratio, [each.hit_ratio for each in summaries], 1.0),
        f"{of.refused / max(1, of.requests):.3f} / {statistics.fmean(s.shed_ratio for s in summaries):.3f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


BOTH_HEAD: Final = (
    "real / simulated mean [least..most of the runs] (real over simulated mean)\n\n"
    "| set-up | TTFT s mean | TTFT s p90 | TPOT ms | cached | refused |\n" + "|---" * 6 + "|"
)


def _both(real: float | None, simulated: Sequence[float | None], unit: float) -> str:
    known = [unit * value for value in simulated if value is not None]
    if real is None or not known:
        return "–"
    mean = statistics.fmean(known)
    return (
        f"{unit * real:.3g} / {mean:.3g} [{min(known):.3g}..{max(known):.3g}] ({unit * real / mean - 1:+.0%})"
    )


def _s(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{1e3 * value:.0f}"


def _rounded(value: Any) -> Any:
    """Floats of a document to four decimals: the figures are not good for more."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


async def compare(setups: Sequence[Setup], rates: Sequence[float], seconds: float) -> dict[str, Any]:
    """Everything, printed on the way; what the last line holds.

    Args:
        setups: In this order at each rate.
        rates: Requests per second; none for those of the knee.
        seconds: How long arrivals count, after the warm-up.
    """
    report: dict[str, Any] = {"machine": processes.machine(), "rates": {}, "skipped": {}}
    print(json.dumps(report["machine"]), flush=True)
    taken = []
    for setup in setups:
        reason = refusal(setup)
        if reason is None:
            taken.append(setup)
        else:
            report["skipped"][setup.name] = reason
            print(f"skipped: {setup.name}: {reason}", flush=True)
    until_s = WARMUP_S + seconds
    trace = conversations(Random(f"{SEED}/trace"), KNEE_REQUESTS)
    if not rates:
        found = knee([setup for setup in SETUPS if setup.is_rival], trace, until_s)
        report["knee_requests_per_s"] = round(found, 3)
        print(f"knee of the best rival: {found:.2f} requests/s, by virtual time", flush=True)
        rates = [round(factor * found, 2) for factor in (BELOW_KNEE, PAST_KNEE)]
    with tempfile.TemporaryDirectory(prefix="twr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        tokenizer = write_tokenizer(Path(folder) / "tokenizer")
        words = one_token_words(Tokenizer.from_file(str(tokenizer)))
        for rate in rates:
            first = replace(trace, requests=tuple(r for r in trace.requests if r.arrival_s <= until_s * rate))
            asked = schedule(first, prompts(first, words), rate, until_s)
            print(f"\n## {rate} requests/s, {len(asked)} in {until_s:.0f} s\n\n{REAL_HEAD}", flush=True)
            runs: dict[str, Real] = {}
            for setup in taken:
                runs[setup.name] = run = await measure(setup, Path(folder), tokenizer, asked, until_s)
                print(real_row(setup.name, run), flush=True)
            for name, run in runs.items():
                if run.errors:
                    print(f"\n{name}: {run.errors}", flush=True)
            print(f"\n{BOTH_HEAD}", flush=True)
            report["rates"][str(rate)] = of_rate = {}
            with pool(os.cpu_count() or 1) as executor:
                for setup in taken:
                    summaries = replayed(setup, first, rate, until_s, executor)
                    print(both_row(setup.name, runs[setup.name], summaries), flush=True)
                    of_rate[setup.name] = {
                        "real": _rounded(asdict(runs[setup.name])),
                        "simulated": [_rounded(asdict(summary)) for summary in summaries],
                    }
    return report


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rates", help="requests per second, by comma; by default those of the knee")
    parser.add_argument("--seconds", type=float, default=90.0, help="that count, per set-up and rate")
    parser.add_argument("--only", help="set-ups by comma; by default all")
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")] if options.rates else []
    names = options.only.split(",") if options.only else [setup.name for setup in SETUPS]
    unknown = set(names) - {setup.name for setup in SETUPS}
    if unknown:
        parser.error(f"no set-up is called {', '.join(sorted(unknown))}")
    setups = [setup for setup in SETUPS if setup.name in names]
    print(json.dumps(asyncio.run(compare(setups, rates, options.seconds))))


if __name__ == "__main__":
    main()
