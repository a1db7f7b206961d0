"""A paged KV cache that finds and keeps shared prefixes.

Rules:
    1. A block is referenced (by one or more sequences) or unreferenced; only the latter are handed out.
    2. An unreferenced block keeps its contents until it is handed out again: least recently released first,
       and of one sequence the tail first, so that what survives is always a prefix.
    3. One key may have several physical copies (two sequences computed it at once). Every copy is announced
       when stored and again when removed, as vLLM does; a hit uses the oldest copy.
    4. Events come out in the order in which they happened.

Source: vLLM 0.32 `vllm/v1/core/block_pool.py`, behaviour as captured from a running engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks of one sequence became available to others.

    Attributes:
        keys: Their keys, in order; never empty.
        parent: Key of the block before the first, or None at the start of the sequence.
        first_block: Index of the first of them in the sequence.
        source: What the storing request carried along (its tokens, for instance), or None.
    """

    keys: tuple[int, ...]
    parent: int | None
    first_block: int
    source: Any


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Physical blocks lost their contents; one key per block, so a key may occur twice."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Every block lost its contents."""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


class PrefixCache:
    """A pool of `num_blocks` blocks, addressed by index."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._key_of: list[int | None] = [None] * num_blocks
        self._block_of: dict[int, int] = {}
        self._more_copies: dict[int, list[int]] = {}
        self._unreferenced: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._events: list[CacheEvent] = []

    @property
    def num_unreferenced(self) -> int:
        """Blocks that `allocate` could hand out."""
        return len(self._unreferenced)

    @property
    def num_keys(self) -> int:
        """Distinct keys that `match` could find."""
        return len(self._block_of)

    def match(self, keys: Sequence[int], limit_blocks: int) -> list[int]:
        """Blocks holding the longest stored prefix of `keys`, at most `limit_blocks`. Changes nothing."""
        blocks = []
        block_of = self._block_of
        for key in keys[:limit_blocks]:
            block = block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are unreferenced, so that acquiring them would shrink the pool."""
        references = self._references
        return sum(1 for block in blocks if not references[block])

    def acquire(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""
        references = self._references
        for block in blocks:
            if not references[block]:
                del self._unreferenced[block]
            references[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks out of the pool, each with one reference and no contents.

        Raises:
            ValueError: Fewer than `num_blocks` are unreferenced. Nothing has changed.
        """
        if num_blocks > len(self._unreferenced):
            raise ValueError("not enough unreferenced blocks")
        references, key_of, take = self._references, self._key_of, self._unreferenced.popitem
        blocks: list[int] = []
        removed: list[int] = []
        for _ in range(num_blocks):
            block = take(last=False)[0]
            references[block] = 1
            key = key_of[block]
            if key is not None:
                key_of[block] = None
                self._forget(key, block)
                removed.append(key)
            blocks.append(block)
        if removed:
            self._events.append(BlocksRemoved(tuple(removed)))
        return blocks

    def store(self, blocks: Sequence[int], keys: Sequence[int], first: int, stop: int, source: Any) -> None:
        """Make blocks `first..stop` of a sequence findable under their keys.

        Args:
            blocks: All blocks of the sequence, referenced.
            keys: Its keys; `stop` or more.
            first: Index of the first block not yet stored; `first < stop`.
            stop: One past the last.
            source: Handed on in the event.
        """
        key_of, block_of = self._key_of, self._block_of
        stored = tuple(keys[first:stop])
        for key, block in zip(stored, blocks[first:stop], strict=True):
            key_of[block] = key
            if block_of.setdefault(key, block) != block:
                self._more_copies.setdefault(key, []).append(block)
        self._events.append(BlocksStored(stored, keys[first - 1] if first else None, first, source))

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block, the tail first. Contents stay until the block is reused."""
        references, unreferenced = self._references, self._unreferenced
        for block in reversed(blocks):
            references[block] -= 1
            if not references[block]:
                unreferenced[block] = None

    def clear(self) -> bool:
        """Forget all contents. False, and nothing changed, while any block is referenced."""
        if len(self._unreferenced) < self.num_blocks:
            return False
        self._key_of = [None] * self.num_blocks
        self._block_of.clear()
        self._more_copies.clear()
        self._events.append(CacheCleared())
        return True

    def drain_events(self) -> tuple[CacheEvent, ...]:
        """What happened since the last call, oldest first."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def _forget(self, key: int, block: int) -> None:
        copies = self._more_copies.get(key)
        if copies is None:
            del self._block_of[key]
            return
        if self._block_of[key] == block:
            self._block_of[key] = copies.pop(0)
        else:
            copies.remove(block)
        if not copies:
            del self._more_copies[key]
