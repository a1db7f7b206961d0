"""What engines announce as tokens, known as text: who holds the longest start of a prompt.

Rules:
    1. An engine's token ids become bytes through its model's vocabulary when they are announced. A prompt is
       then matched as bytes, and no tokenizer runs for it but over what is in doubt (see `matching`).
    2. A block is removed as often as it was stored before its holder is without it: a hash may have several
       physical copies. Each replica is two holders, GPU memory and everything slower.
    3. A block that is stored has its ancestors beside it: an engine announces what a request holds from its
       start. So if the chain is known from another replica, all of it is credited to this one.
    4. Blocks of prefill (several in one event) are how the tokenizer cuts their text, because that is where
       they came from. A block announced alone may hold generated tokens, and is in doubt.
    5. Full-attention groups alone are followed, the first one announced of each replica. Slower media add no
       blocks: what they announce was in GPU memory before, and is often announced by its hash alone.
    6. A cleared or removed replica loses its holders at once and in O(1). Its bits are swept from the runs
       a few at a time, by `sweep` and at each `apply`, and given to others only after that.
    7. Memory is bounded by `max_blocks` and `max_blocks_per_replica`. What does not fit is not stored, nor
       is what continues it; nothing is evicted, because only engines know what they hold.
    8. A wrong entry costs time, never correctness. No event raises.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

from xxhash import xxh32_intdigest

from metadata_center.cache_map.matching import Level, Walk
from metadata_center.cache_map.runs import (
    FOLD,
    REFUTED,
    RUN_BLOCKS,
    Root,
    Run,
    Seed,
    Space,
    continuing,
    link,
    may_link,
    split,
    unlink,
)
from metadata_center.cache_map.values import CacheMapStats, Counts, Matches, Verify, root
from metadata_center.errors import CapacityError
from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import Batch, BlockRemoved, BlockStored
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import EndpointKey

FULL_ATTENTION: Final = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of vLLM's `KVCacheSpecKind` whose blocks stay useful whatever follows them. None: not said."""

_GPU: Final = frozenset({None, "GPU"})
_SWEEP_RUNS: Final = 16  # per batch: at most 16 * 64 names deleted, about a millisecond
_HURRIED_SWEEP_RUNS: Final = 1024  # when room is short
_MAX_GROUPS: Final = 256  # keys tuples remembered: far more than a gateway has models
_USABLE: Final = itemgetter(2, 1)
_WIDE: Final = 1024  # tokens per block from which slices beat as many iterators


class Replica:
    """One engine, a data-parallel rank of an endpoint: the handle its events are applied with.

    Attributes:
        endpoint: Where requests for it go.
        rank: Its data-parallel rank.
        model: Whose tokens it announces.
        block_size: Tokens per block; 0 until the engine has announced one.
        blocks: Blocks held, per medium class.
    """

    __slots__ = (
        "attached",
        "block_size",
        "blocks",
        "copies",
        "endpoint",
        "gpu",
        "group",
        "has_group",
        "rank",
        "seed",
        "slower",
        "space",
    )

    def __init__(self, endpoint: EndpointKey, rank: int, space: Space) -> None:
        self.endpoint = endpoint
        self.rank = rank
        self.space = space
        self.attached = True
        self.gpu = -2
        self.seed: Seed | None = None
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

    def _empty(self) -> None:
        self.block_size = 0
        self.blocks = 0
        self.group: int | None = None
        self.has_group = False
        self.slower = False
        self.copies: tuple[dict[int, int], dict[int, int]] = ({}, {})


class _Doubt:
    """A block that may not be how the tokenizer cuts its text: its tokens, None if they are not kept."""

    __slots__ = ("tokens",)

    def __init__(self, tokens: bytes | None) -> None:
        self.tokens = tokens


class _Group:
    """One keys tuple: the holders of its endpoints, by block size."""

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


class CacheMap:
    """Blocks of all replicas, by their text.

    Args:
        max_blocks: Most blocks stored; about 100 bytes each.
        max_blocks_per_replica: Most blocks one replica is credited with.
        max_replicas: Most replicas attached.
        max_doubts: Most blocks in doubt whose tokens are kept (about 33 bytes and 4 for each token); of
            further ones only the number of tokens is compared.
        slow_weight: What a token in a slower medium is worth beside one in GPU memory, 0..1.
    """

    def __init__(
        self,
        max_blocks: int = 20_000_000,
        max_blocks_per_replica: int = 4_000_000,
        *,
        max_replicas: int = MAX_ENDPOINTS,
        max_doubts: int = 1_000_000,
        slow_weight: float = 0.5,
    ) -> None:
        if not 0.0 <= slow_weight <= 1.0:
            raise ValueError("slow_weight is not within 0..1")
        self._max_blocks = max_blocks
        self._max_blocks_per_replica = max_blocks_per_replica
        self._max_replicas = max_replicas
        self._max_doubts = max_doubts
        self._slow_weight = slow_weight
        self._spaces: dict[str, Space] = {}
        self._roots: dict[tuple[int, int], Root] = {}
        self._runs: list[Run | None] = []
        self._free_ids: list[int] = []
        self._stored = 0
        self._endpoints: dict[EndpointKey, dict[int, Replica]] = {}
        self._taken = 0  # bits of holders in use or not swept yet
        self._retired = 0  # bits to sweep in the next pass
        self._sweeping = 0  # bits this pass sweeps
        self._cursor = 0
        self._groups: dict[int, _Group] = {}
        self._counts = Counts()

    @property
    def stats(self) -> CacheMapStats:
        """Sizes and counts. O(replicas)."""
        replicas = [replica for ranks in self._endpoints.values() for replica in ranks.values()]
        counts = {name: getattr(self._counts, name) for name in Counts.__slots__}
        return CacheMapStats(
            replicas=len(replicas),
            stored=self._stored,
            held=sum(replica.blocks for replica in replicas),
            runs=len(self._runs) - len(self._free_ids),
            sweeping=(self._retired | self._sweeping).bit_count() // 2,
            **counts,
        )

    def attach(self, endpoint: EndpointKey, rank: int, model: str, vocabulary: Sequence[bytes]) -> Replica:
        """Follow one replica from now on; one that was followed already starts over.

        Args:
            endpoint: Its address.
            rank: Its data-parallel rank.
            model: Name in the `root` of its prompts.
            vocabulary: Token id to bytes, empty for ids that stand for no text. Replicas of one model
                that are given the same object share its memory and what they announce.

        Raises:
            CapacityError: `max_replicas` are attached; nothing was changed.
        """
        ranks = self._endpoints.get(endpoint, {})
        if rank in ranks:
            self._detach(ranks.pop(rank))
        elif sum(len(others) for others in self._endpoints.values()) >= self._max_replicas:
            raise CapacityError(f"{self._max_replicas} replicas are attached")
        space = self._spaces.get(model)
        if space is None or space.vocabulary is not vocabulary:
            space = self._spaces[model] = Space(model, vocabulary)
        space.replicas += 1
        replica = Replica(endpoint, rank, space)
        replica.start(self._holders())
        self._endpoints.setdefault(endpoint, {})[rank] = replica
        self._groups.clear()
        return replica

    def remove(self, endpoint: EndpointKey) -> None:
        """Forget all ranks of `endpoint`; their handles are void. O(ranks)."""
        for replica in self._endpoints.pop(endpoint, {}).values():
            self._detach(replica)
        self._groups.clear()

    def clear(self, replica: Replica) -> None:
        """`replica` holds nothing now: its engine lost its cache, or restarted. O(1)."""
        if replica.attached:
            self._retired |= 3 << replica.gpu
            replica.start(self._holders())
            self._groups.clear()

    def sweep(self, max_runs: int) -> bool:
        """Take away what cleared and removed replicas held, from up to `max_runs` runs.

        Returns:
            True if there is more to sweep.
        """
        while max_runs > 0 and (self._sweeping or self._retired):
            if not self._sweeping:
                self._sweeping, self._retired, self._cursor = self._retired, 0, 0
            stop = min(self._cursor + max_runs, len(self._runs))
            max_runs -= max(stop - self._cursor, 1)
            for run in self._runs[self._cursor : stop]:
                if run is not None:
                    self._sweep_run(run)
            self._cursor = stop
            if stop == len(self._runs):
                self._taken &= ~self._sweeping
                self._sweeping = 0
        return bool(self._sweeping or self._retired)

    def apply(self, replica: Replica, batch: Batch) -> None:
        """Take over what one engine step did, event by event. Never raises."""
        if not replica.attached:
            return
        for event in batch.events:
            if type(event) is BlockStored:
                self._store(replica, event)
            elif type(event) is BlockRemoved:
                self._remove(replica, event)
            else:
                self.clear(replica)
        if self._retired or self._sweeping:
            self.sweep(_SWEEP_RUNS)

    def match(
        self, root: int, text: bytes, keys: tuple[EndpointKey, ...], verify: Verify | None = None
    ) -> Matches:
        """How much of a prompt each endpoint holds.

        O(b / RUN_BLOCKS + n) for b blocks held and n endpoints. Passing the same tuple object again saves
        looking its endpoints up.

        Args:
            root: From `root`: the model, adapter and salt of the request.
            text: All of the prompt, as the engine tokenizes it.
            keys: Endpoints, distinct; one that is unknown matches nothing. Of an endpoint with several
                ranks the best counts.
            verify: Tells tokens of `text`; None takes equal text for equal tokens.
        """
        group = self._groups.get(id(keys)) or self._group(keys)
        blocks, tokens = [0] * len(keys), [0] * len(keys)
        gpu_tokens, sizes = tokens, group.block_sizes
        if group.slower or len(group.masks) > 1:
            gpu_tokens, sizes = tokens.copy(), sizes.copy()
        worth_tokens: list[float] = [*tokens]
        counted = (0, 0)
        for size, mask in group.masks.items():
            start = self._roots.get((root, size))
            if start is None:
                continue
            walk = Walk(text, size, verify, self._counts)
            reaches, gpu_levels = walk.reaches(start, mask, slower=group.slower)
            depth, num_bytes = walk.longest
            counted = max(counted, (depth * size, num_bytes))
            if len(group.masks) > 1 or group.slower:
                gpu = _depths(group, gpu_levels)
                for bits, depth, usable in reaches:
                    hit = usable * size
                    for holder in group.holders(bits):
                        row = group.rows[holder]
                        on_gpu = min(hit, gpu.get(holder, 0) * size) if group.slower else hit
                        value = on_gpu + (hit - on_gpu) * self._slow_weight
                        if value > worth_tokens[row] or (value == worth_tokens[row] and depth > blocks[row]):
                            blocks[row], tokens[row], gpu_tokens[row] = depth, hit, on_gpu
                            worth_tokens[row], sizes[row] = value, size
            else:
                reaches.sort(key=_USABLE)  # so the best of several is written last
                for bits, depth, usable in reaches:
                    for holder in group.holders(bits):
                        row = group.rows[holder]
                        blocks[row], tokens[row] = depth, usable * size
                worth_tokens = [*tokens]
        return Matches(blocks, [*sizes], tokens, [*gpu_tokens], worth_tokens, *counted)

    def _holders(self) -> int:
        """Two free bits; the even number of the first."""
        if self._taken.bit_length() > 8 * self._max_replicas:  # more is waiting to be swept than is used
            while self.sweep(1 << 30):
                pass
        free = ~self._taken
        first = (free & -free).bit_length() - 1
        self._taken |= 3 << first
        return first

    def _detach(self, replica: Replica) -> None:
        replica.attached = False
        replica.stop()
        self._retired |= 3 << replica.gpu
        space = replica.space
        space.replicas -= 1
        if not space.replicas and self._spaces.get(space.model) is space:
            del self._spaces[space.model]

    def _group(self, keys: tuple[EndpointKey, ...]) -> _Group:
        group = _Group(keys, [list(self._endpoints.get(key, {}).values()) for key in keys])
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[id(keys)] = group
        return group

    def _store(self, replica: Replica, event: BlockStored) -> None:
        hashes = event.hashes
        count = len(hashes)
        counts = self._counts
        if event.medium not in _GPU:
            self._store_slower(replica, event)
            return
        if event.kind not in FULL_ATTENTION or (replica.has_group and event.group != replica.group):
            counts.ignored += count
            return
        size = event.block_size
        if size != replica.block_size:
            if replica.block_size or size <= 0:
                counts.ignored += count
                return
            replica.block_size = size
            self._groups.clear()
        replica.has_group, replica.group = True, event.group
        counts.announced += count
        if self._max_blocks - self._stored < count:
            self.sweep(_HURRIED_SWEEP_RUNS)
        names, runs = replica.space.names, self._runs
        run: Run | None = None
        at = done = 0
        while done < count:
            run_id = names.get(hashes[done] & FOLD)
            known = None if run_id is None else runs[run_id]
            position = -1 if known is None else known.position(hashes[done], 0)
            if known is None or position < 0:
                break
            run = known
            same = run.common(position, hashes, done)
            self._credit_ancestors(replica, run, position)
            self._hold(replica, replica.gpu, run, position, hashes[done : done + same])
            if replica.seed is None:
                replica.seed = run.seed_of(hashes[done])
                replica.seed.replicas += 1
            if count > 1 and run.doubts:
                self._trust(run, position, same)
            done += same
            at = position + same
        if done == count:
            return
        texts, doubt = self._texts(replica.space, event, done)
        if len(texts) < count - done:
            counts.opaque += count - done - len(texts)
            if not texts:
                return
        if run is None:
            if event.parent is None:
                run = self._root(replica.space, event)
            else:
                run_id = names.get(event.parent & FOLD)
                run = None if run_id is None else runs[run_id]
                if run is not None and run.wires[-1] == event.parent:
                    at = len(run.ends)
                    if count == 1 and at < RUN_BLOCKS and doubt and self._may_extend(replica, run, 1):
                        self._append(replica, run, hashes[0], texts[0], doubt)
                        return
                else:
                    at = 0 if run is None else run.position(event.parent, 0) + 1
                if run is None or not at:
                    counts.orphans += len(texts)
                    return
                self._credit_ancestors(replica, run, at)
        self._add(replica, run, at, hashes[done : done + len(texts)], texts, doubt)

    def _store_slower(self, replica: Replica, event: BlockStored) -> None:
        """Blocks that this replica has in a slower medium as well, as far as they are known."""
        if replica.has_group and event.group is not None and event.group != replica.group:
            self._counts.ignored += len(event.hashes)
            return
        if not replica.slower:
            replica.slower = True
            self._groups.clear()
        for wire in event.hashes:
            run_id = replica.space.names.get(wire & FOLD)
            run = None if run_id is None else self._runs[run_id]
            position = -1 if run is None else run.position(wire, 0)
            if run is None or position < 0:
                self._counts.ignored += 1
            else:
                self._counts.announced += 1
                self._hold(replica, replica.gpu + 1, run, position, [wire])

    def _texts(self, space: Space, event: BlockStored, done: int) -> tuple[list[bytes], _Doubt | None]:
        """The text of the blocks from `done` on, up to the first that stands for none.

        Returns:
            A text for each, and the doubt about a block that is alone in its event.
        """
        try:
            tokens = event.token_ids()
        except DecodeError:
            return [], None
        size = event.block_size
        if event.lora_id is not None or (event.extra_keys and any(event.extra_keys)):
            tokens = tokens[: _plain_blocks(event) * size]
        if done:
            tokens = tokens[done * size :]
        texts = _joined(space.words, tokens, size)
        if len(event.hashes) > 1:
            return texts, None
        return texts, _Doubt(
            array("I", tokens).tobytes() if self._counts.doubted < self._max_doubts else None
        )

    def _root(self, space: Space, event: BlockStored) -> Root:
        salt = _salt(event)
        key = (root(space.model, event.lora_name, salt), event.block_size)
        found = self._roots.get(key)
        if found is None:
            found = self._roots[key] = Root(key, space)
        return found

    def _add(
        self,
        replica: Replica,
        run: Run,
        at: int,
        hashes: list[int],
        texts: list[bytes],
        doubt: _Doubt | None,
    ) -> None:
        """Store new blocks behind the first `at` of `run`."""
        room = self._room(replica, len(texts))
        if room < len(texts):
            self._counts.refused += len(texts) - room
            texts = texts[:room]
        if replica.seed is None:
            replica.seed = Seed()
            replica.seed.replicas += 1
        digests = array("I", map(xxh32_intdigest, texts))
        done, count = 0, len(texts)
        while done < count:
            if doubt is None:
                same = self._same_text(replica, run, at, digests, texts, done)
                if same is not None:
                    run, start = same
                    at = self._alias(replica, run, start, hashes, texts, digests, done)
                    done += at - start
                    continue
            if at < len(run.ends):
                self._strip(run, self._retired | self._sweeping)
                run = split(run, at, self._new_id())
                self._runs[run.id] = run
            stop = min(count, done + RUN_BLOCKS)
            part = texts[done:stop]
            parent: Run | None = None
            if not self._may_extend(replica, run, len(part)):
                if not may_link(run, len(part[0]), digests[done]):
                    self._counts.refused += count - done
                    break
                parent, run = run, Run(self._new_id(), replica.space, replica.seed)
                self._runs[run.id] = run
            if doubt is not None:
                run.doubts = run.doubts or {}
                run.doubts[len(run.ends)] = doubt.tokens
                self._counts.doubted += 1
            run.append(hashes[done:stop], part, digests[done:stop])
            run.full = 1 << replica.gpu
            replica.blocks += stop - done
            self._stored += stop - done
            if parent is not None:
                link(parent, run)
            at = len(run.ends)
            done = stop
        self._trim(run)

    def _append(self, replica: Replica, run: Run, wire: int, text: bytes, doubt: _Doubt) -> None:
        """As `_add`, of the one block that a sequence has grown by: most events of a busy engine."""
        if self._stored >= self._max_blocks or replica.blocks >= self._max_blocks_per_replica:
            self._counts.refused += 1
            return
        if run.doubts is None:
            run.doubts = {}
        run.doubts[len(run.ends)] = doubt.tokens
        self._counts.doubted += 1
        run.digest = 0
        run.ends.append(run.ends[-1] + len(text))
        run.digests.append(xxh32_intdigest(text))
        run.wires.append(wire)
        replica.space.names[wire & FOLD] = run.id
        replica.blocks += 1
        self._stored += 1

    def _room(self, replica: Replica, wanted: int) -> int:
        """How many of `wanted` new blocks may be stored."""
        room = min(self._max_blocks - self._stored, self._max_blocks_per_replica - replica.blocks)
        return max(min(room, wanted), 0)

    def _may_extend(self, replica: Replica, run: Run, count: int) -> bool:
        """True if `replica` alone holds `run`, nothing continues it, and `count` blocks more fit."""
        return (
            run.full == 1 << replica.gpu
            and run.child is None
            and run.partial is None
            and run.aliases is None
            and len(run.ends) + count <= RUN_BLOCKS
            and run.space is replica.space
        )

    def _new_id(self) -> int:
        """The id of a run that the caller puts into `_runs`."""
        if self._free_ids:
            return self._free_ids.pop()
        self._runs.append(None)
        return len(self._runs) - 1

    def _same_text(
        self, replica: Replica, run: Run, at: int, digests: array[int], texts: list[bytes], done: int
    ) -> tuple[Run, int] | None:
        """The stored block, behind the first `at` of `run`, that is `texts[done]` under another name."""
        if at < len(run.ends):
            found: tuple[Run, ...] = (run,)
        else:
            found, at = tuple(continuing(run, digests[done])), 0
        for other in found:
            if self._is_same(replica, other, at, digests[done], len(texts[done])):
                return other, at
        return None

    def _is_same(self, replica: Replica, run: Run, position: int, digest: int, length: int) -> bool:
        """True if a block has this text, beyond doubt, and no name yet from engines of `replica`'s seed."""
        if (
            run.digests[position] != digest
            or run.block_bytes(position) != length
            or run.space is not replica.space
            or run.seed is replica.seed
            or (run.doubts is not None and position in run.doubts)
        ):
            return False
        alias = None if run.aliases is None or replica.seed is None else run.aliases.get(replica.seed)
        return alias is None or not alias[position]

    def _alias(
        self,
        replica: Replica,
        run: Run,
        position: int,
        hashes: list[int],
        texts: list[bytes],
        digests: array[int],
        done: int,
    ) -> int:
        """Give blocks of `run` a further name, as far as the text is the same; returns where it ends."""
        seed = replica.seed
        assert seed is not None
        stop = position
        while (
            stop < len(run.ends)
            and done + stop - position < len(texts)
            and self._is_same(
                replica, run, stop, digests[done + stop - position], len(texts[done + stop - position])
            )
        ):
            stop += 1
        wires = hashes[done : done + stop - position]
        run.aliases = run.aliases or {}
        if seed not in run.aliases:
            run.aliases[seed] = array("Q", bytes(8 * len(run.ends)))
        run.aliases[seed][position:stop] = array("Q", wires)
        names = replica.space.names
        for wire in wires:
            names[wire & FOLD] = run.id
        self._stored += stop - position
        self._hold(replica, replica.gpu, run, position, wires)
        return stop

    def _hold(self, replica: Replica, holder: int, run: Run, position: int, wires: list[int]) -> None:
        """One more copy of each of these blocks of `run`, named `wires`, at `holder`."""
        held = run.held(holder)
        mask = ((1 << len(wires)) - 1) << position
        again = held & mask
        if again:
            copies = replica.copies[holder & 1]
            for wire in wires:
                if again >> position & 1:
                    name = wire & FOLD
                    copies[name] = copies.get(name, 0) + 1
                position += 1
        self._credit(replica, holder, run, held, mask)

    def _credit(self, replica: Replica, holder: int, run: Run, held: int, mask: int) -> None:
        """Let `holder`, which holds `held` of `run`, hold `mask` too."""
        new = (mask & ~held).bit_count()
        if new:
            if replica.blocks + new > self._max_blocks_per_replica:
                self._counts.refused += new
                return
            replica.blocks += new
            run.set_held(1 << holder, held, held | mask)

    def _credit_ancestors(self, replica: Replica, run: Run, depth: int) -> None:
        """Let `replica` hold what comes before block `depth` of `run`, up to the nearest that it holds."""
        ancestor: Run | None = run
        while ancestor is not None and ancestor.parent is not None:
            mask = (1 << depth) - 1
            held = ancestor.held(replica.gpu)
            nearest = (held & mask).bit_length()
            if nearest < depth:
                self._credit(replica, replica.gpu, ancestor, held, mask ^ (1 << nearest) - 1)
            if nearest:
                return
            ancestor = ancestor.parent
            depth = len(ancestor.ends)

    def _trust(self, run: Run, position: int, count: int) -> None:
        """These blocks came out of a tokenizer."""
        doubts = run.doubts or {}
        for doubted in [p for p in doubts if position <= p < position + count]:
            if doubts[doubted] is not REFUTED:
                del doubts[doubted]
                self._counts.doubted -= 1
        run.doubts = doubts or None

    def _remove(self, replica: Replica, event: BlockRemoved) -> None:
        counts = self._counts
        if replica.has_group and event.group is not None and event.group != replica.group:
            counts.ignored += len(event.hashes)
            return
        holder = replica.gpu if event.medium in _GPU else replica.gpu + 1
        copies, bit = replica.copies[holder & 1], 1 << holder
        names, runs = replica.space.names, self._runs
        for wire in event.hashes:
            name = wire & FOLD
            run_id = names.get(name)
            run = None if run_id is None else runs[run_id]
            if run is None:
                counts.unmatched += 1
                continue
            if run.full == bit and run.wires[-1] == wire:  # the end of a chain nobody else holds: the usual
                position = len(run.wires) - 1
                held = (1 << position + 1) - 1
            else:
                held = run.held(holder)
                position = run.position(wire, held.bit_length() - 1) if held else -1
                if position < 0 or not held >> position & 1:
                    counts.unmatched += 1
                    continue
            counts.removed += 1
            if copies and name in copies:
                copies[name] -= 1
                if not copies[name]:
                    del copies[name]
                continue
            replica.blocks -= 1
            last = len(run.wires) - 1
            if (
                position == last > 0
                and run.full == bit
                and run.child is None
                and run.partial is None
                and run.aliases is None
                and run.doubts is None
            ):
                del names[name]
                run.wires.pop()
                run.ends.pop()
                run.digests.pop()
                run.digest = 0
                self._stored -= 1
            else:
                run.set_held(bit, held, held ^ 1 << position)
                if position == last:
                    self._trim(run)

    def _trim(self, run: Run) -> None:
        """Drop blocks that nobody holds from the end of `run`, and of its ancestors if nothing is left."""
        current: Run | None = run
        while current is not None and current.child is None:
            if isinstance(current, Root):
                self._roots.pop(current.key, None)
                return
            top, count = current.depth_held(), len(current.ends)
            if top == count:
                return
            self._unname(current, top)
            if current.doubts:
                self._drop_doubts(current, top)
            if top:
                current.cut(top)
                return
            unlink(current)
            parent, current.parent = current.parent, None
            self._runs[current.id] = None
            self._free_ids.append(current.id)
            current = parent

    def _unname(self, run: Run, start: int) -> None:
        """Forget the names of the blocks of `run` from `start` on."""
        names, run_id = run.space.names, run.id
        for wire in run.wires[start:]:
            if names.get(wire & FOLD) == run_id:
                del names[wire & FOLD]
        self._stored -= len(run.wires) - start
        for alias in (run.aliases or {}).values():
            self._unname_alias(run, alias, start)

    def _unname_alias(self, run: Run, alias: array[int], start: int) -> None:
        names, run_id = run.space.names, run.id
        for wire in alias[start:]:
            if wire:
                self._stored -= 1
                if names.get(wire & FOLD) == run_id:
                    del names[wire & FOLD]

    def _drop_doubts(self, run: Run, start: int) -> None:
        """Forget what is in doubt from block `start` on."""
        doubts = run.doubts or {}
        for position in [p for p in doubts if p >= start]:
            if doubts.pop(position) is not REFUTED:
                self._counts.doubted -= 1
        run.doubts = doubts or None

    def _strip(self, run: Run, bits: int) -> None:
        """Take the holders `bits` from `run`."""
        run.full &= ~bits
        if run.partial:
            left = {mask: holders & ~bits for mask, holders in run.partial.items() if holders & ~bits}
            run.partial = left or None

    def _sweep_run(self, run: Run) -> None:
        if run.parent is None:  # went with a run swept just before
            return
        self._strip(run, self._sweeping)
        if run.aliases:
            for seed in [seed for seed in run.aliases if not seed.replicas]:
                self._unname_alias(run, run.aliases.pop(seed), 0)
            run.aliases = run.aliases or None
        self._trim(run)


def _depths(group: _Group, levels: Sequence[Level]) -> dict[int, int]:
    """The deepest level of each holder."""
    depths: dict[int, int] = {}
    for bits, depth in levels:
        for holder in group.holders(bits):
            depths[holder] = max(depths.get(holder, 0), depth)
    return depths


def _rest(extra: list[Any], lora: str | None) -> list[Any]:
    """What a block's hash covers besides its tokens and its adapter."""
    rest = list(extra)
    if lora is not None and lora in rest:
        rest.remove(lora)
    return rest


def _salt(event: BlockStored) -> str | None:
    """The cache salt of a chain's first event; None if it has none."""
    extra = event.extra_keys[0] if event.extra_keys else None
    rest = _rest(extra, event.lora_name) if extra else []
    return rest[0] if rest else None


def _plain_blocks(event: BlockStored) -> int:
    """How many leading blocks depend on nothing but tokens, a named adapter, and a salt at the very start."""
    if event.lora_id is not None and event.lora_name is None:
        return 0
    for block, extra in enumerate(event.extra_keys or ()):
        rest = _rest(extra or [], event.lora_name)
        salted = not block and event.parent is None and len(rest) == 1 and isinstance(rest[0], str)
        if rest and not salted:
            return min(block, len(event.hashes))
    return len(event.hashes)


def _joined(words: list[bytes | None], tokens: list[int], size: int) -> list[bytes]:
    """The text of each block of tokens, up to the first block that has a token without one."""
    if 2 <= size <= _WIDE and tokens:
        try:
            if len(tokens) == size:
                return [b"".join(itemgetter(*tokens)(words))]
            pieces = iter(itemgetter(*tokens)(words))
            return list(map(b"".join, zip(*[pieces] * size, strict=True)))
        except (IndexError, TypeError):
            pass
    texts: list[bytes] = []
    for start in range(0, len(tokens), size):
        block = [words[token] for token in tokens[start : start + size] if token < len(words)]
        if len(block) < size or None in block:
            break
        texts.append(b"".join(word for word in block if word))
    return texts
