"""Who holds which block, as bit masks: the part that every view of caches has in common.

Rules:
    1. Blocks come as chains: a block's hash covers everything before it, so one hash has one ancestry.
    2. Each endpoint's blocks are closed under ancestry, which is the users' business. Hence "holds the first
       d blocks" is the same as "holds block d": `match` bisects where it would otherwise walk.
    3. `masks[block]` has bit b set if and only if the endpoint with bit b holds the block; a block nobody
       holds has no entry. A bit is given to another endpoint only after all its blocks are gone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import EndpointKey

_MAX_GROUPS: Final = 256  # keys tuples remembered: far more than a gateway has models


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


class BlockHolders:
    """Masks per block, bits per endpoint.

    Args:
        max_endpoints: Bound on endpoints.

    Attributes:
        masks: Rule 3; users write it.
    """

    def __init__(self, max_endpoints: int = MAX_ENDPOINTS) -> None:
        self.masks: dict[int, int] = {}
        self._max_endpoints = max_endpoints
        self._bits: dict[EndpointKey, int] = {}
        self._groups: dict[int, _Group] = {}

    def admit(self, endpoint: EndpointKey) -> int:
        """A bit for an endpoint that has none.

        Raises:
            CapacityError: `max_endpoints` are known; nothing was changed.
        """
        if len(self._bits) >= self._max_endpoints:
            raise CapacityError(f"{self._max_endpoints} endpoints are known")
        taken = 0
        for bit in self._bits.values():
            taken |= bit
        bit = self._bits[endpoint] = ~taken & (taken + 1)
        self._groups.clear()  # they may know this bit as another's, or this endpoint as nobody's
        return bit

    def dismiss(self, endpoint: EndpointKey) -> None:
        """The endpoint, which holds nothing any more, gives its bit back."""
        self._bits.pop(endpoint, None)

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
        holders = self.masks
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

    def _group(self, keys: tuple[EndpointKey, ...]) -> _Group:
        bits = [self._bits.get(key) for key in keys]
        group = _Group(keys, [None if bit is None else bit.bit_length() - 1 for bit in bits])
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[id(keys)] = group
        return group
