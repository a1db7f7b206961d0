"""The tree of routed prompts against a plain model of it: sets of prefixes per endpoint."""

from __future__ import annotations

from random import Random

import pytest

from extproc.choosing.rivals.radix import RadixTree

ROWS = 3


def prompts(rng: Random, number: int, first: int = 0) -> list[list[int]]:
    """Chained keys: two prompts have equal keys exactly as far as they agree."""
    made: list[list[int]] = []
    fresh = iter(range(first, first + 1_000_000))
    for _ in range(number):
        stem = rng.choice(made)[: rng.randrange(12)] if made and rng.random() < 0.7 else []
        made.append([*stem, *(next(fresh) for _ in range(rng.randrange(0 if stem else 1, 8)))])
    return made


def matched(tree: RadixTree, blocks: list[int], rows: int) -> list[int]:
    """Leading blocks that each row holds."""
    nodes, depth = tree.path(blocks)
    return [
        max((min(node.end, depth) for node in nodes if row in node.rows), default=0) for row in range(rows)
    ]


def test_a_prompt_matches_as_far_as_it_was_routed() -> None:
    """Row 0 has all of it, row 1 the part it shares, row 2 nothing."""
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], 0)
    tree.insert([1, 2, 9], 1)
    assert matched(tree, [1, 2, 3, 4, 5], ROWS) == [4, 2, 0]
    assert matched(tree, [1, 2, 9], ROWS) == [2, 3, 0]
    assert (tree.size(0), tree.size(1), tree.nodes) == (4, 3, 3)


def test_a_cut_node_is_reported_with_its_new_parent() -> None:
    """[1..4] cut at 2 gives the node [3, 4] and its parent [1, 2]."""
    tree = RadixTree()
    (whole,), _ = tree.insert([1, 2, 3, 4], 0)
    nodes, ((lower, upper),) = tree.insert([1, 2, 9], 1)
    assert lower is whole
    assert [(upper.start, upper.end), (lower.start, lower.end)] == [(0, 2), (2, 4)]
    assert nodes[0] is upper
    assert lower.parent is upper
    assert nodes[1].parent is upper


def test_the_least_recently_used_leaf_leaves_first() -> None:
    """Bounded to 4 blocks, row 0 drops the older branch and keeps what both share."""
    tree = RadixTree()
    tree.insert([1, 2, 3], 0)
    tree.insert([1, 2, 4, 5], 0)
    assert tree.evict(0, 4) != []
    assert matched(tree, [1, 2, 3], 1) == [2]
    assert matched(tree, [1, 2, 4, 5], 1) == [4]


def test_spared_nodes_stay() -> None:
    """Nothing leaves that the caller still needs."""
    tree = RadixTree()
    (node,), _ = tree.insert([1, 2, 3], 0)
    assert tree.evict(0, 0, lambda asked: asked is node) == []
    assert tree.evict(0, 0) == [node]
    assert tree.nodes == 0


@pytest.mark.parametrize("seed", range(8))
def test_it_agrees_with_sets_of_prefixes(seed: int) -> None:
    """Without eviction, what a row matches is the longest prefix of anything it was sent."""
    rng = Random(seed)
    tree = RadixTree()
    sent: list[set[int]] = [set() for _ in range(ROWS)]
    for blocks in prompts(rng, 120):
        row = rng.randrange(ROWS)
        nodes, _ = tree.insert(blocks, row)
        assert [key for node in nodes for key in node.keys[node.start : node.end]] == blocks
        sent[row].update(blocks)
        asked = rng.choice([*prompts(rng, 3, 5_000_000), blocks])
        expected = [
            next((at for at, key in enumerate(asked) if key not in held), len(asked)) for held in sent
        ]
        assert matched(tree, asked, ROWS) == expected
        assert [tree.size(row) for row in range(ROWS)] == [len(held) for held in sent]


@pytest.mark.parametrize("seed", range(8))
def test_eviction_keeps_prefixes_whole_and_sizes_true(seed: int) -> None:
    """Every row stays within its bound and holds the ancestors of what it holds; sizes are sums."""
    rng = Random(seed)
    tree = RadixTree()
    for blocks in prompts(rng, 200):
        row = rng.randrange(ROWS)
        tree.insert(blocks, row)
        tree.evict(row, 20)
        held = [list(tree.oldest(at)) for at in range(ROWS)]
        for at in range(ROWS):
            assert tree.size(at) == sum(node.blocks for node in held[at])
            assert all(node.parent is None or node.parent in held[at] for node in held[at])
            assert all(at in node.rows for node in held[at])
        assert tree.size(row) <= 20
        assert tree.nodes == len({node for nodes in held for node in nodes})
    for row in range(ROWS):
        tree.evict(row, 0)
    assert tree.nodes == 0
