"""What a run is to be compared by: arrivals, lengths and times of each request, seconds of gauges.

Rules:
    1. Times are seconds since the first arrival, on the engine's clock.
    2. The client's and the engine's clock differ by a constant that was not measured: the quickest request is
       taken to have been queued the moment it arrived. TTFT and its error are both too small by that much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class MeasurementError(ValueError):
    """A measured run cannot be read; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When one request came and was answered, seconds.

    Attributes:
        arrival_s: At the engine's front end.
        first_s: Its first token.
        last_s: Its last token, >= `first_s`.
        output_tokens: Generated, >= 1.
    """

    arrival_s: float
    first_s: float
    last_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there is no second."""
        if self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Gauges:
    """An engine's gauges at one moment.

    Attributes:
        time_s: When.
        running: Sequences holding blocks.
        waiting: Requests in the queue.
        kv_usage: Share of the KV cache in use, 0..1.
    """

    time_s: float
    running: float
    waiting: float
    kv_usage: float


@dataclass(frozen=True, slots=True)
class Load:
    """One request as it was sent.

    Attributes:
        arrival_s: Not before the request before it.
        prompt_tokens: >= 1.
        output_tokens: >= 1.
        keys: Keys of its full blocks, prompt and output together, as far as they are known.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One engine under load, measured or played.

    Attributes:
        loads: In the order of arrival.
        timings: Likewise.
        gauges: In the order of time.
        preemptions: How often a sequence lost its blocks; None if they were not counted.
    """

    loads: tuple[Load, ...]
    timings: tuple[Timing, ...]
    gauges: tuple[Gauges, ...]
    preemptions: int | None = None


def measured_run(
    requests: Iterable[Mapping[str, Any]],
    gauges: Iterable[Mapping[str, str]] = (),
    keys: Mapping[int, tuple[int, ...]] | None = None,
) -> Run:
    """A run from vLLM's per-request timestamps.

    Args:
        requests: `{input_toks, output_toks, arrival_time, queued_ts, first_token_ts, last_token_ts}`;
            `arrival_time` on the client's clock, the others on the engine's, all in seconds.
        gauges: `{t, running, waiting, kv_cache_pct}`, `t` in seconds since the first arrival.
        keys: Block keys by position in `requests`, as far as they are known.

    Raises:
        MeasurementError: A field is missing or no number, or there is no request.
    """
    rows = list(requests)
    if not rows:
        raise MeasurementError("there are no requests")
    try:
        between_clocks = min(float(row["queued_ts"]) - float(row["arrival_time"]) for row in rows)
        begun = min(float(row["arrival_time"]) for row in rows)
        loads, timings = [], []
        for index in sorted(range(len(rows)), key=lambda index: float(rows[index]["arrival_time"])):
            row = rows[index]
            arrival_s, output = float(row["arrival_time"]) - begun, int(row["output_toks"])
            first_s, last_s = (
                float(row[name]) - begun - between_clocks for name in ("first_token_ts", "last_token_ts")
            )
            loads.append(Load(arrival_s, int(row["input_toks"]), output, (keys or {}).get(index, ())))
            timings.append(Timing(arrival_s, first_s, last_s, output))
        seconds = tuple(
            Gauges(
                float(row["t"]),
                float(row["running"]),
                float(row["waiting"]),
                float(row["kv_cache_pct"]) / 100.0,
            )
            for row in gauges
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MeasurementError(f"{type(error).__name__}: {error}") from None
    return Run(tuple(loads), tuple(timings), seconds)
