"""Prompt blocks of requests in flight, per endpoint: what an engine has cached or is about to cache.

Rules:
    1. An engine never evicts the blocks of a request that runs there, and computes those of one that waits
       there before any request behind it starts. So from a request's charge to its end its blocks are a
       hit for the request after it, whatever else is known of that cache.
    2. Chains are added and removed whole, so a block is in use as long as its descendants are: blocks are
       closed under ancestry, as `RadixTree` wants them.
    3. Counts are exact: what `add` gave is given back to `remove`, once.
    4. Memory is bounded by `max_blocks` over all endpoints.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from metadata_center.errors import CapacityError
from metadata_center.history.radix_tree import RadixTree, Run
from metadata_center.load.counters import MAX_SLOTS
from metadata_center.types import MANY_ROWS, EndpointKey, value


@value
class SharedRun:
    """Consecutive blocks of a prompt, and who in flight has them as well.

    Attributes:
        blocks: How many, > 0.
        requests: That have them, > 0.
        endpoints: That these run at, > 0.
    """

    blocks: int
    requests: int
    endpoints: int


_MAX_COLUMNS: Final = 16  # of many endpoints each: far more than a gateway has pools so large


class _Running:
    """One endpoint: its bit, its distinct blocks in use, and the blocks of all requests that use them."""

    __slots__ = ("bit", "distinct", "has_left", "uses")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.distinct = 0
        self.uses = 0
        self.has_left = False


class _Column:
    """`distinct_ratios` of many endpoints, and where it is no more true."""

    __slots__ = ("changed", "keys", "ratios", "rows")

    def __init__(self, keys: tuple[EndpointKey, ...], ratios: Iterable[float]) -> None:
        self.keys = keys  # held, so that its id stays its own
        self.rows = {key: row for row, key in enumerate(keys)}
        self.ratios = array("d", ratios)
        self.changed: set[EndpointKey] = set()


class RunningBlocks:
    """Counts of blocks in use.

    Args:
        max_blocks: Bound on blocks counted, summed over endpoints; chains beyond it are left out.
        max_endpoints: Bound on endpoints, with those that left while requests ran there.
    """

    def __init__(self, max_blocks: int = 2_000_000, *, max_endpoints: int = MAX_SLOTS) -> None:
        self._running: dict[EndpointKey, _Running] = {}
        self._tree = RadixTree(max_endpoints)
        self._max_blocks = max_blocks
        self._columns: dict[int, _Column] = {}
        self._blocks = 0

    def __len__(self) -> int:
        """Distinct blocks in use, summed over endpoints."""
        return self._blocks

    def add(self, endpoint: EndpointKey, blocks: Sequence[int]) -> Run | None:
        """One more request with these blocks is on its way.

        Returns:
            What `remove` takes; None if there are no blocks, or no room for them.
        """
        if not blocks or self._blocks + len(blocks) > self._max_blocks:
            return None
        running = self._running.get(endpoint)
        if running is None:
            try:
                running = self._running[endpoint] = _Running(self._tree.admit(endpoint))
            except CapacityError:
                return None
        if self._columns:
            self._changed(endpoint)
        running.has_left = False
        running.uses += len(blocks)
        bit, new, depth, run = running.bit, 0, 0, self._tree.root
        for run in self._tree.path(blocks):
            depth += len(run.blocks)
            run.uses += 1
            count = run.held.get(bit)
            if count is None:
                run.hold(bit, 1)
                new += len(run.blocks)
            else:
                run.held[bit] = count + 1
        if depth < len(blocks):
            run = run.grow(blocks, depth)
            run.hold(bit, 1)
            run.uses = 1
            new += len(blocks) - depth
        running.distinct += new
        self._blocks += new
        return run

    def remove(self, endpoint: EndpointKey, last: Run) -> None:
        """A request that was added is over; `last` is what `add` gave."""
        if self._columns:
            self._changed(endpoint)
        running = self._running[endpoint]
        bit, run = running.bit, last
        while run.parent is not None:
            before, blocks = run.parent, len(run.blocks)
            running.uses -= blocks
            run.uses -= 1
            left = run.held[bit] - 1
            if left:
                run.held[bit] = left
            else:
                run.let_go(bit)
                running.distinct -= blocks
                self._blocks -= blocks
            run = before
        if running.has_left:
            self.forget(endpoint)

    def distinct_ratios(self, endpoints: Sequence[EndpointKey]) -> Sequence[float]:
        """Distinct blocks in use at each endpoint over the blocks of its requests, in (0, 1]; 1 without any.

        What its prompts take in the KV cache is that share of their length: what they share is there once.
        Many endpoints in a tuple have a column that is kept, and looked at anew where something has changed:
        it is good until the next call.
        """
        if len(endpoints) < MANY_ROWS or not isinstance(endpoints, tuple):
            of = self._running.get
            return [
                running.distinct / running.uses if running is not None and running.uses else 1.0
                for running in map(of, endpoints)
            ]
        column = self._columns.get(id(endpoints))
        if column is None:
            if len(self._columns) >= _MAX_COLUMNS:
                self._columns.clear()
            column = self._columns[id(endpoints)] = _Column(endpoints, map(self._distinct_ratio, endpoints))
        elif column.changed:
            rows, ratios = column.rows, column.ratios
            for endpoint in column.changed:
                row = rows.get(endpoint)
                if row is not None:
                    ratios[row] = self._distinct_ratio(endpoint)
            column.changed.clear()
        return column.ratios

    def _distinct_ratio(self, endpoint: EndpointKey) -> float:
        running = self._running.get(endpoint)
        return running.distinct / running.uses if running is not None and running.uses else 1.0

    def _changed(self, endpoint: EndpointKey) -> None:
        for column in self._columns.values():
            column.changed.add(endpoint)

    def forget(self, endpoint: EndpointKey) -> None:
        """The endpoint has left: nothing is kept of it once the last request there is over."""
        running = self._running.get(endpoint)
        if running is not None:
            running.has_left = True
            if not running.uses:
                del self._running[endpoint]
                self._tree.dismiss(endpoint)

    def retain(self, keys: AbstractSet[EndpointKey]) -> None:
        """These are there; `forget` all others, also those that a request came to after they had left."""
        for key in self._running.keys() - keys:
            self.forget(key)

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int] | array[int]:
        """How many leading blocks of a prompt are in use at each endpoint; see `RadixTree.match`."""
        return self._tree.match(blocks, keys)

    def shared(self, blocks: Sequence[int]) -> list[SharedRun]:
        """The leading blocks of a prompt that requests in flight have as well; O(r) for r runs."""
        return [SharedRun(common, run.uses, len(run.held)) for run, common in self._tree.walk(blocks)]
