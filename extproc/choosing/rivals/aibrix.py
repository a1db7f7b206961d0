"""AIBrix prefix-cache: the longest match that is not overloaded, unless the fleet is out of balance.

Source: AIBrix `pkg/plugins/gateway/algorithms/prefix_cache.go` and `pkg/utils/prefixcacheindexer/` at
e3e10f9.

1. If the most loaded endpoint has over `imbalance` requests more than the least loaded: a least loaded one.
2. Else among the endpoints that match anything, by falling match in whole percent, then by rising requests,
   then in random order: the first with requests <= mean + `sigmas`·deviation.
3. Else a least loaded one.

Requests are the gateway's own count. The index as shipped is one LRU table of block hashes for the whole
fleet, 200,000 entries that expire after 20 minutes, written when a request is routed; a block is 4
characters in the code and 128 in the deployment manifest, so that it covers far less than the engines hold.
A later version (the gate compares with twice the mean plus one, and prefix matching goes on among the least
loaded) is not modelled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import sqrt
from typing import Final

from extproc.choosing.rivals.ties import draw, least
from extproc.choosing.stateful import FleetView, StatefulPolicy
from extproc.predicting.sums import plain_sum

_ENTRIES: Final = 200_000
_EXPIRE_S: Final = 20 * 60.0
_CHARACTERS_PER_TOKEN: Final = 4.0
"""Of English prose; AIBrix's default tokenizer splits into characters."""


class _Table:
    """Which rows were sent each block, the least recently used block leaving first."""

    __slots__ = ("_capacity", "_entries")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, dict[int, float]] = OrderedDict()

    def matched(self, blocks: Sequence[int], rows: int, now_s: float) -> list[int]:
        """Leading blocks known per row, the count going on while any row is known for the next."""
        matched = [0] * rows
        for depth, block in enumerate(blocks, 1):
            sent = self._entries.get(block)
            if sent is None or now_s - max(sent.values()) > _EXPIRE_S:
                break
            self._entries.move_to_end(block)
            for row in sent:
                matched[row] = depth
        return matched

    def add(self, blocks: Sequence[int], row: int, now_s: float) -> None:
        """The blocks went to `row`."""
        entries = self._entries
        for block in blocks:
            entries.setdefault(block, {})[row] = now_s
            entries.move_to_end(block)
        while len(entries) > self._capacity:
            entries.popitem(last=False)


class AibrixPrefixCache(StatefulPolicy):
    """Longest match within mean + sigma.

    Args:
        own: False matches by the cache view in use, True by the table as shipped.
        block_characters: Prompt characters per entry of the table; counts only with `own`.
        imbalance: Rule 1's spread of requests.
        sigmas: Rule 2's factor on the standard deviation.
    """

    __slots__ = ("_block_characters", "_imbalance", "_own", "_sigmas", "_table")

    def __init__(
        self,
        *,
        own: bool = False,
        block_characters: int = 4,
        imbalance: int = 8,
        sigmas: float = 1.0,
    ) -> None:
        self._own = own
        self._block_characters = block_characters
        self._imbalance = imbalance
        self._sigmas = sigmas
        self._table: _Table | None = None

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        requests = view.requests
        if max(requests) - min(requests) > self._imbalance:
            row = least(requests, view.rng)
        else:
            row = self._holder(view)
        if self._own and self._table is not None:
            self._table.add(view.request.blocks, row, view.now_s)
        return row

    def _holder(self, view: FleetView) -> int:
        requests, rows = view.requests, range(len(view.keys))
        mean = sum(requests) / len(requests)
        limit = mean + self._sigmas * sqrt(plain_sum((load - mean) ** 2 for load in requests) / len(requests))
        num_blocks = max(1, len(view.request.blocks))
        percent = [matched * 100 // num_blocks for matched in self._matched(view)]
        within = [row for row in rows if percent[row] and requests[row] <= limit]
        if not within:
            return least(requests, view.rng)
        best = max((percent[row], -requests[row]) for row in within)
        return draw(view.rng, [row for row in within if (percent[row], -requests[row]) == best])

    def _matched(self, view: FleetView) -> Sequence[int]:
        if not self._own:
            return view.matched_blocks
        if self._table is None:
            characters = _ENTRIES * self._block_characters
            self._table = _Table(max(1, int(characters / _CHARACTERS_PER_TOKEN / view.block_size)))
        return self._table.matched(view.request.blocks, len(view.keys), view.now_s)
