"""Preble's E2: exploit a cached prefix that is most of the prompt, else explore by load and eviction.

Source: WukLab/preble `multi_node/global_scheduler_with_time.py`, `global_lru_cache.py`, at 8e7906a3.

A tree of what was routed is kept, each node with the endpoints it is allocated to. A node is large if its own
run is over half of its context; a request belongs to the nearest large node at or above its leaf.

1. Exploit, if the leaf's run is under half of the prompt: among the endpoints allocated to the nearest
   ancestor, the least cost. Else explore: the least cost of all.
2. Cost = load + eviction. Load, over the requests of the last 3 minutes by large node: miss rate · requests ·
   prefill time of the node / endpoints allocated, plus running requests · mean output length · median TPOT.
   Eviction: what the least recently used nodes cost that would make room for the leaf: miss rate · requests ·
   prefill time of those that are large.
3. Nodes leave an endpoint, the least recently used first, beyond its KV capacity.

With the given view the exploit decision is that view's: the best match is over half of the prompt, and the
candidates are those that match as much. The load is computed as above in either case.

Assumed: prefill time is the fit for an 8B model on an H100, where the source has a Mistral-7B on an A6000
built in and asks for one's own; an index into the candidates that the source takes for an endpoint is the
endpoint here; the re-balancing of hot prefixes, which the paper describes, is commented out in the source
and so is not here: a prefix stays where it was first put. Nodes that no endpoint holds are forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from extproc.choosing.rivals.radix import Node, RadixTree
from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, Sent, StatefulPolicy

_WINDOW_S: Final = 180.0
_TPOT_SAMPLES: Final = 200
_FIRST_TPOT_S: Final = 0.15
_FIRST_OUTPUT_TOKENS: Final = 45.0
"""Output length and TPOT before any was seen (source)."""


@dataclass(slots=True, eq=False)
class _Large:
    """What a large node got within the window, and what it adds to each endpoint's load now."""

    node: Node
    requests: int = 0
    context_blocks: int = 0
    hit_blocks: int = 0
    prefill_s: float = 0.0
    rows: tuple[int, ...] = ()
    decode_tokens: dict[int, float] = field(default_factory=dict)

    @property
    def miss_rate(self) -> float:
        """Share of the tokens that had to be computed."""
        return 1.0 - self.hit_blocks / self.context_blocks


@dataclass(frozen=True, slots=True)
class _Arrival:
    at_s: float
    large: _Large
    context_blocks: int
    hit_blocks: int


@dataclass(slots=True)
class _Running:
    leaf: Node
    first_s: float | None = None


class Preble(StatefulPolicy):
    """Rules 1 to 3.

    Args:
        own: True decides by the tree as shipped, False by the cache view in use.
        eviction: False leaves the eviction cost out, the source's constructor default.
        base_ms: Prefill time, constant part.
        per_token_ms: Prefill time per token.
        per_pair_ms: Prefill time per pair of tokens.
    """

    __slots__ = (
        "_allocated",
        "_arrivals",
        "_block_size",
        "_eviction",
        "_kv_blocks",
        "_larges",
        "_loads",
        "_outputs",
        "_own",
        "_prefill_ms",
        "_refs",
        "_running",
        "_selected",
        "_tpots",
        "_tpots_s",
        "_tree",
    )

    def __init__(
        self,
        *,
        own: bool = False,
        eviction: bool = True,
        base_ms: float = 8.0,
        per_token_ms: float = 0.022,
        per_pair_ms: float = 1.3e-6,
    ) -> None:
        self._own = own
        self._eviction = eviction
        self._prefill_ms = (base_ms, per_token_ms, per_pair_ms)
        self._block_size = 1
        self._kv_blocks: list[int] = []
        self._tree = RadixTree()
        self._allocated: dict[Node, set[int]] = {}
        self._refs: dict[Node, dict[int, int]] = {}
        self._outputs: dict[Node, tuple[int, int]] = {}
        self._larges: dict[Node, _Large] = {}
        self._arrivals: deque[_Arrival] = deque()
        self._tpots: list[deque[float]] = []
        self._tpots_s: list[float] = []
        self._loads: list[list[float]] = []
        self._running: dict[int, _Running] = {}
        self._selected: set[int] = set()

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        rows = len(view.keys)
        if not self._loads:
            self._loads = [[0.0, 0.0] for _ in range(rows)]
            self._tpots = [deque([_FIRST_TPOT_S], maxlen=_TPOT_SAMPLES) for _ in range(rows)]
            self._tpots_s = [_FIRST_TPOT_S] * rows
        self._block_size = view.block_size
        self._kv_blocks = [tokens // view.block_size for tokens in view.kv_tokens]
        self._expire(view.now_s)
        start, candidates = self._leaf(view) if self._own else self._given(view)
        blocks = len(view.request.blocks) - start
        exploit = blocks < start
        self._selected = candidates if exploit else set(range(rows))
        if len(self._selected) == 1:
            return next(iter(self._selected))
        among = sorted(self._selected)
        row = among[least([self._cost_s(candidate, blocks) for candidate in among], view.rng)]
        if not exploit:
            self._selected = {row}
        return row

    def _given(self, view: FleetView) -> tuple[int, set[int]]:
        """Blocks before the leaf and its candidates, by the given view."""
        best = max(view.matched_blocks)
        return best, {row for row, matched in enumerate(view.matched_blocks) if matched == best}

    def _leaf(self, view: FleetView) -> tuple[int, set[int]]:
        """The same by the own tree.

        The leaf is what the prompt adds to it, be it less than a block, or else its last node.
        """
        request = view.request
        nodes, depth = self._tree.path(request.blocks)
        has_tail = request.prompt_tokens > len(request.blocks) * view.block_size
        is_known = depth == len(request.blocks) and not has_tail
        start = nodes[-1].start if nodes and is_known else depth
        node = nodes[-1] if nodes else None
        while node is not None and not self._allocated.get(node):
            node = node.parent
        return start, set(range(len(view.keys))) if node is None else self._allocated[node]

    def on_sent(self, sent: Sent) -> None:
        """Enter it into the tree and the window."""
        blocks, row = sent.request.blocks, sent.row
        if not blocks:
            return
        nodes, splits = self._tree.insert(blocks, row)
        for lower, upper in splits:
            self._inherit(lower, upper)
        leaf = nodes[-1]
        for node in nodes:
            self._allocated.setdefault(node, set()).update(self._selected)
            refs = self._refs.setdefault(node, {})
            refs[row] = refs.get(row, 0) + 1
        large = self._large_at(leaf)
        arrival = _Arrival(sent.sent_s, large, leaf.end, leaf.start)
        large.requests += 1
        large.context_blocks += arrival.context_blocks
        large.hit_blocks += arrival.hit_blocks
        self._arrivals.append(arrival)
        for node in nodes:
            self._refresh(node)
        self._running[sent.request.request_id] = _Running(leaf)
        self._forget(
            self._tree.evict(row, self._kv_blocks[row], lambda node: self._refs[node].get(row, 0) > 0)
        )

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Note when, for its TPOT."""
        if (running := self._running.get(sent.request.request_id)) is not None:
            running.first_s = now_s

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """Take it off the running ones; learn output length and TPOT."""
        running = self._running.pop(sent.request.request_id, None)
        if running is None:
            return
        node: Node | None = running.leaf
        if output_tokens > 1:
            large = _large(running.leaf)
            total, count = self._outputs.get(large, (0, 0))
            self._outputs[large] = (total + output_tokens, count + 1)
            if running.first_s is not None:
                tpots = self._tpots[sent.row]
                tpots.append((now_s - running.first_s) / (output_tokens - 1))
                self._tpots_s[sent.row] = median(tpots)
        while node is not None:
            self._refs[node][sent.row] -= 1
            self._refresh(node)
            node = node.parent

    def _cost_s(self, row: int, leaf_blocks: int) -> float:
        """Rule 2."""
        prefill_s, decode_tokens = self._loads[row]
        eviction_s = self._eviction_s(row, leaf_blocks) if self._eviction else 0.0
        return prefill_s + decode_tokens * self._tpots_s[row] + eviction_s

    def _eviction_s(self, row: int, blocks: int) -> float:
        """What making room for `blocks` costs, if the endpoint is full."""
        cost_s = 0.0
        for node in self._tree.oldest(row):
            if blocks <= 0:
                break
            if self._refs[node].get(row):
                continue
            blocks -= node.blocks
            large = self._larges.get(node)
            if large is not None:
                cost_s += large.miss_rate * large.requests * self._prefill_s(node)
        return cost_s

    def _prefill_s(self, node: Node) -> float:
        base_ms, per_token_ms, per_pair_ms = self._prefill_ms
        tokens, context = node.blocks * self._block_size, node.end * self._block_size
        return (base_ms + per_token_ms * tokens + per_pair_ms * tokens * (context - tokens / 2)) / 1000.0

    def _large_at(self, leaf: Node) -> _Large:
        node = _large(leaf)
        large = self._larges.get(node)
        if large is None:
            large = self._larges[node] = _Large(node)
        return large

    def _inherit(self, lower: Node, upper: Node) -> None:
        """`upper` was cut off the head of `lower`: it has what `lower` has, and is large in its place."""
        self._allocated[upper] = set(self._allocated.get(lower, ()))
        self._refs[upper] = dict(self._refs.get(lower, {}))
        large = self._larges.get(lower)
        if large is not None and not _is_large(lower) and _is_large(upper):
            del self._larges[lower]
            self._larges[upper] = large
            large.node = upper
            if lower in self._outputs:
                self._outputs[upper] = self._outputs.pop(lower)

    def _refresh(self, node: Node) -> None:
        """Bring the loads up to date with what `node` is now."""
        large = self._larges.get(node)
        if large is None:
            return
        self._retract(large)
        rows = self._allocated.get(node, set())
        if not large.requests or not rows:
            return
        large.prefill_s = large.miss_rate * large.requests * self._prefill_s(node) / len(rows)
        total, count = self._outputs.get(node, (0, 0))
        output_tokens = total / count if count else _FIRST_OUTPUT_TOKENS
        refs = self._refs.get(node, {})
        large.rows = tuple(rows)
        large.decode_tokens = {row: refs.get(row, 0) * output_tokens for row in rows}
        for row in large.rows:
            self._loads[row][0] += large.prefill_s
            self._loads[row][1] += large.decode_tokens[row]

    def _retract(self, large: _Large) -> None:
        for row in large.rows:
            self._loads[row][0] -= large.prefill_s
            self._loads[row][1] -= large.decode_tokens[row]
        large.rows = ()

    def _expire(self, now_s: float) -> None:
        """Take arrivals out that are older than the window; a node without any loses its allocation."""
        while self._arrivals and now_s - self._arrivals[0].at_s > _WINDOW_S:
            arrival = self._arrivals.popleft()
            large = arrival.large
            large.requests -= 1
            large.context_blocks -= arrival.context_blocks
            large.hit_blocks -= arrival.hit_blocks
            if large.requests:
                self._refresh(large.node)
                continue
            self._retract(large)
            del self._larges[large.node]
            self._allocated[large.node] = set()
            if not large.node.rows:
                self._forget([large.node])

    def _forget(self, nodes: Iterable[Node]) -> None:
        """Nodes that left the tree: nothing is kept of those the window has no arrivals of."""
        for node in nodes:
            if node not in self._larges:
                self._allocated.pop(node, None)
                self._refs.pop(node, None)
                self._outputs.pop(node, None)


def _is_large(node: Node) -> bool:
    return node.blocks > node.start


def _large(node: Node) -> Node:
    """The nearest large node at or above `node`; the first of a prompt always is."""
    while not _is_large(node):
        assert node.parent is not None, "a node without a parent starts at 0"
        node = node.parent
    return node
