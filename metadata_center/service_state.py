"""What the metadata-center service remembers: load and cached prefixes of every engine of every cluster.

Rules:
    1. A request id counts at most once. Once its delete was seen no add of it counts any more, however the
       two were ordered or repeated, for as long as the id is remembered.
    2. A prompt delete that comes before its add is remembered as well: the add then brings no prompt.
    3. Clusters share nothing but the bounds: an address in two clusters is two engines.
    4. Time alone ends what nobody ended: requests after `request_expiry_s`, cached prefixes
       `cache_expiry_s` after they were last saved. Every call first does what is due by its `now_s`,
       which never goes back.
    5. Everything is bounded by `Limits`. A new request or engine beyond them is refused with
       `CapacityError` and nothing is changed; memories of what ended, and cached prefixes, make room.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import accumulate
from typing import Final

from metadata_center.counters import MAX_ENDPOINTS, Counters
from metadata_center.errors import CapacityError
from metadata_center.load import LoadTable
from metadata_center.prefix_index import PrefixIndex
from metadata_center.types import Charge, EndpointKey, RequestId, value

DEFAULT_TOP_K: Final = 5
"""Locations answered when the caller does not say how many: AIGW's `defaultQueryTopK`."""

_SLOTS: Final = 64
"""Spans that a cache lifetime is cut into: a prefix outlives it by at most one, 56 s of the default hour."""

_NOT_ENDED: Final = (0.0, False)

_MAKE_ROOM_RATIO: Final = 8
"""The fullest engine gives up one block in so many at a time, which keeps looking for it rare."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Lifetimes and bounds.

    Attributes:
        request_expiry_s: A request nobody deleted for so long is taken for lost, an ended one is forgotten,
            and an engine without news is no longer listed. AIGW's METADATA_CENTER_LOAD_REQ_EXPIRE, 660 s.
        cache_expiry_s: Since a prefix was last saved. AIGW's metadata center keeps it an hour.
        max_requests: In flight, all clusters together; as in the gateway's own load table.
        max_ended: Ended ids remembered; the oldest makes room. one measures 300 bytes.
            Enough for 300 requests per second over the whole expiry, or 1,000 over the last 200 s.
        max_endpoints: Engines with load, and engines with cached prefixes, all clusters together.
        max_blocks: Cached blocks of all engines; one measures 180 bytes over 64 engines, so about 0.4 GB.
        max_blocks_per_endpoint: 32 MiB of prompt text in AIGW's steps of 512 bytes, about 8 million tokens:
            more than any one engine's KV cache holds.
    """

    request_expiry_s: float = 660.0
    cache_expiry_s: float = 3600.0
    max_requests: int = 200_000
    max_ended: int = 200_000
    max_endpoints: int = MAX_ENDPOINTS
    max_blocks: int = 2_000_000
    max_blocks_per_endpoint: int = 65_536


@value
class EngineLoad:
    """One engine of a cluster, as a caller sees it.

    Attributes:
        address: As the caller named it: `ip` or `ip:port`, canonical.
        requests: In flight.
        prompt_length: Sum over requests whose prompt was not deleted, in the unit the callers send.
        updated_s: Time of the last add or delete that changed it, on the clock of `now_s`.
    """

    address: str
    requests: int
    prompt_length: int
    updated_s: float


@dataclass(slots=True)
class _Engine:
    """An engine with load; its counters are found by `key`, as addresses repeat between clusters."""

    cluster: str
    address: str
    key: EndpointKey
    updated_s: float


class ClusterLoads:
    """Requests in flight and their prompt lengths, per engine of each cluster.

    Args:
        limits: Lifetimes and bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Rule 1 outlives the table's own tombstones, which void one late charge only; it keeps none.
        self._table = LoadTable(
            Counters(capacity=limits.max_endpoints),
            lease_s=limits.request_expiry_s,
            max_tombstones=0,
            max_requests=limits.max_requests,
        )
        self._clusters: dict[str, dict[str, _Engine]] = {}
        self._engines: OrderedDict[EndpointKey, _Engine] = OrderedDict()  # longest without news first
        self._ended: OrderedDict[RequestId, tuple[float, bool]] = OrderedDict()  # until when; wholly?
        self._serial = 0
        self.expired_requests = 0
        """Requests that time has ended so far."""

    @property
    def in_flight(self) -> int:
        """Requests counted now."""
        return self._table.in_flight

    @property
    def endpoints(self) -> int:
        """Engines listed now."""
        return len(self._engines)

    def add(
        self, request_id: RequestId, cluster: str, address: str, prompt_length: int, now_s: float
    ) -> bool:
        """Count a request on an engine.

        Args:
            request_id: Unique over all clusters.
            cluster: Made known by its first engine.
            address: Made known by its first request.
            prompt_length: >= 0, in any unit that all callers of the cluster share.
            now_s: Monotonic seconds.

        Returns:
            False if it is counted already or was deleted before.

        Raises:
            CapacityError: Too many requests or engines; nothing was changed.
        """
        self.advance(now_s)
        _, is_over = self._ended.get(request_id, _NOT_ENDED)
        if is_over or self._table.get(request_id) is not None:
            return False
        engine = self._clusters.get(cluster, {}).get(address)
        if engine is None:
            engine = _Engine(cluster, address, EndpointKey(str(self._serial)), now_s)
        self._table.charge(Charge(request_id, engine.key, prompt_length, 0), now_s, None)
        if engine.key not in self._engines:
            self._serial += 1
            self._clusters.setdefault(cluster, {})[address] = engine
            self._engines[engine.key] = engine
        if self._ended.pop(request_id, None) is not None:  # its prompt was deleted first (Rule 2)
            self._table.release_prefill(request_id)
        self._touch(engine, now_s)
        return True

    def delete_prompt(self, request_id: RequestId, now_s: float) -> None:
        """The request's prompt is computed; its add may still be under way. Idempotent."""
        self.advance(now_s)
        charge = self._table.get(request_id)
        if charge is None:
            if request_id not in self._ended:
                self._remember(request_id, now_s, wholly=False)
        elif self._table.release_prefill(request_id):
            self._touch(self._engines[charge.endpoint], now_s)

    def delete(self, request_id: RequestId, now_s: float) -> None:
        """The request is over; its add may still be under way. Idempotent."""
        self.advance(now_s)
        charge = self._table.release(request_id, now_s)
        if charge is not None:
            self._touch(self._engines[charge.endpoint], now_s)
        self._remember(request_id, now_s, wholly=True)

    def view(self, cluster: str, now_s: float) -> list[EngineLoad] | None:
        """Load of every engine heard of within `request_expiry_s`; None if the cluster has none."""
        self.advance(now_s)
        engines = self._clusters.get(cluster)
        if engines is None:
            return None
        view = self._table.view(self._table.slots(engine.key for engine in engines.values()))
        return [
            EngineLoad(engine.address, requests, prompt_length, engine.updated_s)
            for engine, requests, prompt_length in zip(
                engines.values(), view.requests, view.prefill_tokens, strict=True
            )
        ]

    def advance(self, now_s: float) -> None:
        """End what is due by `now_s`; O(1) when nothing is."""
        self.expired_requests += len(self._table.advance(now_s).requests)
        while self._ended and next(iter(self._ended.values()))[0] <= now_s:
            self._ended.popitem(last=False)
        # A request's lease began no later than its engine's last news: such an engine has none left.
        before = len(self._engines)
        while self._engines:
            engine = next(iter(self._engines.values()))
            if engine.updated_s + self._limits.request_expiry_s > now_s:
                break
            del self._engines[engine.key]
            cluster = self._clusters[engine.cluster]
            del cluster[engine.address]
            if not cluster:
                del self._clusters[engine.cluster]
        if len(self._engines) != before:
            self._table.retain(frozenset(self._engines))

    def _touch(self, engine: _Engine, now_s: float) -> None:
        engine.updated_s = now_s
        self._engines.move_to_end(engine.key)

    def _remember(self, request_id: RequestId, now_s: float, *, wholly: bool) -> None:
        self._ended[request_id] = (now_s + self._limits.request_expiry_s, wholly)
        self._ended.move_to_end(request_id)
        if len(self._ended) > self._limits.max_ended:
            self._ended.popitem(last=False)


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
        self._spans[-1].sequences[group] = group.index.last_use(key, chain[0])
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


class ServiceState:
    """Both halves of the metadata center, as one thing to hand to its HTTP API.

    Args:
        limits: Lifetimes and bounds.
        zero_unix_ns: Unix time in nanoseconds at which `now_s` is 0.
    """

    def __init__(self, limits: Limits, *, zero_unix_ns: int = 0) -> None:
        self.loads = ClusterLoads(limits)
        self.caches = ClusterCaches(limits)
        self._zero_unix_ns = zero_unix_ns

    def unix_ns(self, at_s: float) -> int:
        """A time on the clock of `now_s` as Unix nanoseconds; wrong by what the wall clock was set since."""
        return self._zero_unix_ns + int(at_s * 1e9)

    def advance(self, now_s: float) -> None:
        """End and drop what is due by `now_s`."""
        self.loads.advance(now_s)
        self.caches.advance(now_s)


def _chain(hashes: Iterable[int]) -> list[int]:
    """One number of 64 bits per prefix, equal for equal prefixes.

    Python hashes an integer modulo 2**61-1. Two of 64 bits that agree in that differ in their upper halves.
    """
    mixed = accumulate(hashes, lambda prefix, piece: hash((prefix, piece, piece >> 32)), initial=0)
    return list(mixed)[1:]
