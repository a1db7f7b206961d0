"""The tree of cached blocks: runs of blocks without a branch between them, and the surgery on it.

Rules:
    1. A run is 1..RUN_BLOCKS consecutive blocks of one chain. Chains branch only where a run ends, so a
       child continues all of its parent; the root of a chain is a run of no blocks.
    2. Holders: bit b of `full` is set if holder b holds every block of the run. Holders of some
       of them are in `partial`, by the mask of positions they hold: non-empty, each holder under one mask
       at most, and never in `full` too. Many hold the same, so a match looks at few masks.
    3. `ends` and `digests` describe the text of the blocks, `digest` that of the whole run; they are all
       that is kept of it. `digest` is 0 until it is worked out from the text.
    4. `wires[p]` is the name that engines gave to block p. Engines that hash with another seed give it
       another, which is in `aliases`, arrays as long as `wires` with 0 for none.
    5. A child of a parent with several is found by the digest of its first block. Two children may begin
       with the same text (cut into tokens differently), so a digest finds a tuple of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from xxhash import xxh3_64_intdigest, xxh32_intdigest

RUN_BLOCKS: Final = 64
"""A match takes a step per run, and a split touches each block of one. 64 blocks are also what vLLM's default
step of 2,048 tokens announces at once with blocks of 32."""

FOLD: Final = (1 << 60) - 1
"""Names are kept as 60 bits: CPython then needs 32 bytes for each instead of 48."""

REFUTED: Final = b""
"""In `Run.doubts`: the tokenizer cuts this text into other tokens, so no prompt reaches the block."""


class Space:
    """One model's vocabulary, and the names that its engines gave to blocks.

    Attributes:
        model: Its name, part of its chains' roots.
        vocabulary: As it was given; `words` is made from it.
        words: The bytes of each token, None for those that stand for no text.
        names: Folded name to the id of the run that has it.
        replicas: How many use this space.
    """

    __slots__ = ("model", "names", "replicas", "vocabulary", "words")

    def __init__(self, model: str, vocabulary: Sequence[bytes]) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.words = [word or None for word in vocabulary]
        self.names: dict[int, int] = {}
        self.replicas = 0


class Seed:
    """Engines that give the same names to the same blocks, as far as that was seen.

    Attributes:
        replicas: How many they are; further names are forgotten.
    """

    __slots__ = ("replicas",)

    def __init__(self) -> None:
        self.replicas = 0


class Run:
    """Consecutive blocks of one chain; see the module's rules.

    Attributes:
        id: Unique among the living, small.
        space: Whose names these are.
        parent: What the run continues.
        child: What continues the run: nothing, one run, or a fork of several.
        wires: Names, 64 bits each.
        seed: The hash seed that they were made with.
        aliases: Further names by seed, or None.
        ends: For each block, where its text ends, in bytes from the start of the run.
        digests: xxh32 of each block's text.
        digest: xxh3-64 of all text, or 0.
        full: Bits of the holders of all blocks.
        partial: Mask of positions to the bits of holders of just these, or None.
        doubts: Position to the tokens (uint32, native order) of a block that may not be what the tokenizer
            makes of its text, None in place of tokens that were not kept, `REFUTED` once it is known.
    """

    __slots__ = (
        "aliases",
        "child",
        "digest",
        "digests",
        "doubts",
        "ends",
        "full",
        "id",
        "parent",
        "partial",
        "seed",
        "space",
        "wires",
    )

    def __init__(self, run_id: int, space: Space, seed: Seed) -> None:
        self.id = run_id
        self.space = space
        self.seed = seed
        self.parent: Run | None = None
        self.child: Run | Fork | None = None
        self.wires = array("Q")
        self.aliases: dict[Seed, array[int]] | None = None
        self.ends = array("I")
        self.digests = array("I")
        self.digest = 0
        self.full = 0
        self.partial: dict[int, int] | None = None
        self.doubts: dict[int, bytes | None] | None = None

    def position(self, wire: int, guess: int) -> int:
        """Which block has this name, -1 if none has. `guess`, within the run, is looked at first."""
        if self.wires[guess] == wire:
            return guess
        for names in self._names():
            if names[guess] == wire:
                return guess
        for names in self._names():
            if wire in names:
                return names.index(wire)
        return -1

    def seed_of(self, wire: int) -> Seed:
        """The seed that gave this name to one of the blocks."""
        for seed, names in (self.aliases or {}).items():
            if wire in names:
                return seed
        return self.seed

    def common(self, position: int, hashes: list[int], start: int) -> int:
        """How many names from `position` on are those from `hashes[start]` on; the first is."""
        for names in self._names():
            if names[position] == hashes[start]:
                length = min(len(names) - position, len(hashes) - start)
                if names[position : position + length].tolist() == hashes[start : start + length]:
                    return length
                same = 1
                while same < length and names[position + same] == hashes[start + same]:
                    same += 1
                return same
        return 0

    def held(self, holder: int) -> int:
        """Mask of the positions that `holder` holds."""
        if self.full >> holder & 1:
            return (1 << len(self.ends)) - 1
        if self.partial:
            for mask, bits in self.partial.items():
                if bits >> holder & 1:
                    return mask
        return 0

    def set_held(self, holders: int, before: int, mask: int) -> None:
        """Make `mask` the positions held by each of the bits `holders`, which held `before` until now."""
        everything = (1 << len(self.ends)) - 1
        partial = self.partial
        if before == everything:
            self.full &= ~holders
        elif before and partial:
            left = partial[before] & ~holders
            if left:
                partial[before] = left
            else:
                del partial[before]
        if mask == everything:
            self.full |= holders
        elif mask:
            if partial is None:
                partial = self.partial = {}
            partial[mask] = partial.get(mask, 0) | holders
        if not partial:
            self.partial = None

    def strip(self, holders: int) -> None:
        """Take the bits `holders` away, whatever they hold."""
        self.full &= ~holders
        if self.partial:
            left = {mask: bits & ~holders for mask, bits in self.partial.items() if bits & ~holders}
            self.partial = left or None

    def depth_held(self) -> int:
        """One more than the last position that anybody holds."""
        if self.full:
            return len(self.ends)
        return max(self.partial).bit_length() if self.partial else 0

    def names(self) -> Iterator[int]:
        """All names of all blocks, folded."""
        for names in self._names():
            for wire in names:
                if wire:
                    yield wire & FOLD

    def append(self, hashes: list[int], texts: list[bytes], digests: array[int]) -> None:
        """Add blocks at the end; `full` and `partial` are left to the caller."""
        base = self.ends[-1] if self.ends else 0
        self.digest = 0 if base else xxh3_64_intdigest(b"".join(texts))
        self.ends.extend(array("I", accumulate(map(len, texts), initial=base))[1:])
        self.digests.extend(digests)
        self.wires.extend(hashes)
        names, run_id = self.space.names, self.id
        for wire in hashes:
            names[wire & FOLD] = run_id

    def cut(self, count: int) -> None:
        """Drop the blocks from `count` >= 1 on, which no holder has and nothing continues."""
        del self.wires[count:], self.ends[count:], self.digests[count:]
        for alias in (self.aliases or {}).values():
            del alias[count:]
        self.digest = 0
        if self.partial:
            self.full |= self.partial.pop((1 << count) - 1, 0)
            self.partial = self.partial or None

    def block_bytes(self, position: int) -> int:
        """Length of one block's text."""
        return self.ends[position] - (self.ends[position - 1] if position else 0)

    def _names(self) -> tuple[array[int], ...]:
        return (self.wires, *self.aliases.values()) if self.aliases else (self.wires,)

    def scan(self, text: bytes) -> int:
        """How many leading blocks `text` starts with."""
        start, total = 0, len(text)
        for position, (end, digest) in enumerate(zip(self.ends, self.digests, strict=True)):
            if end > total or xxh32_intdigest(text[start:end]) != digest:
                return position
            start = end
        return len(self.ends)


class Root(Run):
    """Start of the chains of one (root, block size): a run of no blocks.

    Attributes:
        key: What it is found by.
    """

    __slots__ = ("key",)

    def __init__(self, key: tuple[int, int], space: Space) -> None:
        super().__init__(-1, space, Seed())
        self.key = key


class Fork:
    """Several runs that continue the same one.

    Attributes:
        lengths: Bytes of a first block to how many children have such a one. A prompt tries each.
        runs: Digest of the first block to the children that begin with it.
    """

    __slots__ = ("lengths", "runs")

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.runs: dict[int, tuple[Run, ...]] = {}

    def add(self, run: Run) -> None:
        """One more child."""
        length, digest = run.ends[0], run.digests[0]
        self.lengths[length] = self.lengths.get(length, 0) + 1
        self.runs[digest] = (*self.runs.get(digest, ()), run)

    def discard(self, run: Run) -> None:
        """One child less."""
        length, digest = run.ends[0], run.digests[0]
        self.lengths[length] -= 1
        if not self.lengths[length]:
            del self.lengths[length]
        left = tuple(other for other in self.runs[digest] if other is not run)
        if left:
            self.runs[digest] = left
        else:
            del self.runs[digest]


MAX_FIRST_LENGTHS: Final = 512
"""Distinct lengths of first blocks at one fork, each a hash (0.1 us) for a prompt that passes there. 16
tokens of prose give about 60; only a client that tries gives more than this."""

MAX_SAME_TEXT: Final = 8
"""Children of one fork that begin with the same text; each is a way to be followed."""


def may_link(parent: Run, length: int, digest: int) -> bool:
    """True if `parent` has room for a child whose first block has this length and digest."""
    child = parent.child
    if not isinstance(child, Fork):
        return True
    known = length in child.lengths or len(child.lengths) < MAX_FIRST_LENGTHS
    return known and len(child.runs.get(digest, ())) < MAX_SAME_TEXT


def link(parent: Run, run: Run) -> None:
    """Make `run`, which has its blocks, a child of `parent`."""
    run.parent = parent
    child = parent.child
    if child is None:
        parent.child = run
        return
    if not isinstance(child, Fork):
        fork = Fork()
        fork.add(child)
        parent.child = child = fork
    child.add(run)


def unlink(run: Run) -> None:
    """Take `run` from its parent's children."""
    parent = run.parent
    assert parent is not None
    child = parent.child
    if isinstance(child, Fork):
        child.discard(run)
        if len(child.runs) == 1:
            (left,) = child.runs.values()
            if len(left) == 1:
                parent.child = left[0]
    else:
        parent.child = None


def continuing(parent: Run, digest: int) -> Sequence[Run]:
    """Children of `parent` whose first block has this text."""
    child = parent.child
    if child is None:
        return ()
    if isinstance(child, Fork):
        return child.runs.get(digest, ())
    return (child,) if child.digests[0] == digest else ()


def split(run: Run, at: int, head_id: int) -> Run:
    """Cut `run` before block `at`, inside it; `run` keeps the tail and its children.

    Returns:
        The head, in the place that `run` had.
    """
    parent = run.parent
    assert parent is not None
    unlink(run)
    head = Run(head_id, run.space, run.seed)
    names = run.space.names
    head.wires, run.wires = run.wires[:at], run.wires[at:]
    if run.aliases:
        aliases = run.aliases.items()
        head.aliases = {seed: alias[:at] for seed, alias in aliases if any(alias[:at])} or None
        run.aliases = {seed: alias[at:] for seed, alias in aliases if any(alias[at:])} or None
    for name in head.names():
        names[name] = head_id
    base = run.ends[at - 1]
    head.ends, run.ends = run.ends[:at], array("I", [end - base for end in run.ends[at:]])
    head.digests, run.digests = run.digests[:at], run.digests[at:]
    run.digest = 0
    head.full = run.full
    partial, run.partial = run.partial, None
    low = (1 << at) - 1
    for mask, bits in (partial or {}).items():
        head.set_held(bits, 0, mask & low)
        run.set_held(bits, 0, mask >> at)
    if run.doubts:
        doubts, run.doubts = run.doubts, None
        head.doubts = {p: tokens for p, tokens in doubts.items() if p < at} or None
        run.doubts = {p - at: tokens for p, tokens in doubts.items() if p >= at} or None
    link(parent, head)
    link(head, run)
    return head
