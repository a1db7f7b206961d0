"""What a run comes to: latencies, cache use, goodput, and what they were paid with.

Rules:
    1. Requests that arrived during warm-up count nowhere. A refused request counts as shed and as not good;
       it has no latency. So does one whose client left, but that counts as abandoned instead of shed.
    2. TTFT and end-to-end time begin when a request first comes to the gateway: time held is part of them,
       and so is the time between the tries of a client that was refused. However often it came, it is one.
    3. Rates are over the span of the arrivals that count, not over the drain after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from tokenway.simulator.replay.outcome import Replayed, Served

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits a request must keep to be good; its own, where it has any, go before.

    The defaults suit long prompts on the shipped profiles: a step that computes a full chunk of prefill takes
    an 8B model on H100 50 to 100 ms, so that decodes beside a steady stream of prefills need that long.

    Attributes:
        ttft_s: Time to first token.
        tpot_s: Time per output token.
    """

    ttft_s: float = 5.0
    tpot_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run; seconds, ratios 0..1, requests per second. None where nothing was answered.

    Attributes:
        requests: Those that count.
        offered_rps: Their rate of arrival.
        goodput_rps: Of those that kept both limits.
        good_ratio: Share of them.
        shed_ratio: Share that was refused, for good if clients try again.
        abandoned_ratio: Share whose client left.
        retried_ratio: Share that came more than once.
        ttft_mean_s: Time to first token.
        ttft_p50_s: Its median.
        ttft_p90_s: Its 90th percentile.
        ttft_p99_s: Its 99th percentile.
        tpot_mean_s: Time per output token after the first.
        tpot_p99_s: Its 99th percentile.
        e2e_mean_s: Until the last token.
        available_ratio: Prompt tokens that a cache of the whole fleet that forgets nothing would have had, of
            all prompt tokens.
        foreseen_ratio: Those that the gateway expected where it sent the request.
        hit_ratio: Those that the engine found.
        wasted_ratio: Prompt tokens computed though another engine had them cached, of all.
        load_spread: Tokens computed by the busiest engine over the mean.
        held_ratio: Share that was held at the gateway.
        hold_mean_s: How long, the mean over those that were held.
        hold_max_s: The longest.
        preemptions: Of all engines, warm-up included.
        end_s: Virtual time of the last answer.
    """

    requests: int
    offered_rps: float
    goodput_rps: float
    good_ratio: float
    shed_ratio: float
    abandoned_ratio: float
    retried_ratio: float
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    tpot_p99_s: float | None
    e2e_mean_s: float | None
    available_ratio: float
    foreseen_ratio: float
    hit_ratio: float
    wasted_ratio: float
    load_spread: float
    held_ratio: float
    hold_mean_s: float
    hold_max_s: float
    preemptions: int
    end_s: float


@dataclass(frozen=True, slots=True)
class DecisionCost:
    """Real time that decisions took; differs from run to run.

    Attributes:
        decisions: How many were made, again-asked ones included.
        mean_us: Of one.
        mean_per_request_us: Of all those of one request.
    """

    decisions: int
    mean_us: float
    mean_per_request_us: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to.

    Attributes:
        policy: Name of the entrant.
        speed: Of the run.
        seed: Of the run.
        summary: Figures.
        cost: Real time of its decisions.
        waits_s: Where the time to the first token went: seconds held at the gateway, in the engine's queue,
            and in prefill (with the tries of a client that was refused before), means over each tenth of the
            answered requests, the quickest first; empty if nothing was answered.
        ttft_quantiles_s: Quantiles of TTFT at 0, 0.5, ... 100 %; empty if nothing was answered.
        heat: Tokens computed per second, one row per engine, one column per `heat_s`.
        heat_s: Width of a column.
    """

    policy: str
    speed: float
    seed: int
    summary: Summary
    cost: DecisionCost
    waits_s: tuple[tuple[float, float, float], ...]
    ttft_quantiles_s: tuple[float, ...]
    heat: tuple[tuple[float, ...], ...]
    heat_s: int


def counted(outcome: Replayed, warmup_s: float) -> list[Served]:
    """The requests that count."""
    return [served for served in outcome.served if served.arrived_s >= warmup_s]


def ttfts(served: Sequence[Served]) -> Floats:
    """Times to first token in seconds, of those that got one; shape (n,), unordered."""
    return np.array([each.first_s - each.arrived_s for each in served if each.first_s is not None])


def waits(served: Sequence[Served]) -> tuple[tuple[float, float, float], ...]:
    """See `RunResult.waits_s`."""
    parts = sorted(
        (each.first_s - each.arrived_s, each.held_s, each.admitted_s - each.sent_s)
        for each in served
        if each.first_s is not None and each.sent_s is not None and each.admitted_s is not None
    )
    tenths = [parts[len(parts) * at // 10 : len(parts) * (at + 1) // 10] for at in range(10)]
    means = [np.array(tenth).mean(axis=0).tolist() for tenth in tenths if tenth]
    return tuple((held, queued, ttft - held - queued) for ttft, held, queued in means)


def summarise(
    outcome: Replayed, slos: Sequence[tuple[float | None, float | None]], default: Slo, warmup_s: float
) -> Summary:
    """The figures of a run.

    Args:
        outcome: Of it.
        slos: (TTFT, TPOT) limits of each request of the trace, None where it has none of its own.
        default: For those.
        warmup_s: What arrived before does not count.
    """
    served = counted(outcome, warmup_s)
    answered = [each for each in served if each.first_s is not None]
    span_s = _span_s(served)
    ttft_s = ttfts(served)
    tpot_s = np.array([_tpot_s(each) for each in answered if each.output_tokens > 1])
    good = sum(_is_good(each, *slos[each.index], default) for each in answered)
    prompt = sum(each.prompt_tokens for each in answered)
    wasted = sum(max(0, each.best_tokens - each.cached_tokens) for each in answered)
    abandoned = sum(each.is_abandoned for each in served)
    holds = [each.held_s for each in served if each.decisions > each.tries]
    loads = [
        sum(tokens for second, tokens in row.items() if second >= int(warmup_s))
        for row in outcome.computed_tokens
    ]
    return Summary(
        requests=len(served),
        offered_rps=len(served) / span_s,
        goodput_rps=good / span_s,
        good_ratio=good / max(1, len(served)),
        shed_ratio=1.0 - (len(answered) + abandoned) / max(1, len(served)),
        abandoned_ratio=abandoned / max(1, len(served)),
        retried_ratio=sum(each.tries > 1 for each in served) / max(1, len(served)),
        ttft_mean_s=_mean(ttft_s),
        ttft_p50_s=_percentile(ttft_s, 50),
        ttft_p90_s=_percentile(ttft_s, 90),
        ttft_p99_s=_percentile(ttft_s, 99),
        tpot_mean_s=_mean(tpot_s),
        tpot_p99_s=_percentile(tpot_s, 99),
        e2e_mean_s=_mean(np.array([each.end_s - each.arrived_s for each in answered])),
        available_ratio=sum(each.available_tokens for each in answered) / max(1, prompt),
        foreseen_ratio=sum(each.foreseen_tokens for each in answered) / max(1, prompt),
        hit_ratio=sum(each.cached_tokens for each in answered) / max(1, prompt),
        wasted_ratio=wasted / max(1, prompt),
        load_spread=max(loads) * len(loads) / max(1, sum(loads)),
        held_ratio=len(holds) / max(1, len(served)),
        hold_mean_s=fsum(holds) / max(1, len(holds)),
        hold_max_s=max(holds, default=0.0),
        preemptions=outcome.preemptions,
        end_s=outcome.end_s,
    )


def decision_cost(outcome: Replayed) -> DecisionCost:
    """What the policy took of a real processor."""
    decisions = sum(each.decisions for each in outcome.served)
    total_us = 1e6 * sum(each.decision_s for each in outcome.served)
    return DecisionCost(decisions, total_us / max(1, decisions), total_us / max(1, len(outcome.served)))


def _span_s(served: Sequence[Served]) -> float:
    arrived = [each.arrived_s for each in served]
    return max(arrived) - min(arrived) or 1.0 if arrived else 1.0


def _tpot_s(each: Served) -> float:
    assert each.first_s is not None, "only of what was answered"
    return (each.end_s - each.first_s) / (each.output_tokens - 1)


def _is_good(each: Served, ttft_limit_s: float | None, tpot_limit_s: float | None, default: Slo) -> bool:
    assert each.first_s is not None, "only of what was answered"
    if each.first_s - each.arrived_s > (default.ttft_s if ttft_limit_s is None else ttft_limit_s):
        return False
    limit_s = default.tpot_s if tpot_limit_s is None else tpot_limit_s
    return each.output_tokens == 1 or _tpot_s(each) <= limit_s


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _percentile(values: Floats, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values.size else None
