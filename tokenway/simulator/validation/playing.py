"""Measured arrivals, played again in the engine core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tokenway.simulator.engine.engine import Engine, EngineRequest
from tokenway.simulator.engine.profile import EngineProfile
from tokenway.simulator.validation.measured import Gauges, Load, Run, Timing

GAUGE_S: Final = 1.0
"""As often as vLLM's own log says how many are running."""


def play(profile: EngineProfile, loads: Sequence[Load], ranks: int = 1) -> Run:
    """Send `loads` to an engine in virtual time.

    Args:
        profile: Of each rank.
        loads: In the order of arrival.
        ranks: Data-parallel engines behind one front end, >= 1. Each request goes to the one with the least
            4 · waiting + running, as vLLM's front end does; ranks do not wait for each other.

    Returns:
        The run; its gauges are summed over ranks, `kv_usage` averaged. A step under way counts as done.

    Raises:
        ValueError: A request does not fit the engine, or would be refused.
    """
    engines = [Engine(profile) for _ in range(ranks)]
    first_s = [0.0] * len(loads)
    last_s = [0.0] * len(loads)
    gauges: list[Gauges] = []
    preemptions = sent = 0
    while True:
        due = [
            (due_s, rank)
            for rank, engine in enumerate(engines)
            if (due_s := engine.next_step_due()) is not None
        ]
        due_s, rank = min(due, default=(math.inf, 0))
        arrives_s = loads[sent].arrival_s if sent < len(loads) else math.inf
        now_s = min(arrives_s, due_s)
        if now_s == math.inf:
            break
        while now_s >= (len(gauges) + 1) * GAUGE_S:
            gauges.append(_gauges((len(gauges) + 1) * GAUGE_S, engines))
        if arrives_s <= due_s:
            load = loads[sent]
            engine = min(engines, key=lambda each: 4 * each.num_waiting + each.num_running)
            request = EngineRequest(str(sent), load.prompt_tokens, load.output_tokens, load.keys)
            if engine.submit(request, load.arrival_s) is not None:
                raise ValueError(f"the queue of {profile.name} is full")
            sent += 1
            continue
        step = engines[rank].step(due_s)
        for request_id in step.first_tokens:
            first_s[int(request_id)] = step.end_s
        for request_id in step.finished:
            last_s[int(request_id)] = step.end_s
        preemptions += len(step.preempted)
    timings = (
        Timing(load.arrival_s, first, last, load.output_tokens)
        for load, first, last in zip(loads, first_s, last_s, strict=True)
    )
    return Run(tuple(loads), tuple(timings), tuple(gauges), preemptions)


def _gauges(time_s: float, engines: Sequence[Engine]) -> Gauges:
    return Gauges(
        time_s,
        sum(engine.num_running for engine in engines),
        sum(engine.num_waiting for engine in engines),
        sum(engine.kv_usage_ratio for engine in engines) / len(engines),
    )
