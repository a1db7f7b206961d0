"""Prompt blocks of requests in flight, per endpoint: what an engine has cached or is about to cache.

Rules:
    1. An engine never evicts the blocks of a request that runs there, and computes those of one that waits
       there before any request behind it starts. So from a request's charge to its end its blocks are a
       hit for whoever comes after it, whatever else is known of that cache.
    2. Chains are added and removed whole, so a block is in use as long as its descendants are: blocks are
       closed under ancestry, as `BlockHolders` wants them.
    3. Counts are exact: what was not added must not be removed, which `add` tells.
    4. Memory is bounded by `max_blocks` over all endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from metadata_center.errors import CapacityError
from metadata_center.history.block_holders import BlockHolders
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import EndpointKey


class _Running:
    """One endpoint's blocks in use, counted."""

    __slots__ = ("bit", "counts", "has_left", "uses")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.counts: dict[int, int] = {}
        self.uses = 0
        self.has_left = False


class RunningBlocks:
    """Counts of blocks in use.

    Args:
        max_blocks: Bound on blocks counted, summed over endpoints; chains beyond it are left out.
        max_endpoints: Bound on endpoints.
    """

    def __init__(self, max_blocks: int = 2_000_000, *, max_endpoints: int = MAX_ENDPOINTS) -> None:
        self._running: dict[EndpointKey, _Running] = {}
        self._holders = BlockHolders(max_endpoints)
        self._max_blocks = max_blocks
        self._blocks = 0

    def __len__(self) -> int:
        """Distinct blocks in use, summed over endpoints."""
        return self._blocks

    def add(self, endpoint: EndpointKey, blocks: Sequence[int]) -> bool:
        """One more request with these blocks is on its way; False if there are none, or no room for them."""
        if not blocks or self._blocks + len(blocks) > self._max_blocks:
            return False
        running = self._running.get(endpoint)
        if running is None:
            try:
                running = self._running[endpoint] = _Running(self._holders.admit(endpoint))
            except CapacityError:
                return False
        running.has_left = False
        running.uses += len(blocks)
        counts, bit, masks = running.counts, running.bit, self._holders.masks
        for block in blocks:
            count = counts.get(block)
            if count is None:
                counts[block] = 1
                masks[block] = masks.get(block, 0) | bit
                self._blocks += 1
            else:
                counts[block] = count + 1
        return True

    def remove(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """A request that was added is over."""
        running = self._running[endpoint]
        running.uses -= len(blocks)
        counts, bit, masks = running.counts, running.bit, self._holders.masks
        for block in blocks:
            left = counts[block] - 1
            if left:
                counts[block] = left
                continue
            del counts[block]
            self._blocks -= 1
            holding = masks[block] ^ bit
            if holding:
                masks[block] = holding
            else:
                del masks[block]

        if running.has_left:
            self.forget(endpoint)

    def distinct_ratio(self, endpoint: EndpointKey) -> float:
        """Distinct blocks in use at an endpoint over the blocks of its requests, in (0, 1]; 1 without any.

        What its prompts take in the KV cache is that share of their length: what they share is there once.
        """
        running = self._running.get(endpoint)
        return len(running.counts) / running.uses if running is not None and running.uses else 1.0

    def forget(self, endpoint: EndpointKey) -> None:
        """The endpoint has left: nothing is kept of it once the last request there is over."""
        running = self._running.get(endpoint)
        if running is not None:
            running.has_left = True
            if not running.counts:
                del self._running[endpoint]
                self._holders.dismiss(endpoint)

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int]:
        """How many leading blocks of a prompt are in use at each endpoint; see `BlockHolders.match`."""
        return self._holders.match(blocks, keys)
