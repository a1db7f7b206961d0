"""How far one run is from another of the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenway.simulator.validation.measured import Run

QUANTILES: Final = (0.5, 0.9, 0.99)
"""Those of the reports."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One quantity's distribution, measured and played, in the quantity's unit.

    Attributes:
        measured: Mean and `QUANTILES`.
        played: Likewise.
        distance: Largest vertical distance between the two distribution functions (Kolmogorov-Smirnov).
    """

    measured: tuple[float, ...]
    played: tuple[float, ...]
    distance: float

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative errors of mean and quantiles."""
        return tuple(ours / real - 1.0 for real, ours in zip(self.measured, self.played, strict=True))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of the same requests.

    Attributes:
        requests: How many were compared.
        ttft_s: Time to first token.
        tpot_s: Time per output token.
        e2e_s: Arrival to last token.
    """

    requests: int
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread

    def document(self) -> dict[str, Any]:
        """As JSON; seconds and shares."""
        return {
            "requests": self.requests,
            **{
                name: {
                    "measured": [round(value, 5) for value in spread.measured],
                    "played": [round(value, 5) for value in spread.played],
                    "errors": [round(value, 4) for value in spread.errors],
                    "distance": round(spread.distance, 4),
                }
                for name, spread in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s), ("e2e_s", self.e2e_s))
            },
        }


def compare(measured: Run, played: Run, judged: Sequence[int]) -> Comparison:
    """Compare the requests `judged`; at least one of them has two output tokens."""
    return Comparison(
        len(judged),
        _spread(ttfts_s(measured, judged), ttfts_s(played, judged)),
        _spread(tpots_s(measured, judged), tpots_s(played, judged)),
        _spread(_e2es_s(measured, judged), _e2es_s(played, judged)),
    )


def ttfts_s(run: Run, judged: Sequence[int]) -> NDArray[np.float64]:
    """Times to first token; shape (len(judged),)."""
    return np.array([run.timings[index].ttft_s for index in judged])


def tpots_s(run: Run, judged: Sequence[int]) -> NDArray[np.float64]:
    """Times per output token, of those that have more than one; shape (<= len(judged),)."""
    times = (run.timings[index].tpot_s for index in judged)
    return np.array([time_s for time_s in times if time_s is not None])


def gauge_errors(measured: Run, played: Run) -> dict[str, tuple[float, float]]:
    """Mean of each measured gauge, and the mean distance of the played one from it, second by second."""
    pairs = list(zip(measured.gauges, played.gauges, strict=False))
    return {
        name: (
            float(np.mean([getattr(real, name) for real, _ in pairs])),
            float(np.mean([abs(getattr(real, name) - getattr(ours, name)) for real, ours in pairs])),
        )
        for name in ("running", "waiting", "kv_usage")
        if pairs
    }


def halves(run: Run) -> tuple[list[int], list[int]]:
    """Indices of the requests that arrived in the first half of the arrivals' time, and of the others."""
    middle_s = (run.timings[0].arrival_s + run.timings[-1].arrival_s) / 2.0
    first = [index for index, timing in enumerate(run.timings) if timing.arrival_s < middle_s]
    return first, list(range(len(first), len(run.timings)))


def _e2es_s(run: Run, judged: Sequence[int]) -> NDArray[np.float64]:
    return np.array([run.timings[index].last_s - run.timings[index].arrival_s for index in judged])


def _spread(measured: NDArray[np.float64], played: NDArray[np.float64]) -> Spread:
    return Spread(_figures(measured), _figures(played), _distance(measured, played))


def _figures(values: NDArray[np.float64]) -> tuple[float, ...]:
    return (float(np.mean(values)), *(float(value) for value in np.quantile(values, QUANTILES)))


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    places = np.concatenate([one, other])
    shares = (np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (one, other))
    return float(np.max(np.abs(next(shares) - next(shares))))
