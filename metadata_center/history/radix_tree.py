"""Chains of blocks as a tree of runs, and how much of each endpoints hold: the base of all views of caches.

Rules:
    1. Blocks come as chains: a block's hash covers everything before it, so one hash has one ancestry. Two
       chains that agree in one place agree in all before it: a whole run is compared by its last block.
    2. A run is a stretch of blocks that is held as one. It is cut where a chain leaves it, ends in it, or is
       forgotten from; the far part stays the same object, so what keeps the end of a chain keeps it.
    3. Each endpoint's blocks are closed under ancestry, which users ensure: a holder of a run holds
       all runs before it.
    4. A bit is given to another endpoint only after all that it holds is gone.

So a chain of thousands of blocks costs what it branches, not what it is long.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import MANY_ROWS, EndpointKey

_Blocks: TypeAlias = "list[int] | array[int]"

_MAX_GROUPS: Final = 256  # keys tuples remembered: far more than a gateway has models
_MAX_ADMITTING: Final = 16  # of them told of a new endpoint, which takes a look at all keys of each
_FEW_BITS: Final = 16  # up to here one row after the other is quicker


class Run:
    """Blocks that follow each other, and their holders.

    Attributes:
        blocks: At least one, but for the root's; in an array where they came in one.
        parent: The run before; None for the root, and for a run that no endpoint holds any more.
        children: Runs that follow, by their first block.
        held: Bit of each holder to what its view of caches remembers of it; never 0.
        mask: The bits of `held`.
        uses: Requests in flight with these blocks, at all holders; counted by `RunningBlocks` alone.
    """

    __slots__ = ("blocks", "children", "held", "mask", "parent", "uses")

    def __init__(self, blocks: _Blocks, parent: Run | None) -> None:
        self.blocks = blocks
        self.parent = parent
        self.children: dict[int, Run] = {}
        self.held: dict[int, int] = {}
        self.mask = 0
        self.uses = 0

    def cut(self, at: int) -> Run:
        """Cut after `at` blocks, 0 < at < len; returns the near part, which is new."""
        assert self.parent is not None, "the root has no blocks"
        near = Run(self.blocks[:at], self.parent)
        del self.blocks[:at]
        near.held, near.mask, near.uses = self.held.copy(), self.mask, self.uses
        near.children[self.blocks[0]] = self
        self.parent.children[near.blocks[0]] = near
        self.parent = near
        return near

    def grow(self, blocks: Sequence[int], depth: int) -> Run:
        """A new run behind this one: the blocks of a chain from `depth` on, at least one."""
        own = blocks[depth:]
        child = self.children[own[0]] = Run(own if isinstance(own, array) else list(own), self)
        return child

    def hold(self, bit: int, what: int) -> None:
        """An endpoint holds it."""
        self.held[bit] = what
        self.mask |= bit

    def let_go(self, bit: int) -> None:
        """An endpoint holds it no more; a run that none holds leaves the tree, with what follows it."""
        del self.held[bit]
        self.mask ^= bit
        if not self.mask and self.parent is not None:
            del self.parent.children[self.blocks[0]]
            self.parent = None


class _Group:
    """One keys tuple: the bits it spans, and the row of each bit; other bits have none."""

    __slots__ = ("_of_bits", "keys", "mask", "rows")

    def __init__(self, keys: tuple[EndpointKey, ...], bits: list[int | None]) -> None:
        self.keys = keys  # held, so that its id stays its own
        self.rows = {bit: row for row, bit in enumerate(bits) if bit is not None}
        self.mask = sum(1 << bit for bit in self.rows)
        self._of_bits: NDArray[np.intp] | None = None

    def admit(self, endpoint: EndpointKey, bit: int) -> None:
        """A bit is this endpoint's now, and no other's."""
        self._of_bits = None
        if self.rows.pop(bit, None) is not None:
            self.mask ^= 1 << bit
        if endpoint in self.keys:
            self.rows[bit] = self.keys.index(endpoint)
            self.mask |= 1 << bit

    def set_rows(self, matched: list[int] | array[int], mask: int, depth: int) -> None:
        """Write `depth` into the row of each bit of `mask`."""
        if isinstance(matched, array) and mask.bit_count() > _FEW_BITS:
            if self._of_bits is None:
                self._of_bits = np.zeros(self.mask.bit_length(), np.intp)
                self._of_bits[list(self.rows)] = list(self.rows.values())
            packed = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), np.uint8)
            bits = np.unpackbits(packed, bitorder="little").nonzero()[0]
            np.frombuffer(matched, np.int64)[self._of_bits[bits]] = depth
            return
        rows, bit = self.rows, -1
        if isinstance(matched, array):
            while mask:
                least = mask & -mask
                matched[rows[least.bit_length() - 1]] = depth
                mask ^= least
            return
        for zeros in f"{mask:b}"[::-1].split("1")[:-1]:
            bit += len(zeros) + 1
            matched[rows[bit]] = depth


class RadixTree:
    """The tree, and a bit for each endpoint.

    Args:
        max_endpoints: Bound on endpoints.

    Attributes:
        root: Holds no blocks.
    """

    def __init__(self, max_endpoints: int = MAX_ENDPOINTS) -> None:
        self.root = Run([], None)
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
        if len(self._groups) > _MAX_ADMITTING:
            self._groups.clear()
        for group in self._groups.values():  # they may know this bit as another's, or this endpoint as none's
            group.admit(endpoint, bit.bit_length() - 1)
        return bit

    def dismiss(self, endpoint: EndpointKey) -> None:
        """The endpoint, which holds nothing any more, gives its bit back."""
        self._bits.pop(endpoint, None)

    def path(self, blocks: Sequence[int]) -> list[Run]:
        """The runs that are the leading blocks of a chain, the first one first; cuts one that it leaves."""
        path: list[Run] = []
        run, depth, end = self.root, 0, len(blocks)
        while depth < end:
            child = run.children.get(blocks[depth])
            if child is None:
                break
            common = _common(child.blocks, blocks, depth)
            run = child if common == len(child.blocks) else child.cut(common)
            path.append(run)
            depth += common
        return path

    def walk(self, blocks: Sequence[int]) -> Iterator[tuple[Run, int]]:
        """The runs that a chain leads through, and how many of its blocks each has; cuts nothing."""
        run, depth, end = self.root, 0, len(blocks)
        while depth < end:
            child = run.children.get(blocks[depth])
            if child is None:
                return
            common = _common(child.blocks, blocks, depth)
            yield child, common
            depth += common
            if common < len(child.blocks):
                return
            run = child

    def match(self, blocks: Sequence[int], keys: tuple[EndpointKey, ...]) -> list[int] | array[int]:
        """How many leading blocks each endpoint holds.

        O(r + n) for r runs of the chain and n endpoints. Passing the same tuple object again saves looking
        its endpoints up.

        Args:
            blocks: The prompt's chain, head first.
            keys: Endpoints, distinct; one that is unknown matches nothing.

        Returns:
            One length per key, 0..len(blocks); the caller's own, for many keys in an array.
        """
        group = self._groups.get(id(keys)) or self._group(keys)
        matched = [0] * len(keys) if len(keys) < MANY_ROWS else array("q", bytes(8 * len(keys)))
        alive, run, depth, end = group.mask, self.root, 0, len(blocks)
        while alive and depth < end:
            child = run.children.get(blocks[depth])
            if child is None:
                break
            holding = alive & child.mask
            if holding != alive:  # those that hold `depth` blocks and not the next
                if depth:
                    group.set_rows(matched, alive ^ holding, depth)
                alive = holding
                if not alive:
                    return matched
            common = _common(child.blocks, blocks, depth)
            depth += common
            if common < len(child.blocks):
                break
            run = child
        if depth:
            group.set_rows(matched, alive, depth)
        return matched

    def _group(self, keys: tuple[EndpointKey, ...]) -> _Group:
        bits = [self._bits.get(key) for key in keys]
        group = _Group(keys, [None if bit is None else bit.bit_length() - 1 for bit in bits])
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[id(keys)] = group
        return group


def _common(run: _Blocks, blocks: Sequence[int], depth: int) -> int:
    """How many blocks of a run are those of a chain from `depth` on, where the first is (Rule 1)."""
    most = min(len(run), len(blocks) - depth)
    if run[most - 1] == blocks[depth + most - 1]:
        return most
    return bisect_left(range(most), True, 1, key=lambda at: run[at] != blocks[depth + at])
