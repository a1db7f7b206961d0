"""Which endpoint holds which prompt blocks in its KV cache, as far as the gateway can know.

Rules:
    1. A chain is recorded head last, so an ancestor is always used more recently than its descendants
       and outlives them: each endpoint's blocks are closed under ancestry, as `BlockHolders` wants them.
    2. An endpoint never holds more than its capacity; the least recently used block leaves first, as in
       the engine's own free queue (vLLM `FreeKVCacheBlockQueue`: a request's blocks are freed tail first).
    3. A wrong entry costs time, never correctness: this is a prediction of the engine's cache. Blocks that
       are no chains may spoil a match; they break no bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from metadata_center.history.block_holders import BlockHolders
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import EndpointKey


class _Cache:
    """One endpoint's blocks, least recently used first, each with the sequence of its last use."""

    __slots__ = ("bit", "blocks", "capacity")

    def __init__(self, bit: int, capacity: int) -> None:
        self.bit = bit
        self.capacity = capacity
        self.blocks: OrderedDict[int, int] = OrderedDict()


class PrefixIndex:
    """Blocks per endpoint, bounded by each endpoint's capacity.

    Args:
        default_capacity_blocks: For endpoints whose capacity nobody has told yet, 0..max.
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
        self._holders = BlockHolders(max_endpoints)
        self._caches: dict[EndpointKey, _Cache] = {}
        self._sequence = 0

    @property
    def total(self) -> int:
        """Blocks held, summed over endpoints."""
        return sum(len(cache.blocks) for cache in self._caches.values())

    def size(self, endpoint: EndpointKey) -> int:
        """Blocks held by `endpoint`; 0 if it is unknown."""
        cache = self._caches.get(endpoint)
        return 0 if cache is None else len(cache.blocks)

    def capacity(self, endpoint: EndpointKey) -> int:
        """Blocks `endpoint` may hold here."""
        cache = self._caches.get(endpoint)
        return self._default_capacity_blocks if cache is None else cache.capacity

    def last_use(self, endpoint: EndpointKey, block: int) -> int:
        """Sequence of the last `record` of `block` on `endpoint`; 0 if it is not held."""
        cache = self._caches.get(endpoint)
        return 0 if cache is None else cache.blocks.get(block, 0)

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int]:
        """How many leading blocks each endpoint holds; see `BlockHolders.match`."""
        return self._holders.match(blocks, keys)

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
        held, holders, bit = cache.blocks, self._holders.masks, cache.bit
        kept = blocks[: cache.capacity]
        known = list(takewhile(held.__contains__, kept))
        previous = held[known[-1]] if known else 0
        self._sequence = sequence = self._sequence + 1
        for block in reversed(kept[len(known) :]):
            held[block] = sequence
            held.move_to_end(block)
            holding = holders.get(block)
            holders[block] = bit if holding is None else holding | bit
        for block in reversed(known):
            held[block] = sequence
            held.move_to_end(block)
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
        before = len(cache.blocks)
        while cache.blocks and next(iter(cache.blocks.values())) <= sequence:
            self._drop_oldest(cache)
        return before - len(cache.blocks)

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
            while cache.blocks:
                self._drop_oldest(cache)

    def remove(self, endpoint: EndpointKey) -> None:
        """Forget `endpoint`, capacity included. O(its blocks)."""
        self.clear(endpoint)
        if self._caches.pop(endpoint, None) is not None:
            self._holders.dismiss(endpoint)

    def _admit(self, endpoint: EndpointKey) -> _Cache:
        bit = self._holders.admit(endpoint)
        cache = self._caches[endpoint] = _Cache(bit, self._default_capacity_blocks)
        return cache

    def _evict(self, cache: _Cache) -> None:
        while len(cache.blocks) > cache.capacity:
            self._drop_oldest(cache)

    def _drop_oldest(self, cache: _Cache) -> None:
        block, _ = cache.blocks.popitem(last=False)
        masks = self._holders.masks
        holding = masks[block] ^ cache.bit
        if holding:
            masks[block] = holding
        else:
            del masks[block]
