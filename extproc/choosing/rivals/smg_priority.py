"""SMG's priority admission: a slot of the fleet per request in flight, one queue per class.

Source: smg-project/smg `model_gateway/src/middleware/scheduler/{engine,slots,config,class}.rs` and
`src/worker/capacity.rs` at f8daa883; off by default, the constants are its defaults.

1. The fleet has `slots_per_worker` slots per worker that does not say how many it runs (engines over HTTP do
   not). Classes above a request's own keep what they have reserved and do not use: system 32; interactive
   128, or a quarter if that is more.
2. A request without a slot waits in its class, first come, first served. A head older than 5 s (default:
   30 s) may take a reserved slot. After 30 s (default: 60 s) in the queue it is refused, and so is one that
   finds 256 (default: 512) there.
3. With its slot it is routed by the gateway's policy, `cache_aware` (`sglang_cache_aware`).

The traces have one class of requests: `interactive` by default here, which is the better for it, since the
shipped default class leaves the slots reserved for the others unused. Preemption needs two classes.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from extproc.choosing.rivals.line import HEAD_ROOM_S, Line
from extproc.choosing.rivals.sglang import SglangCacheAware
from extproc.choosing.stateful import Decision, FleetView, PolicyRequest, Shed, StatefulPolicy

_SYSTEM_SLOTS: Final = 32
_INTERACTIVE_SLOTS: Final = 128
_INTERACTIVE_SHARE: Final = 0.25
_RETRY_AFTER_S: Final = 1.0


class SmgPriority(StatefulPolicy):
    """Rules 1 to 3, for requests of one class.

    Args:
        interactive: True for that class, False for the default one.
        slots_per_worker: Source default.
    """

    __slots__ = ("_interactive", "_limits", "_line", "_rule", "_slots_per_worker")

    def __init__(self, *, interactive: bool = True, slots_per_worker: int = 64) -> None:
        self._interactive = interactive
        self._slots_per_worker = slots_per_worker
        # Of the queue: requests, seconds until a head is starved, seconds until one is refused.
        self._limits = (256, 5.0, 30.0) if interactive else (512, 30.0, 60.0)
        self._line = Line(self._limits[2] + HEAD_ROOM_S)
        self._rule = SglangCacheAware()

    def slots(self, workers: int) -> tuple[int, int]:
        """Slots of the fleet, and how many of them this class may use while nobody else does."""
        capacity = self._slots_per_worker * workers
        reserved = _SYSTEM_SLOTS
        if not self._interactive:
            reserved += max(_INTERACTIVE_SLOTS, ceil(_INTERACTIVE_SHARE * capacity))
        return capacity, max(0, capacity - reserved)

    def choose(self, view: FleetView) -> Decision:
        """The policy's draw, when it has a slot."""
        request, now_s, line = view.request, view.now_s, self._line
        max_queued, starved_s, timeout_s = self._limits
        waits = line.rank(request.request_id) is not None
        waited_s = now_s - request.arrived_s
        if waited_s >= timeout_s:
            line.leave(request.request_id)
            return Shed(_RETRY_AFTER_S)
        capacity, usable = self.slots(len(view.keys))
        limit = capacity if waits and waited_s > starved_s else usable
        if sum(view.requests) >= limit or not line.may_go(request.request_id, now_s):
            if not waits and len(line) >= max_queued:
                return Shed(_RETRY_AFTER_S)
            starves_s = request.arrived_s + starved_s + 0.001
            until_s = starves_s if now_s < starves_s else request.arrived_s + timeout_s
            return line.wait(request.request_id, request.arrived_s, now_s, until_s)
        line.leave(request.request_id)
        return self._rule.choose(view)

    def on_left(self, request: PolicyRequest) -> None:
        """It leaves the line."""
        self._line.leave(request.request_id)
