"""Which endpoint holds which prompt blocks in its KV cache, as far as the gateway can know.

Rules:
    1. Blocks come as chains: a block's hash covers everything before it, so one hash has one ancestry.
    2. A chain is recorded head last, so an ancestor is always used more recently than its descendants
       and outlives them. Hence each endpoint's blocks are closed under ancestry, and "holds the first d
       blocks" is the same as "holds block d": `match` bisects where it would otherwise walk.
    3. An endpoint never holds more than its capacity; the least recently used block leaves first, as in
       the engine's own free queue (vLLM `FreeKVCacheBlockQueue`: a request's blocks are freed tail first).
    4. `_holders[block]` has bit b set if and only if the endpoint with bit b holds the block; a block
       nobody holds has no entry. A bit is given to another endpoint only after all its blocks are gone.
    5. A wrong entry costs time, never correctness: this is a prediction of the engine's cache. Blocks that
       break Rule 1 may spoil a match; they break neither a bound nor Rule 4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from metadata_center.counters import MAX_ENDPOINTS
from metadata_center.errors import CapacityError
from metadata_center.types import EndpointKey

_MAX_GROUPS: Final = 256  # keys tuples remembered: far more than a gateway has models


class _Cache:
    """One endpoint's blocks, least recently used first, each with the sequence of its last use."""

    __slots__ = ("bit", "blocks", "capacity")

    def __init__(self, bit: int, capacity: int) -> None:
        self.bit = bit
        self.capacity = capacity
        self.blocks: OrderedDict[int, int] = OrderedDict()


class _Group:
    """One keys tuple: the bits it spans, and the row of each bit (`rows[bit]`; other bits have none)."""

    __slots__ = ("keys", "mask", "rows")

    def __init__(self, keys: tuple[EndpointKey, ...], bits: list[int | None]) -> None:
        self.keys = keys  # held, so that its id stays its own
        self.rows = {bit: row for row, bit in enumerate(bits) if bit is not None}
        self.mask = sum(1 << bit for bit in self.rows)

    def set_rows(self, matched: list[int], mask: int, depth: int) -> None:
        """Write `depth` into the row of each bit of `mask`."""
        rows, bit = self.rows, -1
        for zeros in f"{mask:b}"[::-1].split("1")[:-1]:
            bit += len(zeros) + 1
            matched[rows[bit]] = depth


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
        self._max_endpoints = max_endpoints
        self._holders: dict[int, int] = {}
        self._caches: dict[EndpointKey, _Cache] = {}
        self._groups: dict[int, _Group] = {}
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
        """How many leading blocks each endpoint holds.

        O(k log b + n) for b blocks, n endpoints and k distinct lengths of match. Passing the same tuple
        object again saves looking its endpoints up.

        Args:
            blocks: The prompt's chain, head first.
            keys: Endpoints, distinct; one that is unknown matches nothing.

        Returns:
            One length per key, 0..len(blocks).
        """
        group = self._groups.get(id(keys)) or self._group(keys)
        holders = self._holders
        alive = group.mask
        matched = [0] * len(keys)
        depth = 0
        while alive and depth < len(blocks):
            holding = alive & holders.get(blocks[depth], 0)
            if holding != alive:  # those that hold `depth` blocks and not the next
                if depth:
                    group.set_rows(matched, alive ^ holding, depth)
                alive = holding
                if not alive:
                    return matched
            depth = bisect_left(
                blocks, True, depth + 1, key=lambda block: alive & holders.get(block, 0) != alive
            )
        if alive:
            group.set_rows(matched, alive, len(blocks))
        return matched

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
        held, holders, bit = cache.blocks, self._holders, cache.bit
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
        self._caches.pop(endpoint, None)

    def _admit(self, endpoint: EndpointKey) -> _Cache:
        if len(self._caches) >= self._max_endpoints:
            raise CapacityError(f"{self._max_endpoints} endpoints are known")
        taken = 0
        for cache in self._caches.values():
            taken |= cache.bit
        cache = self._caches[endpoint] = _Cache(~taken & (taken + 1), self._default_capacity_blocks)
        self._groups.clear()  # they may know this bit as another's, or this endpoint as nobody's
        return cache

    def _group(self, keys: tuple[EndpointKey, ...]) -> _Group:
        caches = [self._caches.get(key) for key in keys]
        group = _Group(keys, [None if cache is None else cache.bit.bit_length() - 1 for cache in caches])
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[id(keys)] = group
        return group

    def _evict(self, cache: _Cache) -> None:
        while len(cache.blocks) > cache.capacity:
            self._drop_oldest(cache)

    def _drop_oldest(self, cache: _Cache) -> None:
        block, _ = cache.blocks.popitem(last=False)
        holding = self._holders[block] ^ cache.bit
        if holding:
            self._holders[block] = holding
        else:
            del self._holders[block]
