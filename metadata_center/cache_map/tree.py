"""The tree of one cache map: all its runs, found by where a chain starts and by their blocks' names.

Rules:
    1. A run is in the tree from the moment its id is given to it until no holder has any of its blocks and
       nothing continues it; then its id is given to another.
    2. What no holder has at the end of a chain is dropped at once, with its names and doubts; what others
       continue stays.
"""

from __future__ import annotations

from array import array

from metadata_center.cache_map.runs import FOLD, REFUTED, Root, Run, Seed, Space, split, unlink
from metadata_center.cache_map.values import Counts


class Tree:
    """Runs and what is counted of them.

    Args:
        counts: Those of its map; `doubted` is kept here.

    Attributes:
        roots: (root of a prompt, tokens per block) to where its chains start.
        runs: By id; None where an id is free.
        stored: Blocks, and further names of them.
    """

    __slots__ = ("_counts", "_free_ids", "roots", "runs", "stored")

    def __init__(self, counts: Counts) -> None:
        self.roots: dict[tuple[int, int], Root] = {}
        self.runs: list[Run | None] = []
        self.stored = 0
        self._free_ids: list[int] = []
        self._counts = counts

    @property
    def size(self) -> int:
        """Runs in the tree, roots not counted."""
        return len(self.runs) - len(self._free_ids)

    def root(self, key: tuple[int, int], space: Space) -> Root:
        """Where the chains of this key start, made if it is new."""
        found = self.roots.get(key)
        if found is None:
            found = self.roots[key] = Root(key, space)
        return found

    def find(self, space: Space, wire: int) -> tuple[Run, int] | None:
        """The run that has a block of this name, and the block's position in it."""
        run_id = space.names.get(wire & FOLD)
        run = None if run_id is None else self.runs[run_id]
        position = -1 if run is None else run.position(wire, 0)
        return None if run is None or position < 0 else (run, position)

    def new(self, space: Space, seed: Seed) -> Run:
        """An empty run; the caller gives it blocks and links it."""
        run_id = self._new_id()
        run = self.runs[run_id] = Run(run_id, space, seed)
        return run

    def split(self, run: Run, at: int) -> Run:
        """Cut `run` before block `at`, inside it; returns the head, in the place that `run` had."""
        head = split(run, at, self._new_id())
        self.runs[head.id] = head
        return head

    def _new_id(self) -> int:
        """The id of a run that the caller puts into `runs`."""
        if self._free_ids:
            return self._free_ids.pop()
        self.runs.append(None)
        return len(self.runs) - 1

    def trust(self, run: Run, position: int, count: int) -> None:
        """These blocks came out of a tokenizer."""
        doubts = run.doubts or {}
        for doubted in [p for p in doubts if position <= p < position + count]:
            if doubts[doubted] is not REFUTED:
                del doubts[doubted]
                self._counts.doubted -= 1
        run.doubts = doubts or None

    def trim(self, run: Run) -> None:
        """Drop blocks that no holder has from the end of `run`, and of its ancestors if nothing is left."""
        current: Run | None = run
        while current is not None and current.child is None:
            if isinstance(current, Root):
                self.roots.pop(current.key, None)
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
            self.runs[current.id] = None
            self._free_ids.append(current.id)
            current = parent

    def sweep(self, run: Run, bits: int) -> None:
        """Take the holders `bits` from `run`, and the names that only they used; what no holder has goes."""
        if run.parent is None:  # went with a run swept just before
            return
        run.strip(bits)
        if run.aliases:
            for seed in [seed for seed in run.aliases if not seed.replicas]:
                self._unname_alias(run, run.aliases.pop(seed), 0)
            run.aliases = run.aliases or None
        self.trim(run)

    def _unname(self, run: Run, start: int) -> None:
        """Forget the names of the blocks of `run` from `start` on."""
        names, run_id = run.space.names, run.id
        for wire in run.wires[start:]:
            if names.get(wire & FOLD) == run_id:
                del names[wire & FOLD]
        self.stored -= len(run.wires) - start
        for alias in (run.aliases or {}).values():
            self._unname_alias(run, alias, start)

    def _unname_alias(self, run: Run, alias: array[int], start: int) -> None:
        names, run_id = run.space.names, run.id
        for wire in alias[start:]:
            if wire:
                self.stored -= 1
                if names.get(wire & FOLD) == run_id:
                    del names[wire & FOLD]

    def _drop_doubts(self, run: Run, start: int) -> None:
        """Forget what is in doubt from block `start` on."""
        doubts = run.doubts or {}
        for position in [p for p in doubts if p >= start]:
            if doubts.pop(position) is not REFUTED:
                self._counts.doubted -= 1
        run.doubts = doubts or None
