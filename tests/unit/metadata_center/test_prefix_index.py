"""The prefix index against a model of one ordered dict per endpoint."""

import random
from array import array
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata_center.errors import CapacityError
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.history.radix_tree import Run
from metadata_center.types import EndpointKey

A, B, C = (EndpointKey(f"10.0.0.{host}:8000") for host in (1, 2, 3))


class NaiveIndex:
    """What the index means: per endpoint, block to sequence, least recently used first."""

    def __init__(self, default: int, most: int) -> None:
        self.default, self.most, self.sequence = default, most, 0
        self.used: dict[EndpointKey, OrderedDict[int, int]] = {}
        self.capacity: dict[EndpointKey, int] = {}

    def depth(self, key: EndpointKey, blocks: list[int]) -> int:
        """Walk the chain until a block is missing."""
        used = self.used.get(key, OrderedDict())
        return next((i for i, block in enumerate(blocks) if block not in used), len(blocks))

    def record(self, key: EndpointKey, blocks: list[int]) -> int:
        """Touch tail to head, then evict."""
        used = self.used.setdefault(key, OrderedDict())
        depth = self.depth(key, blocks[: self.capacity.get(key, self.default)])
        previous = used[blocks[depth - 1]] if depth else 0
        self.sequence += 1
        for block in reversed(blocks):
            used.pop(block, None)
            used[block] = self.sequence
        self.evict(key)
        return previous

    def evict(self, key: EndpointKey) -> None:
        """Oldest first."""
        used = self.used.get(key, OrderedDict())
        while len(used) > self.capacity.get(key, self.default):
            used.popitem(last=False)


def chain(path: list[int]) -> list[int]:
    """Chained hashes of a path: equal prefixes give equal blocks, nothing else does."""
    return [hash(tuple(path[: end + 1])) % 2**64 for end in range(len(path))]


def blocks_of(run: Run) -> int:
    """Blocks in a tree, each with a holder, and its counts in order."""
    for head, child in run.children.items():
        assert (head, run) == (child.blocks[0], child.parent)
        assert child.mask == sum(child.held)
        assert child.mask & ~(run.mask or child.mask) == 0
    return len(run.blocks) + sum(map(blocks_of, run.children.values()))


chains = st.lists(st.integers(0, 1), min_size=0, max_size=9).map(chain)
endpoints = st.sampled_from([A, B, C])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("record"), endpoints, chains),
        st.tuples(st.just("record"), endpoints, chains.map(lambda blocks: array("Q", blocks))),
        st.tuples(st.just("forget"), endpoints, st.integers(0, 30)),
        st.tuples(st.just("capacity"), endpoints, st.integers(0, 14)),
        st.tuples(st.just("clear"), endpoints, st.none()),
        st.tuples(st.just("remove"), endpoints, st.none()),
    ),
    max_size=30,
)


@given(steps, st.lists(chains, min_size=1, max_size=4))
@settings(max_examples=300)
def test_agrees_with_the_naive_model(
    steps: list[tuple[str, EndpointKey, Any]], queries: list[list[int]]
) -> None:
    """Matches, sizes, uses and return values are those of the model after every step.

    Chains come in lists and in arrays, and are nobody's but the caller's afterwards.
    """
    index, model = PrefixIndex(8, 12), NaiveIndex(8, 12)
    keys = (C, A, B)
    for name, key, argument in steps:
        used = model.used.get(key, OrderedDict())
        if name == "record":
            blocks = list(argument)
            assert index.record(key, argument) == model.record(key, blocks)
            assert list(argument) == blocks
        elif name == "forget":
            old = [block for block, sequence in used.items() if sequence <= argument]
            assert index.forget_older(key, argument) == len(old)
            for block in old:
                del used[block]
        elif name == "capacity":
            index.set_capacity(key, argument)
            model.capacity[key] = min(argument, 12)
            model.evict(key)
        else:
            index.clear(key) if name == "clear" else index.remove(key)
            used.clear()
            if name == "remove":
                model.capacity.pop(key, None)
        for query in queries:
            assert index.match(query, keys) == [model.depth(key, query) for key in keys]
        for endpoint in keys:
            held = model.used.get(endpoint, OrderedDict())
            assert index.size(endpoint) == len(held)
        for query in queries:
            for endpoint in keys:
                held = model.used.get(endpoint, OrderedDict())
                assert index.last_use(endpoint, query) == (held.get(query[-1], 0) if query else 0)
    assert index.total == sum(map(len, model.used.values()))
    assert blocks_of(index._tree.root) == len({block for held in model.used.values() for block in held})


def test_a_chain_in_an_array_is_kept_in_8_bytes_a_block() -> None:
    """What is kept behind a run that it leaves, ends or goes on with is an array of its own."""
    index, blocks = PrefixIndex(100, 100), array("Q", range(2**63, 2**63 + 40))
    for chain_ in (blocks[:20], blocks, array("Q", [*blocks[:10], 7])):
        index.record(A, chain_)
    (head,) = index._tree.root.children.values()
    kept = [head.blocks, *(run.blocks for run in head.children.values())]
    assert sorted(kept, key=len) == [array("Q", [7]), blocks[:10], blocks[10:]]
    assert all(isinstance(run, array) for run in kept)


@given(steps=st.lists(st.tuples(endpoints, st.lists(st.integers(0, 9), max_size=8)), max_size=20))
def test_blocks_that_are_no_chain_do_no_harm(steps: list[tuple[EndpointKey, list[int]]]) -> None:
    """Colliding or made-up hashes may spoil a match, never the bound nor the bookkeeping."""
    index = PrefixIndex(5, 5)
    for key, blocks in steps:
        index.record(key, blocks)
        assert index.size(key) <= 5
        assert all(0 <= depth <= len(blocks) for depth in index.match(blocks, (A, B, C)))
    for key in (A, B, C):
        index.remove(key)
    assert index._tree.root.children == {}


def test_the_tail_of_a_chain_is_evicted_first() -> None:
    """Over capacity, the older chain loses its last blocks and keeps its head."""
    index = PrefixIndex(6, 6)
    old, new = chain([1, 2, 3, 4]), chain([9, 8, 7])
    index.record(A, old)
    index.record(A, new)

    assert index.match(old, (A,)) == [3]
    assert index.match(new, (A,)) == [3]


def test_record_returns_the_previous_use_of_the_deepest_block_held() -> None:
    """The sequence names the last use of the prediction that is about to be put to the test."""
    index = PrefixIndex(100, 100)
    first, longer = chain([1, 2]), chain([1, 2, 3, 4])

    assert index.record(A, first) == 0
    used = index.last_use(A, first)
    assert used > 0
    assert index.record(B, first) == 0
    assert index.record(A, longer) == used
    assert index.last_use(A, first[:1]) > used
    assert index.last_use(C, first[:1]) == 0


def test_forgetting_older_blocks_keeps_what_was_used_since() -> None:
    """An engine that lost one chain's block has lost every block not used after it, here and only here."""
    index = PrefixIndex(100, 100)
    lost, kept, shared = chain([1, 2, 3]), chain([4, 5]), chain([6])
    index.record(B, lost)
    index.record(A, shared)
    index.record(A, lost)
    sequence = index.last_use(A, lost)
    index.record(A, kept)

    assert index.forget_older(A, sequence) == 4
    assert [index.match(blocks, (A, B)) for blocks in (lost, kept, shared)] == [
        [0, 3],
        [2, 0],
        [0, 0],
    ]
    assert index.forget_older(C, sequence) == 0


def test_a_reused_bit_inherits_nothing() -> None:
    """An endpoint that takes a removed one's place starts with an empty cache and the default capacity."""
    index = PrefixIndex(2, 9)
    keys = (A, B)
    blocks = chain([1, 2, 3])
    index.set_capacity(A, 9)
    index.record(A, blocks)
    assert index.match(blocks, keys) == [3, 0]

    index.remove(A)
    index.record(B, chain([5]))

    assert index.match(blocks, keys) == [0, 0]
    index.record(B, blocks)
    assert index.match(blocks, keys) == [0, 2]


def test_matches_over_many_endpoints() -> None:
    """Beyond one machine word of endpoints each row still gets its own depth."""
    index = PrefixIndex(1000, 1000)
    keys = tuple(EndpointKey(f"10.0.0.1:{port}") for port in range(300))
    blocks = chain(list(range(400)))
    for port, key in enumerate(keys):
        index.record(key, blocks[:port])

    assert list(index.match(blocks, keys)) == list(range(300))
    assert list(index.match(blocks, keys[::-7])) == list(range(300))[::-7]
    assert list(index.match([], keys)) == [0] * 300
    assert index.match(blocks, ()) == []


def test_matches_over_many_endpoints_that_come_and_go(rng: random.Random) -> None:
    """A column of many rows is that of its rows one by one, also after bits went to other endpoints."""
    index = PrefixIndex(1000, 1000)
    keys = tuple(EndpointKey(f"10.0.0.1:{port}") for port in range(200))
    gone = EndpointKey("10.0.0.2:1")  # in no column
    blocks = chain(list(range(9)))
    for _ in range(40):
        depth = rng.randrange(10)
        for key in rng.sample((*keys, gone), rng.choice([1, 100])):
            index.record(key, blocks[:depth])
        for key in rng.sample((*keys, gone), 20):
            index.remove(key)
        assert list(index.match(blocks, keys)) == [index.match(blocks, (key,))[0] for key in keys]


def test_equal_tuples_are_interchangeable() -> None:
    """Remembering a keys tuple by identity never shows: other objects, however many, get equal answers."""
    index = PrefixIndex(10, 10)
    blocks = chain([1, 2])
    index.record(A, blocks)

    for _ in range(600):
        assert index.match(blocks, tuple([B, A])) == [0, 2]  # noqa: C409 - a new object each time
    assert len(index._tree._groups) <= 256


def test_endpoints_are_bounded() -> None:
    """One endpoint too many is an error that changes nothing."""
    index = PrefixIndex(4, 4, max_endpoints=1)
    index.record(A, [1])

    with pytest.raises(CapacityError):
        index.record(B, [1])
    with pytest.raises(CapacityError):
        index.set_capacity(B, 1)
    assert index.match([1], (A, B)) == [1, 0]
    index.remove(A)
    index.remove(A)
    index.clear(A)
    assert index.record(B, [1]) == 0


def test_bad_capacities_are_refused() -> None:
    """A negative capacity, or a default over the maximum, is an error."""
    with pytest.raises(ValueError):
        PrefixIndex(5, 4)
    with pytest.raises(ValueError):
        PrefixIndex(1, 4).set_capacity(A, -1)
