"""The cache map against a multiset of token chains per replica, under any engine's behaviour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import reduce
from operator import or_

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from xxhash import xxh3_64_intdigest

from metadata_center.cache_map import matching, runs
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.cache_map.holders import Replica
from metadata_center.cache_map.runs import FOLD, REFUTED, Fork, Root, Run
from metadata_center.kv_events.events import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    Event,
    encoded_token_ids,
)
from metadata_center.roots import root
from metadata_center.types import EndpointKey

VOCABULARY = [b"a", b"b", b"aa", b"ab"]
SIZE = 2
KEYS = tuple(EndpointKey(f"10.0.0.{host}:8000") for host in range(3))
REPLICAS = [(KEYS[0], 0), (KEYS[1], 0), (KEYS[1], 1), (KEYS[2], 0)]
SALTS = (None, "s")
MEDIA = ("GPU", "CPU")

Chain = tuple[tuple[int, ...], ...]
Node = tuple[str | None, Chain]

blocks = st.sampled_from([(0, 0), (1, 0), (0, 2), (2, 0), (3, 1)])
numbers = st.integers(0, len(REPLICAS) - 1)
salts = st.sampled_from(SALTS)


def wire(seed: int, salt: str | None, chain: Chain) -> int:
    """What an engine with this hash seed calls the last block of a chain."""
    return xxh3_64_intdigest(repr((salt, chain)).encode(), seed)


def text(chain: Chain) -> bytes:
    """What the chain says."""
    return b"".join(VOCABULARY[token] for block in chain for token in block)


class CacheMapMachine(RuleBasedStateMachine):
    """Plays engines, and keeps what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.map = CacheMap(max_doubts=3)
        self.held: list[dict[str, Counter[Node]]] = [
            {medium: Counter() for medium in MEDIA} for _ in REPLICAS
        ]
        self.seeds = [0, 0, 1, 1]
        self.recent: list[Node] = []
        self.replicas: list[Replica] = []

    @initialize(width=st.sampled_from([2, 3, 64]))
    def start(self, width: int) -> None:
        """Attach all; short runs make many nodes out of short chains."""
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("metadata_center.cache_map.storing.RUN_BLOCKS", width)
        self.patch.setattr(matching, "MAX_PATHS", 100_000)
        self.patch.setattr(runs, "MAX_SAME_TEXT", 100_000)
        self.replicas = [self.map.attach(key, rank, "m", VOCABULARY) for key, rank in REPLICAS]
        for number in range(len(REPLICAS)):
            self.greet(number)

    def greet(self, number: int) -> None:
        """A block that all engines have first shows which of them hash alike.

        Until then the map takes two cuts of one text for one block if both come as prefill.
        """
        self.announce(number, None, ((1, 0),), 0)

    def apply(self, number: int, *events: Event) -> None:
        """One batch."""
        self.map.apply(self.replicas[number], Batch(0.0, list(events)))

    def reachable(self, number: int) -> Iterator[Node]:
        """Nodes that the replica holds in GPU memory with all that comes before them."""
        gpu = self.held[number]["GPU"]
        for salt, chain in sorted(gpu, key=repr):
            if all((salt, chain[:end]) in gpu for end in range(1, len(chain) + 1)):
                yield salt, chain

    @rule(
        number=numbers,
        salt=salts,
        like=st.integers(0, 1000),
        kept=st.integers(0, 6),
        new=st.lists(blocks, max_size=4),
        overlap=st.integers(0, 3),
    )
    def store(
        self, number: int, salt: str | None, like: int, kept: int, new: list[tuple[int, int]], overlap: int
    ) -> None:
        """A prompt, perhaps with a beginning seen before; what the engine holds of it comes again or not."""
        chains = [(), *(chain for other, chain in self.recent if other == salt)]
        chain: Chain = (*chains[like % len(chains)][:kept], *new)
        mine = set(self.reachable(number))
        known = next((end for end in range(len(chain), 0, -1) if (salt, chain[:end]) in mine), 0)
        start = max(known - overlap, 0)
        if start == len(chain):
            return
        self.announce(number, salt, chain, start)
        self.recent = [*self.recent[-9:], (salt, chain)]

    def announce(self, number: int, salt: str | None, chain: Chain, start: int) -> None:
        """The blocks of a chain from `start` on are stored once more."""
        seed = self.seeds[number]
        self.apply(
            number,
            BlockStored(
                [wire(seed, salt, chain[:end]) for end in range(start + 1, len(chain) + 1)],
                wire(seed, salt, chain[:start]) if start else None,
                encoded_token_ids([token for block in chain[start:] for token in block]),
                SIZE,
                medium="GPU",
                extra_keys=[[salt] if salt and not end else None for end in range(start, len(chain))],
                group=0,
                kind="full_attention",
            ),
        )
        for end in range(start + 1, len(chain) + 1):
            self.held[number]["GPU"][salt, chain[:end]] += 1

    @rule(number=numbers, pick=st.integers(0, 1000))
    def offload(self, number: int, pick: int) -> None:
        """A chain is in the slower medium as well, as far as it is held; only hashes are published."""
        held = sorted(self.held[number]["GPU"], key=repr)
        if held:
            salt, chain = held[pick % len(held)]
            nodes = [(salt, chain[:end]) for end in range(1, len(chain) + 1) if (salt, chain[:end]) in held]
            names = [wire(self.seeds[number], *node) for node in nodes]
            self.apply(number, BlockStored(names, None, encoded_token_ids([]), SIZE, medium="CPU", group=0))
            self.held[number]["CPU"].update(nodes)

    @rule(number=numbers, medium=st.sampled_from(MEDIA), picks=st.lists(st.integers(0, 1000), max_size=4))
    def remove(self, number: int, medium: str, picks: list[int]) -> None:
        """Copies of any blocks are evicted, whatever their place in a chain."""
        counter = self.held[number][medium]
        names = []
        for pick in picks:
            held = sorted(counter, key=repr)
            if held:
                node = held[pick % len(held)]
                names.append(wire(self.seeds[number], *node))
                counter[node] -= 1
                if not counter[node]:
                    del counter[node]
        self.apply(number, BlockRemoved(names, medium, 0))

    @rule(number=numbers, tail=st.integers(1, 4))
    def evict_tails(self, number: int, tail: int) -> None:
        """The ends of the longest chains go, as in an engine."""
        counter = self.held[number]["GPU"]
        for _ in range(tail):
            if counter:
                node = max(counter, key=lambda item: (len(item[1]), repr(item)))
                self.apply(number, BlockRemoved([wire(self.seeds[number], *node)], "GPU", 0))
                counter[node] -= 1
                if not counter[node]:
                    del counter[node]

    @precondition(lambda self: len(self.recent) > 3)
    @rule(number=numbers, how=st.sampled_from(["event", "call", "attach", "reseed"]))
    def clear(self, number: int, how: str) -> None:
        """The cache is lost, by an event, a call, or a restart that may hash otherwise."""
        if how == "event":
            self.apply(number, AllBlocksCleared())
        elif how == "call":
            self.map.clear(self.replicas[number])
        else:
            key, rank = REPLICAS[number]
            self.replicas[number] = self.map.attach(key, rank, "m", VOCABULARY)
            if how == "reseed":
                self.seeds[number] = 2 + number
        self.held[number] = {medium: Counter() for medium in MEDIA}
        self.greet(number)

    @precondition(lambda self: len(self.recent) > 5)
    @rule()
    def drop_endpoint(self) -> None:
        """The endpoint with two ranks goes and comes back; its old handles do nothing."""
        self.map.remove(KEYS[1])
        self.apply(1, AllBlocksCleared())
        for number in (1, 2):
            self.held[number] = {medium: Counter() for medium in MEDIA}
            self.replicas[number] = self.map.attach(*REPLICAS[number], "m", VOCABULARY)
            self.greet(number)

    @precondition(lambda self: self.map.stats.sweeping)
    @rule(budget=st.integers(1, 4))
    def sweep(self, budget: int) -> None:
        """A few runs at a time."""
        self.map.sweep(budget)

    def depth(self, number: int, salt: str | None, prompt: bytes, media: tuple[str, ...]) -> tuple[int, int]:
        """Blocks of the best held chain that the prompt starts with: usable ones, and all."""
        held = {node for medium in media for node in self.held[number][medium]}
        return max(
            (
                (len(chain) - (text(chain) == prompt), len(chain))
                for other, chain in held
                if other == salt
                and prompt.startswith(text(chain))
                and all((salt, chain[:end]) in held for end in range(1, len(chain)))
            ),
            default=(0, 0),
        )

    @invariant()
    def depths_are_those_of_the_definition(self) -> None:
        """Prompts that begin as chains do that are or were held, and go on or not."""
        for salt in SALTS:
            known = [chain for other, chain in self.recent if other == salt]
            for chain in [*known[-3:], *known[:1]]:
                for prompt in (text(chain), text(chain) + b"ba", text(chain)[:-1]):
                    self.check_match(salt, prompt)

    def check_match(self, salt: str | None, prompt: bytes) -> None:
        """Every field, for every endpoint; of two ranks the one that is worth more counts."""
        found = self.map.match(root("m", None, salt), prompt, KEYS)
        for row, key in enumerate(KEYS):
            expected = []
            for number, (other, _) in enumerate(REPLICAS):
                if other == key:
                    usable, depth = self.depth(number, salt, prompt, MEDIA)
                    _, on_gpu = self.depth(number, salt, prompt, ("GPU",))
                    hit = usable * SIZE
                    fast = min(hit, on_gpu * SIZE)
                    expected.append((fast + (hit - fast) / 2, depth, hit, fast))
            best = max(expected)
            assert (found.worth_tokens[row], found.blocks[row]) == best[:2]
            assert (*best[:2], found.tokens[row], found.gpu_tokens[row]) in expected

    @invariant()
    def counts_are_right(self) -> None:
        """Every count of the map is what its tree says, and nothing is kept that no endpoint holds."""
        stats = self.map.stats
        held = sum(len(counter) for media in self.held for counter in media.values())
        assert (stats.held, stats.unmatched, stats.orphans, stats.refused) == (held, 0, 0, 0)
        living = [run for run in self.map._tree.runs if run is not None]
        assert stats.runs == len(living)
        assert stats.stored == sum(1 for run in living for _ in run.names())
        assert stats.doubted == sum(
            tokens is not REFUTED for run in living for tokens in (run.doubts or {}).values()
        )
        mine = [run for run in living if run.space is self.map._holders.spaces["m"]]
        assert self.map._holders.spaces["m"].names == {name: run.id for run in mine for name in run.names()}
        for run in living:
            self.check(run)
        reached = [run for start in self.map._tree.roots.values() for run in self.below(start)]
        assert sorted(run.id for run in reached) == sorted(run.id for run in living)

    def check(self, run: Run) -> None:
        """Rules 1 to 4 of the tree."""
        count = len(run.ends)
        assert 1 <= count == len(run.wires) == len(run.digests)
        assert all(len(alias) == count and any(alias) for alias in (run.aliases or {}).values())
        everything = (1 << count) - 1
        partial = run.partial or {}
        assert all(0 < mask < everything and bits for mask, bits in partial.items())
        each = [run.full, *partial.values()]
        assert sum(bits.bit_count() for bits in each) == reduce(or_, each).bit_count()
        assert run.child is not None or run.depth_held() == count
        assert all(0 <= position < count for position in run.doubts or ())
        assert all(name & FOLD == name for name in run.names())

    def below(self, run: Run) -> Iterator[Run]:
        """All runs under one, by the links downwards."""
        children = run.child
        if isinstance(children, Fork):
            assert sum(children.lengths.values()) > 1
            for same in children.runs.values():
                for child in same:
                    assert child.parent is run
                    yield child
                    yield from self.below(child)
        elif children is not None:
            assert children.parent is run
            yield children
            yield from self.below(children)
        else:
            assert not isinstance(run, Root)

    def teardown(self) -> None:
        """When all endpoints are gone, so is everything."""
        for key in KEYS:
            self.map.remove(key)
        while self.map.sweep(2):
            pass
        stats = self.map.stats
        assert (stats.stored, stats.held, stats.runs, stats.doubted, stats.sweeping) == (0, 0, 0, 0, 0)
        assert not self.map._tree.roots
        assert not self.map._holders.spaces
        assert not self.map._holders.taken
        if self.replicas:
            self.patch.undo()


TestCacheMap = CacheMapMachine.TestCase
TestCacheMap.settings = settings(max_examples=80, stateful_step_count=30)
