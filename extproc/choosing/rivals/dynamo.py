"""Dynamo's KV router: prefill still to do there plus blocks held there, in blocks, this request included.

Source: ai-dynamo/dynamo `lib/kv-router/src/scheduling/selector/` and `config.rs` at 0a3d0d59, defaults.

cost = prefill_scale · (pending uncached tokens + prompt - credit)/block + (context + prompt)/block +
request_weight · requests, credit = overlap_credit · matched / (1 + decay · excess/prompt), excess = how
much more prefill is pending there than on the least loaded endpoint. The least cost wins, ties at random
(temperature 0). Its other formula is the product, prefill · (held blocks + 1).

Assumed: blocks that several running requests share are counted for each of them (Dynamo counts them once),
and output blocks are not (as shipped).
"""

from __future__ import annotations

from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, StatefulPolicy


class DynamoLinear(StatefulPolicy):
    """argmin of the cost.

    Args:
        overlap_credit: Credit per matched token, source default.
        decay: Source default: off.
        prefill_scale: Source default.
        request_weight: Blocks per request in flight, source default: off.
        product: The other formula.
    """

    __slots__ = ("_decay", "_overlap_credit", "_prefill_scale", "_product", "_request_weight")

    def __init__(
        self,
        *,
        overlap_credit: float = 1.0,
        decay: float = 0.0,
        prefill_scale: float = 1.0,
        request_weight: float = 0.0,
        product: bool = False,
    ) -> None:
        self._overlap_credit = overlap_credit
        self._decay = decay
        self._prefill_scale = prefill_scale
        self._request_weight = request_weight
        self._product = product

    def costs(self, view: FleetView) -> list[float]:
        """One per row, in blocks (or blocks squared)."""
        prompt, block_size = view.request.prompt_tokens, view.block_size
        floor = min(view.prefill_tokens)
        rows = zip(
            view.prefill_tokens, view.matched_tokens(), view.context_tokens, view.requests, strict=True
        )
        costs = []
        for pending, matched, context, requests in rows:
            credit = self._overlap_credit * matched / (1.0 + self._decay * (pending - floor) / prompt)
            prefill = self._prefill_scale * max(0.0, pending + prompt - credit) / block_size
            held = (context + prompt) / block_size
            costs.append(
                prefill * (held + 1.0) if self._product else prefill + held + self._request_weight * requests
            )
        return costs

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        return least(self.costs(view), view.rng)
