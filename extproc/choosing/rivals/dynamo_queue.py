"""Dynamo's router queue: requests wait while every worker has more prefill than 16 engine steps to do.

Source: ai-dynamo/dynamo `lib/kv-router/src/scheduling/{queue,policy,policy_config,config}.rs`: queue.rs at
00067c31, policy.rs at 01690d42, policy_config.rs at 0111b619, config.rs at 0243c51b; defaults 16.0 and fcfs.

1. A worker is busy while its uncached prompt tokens without a first token exceed `threshold` times its
   `max_num_batched_tokens`. A request waits if all workers are busy, or if others wait already.
2. When a prefill or a request ends, those that wait go one after another in the order of the policy until
   all workers are busy again: `fcfs` by arrival, `lcfs` the latest first, `wspt` the fewest uncached tokens
   at the worker that has most of the prompt cached, as they were when the request began to wait.
3. Each is then placed by the router's cost (`dynamo_linear`, or `dynamo_product`).

Weights of requests and strict priorities come from hints that the traces do not have. The queue has no limit
and no expiry by default; a replay refuses after its own longest hold.
"""

from __future__ import annotations

from math import inf
from typing import Final

from extproc.choosing.rivals.dynamo import DynamoLinear
from extproc.choosing.rivals.line import Line
from extproc.choosing.stateful import Decision, FleetView, PolicyRequest, StatefulPolicy

_LONGEST_S: Final = 600.0
"""No request of a replay waits that long; frees the place of one that was abandoned."""

_POLICIES: Final = ("fcfs", "lcfs", "wspt")


class DynamoQueue(StatefulPolicy):
    """Rules 1 to 3.

    Args:
        threshold: Steps' worth of prefill that make a worker busy, source default.
        max_batched_tokens: Of a step; what the workers would report: 2,048 in the simulated engines.
        policy: `fcfs`, the source default, `lcfs` or `wspt`.
        product: Place by the other cost.
    """

    __slots__ = ("_busy_tokens", "_line", "_policy", "_rule")

    def __init__(
        self,
        *,
        threshold: float = 16.0,
        max_batched_tokens: int = 2048,
        policy: str = "fcfs",
        product: bool = False,
    ) -> None:
        if policy not in _POLICIES:
            raise ValueError(f"policy is one of {', '.join(_POLICIES)}, not {policy!r}")
        self._busy_tokens = threshold * max_batched_tokens
        self._policy = policy
        self._rule = DynamoLinear(product=product)
        self._line = Line(_LONGEST_S)

    def rank(self, view: FleetView) -> float:
        """Place in the order, lower first."""
        if self._policy == "wspt":
            return float(min(view.uncached_tokens()))
        arrived_s = view.request.arrived_s
        return arrived_s if self._policy == "fcfs" else -arrived_s

    def choose(self, view: FleetView) -> Decision:
        """The cost's draw, when it goes."""
        request_id, line = view.request.request_id, self._line
        is_busy = min(view.prefill_tokens) > self._busy_tokens
        if is_busy or not line.may_go(request_id, view.now_s):
            return line.wait(request_id, self.rank(view), view.now_s, inf)
        line.leave(request_id)
        return self._rule.choose(view)

    def on_left(self, request: PolicyRequest) -> None:
        """It leaves the line."""
        self._line.leave(request.request_id)
