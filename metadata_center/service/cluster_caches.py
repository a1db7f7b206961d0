"""Cached prompt prefixes of every engine of every cluster, as callers saved them.

Rules:
    1. Clusters share nothing but the bounds: an address in two clusters is two engines.
    2. A prefix is dropped `cache_expiry_s` after it was last saved. Every call first does what is due by its
       `now_s`, which never goes back.
    3. Everything is bounded by `Limits`. A new engine beyond them is refused with `CapacityError` and
       nothing is changed; cached prefixes make room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import accumulate
from typing import Final

from metadata_center.errors import CapacityError
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.service.cluster_loads import Limits
from metadata_center.types import EndpointKey

DEFAULT_TOP_K: Final = 5
"""Locations answered when the caller does not say how many: AIGW's `defaultQueryTopK`."""

_SLOTS: Final = 64
"""Spans that a cache lifetime is cut into: a prefix outlives it by at most one, 56 s of the default hour."""

_MAKE_ROOM_RATIO: Final = 8
"""The fullest engine gives up one block in so many at a time, which keeps looking for it rare."""


@dataclass(slots=True, eq=False)
class _Cluster:
    """Prefixes of one cluster; `keys` are the engines that hold any."""

    name: str
    index: PrefixIndex
    keys: tuple[EndpointKey, ...] = ()


@dataclass(slots=True)
class _Span:
    """What was saved before `end_s` and after the span before: per cluster, up to which sequence."""

    end_s: float
    sequences: dict[_Cluster, int] = field(default_factory=dict)


class ClusterCaches:
    """Prompt prefixes held per engine of each cluster: longest common prefix, by last save.

    A caller sends a prompt as a list of hashes. `PrefixIndex` wants each hash to stand for all before it;
    AIGW's do, but nothing checks it, so the list is chained once more here: then any list of numbers
    means its prefixes, and a caller that hashes each piece by itself gets right answers as well.

    Args:
        limits: Lifetimes and bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._clusters: dict[str, _Cluster] = {}
        self._spans: deque[_Span] = deque()
        self._span_s = limits.cache_expiry_s / _SLOTS
        self.endpoints = 0
        """Engines that hold any block."""
        self.blocks = 0
        """Blocks held, summed over engines."""
        self.expired_blocks = 0
        """Blocks that time has dropped so far."""

    def save(self, cluster: str, address: str, hashes: Sequence[int], now_s: float) -> None:
        """Note that an engine holds a prompt now; an empty one says nothing.

        Args:
            cluster: Made known by its first engine.
            address: Made known by its first prompt.
            hashes: The prompt's pieces, in order, 0..2**64-1 each.
            now_s: Monotonic seconds.

        Raises:
            CapacityError: The engine is new and too many are known; nothing was changed.
        """
        self.advance(now_s)
        if not hashes:
            return
        key = EndpointKey(address)
        group = self._clusters.get(cluster)
        if group is None or key not in group.keys:
            if self.endpoints >= self._limits.max_endpoints:
                raise CapacityError(f"{self._limits.max_endpoints} endpoints are known")
            if group is None:
                blocks = self._limits.max_blocks_per_endpoint
                index = PrefixIndex(blocks, blocks, max_endpoints=self._limits.max_endpoints)
                group = self._clusters[cluster] = _Cluster(cluster, index)
            group.keys += (key,)
            self.endpoints += 1
        chain = _chain(hashes)
        before = group.index.size(key)
        group.index.record(key, chain)
        self.blocks += group.index.size(key) - before
        if not self._spans or self._spans[-1].end_s <= now_s:
            self._spans.append(_Span(now_s + self._span_s))
        self._spans[-1].sequences[group] = group.index.last_use(key, chain[:1])
        while self.blocks > self._limits.max_blocks:
            self._make_room()

    def query(self, cluster: str, hashes: Sequence[int], top_k: int, now_s: float) -> list[tuple[str, int]]:
        """Engines that hold a prefix of a prompt.

        Args:
            cluster: Unknown ones hold nothing.
            hashes: As saved.
            top_k: Most engines to name, the longest prefixes first; 0 for `DEFAULT_TOP_K`.
            now_s: Monotonic seconds.

        Returns:
            Address and number of leading hashes held, 1..len(hashes).
        """
        self.advance(now_s)
        group = self._clusters.get(cluster)
        if group is None:
            return []
        lengths = group.index.match(_chain(hashes), group.keys)
        held = [(-length, key) for key, length in zip(group.keys, lengths, strict=True) if length]
        return [(key, -length) for length, key in nsmallest(top_k or DEFAULT_TOP_K, held)]

    def advance(self, now_s: float) -> None:
        """Drop what is due by `now_s`; O(1) when nothing is."""
        while self._spans and self._spans[0].end_s + self._limits.cache_expiry_s <= now_s:
            for group, sequence in self._spans.popleft().sequences.items():
                dropped = sum(group.index.forget_older(key, sequence) for key in group.keys)
                self.blocks -= dropped
                self.expired_blocks += dropped
                self._forget_empty(group)

    def _make_room(self) -> None:
        """Take the least recently saved blocks from whichever engine holds the most."""
        size, group, key = max(
            ((group.index.size(key), group, key) for group in self._clusters.values() for key in group.keys),
            key=lambda held: held[0],
        )
        dropped = -(-size // _MAKE_ROOM_RATIO)
        group.index.set_capacity(key, size - dropped)
        group.index.set_capacity(key, self._limits.max_blocks_per_endpoint)
        self.blocks -= dropped
        self._forget_empty(group)

    def _forget_empty(self, group: _Cluster) -> None:
        empty = [key for key in group.keys if not group.index.size(key)]
        for key in empty:
            group.index.remove(key)
        if empty:
            self.endpoints -= len(empty)
            group.keys = tuple(key for key in group.keys if group.index.size(key))
            if not group.keys:
                del self._clusters[group.name]


def _chain(hashes: Iterable[int]) -> list[int]:
    """One number of 64 bits per prefix, equal for equal prefixes.

    Python hashes an integer modulo 2**61-1. Two of 64 bits that agree in that differ in their upper halves.
    """
    mixed = accumulate(hashes, lambda prefix, piece: hash((prefix, piece, piece >> 32)), initial=0)
    return list(mixed)[1:]
