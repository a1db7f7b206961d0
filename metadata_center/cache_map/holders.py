"""Holders: replicas, the bits that stand for them in the runs, and those of one request's endpoints.

Rules:
    1. Each replica is two holders, GPU memory (an even bit) and everything slower (the next).
    2. A block is removed as often as it was stored before its holder is without it: a hash may have several
       physical copies.
    3. A block that is stored has its ancestors beside it: an engine announces what a request holds from its
       start. So if the chain is known from another replica, all of it is credited to this one.
    4. The bits of a cleared or removed replica mean nothing from then on, but are given to others only after
       they were swept from every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from metadata_center.cache_map.runs import FOLD, Run, Seed, Space
from metadata_center.cache_map.tree import Tree
from metadata_center.cache_map.values import Counts
from metadata_center.errors import CapacityError
from metadata_center.types import EndpointKey

_MAX_GROUPS: Final = 256  # keys tuples remembered: far more than a gateway has models


class Replica:
    """One engine, a data-parallel rank of an endpoint: the handle its events are applied with.

    Args:
        endpoint: Where requests for it go.
        rank: Its data-parallel rank.
        space: Its model's vocabulary and names.
        max_blocks: Most blocks it is credited with.
        counts: Those of its map.

    Attributes:
        attached: False once its endpoint was removed, or another was attached in its place.
        block_size: Tokens per block; 0 until the engine has announced one.
        blocks: Blocks held, per medium class.
        copies: For each of its two holders: folded name to copies beyond the first.
        gpu: The even bit of its two.
        group: KV cache group that is followed, once `has_group`.
        seed: Whose names it uses; None until it has stored.
        slower: It has announced blocks in slower media.
    """

    __slots__ = (
        "_counts",
        "attached",
        "block_size",
        "blocks",
        "copies",
        "endpoint",
        "gpu",
        "group",
        "has_group",
        "max_blocks",
        "rank",
        "seed",
        "slower",
        "space",
    )

    def __init__(
        self, endpoint: EndpointKey, rank: int, space: Space, max_blocks: int, counts: Counts
    ) -> None:
        self.endpoint = endpoint
        self.rank = rank
        self.space = space
        self.attached = True
        self.gpu = -2
        self.seed: Seed | None = None
        self.max_blocks = max_blocks
        self._counts = counts
        self._empty()

    @property
    def model(self) -> str:
        """Whose tokens it announces."""
        return self.space.model

    def start(self, gpu: int) -> None:
        """Hold nothing, as holders `gpu` (even) and `gpu + 1`."""
        self.stop()
        self.gpu = gpu
        self._empty()

    def stop(self) -> None:
        """Names that only this replica used may be forgotten."""
        if self.seed is not None:
            self.seed.replicas -= 1
            self.seed = None

    def use(self, seed: Seed) -> Seed:
        """Its names are those of `seed`."""
        seed.replicas += 1
        self.seed = seed
        return seed

    def hold(self, holder: int, run: Run, position: int, wires: list[int]) -> None:
        """One more copy of each of these blocks of `run`, named `wires`, at one of its two holders."""
        held = run.held(holder)
        mask = ((1 << len(wires)) - 1) << position
        again = held & mask
        if again:
            copies = self.copies[holder & 1]
            for wire in wires:
                if again >> position & 1:
                    name = wire & FOLD
                    copies[name] = copies.get(name, 0) + 1
                position += 1
        self._credit(holder, run, held, mask)

    def hold_ancestors(self, run: Run, depth: int) -> None:
        """Hold what comes before block `depth` of `run`, up to the nearest that it holds."""
        ancestor: Run | None = run
        gpu = self.gpu
        while ancestor is not None and ancestor.parent is not None:
            mask = (1 << depth) - 1
            held = ancestor.held(gpu)
            nearest = (held & mask).bit_length()
            if nearest < depth:
                self._credit(gpu, ancestor, held, mask ^ (1 << nearest) - 1)
            if nearest:
                return
            ancestor = ancestor.parent
            depth = len(ancestor.ends)

    def may_extend(self, run: Run, max_blocks: int) -> bool:
        """True if this replica alone holds `run`, of at most `max_blocks`, and nothing continues it."""
        return (
            run.full == 1 << self.gpu
            and run.child is None
            and run.partial is None
            and run.aliases is None
            and len(run.ends) <= max_blocks
            and run.space is self.space
        )

    def _credit(self, holder: int, run: Run, held: int, mask: int) -> None:
        """Let `holder`, which holds `held` of `run`, hold `mask` too."""
        new = (mask & ~held).bit_count()
        if new:
            if self.blocks + new > self.max_blocks:
                self._counts.refused += new
                return
            self.blocks += new
            run.set_held(1 << holder, held, held | mask)

    def _empty(self) -> None:
        self.block_size = 0
        self.blocks = 0
        self.group: int | None = None
        self.has_group = False
        self.slower = False
        self.copies: tuple[dict[int, int], dict[int, int]] = ({}, {})


class Group:
    """One keys tuple: the holders of its endpoints, by block size.

    Attributes:
        keys: The tuple.
        rows: Even bit of a replica to the row of its endpoint.
        masks: Tokens per block to the even bits of the replicas that announce such blocks.
        slower: One of them has announced blocks in slower media.
        block_sizes: Of each row; 0 if nothing is known of the endpoint.
    """

    __slots__ = ("block_sizes", "keys", "masks", "rows", "slower")

    def __init__(self, keys: tuple[EndpointKey, ...], replicas: Sequence[Sequence[Replica]]) -> None:
        self.keys = keys  # held, so that its id stays its own
        self.rows: dict[int, int] = {}
        self.masks: dict[int, int] = {}
        self.slower = False
        self.block_sizes = [0] * len(keys)
        for row, ranks in enumerate(replicas):
            for replica in ranks:
                if replica.block_size:
                    self.rows[replica.gpu] = row
                    size = self.block_sizes[row] = replica.block_size
                    self.masks[size] = self.masks.get(size, 0) | 1 << replica.gpu
                    self.slower |= replica.slower

    def holders(self, mask: int) -> list[int]:
        """The bits of `mask`, as numbers."""
        found, bit = [], -1
        for zeros in f"{mask:b}"[::-1].split("1")[:-1]:
            bit += len(zeros) + 1
            found.append(bit)
        return found


class Holders:
    """All replicas of one cache map, and their bits.

    Args:
        tree: Whose runs are swept of bits that mean nothing any more.
        max_replicas: Most replicas attached.
        max_blocks_per_replica: Most blocks one replica is credited with.
        counts: Those of the map.

    Attributes:
        gone: Bits that mean nothing any more and are not swept from all runs yet.
        groups: Keys tuples asked about lately, by identity; forgotten when a replica changes.
        spaces: Vocabulary and names by model.
        taken: Bits in use or not swept yet.
    """

    __slots__ = (
        "_counts",
        "_cursor",
        "_endpoints",
        "_max_blocks_per_replica",
        "_max_replicas",
        "_sweeping",
        "_tree",
        "gone",
        "groups",
        "spaces",
        "taken",
    )

    def __init__(self, tree: Tree, max_replicas: int, max_blocks_per_replica: int, counts: Counts) -> None:
        self._tree = tree
        self._max_replicas = max_replicas
        self._max_blocks_per_replica = max_blocks_per_replica
        self._counts = counts
        self.spaces: dict[str, Space] = {}
        self.groups: dict[int, Group] = {}
        self._endpoints: dict[EndpointKey, dict[int, Replica]] = {}
        self.taken = 0
        self.gone = 0
        self._sweeping = 0  # bits of `gone` that this pass over the runs sweeps
        self._cursor = 0

    @property
    def replicas(self) -> list[Replica]:
        """All that are attached."""
        return [replica for ranks in self._endpoints.values() for replica in ranks.values()]

    def attach(self, endpoint: EndpointKey, rank: int, model: str, vocabulary: Sequence[bytes]) -> Replica:
        """As `CacheMap.attach`."""
        ranks = self._endpoints.get(endpoint, {})
        if rank in ranks:
            self._detach(ranks.pop(rank))
        elif sum(len(others) for others in self._endpoints.values()) >= self._max_replicas:
            raise CapacityError(f"{self._max_replicas} replicas are attached")
        space = self.spaces.get(model)
        if space is None or space.vocabulary is not vocabulary:
            space = self.spaces[model] = Space(model, vocabulary)
        space.replicas += 1
        replica = Replica(endpoint, rank, space, self._max_blocks_per_replica, self._counts)
        replica.start(self._take())
        self._endpoints.setdefault(endpoint, {})[rank] = replica
        self.groups.clear()
        return replica

    def remove(self, endpoint: EndpointKey) -> None:
        """Forget all ranks of `endpoint`; their handles are void. O(ranks)."""
        for replica in self._endpoints.pop(endpoint, {}).values():
            self._detach(replica)
        self.groups.clear()

    def clear(self, replica: Replica) -> None:
        """`replica` holds nothing now. O(1)."""
        if replica.attached:
            self.gone |= 3 << replica.gpu
            replica.start(self._take())
            self.groups.clear()

    def group(self, keys: tuple[EndpointKey, ...]) -> Group:
        """The holders of these endpoints; made anew only for a tuple object not seen since a change."""
        group = self.groups.get(id(keys))
        if group is None:
            group = Group(keys, [list(self._endpoints.get(key, {}).values()) for key in keys])
            if len(self.groups) >= _MAX_GROUPS:
                self.groups.clear()
            self.groups[id(keys)] = group
        return group

    def sweep(self, max_runs: int) -> bool:
        """Take bits that mean nothing any more from up to `max_runs` runs; True if there is more to sweep."""
        runs = self._tree.runs
        while max_runs > 0 and self.gone:
            if not self._sweeping:
                self._sweeping, self._cursor = self.gone, 0
            stop = min(self._cursor + max_runs, len(runs))
            max_runs -= max(stop - self._cursor, 1)
            for run in runs[self._cursor : stop]:
                if run is not None:
                    self._tree.sweep(run, self._sweeping)
            self._cursor = stop
            if stop == len(runs):
                self.taken &= ~self._sweeping
                self.gone &= ~self._sweeping
                self._sweeping = 0
        return bool(self.gone)

    def _take(self) -> int:
        """Two free bits; the even number of the first."""
        if self.taken.bit_length() > 8 * self._max_replicas:  # more is waiting to be swept than is used
            while self.sweep(1 << 30):
                pass
        free = ~self.taken
        first = (free & -free).bit_length() - 1
        self.taken |= 3 << first
        return first

    def _detach(self, replica: Replica) -> None:
        replica.attached = False
        replica.stop()
        self.gone |= 3 << replica.gpu
        space = replica.space
        space.replicas -= 1
        if not space.replicas and self.spaces.get(space.model) is space:
            del self.spaces[space.model]
