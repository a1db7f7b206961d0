"""llm-d latency observation: each endpoint's TTFT as a line over its requests in flight, as observed.

Source: llm-d-router `pkg/epp/framework/plugins/requestcontrol/dataproducer/latencyobserver/` (plugin.go,
flush.go) and `scheduling/scorer/latencyobservation/` at a415a8aa; defaults of both.

Per endpoint, of the last 100 answers within 3 minutes: P25 and P50 of TTFT, each with the mean of the
requests in flight when those around it (percentile ± 10) were sent; and a floor, the P10 over the P10s of
all minutes so far. Predicted: the line through (0, floor), (n25, P25), (n50, P50) at the requests in flight
now, the middle point only if it is ordered and 2 requests away from the last. The least prediction wins,
ties at random. An endpoint with under 10 answers is chosen with probability 0.1 and otherwise last. It is
blind to the cache.

Assumed: snapshots are recomputed when a decision finds them over a second old, not by a timer; the TTFT is
measured from sending. Percentiles are taken by nearest rank.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, Sent, StatefulPolicy

_INTERVAL_S: Final = 1.0
_MAX_AGE_S: Final = 180.0
_MAX_REQUESTS: Final = 100
_WINDOW: Final = 5000
_MIN_REQUESTS: Final = 10
_LOW, _TYPICAL, _FLOOR, _BAND = 0.25, 0.50, 0.10, 0.10
_BUCKET_S: Final = 60.0
_BUCKETS: Final = 1000
_MIN_GAP: Final = 2.0
"""Requests in flight that must lie between the two loaded anchors."""


@dataclass(frozen=True, slots=True)
class _Answer:
    at_s: float
    ttft_s: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class _Curve:
    """A published snapshot; `typical_s` 0 if it has too little behind it."""

    floor_s: float
    low_s: float
    low_load: float
    typical_s: float
    typical_load: float

    def at(self, in_flight: int) -> float:
        """Predicted TTFT in seconds."""
        if not self.typical_s:
            return self.floor_s
        use_low = (
            self.typical_load - self.low_load >= _MIN_GAP
            and self.typical_s > self.low_s > self.floor_s
            and self.low_load > 0
        )
        if use_low and in_flight < self.low_load:
            predicted = self.floor_s + in_flight * (self.low_s - self.floor_s) / self.low_load
        elif use_low:
            slope = (self.typical_s - self.low_s) / (self.typical_load - self.low_load)
            predicted = self.low_s + (in_flight - self.low_load) * slope
        else:
            predicted = self.floor_s + in_flight * (self.typical_s - self.floor_s) / self.typical_load
        return max(predicted, self.floor_s)


@dataclass(slots=True)
class _Endpoint:
    answers: deque[_Answer] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    observed: int = 0
    bucket_s: float | None = None
    floors_s: list[float] = field(default_factory=list)
    flushed_s: float = -_INTERVAL_S
    curve: _Curve | None = None

    def flush(self, now_s: float) -> None:
        """Recompute the snapshot."""
        self.flushed_s = now_s
        recent = self._window(now_s, _MAX_AGE_S)[-_MAX_REQUESTS:]
        if self.bucket_s is None:
            self.bucket_s = now_s
        elif now_s - self.bucket_s >= _BUCKET_S:
            if bucket := self._window(now_s, _BUCKET_S):
                self.floors_s = sorted([*self.floors_s, _percentile(bucket, _FLOOR)])[:_BUCKETS]
            self.bucket_s = now_s
        if self.observed < _MIN_REQUESTS or not (self.floors_s or recent):
            self.curve = None
            return
        if self.floors_s:
            floor_s = self.floors_s[_rank(len(self.floors_s), _FLOOR)]
        else:
            floor_s = _percentile(recent, _FLOOR)
        if len(recent) < _MIN_REQUESTS:
            self.curve = _Curve(floor_s, 0.0, 0.0, 0.0, 0.0)
            return
        curve = _Curve(
            floor_s,
            _percentile(recent, _LOW),
            _band_load(recent, _LOW),
            _percentile(recent, _TYPICAL),
            _band_load(recent, _TYPICAL),
        )
        usable = curve.typical_load > 0 and curve.typical_s > floor_s
        self.curve = curve if usable else _Curve(floor_s, 0.0, 0.0, 0.0, 0.0)

    def _window(self, now_s: float, age_s: float) -> list[_Answer]:
        found = []
        for answer in reversed(self.answers):
            if now_s - answer.at_s > age_s:
                break
            found.append(answer)
        found.reverse()
        return found


def _rank(count: int, share: float) -> int:
    return min(count - 1, int(share * count))


def _percentile(answers: list[_Answer], share: float) -> float:
    return sorted(answer.ttft_s for answer in answers)[_rank(len(answers), share)]


def _band_load(answers: list[_Answer], share: float) -> float:
    ranked = sorted(answers, key=lambda answer: answer.ttft_s)
    first, last = _rank(len(ranked), max(0.0, share - _BAND)), _rank(len(ranked), share + _BAND)
    band = ranked[first : last + 1]
    return sum(answer.in_flight for answer in band) / len(band)


class LlmdObserved(StatefulPolicy):
    """argmin of predicted TTFT.

    Args:
        exploration: Chance that an endpoint without a usable curve is taken for the best; source default.
    """

    __slots__ = ("_endpoints", "_exploration", "_loads", "_sent")

    def __init__(self, *, exploration: float = 0.1) -> None:
        self._exploration = exploration
        self._endpoints: list[_Endpoint] = []
        self._loads: list[int] = []
        self._sent: dict[int, int] = {}

    def choose(self, view: FleetView) -> int:
        """A draw per endpoint that is not calibrated, and one if tied."""
        rows = range(len(view.keys))
        if not self._endpoints:
            self._endpoints = [_Endpoint() for _ in rows]
        self._loads = list(view.requests)
        for endpoint in self._endpoints:
            if view.now_s - endpoint.flushed_s >= _INTERVAL_S:
                endpoint.flush(view.now_s)
        curves = [endpoint.curve for endpoint in self._endpoints]
        if not any(curves):
            return least([0.0] * len(curves), view.rng)
        predicted = [
            None if curve is None else curve.at(load)
            for curve, load in zip(curves, view.requests, strict=True)
        ]
        known = [value for value in predicted if value is not None]
        best, worst = min(known), max(known)
        costs = [best if value is None else value for value in predicted]
        any_trusted = any(curve is not None and curve.typical_s for curve in curves)
        for row in rows:
            curve = curves[row]
            if curve is None or not curve.typical_s:
                if view.rng.random() < self._exploration:
                    costs[row] = best
                elif any_trusted:
                    costs[row] = worst
        return least(costs, view.rng)

    def on_sent(self, sent: Sent) -> None:
        """Remember how many were in flight where it went, itself excluded."""
        self._sent[sent.request.request_id] = self._loads[sent.row]

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """An observation."""
        in_flight = self._sent.pop(sent.request.request_id, None)
        if in_flight is not None:
            endpoint = self._endpoints[sent.row]
            endpoint.answers.append(_Answer(now_s, now_s - sent.sent_s, in_flight))
            endpoint.observed += 1

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:  # noqa: ARG002 - of `StatefulPolicy`
        """Forget it, if it ended without a first token."""
        self._sent.pop(sent.request.request_id, None)
