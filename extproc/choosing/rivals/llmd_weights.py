"""llm-d's weighted scorers: queue 2, KV utilisation 2, prefix 3, the highest sum wins.

Source: llm-d-router `pkg/epp/config/loader/defaults.go` (weights) and `pkg/epp/framework/plugins/scheduling/
scorer/{queuedepth,kvcacheutilization,prefix,nohitlru}`, picker `maxscore`, at ebab6879.

queue: (most - waiting)/(most - least), 1 if all are equal. KV: 1 - usage. Prefix: matched/blocks. Queue and
KV come from scraped metrics, every 50 ms as shipped; nothing is added for what was sent since.

Its guide's configuration adds a scorer that spreads requests which match nowhere (`no_hit_lru`, weight 2):
the endpoint that got such a request longest ago, or never, scores 1, the latest 0; any other request scores
0.5 everywhere. Its still newer default is another rule: `llmd_sticky`.
"""

from __future__ import annotations

from collections import OrderedDict

from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, StatefulPolicy


class LlmdWeights(StatefulPolicy):
    """argmax of weighted scores, ties at random.

    Args:
        queue: Weight, source default.
        kv: Weight, source default.
        prefix: Weight, source default.
        no_hit_lru: Weight; 0 is the source default, 2 the guide's.
    """

    __slots__ = ("_cold", "_weights")

    def __init__(
        self, *, queue: float = 2.0, kv: float = 2.0, prefix: float = 3.0, no_hit_lru: float = 0.0
    ) -> None:
        self._weights = (queue, kv, prefix, no_hit_lru)
        self._cold: OrderedDict[int, None] = OrderedDict()

    def scores(self, view: FleetView) -> list[float]:
        """One per row, higher is better."""
        queue, kv, prefix, no_hit_lru = self._weights
        most, fewest = max(view.waiting), min(view.waiting)
        num_blocks = max(1, len(view.request.blocks))
        scores = [
            queue * ((most - waiting) / (most - fewest) if most > fewest else 1.0)
            + kv * (1.0 - usage)
            + prefix * matched / num_blocks
            for waiting, usage, matched in zip(view.waiting, view.kv_usage, view.matched_blocks, strict=True)
        ]
        if no_hit_lru and not any(view.matched_blocks):
            last = {row: rank for rank, row in enumerate(self._cold)}
            rows = len(scores)
            for row in range(rows):
                rank = last.get(row)
                late = 0.0 if rank is None else (rank + rows - len(last)) / max(1, rows - 1)
                scores[row] += no_hit_lru * (1.0 - late)
        return scores

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        row = least([-score for score in self.scores(view)], view.rng)
        if not any(view.matched_blocks):
            self._cold[row] = None
            self._cold.move_to_end(row)
        return row
