"""Many runs: entrants x speeds x seeds over processes, and the speed at which the fleet is full.

Rules:
    1. A run's result depends on its job alone, not on the process it ran in nor on the others.
    2. The knee is the highest speed at which the best of the knee's policies still keeps both limits for
       `KNEE_GOOD_RATIO` of the first seed's requests, to within `KNEE_PRECISION`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from random import Random
from typing import Final

import numpy as np

from tokenway.simulator.replay.fleet import Fleet
from tokenway.simulator.replay.lineup import Entrant
from tokenway.simulator.replay.oracle import prefill_s
from tokenway.simulator.replay.run import Replay
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.summary import (
    RunResult,
    Slo,
    counted,
    decision_cost,
    summarise,
    ttfts,
    waits,
)
from tokenway.simulator.replay.trace import Timing, Trace

KNEE_GOOD_RATIO: Final = 0.9
"""Past the knee queues grow with the trace's length; at nine requests in ten they have begun to."""

KNEE_PRECISION: Final = 1.03
"""Ratio between the speeds below and above the knee at which the search ends."""

AUTO_SPEEDS: Final = (0.7, 0.85, 1.0, 1.1)
"""Of the knee: well below, just below, at it and just past it."""

AT_ONCE_S: Final = 0.001
"""Requests that come within a millisecond come at once: no engine step is shorter."""

_ALIKE: Final = 0.001
"""Of mean TTFT, relative: where four speeds differ by less, nobody waits for anybody at any of them."""

_PROBES: Final = 4
"""Speeds tried at once while searching."""

_MAX_ROUNDS: Final = 12

_QUANTILES: Final = tuple(np.linspace(0.0, 1.0, 201).tolist())

_HEAT_COLUMNS: Final = 120
"""Most columns of a heat map; each is a whole number of seconds."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        entrant: The policy.
        trace: What comes.
        fleet: The engines.
        settings: How; its speed and view are those of the run.
        seed: Of everything drawn.
        slo: What is good.
    """

    entrant: Entrant
    trace: Trace
    fleet: Fleet
    settings: RunSettings
    seed: int
    slo: Slo


def run_job(job: Job) -> RunResult:
    """Do one run."""
    settings = job.settings if job.entrant.view is None else replace(job.settings, view=job.entrant.view)
    outcome = Replay(
        job.trace,
        job.fleet,
        job.entrant.maker(),
        settings,
        lambda use: Random(f"{job.seed}/{use}"),
        time.perf_counter,
    ).run()
    slos = [(request.slo_ttft_s, request.slo_tpot_s) for request in job.trace.requests]
    ttft_s = ttfts(counted(outcome, settings.warmup_s))
    seconds = 1 + max((second for row in outcome.computed_tokens for second in row), default=0)
    bin_s = -(-seconds // _HEAT_COLUMNS)
    quantiles = tuple(np.quantile(ttft_s, _QUANTILES).tolist()) if ttft_s.size else ()
    return RunResult(
        job.entrant.name,
        settings.speed,
        job.seed,
        summarise(outcome, slos, job.slo, settings.warmup_s),
        decision_cost(outcome),
        waits(counted(outcome, settings.warmup_s)),
        quantiles,
        tuple(_binned(row, bin_s, -(-seconds // bin_s)) for row in outcome.computed_tokens),
        bin_s,
    )


def _binned(computed_tokens: Mapping[int, int], bin_s: int, columns: int) -> tuple[float, ...]:
    sums = [0] * columns
    for second, tokens in computed_tokens.items():
        sums[second // bin_s] += tokens
    return tuple(tokens / bin_s for tokens in sums)


@contextmanager
def pool(jobs: int) -> Iterator[Executor]:
    """Processes for `run_all`; a fresh interpreter each, so nothing is inherited."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        yield executor


def run_all(
    jobs: Sequence[Job], executor: Executor | None, done: Callable[[RunResult], None]
) -> list[RunResult]:
    """Do many runs; results in the order of the jobs.

    Args:
        jobs: What to do.
        executor: Where; None runs them here, one after another.
        done: Called with each result as it comes.
    """
    if executor is None:
        results = []
        for job in jobs:
            results.append(run_job(job))
            done(results[-1])
        return results
    futures = {executor.submit(run_job, job): index for index, job in enumerate(jobs)}
    found: dict[int, RunResult] = {}
    for future in as_completed(futures):
        found[futures[future]] = future.result()
        done(found[futures[future]])
    return [found[index] for index in range(len(jobs))]


@dataclass(frozen=True, slots=True)
class Knee:
    """Where a fleet is full.

    Attributes:
        speed: The highest speed tried that was still good; the lowest tried if none was.
        missing: Why it is no knee, in words; None if it is one.
    """

    speed: float
    missing: str | None = None


def full_speed(trace: Trace, fleet: Fleet) -> float:
    """Speed at which computing every prompt without any cache would keep every engine busy all the time.

    A first guess of where the fleet is full, no more.
    """
    work_s = 0.0
    for request in trace.requests:
        times = [prefill_s(member.profile, 0, request.prompt_tokens) for member in fleet]
        work_s += len(times) / sum(1.0 / time_s for time_s in times)
    return len(fleet) * max(_span_s(trace), 1.0) / work_s


def speed_at_once(trace: Trace) -> float:
    """Speed from which on all requests, or sessions, come at once: what is faster is the same."""
    return _span_s(trace) / AT_ONCE_S


def _span_s(trace: Trace) -> float:
    if trace.timing is Timing.SESSIONS:
        return len({request.session for request in trace.requests}) / trace.sessions_per_s
    return max(request.arrival_s for request in trace.requests)


def find_knee(
    jobs_at: Callable[[float], Sequence[Job]],
    start: float,
    executor: Executor | None,
    *,
    fastest: float = float("inf"),
) -> Knee:
    """The knee, see Rule 2; a short trace, or limits that no engine keeps, have none.

    Args:
        jobs_at: The runs at one speed; the best of them counts.
        start: Where to look first, > 0.
        executor: As for `run_all`.
        fastest: What is faster need not be tried.
    """
    low, high = 0.0, float("inf")
    speeds = [start * factor for factor in (0.35, 0.6, 1.0, 1.6)]
    at_any_speed = not fastest  # as fast: all come at once
    fastest = max(fastest, speeds[0])
    for _ in range(_MAX_ROUNDS):
        speeds = sorted({min(speed, fastest) for speed in speeds})
        good, alike = _good_ratios(jobs_at, speeds, executor)
        for speed, ratio in zip(speeds, good, strict=True):
            if ratio < KNEE_GOOD_RATIO:
                high = min(high, speed)
        low = max([low, *(s for s, ratio in zip(speeds, good, strict=True) if s < high)])
        if low and high / low <= KNEE_PRECISION:
            return Knee(low)
        if high == float("inf") and low >= fastest:
            return Knee(low, "all requests at once are no load for this fleet")
        if not low and alike and (len(speeds) > 1 or at_any_speed):
            return Knee(min(speeds), "the limits are missed however slowly requests come")
        if high == float("inf"):
            speeds = [low * 1.5**power for power in range(1, _PROBES + 1)]
        elif not low:
            speeds = [high / 1.5**power for power in range(_PROBES, 0, -1)]
        else:
            speeds = [low * (high / low) ** (step / (_PROBES + 1)) for step in range(1, _PROBES + 1)]
    return Knee(low or min(speeds), f"none was found in {_MAX_ROUNDS} rounds")


def _good_ratios(
    jobs_at: Callable[[float], Sequence[Job]], speeds: Sequence[float], executor: Executor | None
) -> tuple[list[float], bool]:
    """The best share of good requests at each speed, and whether requests wait as long at all of them."""
    jobs = [(speed, job) for speed in speeds for job in jobs_at(speed)]
    results = run_all([job for _, job in jobs], executor, lambda _: None)
    by_speed = [
        [r.summary for (at, _), r in zip(jobs, results, strict=True) if at == speed] for speed in speeds
    ]
    best = [max(summary.good_ratio for summary in summaries) for summaries in by_speed]
    means = [[summary.ttft_mean_s or 0.0 for summary in summaries] for summaries in by_speed]
    alike = all(max(of_policy) <= min(of_policy) * (1.0 + _ALIKE) for of_policy in zip(*means, strict=True))
    return best, alike
