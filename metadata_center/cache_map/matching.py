"""Follow a prompt's text through the tree of runs, and see how far each holder comes.

Rules:
    1. One path is usual. There are several only where two children begin with the same text, and of those
       at most MAX_PATHS are followed; a holder's depth is the best of them.
    2. Equal text is not equal tokens. Blocks in doubt on the way and the last block of a path, which the
       prompt may continue in another way than any prompt before, are put to the tokenizer, if there is one.
       What it says of a block that is followed by the same text as before is remembered. Where it says no,
       the block before is asked about too: the wrong token may begin in that.
    3. Only what a holder has is asked about.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import itemgetter, or_
from typing import Final

from xxhash import xxh3_64_intdigest, xxh32_intdigest

from metadata_center.cache_map.holders import Group
from metadata_center.cache_map.runs import REFUTED, Fork, Root, Run
from metadata_center.cache_map.values import Counts, Matches, Verify

_USABLE: Final = itemgetter(2, 1)

MAX_PATHS: Final = 8
"""Ways to cut one text into tokens that are followed in one match."""

Level = tuple[int, int]
"""Bits of holders, and how many leading blocks each of them holds."""

Reach = tuple[int, int, int]
"""Bits of holders, how many leading blocks each holds, and how many of them it need not compute again."""

_Step = tuple[Run, int, int, int]
"""A run, where its text starts in the prompt, how many of its blocks match, how many come before it."""


def match(
    roots: Mapping[tuple[int, int], Root],
    group: Group,
    root: int,
    text: bytes,
    verify: Verify | None,
    slow_weight: float,
    counts: Counts,
) -> Matches:
    """What each endpoint of `group` holds of a prompt.

    Args:
        roots: (root of a prompt, tokens per block) to where its chains start.
        group: The holders of the endpoints.
        root: That of the prompt.
        text: All of it.
        verify: The tokenizer, None to take equal text for equal tokens.
        slow_weight: What a token in a slower medium is worth beside one in GPU memory.
        counts: What is asked and found out is added to them.
    """
    rows = len(group.keys)
    blocks, tokens = [0] * rows, [0] * rows
    gpu_tokens, sizes = tokens, group.block_sizes
    differs = group.slower or len(group.masks) > 1
    if differs:
        gpu_tokens, sizes = tokens.copy(), sizes.copy()
    worth_tokens: list[float] = [*tokens]
    counted = (0, 0)
    for size, mask in group.masks.items():
        start = roots.get((root, size))
        if start is None:
            continue
        walk = Walk(text, size, verify, counts)
        reaches, gpu_levels = walk.reaches(start, mask, slower=group.slower)
        depth, num_bytes = walk.longest
        counted = max(counted, (depth * size, num_bytes))
        if differs:
            gpu = _depths(group, gpu_levels)
            for bits, depth, usable in reaches:
                hit = usable * size
                for holder in group.holders(bits):
                    row = group.rows[holder]
                    on_gpu = min(hit, gpu.get(holder, 0) * size) if group.slower else hit
                    value = on_gpu + (hit - on_gpu) * slow_weight
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


def _depths(group: Group, levels: Sequence[Level]) -> dict[int, int]:
    """The deepest level of each holder."""
    depths: dict[int, int] = {}
    for bits, depth in levels:
        for holder in group.holders(bits):
            depths[holder] = max(depths.get(holder, 0), depth)
    return depths


class _Path:
    """How far one way has come."""

    __slots__ = ("alive", "depth", "gpu_alive", "gpu_levels", "levels", "offset", "steps")

    def __init__(self, alive: int) -> None:
        self.alive = alive
        self.gpu_alive = alive
        self.depth = 0
        self.offset = 0
        self.steps: list[_Step] = []
        self.levels: list[Level] = []
        self.gpu_levels: list[Level] = []

    def copy(self) -> _Path:
        """Another way from here."""
        other = _Path(self.alive)
        other.gpu_alive, other.depth, other.offset = self.gpu_alive, self.depth, self.offset
        other.steps, other.levels = self.steps.copy(), self.levels.copy()
        other.gpu_levels = self.gpu_levels.copy()
        return other


class _Question:
    """A block whose tokens are to be confirmed; `run` is None if the answer is not to be remembered."""

    __slots__ = ("depth", "end", "position", "run", "start", "tokens")

    def __init__(
        self, depth: int, start: int, end: int, run: Run | None, position: int, tokens: bytes | None
    ) -> None:
        self.depth = depth
        self.start = start
        self.end = end
        self.run = run
        self.position = position
        self.tokens = tokens


class Walk:
    """One match of one prompt.

    Args:
        text: The prompt.
        block_size: Tokens per block.
        verify: The tokenizer, None to take equal text for equal tokens.
        counts: What is asked and found out is added to them.
    """

    __slots__ = ("block_size", "counts", "longest", "text", "verify")

    def __init__(self, text: bytes, block_size: int, verify: Verify | None, counts: Counts) -> None:
        self.longest = (0, 0)
        """Blocks and bytes of the longest start of the text that any holder asked about has."""
        self.text = text
        self.block_size = block_size
        self.verify = verify
        self.counts = counts

    def reaches(self, root: Run, alive: int, *, slower: bool) -> tuple[list[Reach], list[Level]]:
        """How far the holders in `alive` come.

        Args:
            root: Where the chains start.
            alive: Bits of the holders of GPU memory; with `slower`, the next higher bit of each is the
                same replica's slower media.
            slower: Look at those too.

        Returns:
            How far they come in whatever medium, and in GPU memory (empty if not `slower`: it is the same).
            A holder may be in several of each: the best counts.
        """
        reaches: list[Reach] = []
        gpu_levels: list[Level] = []
        waiting: list[tuple[_Path, Run]] = []
        path = _Path(alive)
        first = self._next(root, path, waiting)
        for _ in range(MAX_PATHS):
            outlived = self._follow(path, first, waiting, slower=slower)
            limit = path.depth if self.verify is None else self._verified(path, self.verify, outlived)
            self.longest = max(self.longest, (path.depth, path.offset))
            for bits, depth in path.levels:
                reached = min(depth, limit)
                reaches.append((bits, reached, reached))
            if path.alive and path.depth:
                whole = path.offset == len(self.text) and limit == path.depth
                reaches.append((path.alive, limit, limit - whole))
            if slower:
                path.gpu_levels.append((path.gpu_alive, path.depth))
                gpu_levels += [(bits, min(depth, limit)) for bits, depth in path.gpu_levels]
            if not waiting:
                break
            path, first = waiting.pop()
        return reaches, gpu_levels

    def _next(self, run: Run, path: _Path, waiting: list[tuple[_Path, Run]]) -> Run | None:
        """The run that may continue `path` after `run`; other such runs are left waiting."""
        child = run.child
        if not isinstance(child, Fork):
            return child
        text, offset = self.text, path.offset
        room = len(text) - offset
        found: Run | None = None
        for length in child.lengths:
            if length <= room:
                digest = xxh32_intdigest(text[offset : offset + length])
                for other in child.runs.get(digest, ()):
                    if other.ends[0] != length:
                        continue
                    if found is None:
                        found = other
                    elif len(waiting) < MAX_PATHS:
                        waiting.append((path.copy(), other))
        return found

    def _follow(
        self, path: _Path, run: Run | None, waiting: list[tuple[_Path, Run]], *, slower: bool
    ) -> bool:
        """Go down from `run` as far as the text and any holder alive; True if one still is at the end."""
        text = self.text
        total = len(text)
        while run is not None:
            count = len(run.ends)
            piece = text[path.offset : path.offset + run.ends[-1]]
            if run.digest and len(piece) == run.ends[-1] and xxh3_64_intdigest(piece) == run.digest:
                matched = count
            else:
                matched = run.scan(piece)
                if matched == count:
                    run.digest = xxh3_64_intdigest(piece)
            refuted = False
            if run.doubts:
                for position, tokens in run.doubts.items():
                    if tokens is REFUTED and position < matched:
                        matched, refuted = position, True
            if not matched:
                return True
            path.steps.append((run, path.offset, matched, path.depth))
            if slower:
                path.gpu_alive = _alive(run, path.gpu_alive, matched, path.depth, path.gpu_levels)
                path.alive = _alive_anywhere(run, path.alive, matched, path.depth, path.levels)
            elif matched < count or path.alive & ~run.full:
                path.alive = _alive(run, path.alive, matched, path.depth, path.levels)
            path.depth += matched
            path.offset += run.ends[matched - 1]
            if not path.alive:
                return False
            if refuted or matched < count or path.offset == total:
                return True
            run = self._next(run, path, waiting)
        return True

    def _verified(self, path: _Path, verify: Verify, outlived: bool) -> int:
        """How many blocks of `path` are tokens of the prompt, as far as the tokenizer was asked."""
        deepest = path.depth if path.alive else max((depth for _, depth in path.levels), default=0)
        questions: list[_Question] = []
        continued = not outlived or path.offset == len(self.text)
        for run, offset, matched, before in path.steps:
            for position in sorted(run.doubts or ()):
                depth = before + position
                if position < matched and depth < deepest:
                    start, end = _span(run, offset, position)
                    tokens = (run.doubts or {})[position]
                    questions.append(_Question(depth, start, end, run, position, tokens))
                elif depth == deepest:
                    continued = False
        if not continued and deepest and (not questions or questions[-1].depth != deepest - 1):
            questions.append(_last(path, deepest))
        first = 0
        while first < len(questions):
            stop = first + 1
            while stop < len(questions) and questions[stop].depth == questions[stop - 1].depth + 1:
                stop += 1
            right = self._ask(verify, questions[first:stop])
            if right < stop - first:
                return self._wrong(path, verify, questions[first + right], checked=right > 0)
            first = stop
        return path.depth

    def _wrong(self, path: _Path, verify: Verify, question: _Question, *, checked: bool) -> int:
        """Remember that a block is wrong; how many before it are right, the last of them if not `checked`."""
        run, depth = question.run, question.depth
        if run is not None and run.doubts and depth != path.depth - 1:
            run.doubts[question.position] = REFUTED
            self.counts.doubted -= 1
            self.counts.refuted += 1
        while depth and not checked:
            checked = self._ask(verify, (_last(path, depth),)) == 1
            depth -= not checked
        return depth

    def _ask(self, verify: Verify, questions: Sequence[_Question]) -> int:
        """How many leading blocks of consecutive ones are right; those are in doubt no longer."""
        size = self.block_size
        self.counts.asked += 1
        tokens = verify.tokens_between(questions[0].start, questions[-1].end)
        if tokens is None:
            half = len(questions) // 2
            if not half:
                return 0
            right = self._ask(verify, questions[:half])
            return right if right < half else half + self._ask(verify, questions[half:])
        given = array("I", tokens).tobytes()
        width = 4 * size
        as_many = len(tokens) == size * len(questions)
        right = 0
        for start, question in zip(range(0, width * len(questions), width), questions, strict=True):
            if not as_many if question.tokens is None else given[start : start + width] != question.tokens:
                break
            right += 1
        for question in questions[:right]:
            self._confirm(question)
        return right

    def _confirm(self, question: _Question) -> None:
        run = question.run
        if run is not None and run.doubts:
            del run.doubts[question.position]
            run.doubts = run.doubts or None
            self.counts.doubted -= 1
            self.counts.confirmed += 1


def _span(run: Run, offset: int, position: int) -> tuple[int, int]:
    """Where a block of a run that starts at `offset` lies in the prompt."""
    end = offset + run.ends[position]
    return end - run.block_bytes(position), end


def _last(path: _Path, depth: int) -> _Question:
    """Is there a token's end behind the first `depth` blocks, and do as many tokens make up the last?"""
    run, offset, _, before = next(step for step in reversed(path.steps) if step[3] < depth)
    start, end = _span(run, offset, depth - 1 - before)
    return _Question(depth - 1, start, end, None, 0, None)


def _leading(mask: int) -> int:
    """How many positions from 0 on are in `mask`."""
    return (~mask & (mask + 1)).bit_length() - 1


def _alive(run: Run, alive: int, matched: int, before: int, levels: list[Level]) -> int:
    """Those of `alive` that hold the first `matched` blocks of `run`; the others' depths go to `levels`."""
    holding = alive & run.full
    dropped = alive ^ holding
    if dropped and run.partial:
        for mask, bits in run.partial.items():
            here = dropped & bits
            if here:
                dropped ^= here
                leading = _leading(mask)
                if leading >= matched:
                    holding |= here
                elif before + leading:
                    levels.append((here, before + leading))
    if dropped and before:
        levels.append((dropped, before))
    return holding


def _alive_anywhere(run: Run, alive: int, matched: int, before: int, levels: list[Level]) -> int:
    """As `_alive`, of replicas that hold a block in GPU memory or in a slower medium."""
    holding = alive & (run.full | run.full >> 1)
    dropped = alive ^ holding
    partial = run.partial or {}
    masks = [(mask, bits & dropped) for mask, bits in partial.items()]
    slower = [(mask, bits >> 1 & dropped) for mask, bits in partial.items()]
    for some, other in ((masks, slower), (slower, masks)):
        some.append((0, _union(bits for _, bits in other) & ~_union(bits for _, bits in some)))
    for mask, bits in masks:
        for slow_mask, slow_bits in slower:
            here = bits & slow_bits
            if here:
                dropped ^= here
                leading = _leading(mask | slow_mask)
                if leading >= matched:
                    holding |= here
                elif before + leading:
                    levels.append((here, before + leading))
    if dropped and before:
        levels.append((dropped, before))
    return holding


def _union(masks: Iterable[int]) -> int:
    """All bits of all masks."""
    return reduce(or_, masks, 0)
