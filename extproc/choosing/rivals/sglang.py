"""SGLang's cache_aware: the longest match if it is long enough and the fleet in balance, else the least load.

Source: sgl-project/sglang `sgl-model-gateway/src/policies/{cache_aware,tree}.rs` at 053b63ff; defaults are
those of its command line (0.3 / 64 / 1.5), its library's being 0.5 / 32 / 1.1.

1. If most - least > `balance_abs` and most > `balance_rel`·least requests: the first least loaded endpoint.
2. Else the endpoint with the longest match, if that is over `cache_threshold` of the prompt.
3. Else the first least loaded endpoint, in older versions the one with the smallest tree.

Load is the router's own count of requests. The tree as shipped is of raw text, written when a request is
routed, up to 2^26 characters per endpoint: several times what an engine holds. A match in it names the
endpoint that was sent the deepest node last.
"""

from __future__ import annotations

from typing import Final

from extproc.choosing.rivals.radix import RadixTree
from extproc.choosing.rivals.ties import draw
from extproc.choosing.stateful import FleetView, StatefulPolicy

_TREE_CHARACTERS: Final = 1 << 26
_CHARACTERS_PER_TOKEN: Final = 4.0


class SglangCacheAware(StatefulPolicy):
    """Rules 1 to 3.

    Args:
        own: False matches by the cache view in use, ties at random; True by the tree as shipped.
        cache_threshold: Source default.
        balance_abs: Source default.
        balance_rel: Source default.
        smallest_tree: Rule 3 as in older versions; needs `own`.
    """

    __slots__ = ("_balance_abs", "_balance_rel", "_cache_threshold", "_own", "_smallest_tree", "_tree")

    def __init__(
        self,
        *,
        own: bool = False,
        cache_threshold: float = 0.3,
        balance_abs: int = 64,
        balance_rel: float = 1.5,
        smallest_tree: bool = False,
    ) -> None:
        self._own = own
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel
        self._smallest_tree = smallest_tree
        if smallest_tree and not own:
            raise ValueError("smallest_tree needs own")
        self._tree = RadixTree()

    def choose(self, view: FleetView) -> int:
        """One draw if two hold equally much of the prompt by the given view."""
        row = self._row(view)
        if self._own and view.request.blocks:
            self._tree.insert(view.request.blocks, row)
            self._tree.evict(row, int(_TREE_CHARACTERS / _CHARACTERS_PER_TOKEN / view.block_size))
        return row

    def _row(self, view: FleetView) -> int:
        rows = range(len(view.keys))
        least, most = min(view.requests), max(view.requests)
        idle = view.requests.index(least)
        if most - least > self._balance_abs and most > self._balance_rel * least:
            return idle
        num_blocks = max(1, len(view.request.blocks))
        if self._own:
            nodes, depth = self._tree.path(view.request.blocks)
            if nodes and depth / num_blocks > self._cache_threshold:
                return next(reversed(nodes[-1].rows))
            return min(rows, key=self._tree.size) if self._smallest_tree else idle
        longest = max(view.matched_blocks)
        if longest / num_blocks > self._cache_threshold:
            return draw(view.rng, [row for row in rows if view.matched_blocks[row] == longest])
        return idle
