"""llm-d predicted latency: a model of TTFT and TPOT learned from answers; the best predicted headroom wins.

Source: llm-d-latency-predictor (training and prediction servers) and llm-d-router `dataproducer/
predictedlatency`, `filter/prefixcacheaffinity` with the predictor as its TTFT source, `scorer/latency` at
ebab6879.

1. Features of TTFT: KV usage, prompt length, waiting, running, pending prefill, share matched and uncached
   tokens; of TPOT: the same without the last two. Retrained every 10 s (Helm chart) once there are 100
   samples.
2. Affinity as in `llmd_sticky`, on predicted TTFT.
3. Headroom = limit - predicted, 0 being the limit of a request without one. Of endpoints with both
   headrooms >= 0, if there are any, the one closest to its limits; else an idle endpoint if there is one;
   else the smallest deficit, those that break only TPOT before those that break only TTFT before both.
   Headrooms are scaled to 0..1 within the group and weighted 0.8 (TTFT) and 0.2 (TPOT), in steps of 1 %,
   ties at random.
4. Without a model: free KV + relative queue + matched share, equal weights.

Assumed: a ridge regression, one of the three model families the predictor offers, where XGBoost is its
default; the 2,000 latest samples where it keeps 500 of each of 100 strata; no exploration (1 % there).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from extproc.choosing.rivals.llmd_sticky import sticky_rows
from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, Sent, StatefulPolicy
from extproc.predicting.sums import plain_sum

_RETRAIN_S: Final = 10.0
_MIN_SAMPLES: Final = 100
_SAMPLES: Final = 2000
_RIDGE: Final = 1.0
"""Prior weight of zero coefficients, in samples, on features scaled to unit variance."""

_TTFT_WEIGHT, _TPOT_WEIGHT = 0.8, 0.2
_STEPS: Final = 100


class _Model:
    """Ridge regression over the latest samples."""

    __slots__ = ("_samples", "_weights")

    def __init__(self) -> None:
        self._samples: deque[tuple[Sequence[float], float]] = deque(maxlen=_SAMPLES)
        self._weights: list[float] | None = None

    def learn(self, features: Sequence[float], value: float) -> None:
        """Keep a sample."""
        self._samples.append((features, value))

    def fit(self) -> None:
        """Solve for the samples kept, if there are enough."""
        if len(self._samples) < _MIN_SAMPLES:
            return
        x: NDArray[np.float64] = np.array([features for features, _ in self._samples], dtype=np.float64)
        y: NDArray[np.float64] = np.array([value for _, value in self._samples], dtype=np.float64)
        mean, scale = x.mean(axis=0), x.std(axis=0)
        scale[scale == 0.0] = 1.0
        z = (x - mean) / scale
        solved = np.linalg.solve(z.T @ z + _RIDGE * np.eye(z.shape[1]), z.T @ (y - y.mean())) / scale
        self._weights = [float(y.mean() - solved @ mean), *solved.tolist()]

    def predict(self, features: Sequence[float]) -> float | None:
        """The value, at least 0; None before the first fit."""
        if self._weights is None:
            return None
        bias, *weights = self._weights
        return max(0.0, bias + plain_sum(weight * x for weight, x in zip(weights, features, strict=True)))


@dataclass(slots=True)
class _Open:
    ttft_features: Sequence[float]
    tpot_features: Sequence[float]
    first_s: float | None = None


class LlmdPredicted(StatefulPolicy):
    """Rules 1 to 4.

    Args:
        threshold: Of affinity, source default.
        max_penalty_ms: Of affinity, source default.
    """

    __slots__ = ("_features", "_fitted_s", "_max_penalty_ms", "_open", "_threshold", "_tpot", "_ttft")

    def __init__(self, *, threshold: float = 0.80, max_penalty_ms: float = 18_000.0) -> None:
        self._threshold = threshold
        self._max_penalty_ms = max_penalty_ms
        self._ttft, self._tpot = _Model(), _Model()
        self._fitted_s = 0.0
        self._features: list[tuple[Sequence[float], Sequence[float]]] = []
        self._open: dict[int, _Open] = {}

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        if view.now_s - self._fitted_s >= _RETRAIN_S:
            self._fitted_s = view.now_s
            self._ttft.fit()
            self._tpot.fit()
        self._features = _features(view)
        predicted = [(self._ttft.predict(ttft), self._tpot.predict(tpot)) for ttft, tpot in self._features]
        ttft_s = [0.0 if ttft is None else ttft for ttft, _ in predicted]
        tpot_s = [0.0 if tpot is None else tpot for _, tpot in predicted]
        if predicted[0][0] is None:
            return least([-score for score in _composite(view)], view.rng)
        among = sticky_rows(view, [1000.0 * value for value in ttft_s], self._threshold, self._max_penalty_ms)
        ttft_room = [(view.request.slo_ttft_s or 0.0) - value for value in ttft_s]
        tpot_room = [(view.request.slo_tpot_s or 0.0) - value for value in tpot_s]
        group = _group(among, ttft_room, tpot_room, view.requests)
        return least(_deficits(group, ttft_room, tpot_room), view.rng, group)

    def on_sent(self, sent: Sent) -> None:
        """Keep what was known when it was sent."""
        self._open[sent.request.request_id] = _Open(*self._features[sent.row])

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """A sample of TTFT."""
        if (entry := self._open.get(sent.request.request_id)) is not None:
            entry.first_s = now_s
            self._ttft.learn(entry.ttft_features, now_s - sent.sent_s)

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """A sample of TPOT, if there were two tokens."""
        entry = self._open.pop(sent.request.request_id, None)
        if entry is not None and entry.first_s is not None and output_tokens > 1:
            self._tpot.learn(entry.tpot_features, (now_s - entry.first_s) / (output_tokens - 1))


def _features(view: FleetView) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Per row, of TTFT and of TPOT; tokens in thousands."""
    prompt = view.request.prompt_tokens / 1000.0
    rows = zip(
        view.kv_usage,
        view.waiting,
        view.running,
        view.prefill_tokens,
        view.requests,
        view.uncached_tokens(),
        strict=True,
    )
    found: list[tuple[Sequence[float], Sequence[float]]] = []
    for usage, waiting, running, pending, requests, uncached in rows:
        tpot = (usage, prompt, float(waiting), float(running), pending / 1000.0, float(requests))
        found.append(((*tpot, uncached / 1000.0, 1.0 - uncached / view.request.prompt_tokens), tpot))
    return found


def _composite(view: FleetView) -> list[float]:
    """Rule 4, higher is better."""
    most = max(view.waiting)
    num_blocks = max(1, len(view.request.blocks))
    return [
        round(
            _STEPS * ((1.0 - usage) + ((most - waiting) / most if most else 1.0) + matched / num_blocks) / 3.0
        )
        for usage, waiting, matched in zip(view.kv_usage, view.waiting, view.matched_blocks, strict=True)
    ]


def _group(
    among: Sequence[int], ttft_room: Sequence[float], tpot_room: Sequence[float], requests: Sequence[int]
) -> list[int]:
    """Rule 3: the rows to compare with each other."""
    groups = (
        [row for row in among if ttft_room[row] >= 0 and tpot_room[row] >= 0],
        [row for row in among if not requests[row]],
        [row for row in among if ttft_room[row] >= 0],
        [row for row in among if tpot_room[row] >= 0],
    )
    return next((group for group in groups if group), list(among))


def _deficits(group: Sequence[int], ttft_room: Sequence[float], tpot_room: Sequence[float]) -> list[float]:
    """Distance from the limits, scaled within `group`, in whole percent; lower is better."""
    ttft, tpot = _scaled(group, ttft_room), _scaled(group, tpot_room)
    if ttft is None and tpot is None:
        return [0.0] * len(ttft_room)
    if ttft is None or tpot is None:
        parts = [value for value in (ttft, tpot) if value is not None]
        return [float(int(_STEPS * value)) for value in parts[0]]
    return [
        float(int(_STEPS * (_TTFT_WEIGHT * a + _TPOT_WEIGHT * b))) for a, b in zip(ttft, tpot, strict=True)
    ]


def _scaled(group: Sequence[int], room: Sequence[float]) -> list[float] | None:
    """|room| as 0..1 between the least and the most of `group`; None if all of them are equal."""
    sizes = [abs(value) for value in room]
    low, high = min(sizes[row] for row in group), max(sizes[row] for row in group)
    return None if high == low else [(size - low) / (high - low) for size in sizes]
