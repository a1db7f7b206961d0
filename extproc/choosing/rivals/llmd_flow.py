"""llm-d's flow control: requests wait while the pool is saturated, and are scheduled when they leave it.

Source: llm-d-router `pkg/epp/flowcontrol/controller/internal/processor.go` (dispatch),
`pkg/epp/flowcontrol/{controller,registry}/config.go` (60 s, 5,000 requests, global-strict over fcfs),
`pkg/epp/framework/plugins/flowcontrol/saturationdetector/utilization/` (5 requests, 0.8 of the KV cache) and
`.../flowcontrol/{fairness,usagelimits}/` (ceiling 1.0) at ebab6879.

1. Saturation is the mean over endpoints of max(waiting/`queue_depth`, KV usage/`kv_usage`), as scraped. From
   1 on nothing is dispatched, of any priority.
2. Else the highest priority band with a request gives one: one each time a request comes, and one a
   millisecond. The first of the band's flows in the order of `fairness` goes; it is then scheduled by the
   scorers as any other.
3. A request that waited 60 s is refused, and so is one that finds 5,000 in its band.

The traces name no priorities and no fairness ids: there is one band, and by default one flow, in which
`global_strict` is the order of arrival. With `round_robin` a session is a flow. Metrics older than 200 ms
count as saturated; those of a replay are younger. Eviction of what runs (off by default) is not modelled. A
replay asks every 20 ms whether the line may move: the ticks since then are then made up for.
"""

from __future__ import annotations

from typing import Final

from extproc.choosing.rivals.line import HEAD_ROOM_S, Line
from extproc.choosing.rivals.llmd_sticky import LlmdSticky
from extproc.choosing.rivals.llmd_weights import LlmdWeights
from extproc.choosing.stateful import Decision, FleetView, PolicyRequest, Shed, StatefulPolicy
from extproc.predicting.sums import plain_sum

_TICK_S: Final = 0.001
_TTL_S: Final = 60.0
_MAX_QUEUED: Final = 5000
_RETRY_AFTER_S: Final = 1.0
"""llm-d names no time to come back; clients of 429 take a second."""

_MAX_FLOWS: Final = 100_000


class LlmdFlow(StatefulPolicy):
    """Rules 1 to 3 before llm-d's own scheduling.

    Args:
        queue_depth: Waiting requests at which an endpoint is saturated, source default.
        kv_usage: Share of the KV cache at which it is, source default.
        sticky: Schedule by affinity filter and token load (`llmd_sticky`), not by the default weights.
        fairness: `global_strict`, the source default, or `round_robin`.
    """

    __slots__ = ("_fairness", "_kv_usage", "_line", "_queue_depth", "_round", "_rule", "_ticked_s", "_turns")

    def __init__(
        self,
        *,
        queue_depth: int = 5,
        kv_usage: float = 0.8,
        sticky: bool = False,
        fairness: str = "global_strict",
    ) -> None:
        if fairness not in ("global_strict", "round_robin"):
            raise ValueError(f"fairness is global_strict or round_robin, not {fairness!r}")
        self._queue_depth = queue_depth
        self._kv_usage = kv_usage
        self._fairness = fairness
        self._rule: StatefulPolicy = LlmdSticky() if sticky else LlmdWeights()
        self._line = Line(_TTL_S + HEAD_ROOM_S)
        self._ticked_s = 0.0
        self._round = 0.0
        self._turns: dict[str, float] = {}

    def saturation(self, view: FleetView) -> float:
        """Of the pool, 1 and more is saturated."""
        scores = [
            max(waiting / self._queue_depth, usage / self._kv_usage)
            for waiting, usage in zip(view.waiting, view.kv_usage, strict=True)
        ]
        return plain_sum(scores) / len(scores)

    def choose(self, view: FleetView) -> Decision:
        """The rule's draws, when it is dispatched."""
        request, now_s, line = view.request, view.now_s, self._line
        waits = line.rank(request.request_id) is not None
        expires_s = request.arrived_s + _TTL_S
        if now_s >= expires_s or (not waits and len(line) >= _MAX_QUEUED):
            self.on_left(request)
            return Shed(_RETRY_AFTER_S)
        if self.saturation(view) >= 1.0:
            self._ticked_s = now_s
            may_go = False
        else:
            may_go = line.may_go(request.request_id, now_s)
            if waits:
                may_go = may_go and now_s >= self._ticked_s + _TICK_S
            elif not may_go:
                self._ticked_s -= _TICK_S  # its coming is an occasion to send the first of the line
        if not may_go:
            return line.wait(request.request_id, self._rank(request), now_s, expires_s, polls=True)
        if waits:
            self._ticked_s += _TICK_S
            self._round = max(self._round, line.rank(request.request_id) or 0.0)
        self.on_left(request)
        return self._rule.choose(view)

    def _rank(self, request: PolicyRequest) -> float:
        """Place in the order of those that wait; only the first answer for a request counts."""
        if self._fairness == "global_strict" or self._line.rank(request.request_id) is not None:
            return request.arrived_s
        flow = request.session or ""
        if len(self._turns) >= _MAX_FLOWS:
            self._turns.clear()
        # A flow's nth waiting request goes in the nth round from now: that is a turn for each flow.
        turn = max(self._round, self._turns.get(flow, -1.0)) + 1.0
        self._turns[flow] = turn
        return turn

    def on_left(self, request: PolicyRequest) -> None:
        """It leaves the line."""
        self._line.leave(request.request_id)
