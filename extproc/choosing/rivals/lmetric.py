"""LMetric: prefill to do there times the requests there, so that no weight is needed.

Source: arXiv 2603.15202; its port in sgl-project/sglang `sgl-model-gateway/src/policies/lmetric.rs` at
acaa759a.

cost = (pending uncached tokens + this request's) · (requests + 1), ties to fewer requests, then fewer
uncached tokens, then the first endpoint. The port leaves out what is pending (`pending=false`), which its
gateway does not know.
"""

from __future__ import annotations

from extproc.choosing.stateful import FleetView, StatefulPolicy


class LMetric(StatefulPolicy):
    """argmin of the product.

    Args:
        pending: False for the port's cost.
    """

    __slots__ = ("_pending",)

    def __init__(self, *, pending: bool = True) -> None:
        self._pending = pending

    def choose(self, view: FleetView) -> int:
        """No draw."""
        uncached, requests = view.uncached_tokens(), view.requests
        pending = view.prefill_tokens if self._pending else [0] * len(uncached)
        return min(
            range(len(uncached)),
            key=lambda row: (
                (pending[row] + uncached[row]) * (requests[row] + 1),
                requests[row],
                uncached[row],
            ),
        )
