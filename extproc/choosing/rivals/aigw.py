"""AIGW as it was: three weighted terms, then a draw among the best 5 %.

Source: AIGW `pkg/aigateway/loadbalancer/inferencelb/inference_lb.go` at 169bcb8; the metadata center's
cache query gives the `top_k` longest holders only (its client asks for 10 in a field the server does not
read, so 5).

score = Wc·hit - Wr·ceil(D/5)·(requests - min)/D - Wp·pending/P with D = max(2, spread of requests),
P = max(1024, most pending) and hit = matched/blocks. `pending` is the length of the prompts that have not
got a first token, cached or not, in bytes of their JSON.

The product's `inference_lb` is this rule but for two things: it counts pending prefill in uncached tokens,
and knows every holder. `pending` in bytes matters only below 1,024.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from extproc.choosing.rivals.ties import draw
from extproc.choosing.stateful import FleetView, StatefulPolicy

_MIN_SPREAD: Final = 2.0
_REQUEST_STEP: Final = 5.0
_MIN_PENDING_BYTES: Final = 1024.0
_BYTES_PER_TOKEN: Final = 4.0
"""Of English prose in JSON; AIGW never sees a token."""


class Aigw(StatefulPolicy):
    """Best score among the candidates' first `candidate_percent`, drawn uniformly.

    Args:
        cache_ratio_weight: Wc, source default.
        request_load_weight: Wr, source default.
        prefill_load_weight: Wp, source default.
        candidate_percent: Source default.
        top_k: Longest holders that the cache query names; the others count as holding nothing.
    """

    __slots__ = ("_candidate_percent", "_top_k", "_weights")

    def __init__(
        self,
        *,
        cache_ratio_weight: float = 2.0,
        request_load_weight: float = 1.0,
        prefill_load_weight: float = 3.0,
        candidate_percent: int = 5,
        top_k: int = 5,
    ) -> None:
        self._weights = (cache_ratio_weight, request_load_weight, prefill_load_weight)
        self._candidate_percent = candidate_percent
        self._top_k = top_k

    def scores(self, view: FleetView) -> list[float]:
        """One per row, higher is better."""
        cache, request, prefill = self._weights
        rows = range(len(view.keys))
        known = set(sorted(rows, key=view.matched_blocks.__getitem__, reverse=True)[: self._top_k])
        num_blocks = max(1, len(view.request.blocks))
        fewest = min(view.requests)
        spread = max(_MIN_SPREAD, max(view.requests) - fewest)
        pending = [tokens * _BYTES_PER_TOKEN for tokens in view.prompt_tokens]
        most = max(_MIN_PENDING_BYTES, max(pending))
        return [
            cache * (view.matched_blocks[row] / num_blocks if row in known else 0.0)
            - request * ceil(spread / _REQUEST_STEP) * (view.requests[row] - fewest) / spread
            - prefill * pending[row] / most
            for row in rows
        ]

    def choose(self, view: FleetView) -> int:
        """Up to two draws: the candidate's rank, and the row among equals."""
        scores = self.scores(view)
        rows = len(scores)
        ranked = sorted(scores, reverse=True)
        candidates = min(max(1, rows * self._candidate_percent // 100), rows)
        picked = draw(view.rng, ranked[:candidates]) if candidates > 1 else ranked[0]
        return draw(view.rng, [row for row in range(rows) if scores[row] == picked])
