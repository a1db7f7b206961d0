"""A radix tree of prompts that were routed, each node with the endpoints it was routed to.

What the routers with a tree of their own keep: blocks instead of characters, otherwise the same.

Rules:
    1. A node is a run of blocks; the chain from the root to its end is a prefix of some prompt. Keys are
       chained, so a node is found by the key of its first block alone, and two prompts share exactly the
       blocks before the first difference: `bisect` finds it.
    2. If an endpoint holds a node it holds the node's ancestors. Ancestors are used no less recently than
       descendants, so the least recently used node of an endpoint is always a leaf of what it holds.
    3. A node that no endpoint holds is gone, its ancestors' runs included, unless another prompt needs them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence


class Node:
    """A run of blocks: `keys[start:end]` of some prompt, shared with it and never copied.

    Attributes:
        parent: The node before it; None for the first of a prompt.
        keys: The whole prompt that made it.
        start: First block, counted from the head of the prompt.
        end: After the last block.
        rows: Endpoints that hold it, the latest to be sent there last.
    """

    __slots__ = ("end", "keys", "parent", "rows", "start")

    def __init__(self, parent: Node | None, keys: Sequence[int], start: int, end: int) -> None:
        self.parent = parent
        self.keys = keys
        self.start = start
        self.end = end
        self.rows: dict[int, None] = {}

    @property
    def blocks(self) -> int:
        """Length of the run."""
        return self.end - self.start


class RadixTree:
    """Prompts per endpoint row; bounded by what `evict` leaves to each."""

    __slots__ = ("_heads", "_lru", "_sizes")

    def __init__(self) -> None:
        self._heads: dict[int, Node] = {}
        self._lru: dict[int, OrderedDict[Node, None]] = {}
        self._sizes: dict[int, int] = {}

    @property
    def nodes(self) -> int:
        """Nodes held by anybody."""
        return len(self._heads)

    def size(self, row: int) -> int:
        """Blocks that `row` holds."""
        return self._sizes.get(row, 0)

    def path(self, blocks: Sequence[int]) -> tuple[list[Node], int]:
        """The nodes that `blocks` runs through, from the head, and how many of its blocks they cover.

        The last node may be covered in part.
        """
        nodes: list[Node] = []
        depth = 0
        while depth < len(blocks):
            node = self._heads.get(blocks[depth])
            if node is None:
                break
            nodes.append(node)
            depth += _common(node, blocks)
            if depth < node.end:
                break
        return nodes, depth

    def insert(self, blocks: Sequence[int], row: int) -> tuple[list[Node], list[tuple[Node, Node]]]:
        """Note that `row` was sent `blocks`, all of it used just now.

        Args:
            blocks: The prompt's chain, head first; kept, so it must not change.
            row: The endpoint.

        Returns:
            The nodes of the prompt from the head, their runs together the whole of it; and a pair (node,
            new parent) for a node that was cut in two, the first part being the new parent.
        """
        nodes, depth = self.path(blocks)
        splits = []
        if nodes and depth < nodes[-1].end:
            upper = self._split(nodes[-1], depth)
            splits.append((nodes[-1], upper))
            nodes[-1] = upper
        if depth < len(blocks):
            leaf = Node(nodes[-1] if nodes else None, blocks, depth, len(blocks))
            self._heads[blocks[depth]] = leaf
            nodes.append(leaf)
        used = self._lru.setdefault(row, OrderedDict())
        for node in reversed(nodes):
            if node in used:
                used.move_to_end(node)
                node.rows.pop(row)
            else:
                used[node] = None
                self._sizes[row] = self._sizes.get(row, 0) + node.blocks
            node.rows[row] = None
        return nodes, splits

    def oldest(self, row: int) -> Iterator[Node]:
        """What `row` holds, least recently used first."""
        return iter(self._lru.get(row, ()))

    def evict(
        self, row: int, most_blocks: int, is_spared: Callable[[Node], bool] | None = None
    ) -> list[Node]:
        """Take nodes from `row`, least recently used first, until it holds `most_blocks` at most.

        Args:
            row: The endpoint.
            most_blocks: The bound, >= 0.
            is_spared: Nodes that stay whatever the bound. Rule 2 holds if a node's ancestors are, with it.

        Returns:
            Nodes that no endpoint holds any more; they are no longer part of the tree.
        """
        gone = []
        used = self._lru.get(row, OrderedDict())
        if self.size(row) > most_blocks:
            for node in list(used):
                if self._sizes[row] <= most_blocks:
                    break
                if is_spared is not None and is_spared(node):
                    continue
                del used[node]
                del node.rows[row]
                self._sizes[row] -= node.blocks
                if not node.rows:
                    gone.append(node)
                    del self._heads[node.keys[node.start]]
        return gone

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` before block `at`; the first part becomes a new node that all its holders hold."""
        upper = Node(node.parent, node.keys, node.start, at)
        upper.rows = dict(node.rows)
        self._heads[node.keys[node.start]] = upper
        self._heads[node.keys[at]] = node
        node.parent = upper
        node.start = at
        for row in upper.rows:
            used, above = self._lru[row], upper.parent
            used[upper] = None  # Rule 2: later than its descendants, so its ancestors follow
            while above is not None:
                used.move_to_end(above)
                above = above.parent
        return upper


def _common(node: Node, blocks: Sequence[int]) -> int:
    """Leading blocks of `node`'s run that are in `blocks` at the same depth, at least one."""
    keys, most = node.keys, min(node.end, len(blocks))
    if keys[most - 1] == blocks[most - 1]:
        return most - node.start
    differs = bisect_left(range(most), True, node.start + 1, most, key=lambda at: keys[at] != blocks[at])
    return differs - node.start
