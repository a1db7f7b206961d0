"""Which endpoint holds which prompt blocks in its KV cache, as far as the gateway can know.

Rules:
    1. A chain is recorded whole, so an ancestor is always used no less recently than its descendants and
       outlives them: each endpoint's blocks are closed under ancestry, as `RadixTree` wants them.
    2. An endpoint never holds more than its capacity; the least recently used block leaves first, of those
       used together the last of the chain, as in the engine's own free queue (vLLM `FreeKVCacheBlockQueue`: a
       request's blocks are freed tail first).
    3. A wrong entry costs time, never correctness: this is a prediction of the engine's cache. Blocks that
       are no chains may spoil a match; they break no bound.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from metadata_center.history.radix_tree import RadixTree, Run
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import EndpointKey


class _Cache:
    """One endpoint.

    Attributes:
        bit: Its bit in the tree.
        capacity: Blocks it may hold.
        size: Blocks it holds.
        ends: Sequence of a use to the last run of what was used then and not since, the oldest first: that
            run and those before it that `held` gives the same sequence.
    """

    __slots__ = ("bit", "capacity", "ends", "size")

    def __init__(self, bit: int, capacity: int) -> None:
        self.bit = bit
        self.capacity = capacity
        self.size = 0
        self.ends: OrderedDict[int, Run] = OrderedDict()


class PrefixIndex:
    """Blocks per endpoint, bounded by each endpoint's capacity.

    Args:
        default_capacity_blocks: For endpoints whose capacity is not known yet, 0..max.
        max_capacity_blocks: Bound on any one endpoint, whatever it claims.
        max_endpoints: Bound on endpoints.
    """

    def __init__(
        self,
        default_capacity_blocks: int,
        max_capacity_blocks: int,
        *,
        max_endpoints: int = MAX_ENDPOINTS,
    ) -> None:
        if not 0 <= default_capacity_blocks <= max_capacity_blocks:
            raise ValueError("default_capacity_blocks is not within 0..max_capacity_blocks")
        self._default_capacity_blocks = default_capacity_blocks
        self._max_capacity_blocks = max_capacity_blocks
        self._tree = RadixTree(max_endpoints)
        self._caches: dict[EndpointKey, _Cache] = {}
        self._sequence = 0

    @property
    def total(self) -> int:
        """Blocks held, summed over endpoints."""
        return sum(cache.size for cache in self._caches.values())

    def size(self, endpoint: EndpointKey) -> int:
        """Blocks held by `endpoint`; 0 if it is unknown."""
        cache = self._caches.get(endpoint)
        return 0 if cache is None else cache.size

    def capacity(self, endpoint: EndpointKey) -> int:
        """Blocks `endpoint` may hold here."""
        cache = self._caches.get(endpoint)
        return self._default_capacity_blocks if cache is None else cache.capacity

    def last_use(self, endpoint: EndpointKey, blocks: Sequence[int]) -> int:
        """Sequence of the last `record` of the last block of a chain on `endpoint`; 0 if it is not held."""
        cache = self._caches.get(endpoint)
        if cache is None or not blocks:
            return 0
        run, depth = None, 0
        for run in self._tree.path(blocks):
            depth += len(run.blocks)
        return run.held.get(cache.bit, 0) if run is not None and depth == len(blocks) else 0

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int] | array[int]:
        """How many leading blocks each endpoint holds; see `RadixTree.match`."""
        return self._tree.match(blocks, keys)

    def record(self, endpoint: EndpointKey, blocks: Sequence[int]) -> int:
        """Note that `endpoint` now holds the chain `blocks`, all of it just used.

        Of a chain longer than the endpoint's capacity only the head is kept: the rest would be the first
        to be evicted.

        Args:
            endpoint: Known from now on, if it was not.
            blocks: The prompt's chain, head first.

        Returns:
            The sequence of the previous use of the last block that was held already; 0 if none was.

        Raises:
            CapacityError: `max_endpoints` are known; nothing was changed.
        """
        cache = self._caches.get(endpoint) or self._admit(endpoint)
        bit, ends = cache.bit, cache.ends
        kept = blocks if len(blocks) <= cache.capacity else blocks[: cache.capacity]
        self._sequence = sequence = self._sequence + 1
        run, depth, previous = self._tree.root, 0, 0
        for run in self._tree.path(kept):
            depth += len(run.blocks)
            used = run.held.get(bit)
            if used is None:
                cache.size += len(run.blocks)
            else:
                previous = used
                if ends.get(used) is run:  # all that was used then is used now
                    del ends[used]
            run.hold(bit, sequence)
        if depth < len(kept):
            if run.mask == bit and not run.children:
                run.blocks.extend(kept[depth:])
            else:
                run = run.grow(kept, depth)
                run.hold(bit, sequence)
            cache.size += len(kept) - depth
        if kept:
            ends[sequence] = run
        if cache.size > cache.capacity:
            self._evict(cache)
        return previous

    def forget_older(self, endpoint: EndpointKey, sequence: int) -> int:
        """Drop every block of `endpoint` last used at or before `sequence`; returns how many.

        For an engine that reported fewer cached tokens than were predicted: it evicts in the same order,
        so whatever is no younger than a block it has lost is lost as well.
        """
        cache = self._caches.get(endpoint)
        if cache is None:
            return 0
        before = cache.size
        while cache.ends and next(iter(cache.ends)) <= sequence:
            self._drop_oldest(cache, cache.size)
        return before - cache.size

    def set_capacity(self, endpoint: EndpointKey, blocks: int) -> None:
        """Bound `endpoint` to `blocks` (at most `max_capacity_blocks`), evicting what is over.

        Raises:
            ValueError: `blocks` is negative.
            CapacityError: The endpoint is new and `max_endpoints` are known.
                In each case nothing was changed.
        """
        if blocks < 0:
            raise ValueError("a capacity is negative")
        cache = self._caches.get(endpoint) or self._admit(endpoint)
        cache.capacity = min(blocks, self._max_capacity_blocks)
        self._evict(cache)

    def clear(self, endpoint: EndpointKey) -> None:
        """Drop all blocks of `endpoint` and keep its capacity: its engine lost its cache."""
        cache = self._caches.get(endpoint)
        if cache is not None:
            while cache.ends:
                self._drop_oldest(cache, cache.size)

    def remove(self, endpoint: EndpointKey) -> None:
        """Forget `endpoint`, capacity included. O(its blocks)."""
        self.clear(endpoint)
        if self._caches.pop(endpoint, None) is not None:
            self._tree.dismiss(endpoint)

    def _admit(self, endpoint: EndpointKey) -> _Cache:
        bit = self._tree.admit(endpoint)
        cache = self._caches[endpoint] = _Cache(bit, self._default_capacity_blocks)
        return cache

    def _evict(self, cache: _Cache) -> None:
        while cache.size > cache.capacity:
            self._drop_oldest(cache, cache.size - cache.capacity)

    def _drop_oldest(self, cache: _Cache, most: int) -> None:
        """Drop up to `most` blocks, at least one, of those that were used least recently, the last first."""
        bit = cache.bit
        sequence, run = next(iter(cache.ends.items()))
        while run.held.get(bit) == sequence:
            blocks = len(run.blocks)
            if blocks > most:
                near = run.cut(blocks - most)
                run.let_go(bit)
                cache.size -= most
                cache.ends[sequence] = near
                return
            before = run.parent
            assert before is not None, "the root is not held"
            run.let_go(bit)
            cache.size -= blocks
            most -= blocks
            run = before
            if not most:
                break
        if run.held.get(bit) == sequence:
            cache.ends[sequence] = run
        else:
            del cache.ends[sequence]
