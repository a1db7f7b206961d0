"""Blocks that engines say they have: found by name, by text, or new.

Rules:
    1. Blocks of prefill (several in one event) are how the tokenizer cuts their text, because that is where
       they came from. A block announced alone may hold generated tokens, and is in doubt.
    2. Full-attention groups alone are followed, the first one announced of each replica. Slower media add no
       blocks: what they announce was in GPU memory before, and is often announced by its hash alone.
    3. What does not fit is not stored, nor is what continues it; nothing is evicted, because only engines
       know what they hold.
"""

from __future__ import annotations

from array import array
from typing import Final

from xxhash import xxh32_intdigest

from metadata_center.cache_map.holders import Holders, Replica
from metadata_center.cache_map.runs import FOLD, RUN_BLOCKS, Run, Seed, Space, continuing, link, may_link
from metadata_center.cache_map.texts import joined, plain_blocks, salt_of
from metadata_center.cache_map.tree import Tree
from metadata_center.cache_map.values import Counts
from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import GPU, BlockStored
from metadata_center.roots import root

FULL_ATTENTION: Final = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of vLLM's `KVCacheSpecKind` whose blocks stay useful whatever follows them. None: not said."""

_HURRIED_SWEEP_RUNS: Final = 1024  # when room is short


class _Doubt:
    """A block that may not be how the tokenizer cuts its text: its tokens, None if they are not kept."""

    __slots__ = ("tokens",)

    def __init__(self, tokens: bytes | None) -> None:
        self.tokens = tokens


class _News:
    """Blocks of one event that no name leads to.

    Attributes:
        hashes: Their names.
        texts: Their text.
        digests: xxh32 of each text.
        doubt: About the only block of an event.
    """

    __slots__ = ("digests", "doubt", "hashes", "texts")

    def __init__(self, hashes: list[int], texts: list[bytes], doubt: _Doubt | None) -> None:
        self.hashes = hashes
        self.texts = texts
        self.digests = array("I", map(xxh32_intdigest, texts))
        self.doubt = doubt


class Storing:
    """Stored events into the tree.

    Args:
        tree: The runs.
        holders: The replicas.
        max_blocks: Most blocks stored.
        max_doubts: Most blocks in doubt whose tokens are kept.
        counts: Those of the map.
    """

    __slots__ = ("_counts", "_holders", "_max_blocks", "_max_doubts", "_tree")

    def __init__(
        self, tree: Tree, holders: Holders, max_blocks: int, max_doubts: int, counts: Counts
    ) -> None:
        self._tree = tree
        self._holders = holders
        self._max_blocks = max_blocks
        self._max_doubts = max_doubts
        self._counts = counts

    def store(self, replica: Replica, event: BlockStored) -> None:
        """Let `replica` hold the blocks of one event, as far as they can be placed."""
        if event.medium not in GPU:
            self._store_slower(replica, event)
            return
        hashes, counts = event.hashes, self._counts
        count = len(hashes)
        if (
            event.kind not in FULL_ATTENTION
            or (replica.has_group and event.group != replica.group)
            or (event.block_size != replica.block_size and not self._starts(replica, event.block_size))
        ):
            counts.ignored += count
            return
        replica.has_group, replica.group = True, event.group
        counts.announced += count
        if self._max_blocks - self._tree.stored < count:
            self._holders.sweep(_HURRIED_SWEEP_RUNS)
        names = replica.space.names
        run: Run | None = None
        at = done = 0
        if hashes and hashes[0] & FOLD in names:
            run, at, done = self._known(replica, hashes)
            if done == count:
                return
        texts, doubt = self._texts(replica.space, event, done)
        if len(texts) < count - done:
            counts.opaque += count - done - len(texts)
            if not texts:
                return
        if run is None:
            if event.parent is None:
                salt = salt_of(event)
                key = (root(replica.space.model, event.lora_name, salt), event.block_size)
                run = self._tree.root(key, replica.space)
            else:
                run_id = names.get(event.parent & FOLD)
                run = None if run_id is None else self._tree.runs[run_id]
                if run is not None and run.wires[-1] == event.parent:
                    at = len(run.ends)
                    if count == 1 and doubt and replica.may_extend(run, RUN_BLOCKS - 1):
                        self._append(replica, run, hashes[0], texts[0], doubt)
                        return
                else:
                    at = 0 if run is None else run.position(event.parent, 0) + 1
                if run is None or not at:
                    counts.orphans += len(texts)
                    return
                replica.hold_ancestors(run, at)
        self._add(replica, run, at, hashes[done : done + len(texts)], texts, doubt)

    def _starts(self, replica: Replica, block_size: int) -> bool:
        """True if this is the first size of blocks that `replica` announces."""
        if replica.block_size or block_size <= 0:
            return False
        replica.block_size = block_size
        self._holders.groups.clear()
        return True

    def _known(self, replica: Replica, hashes: list[int]) -> tuple[Run | None, int, int]:
        """Hold the leading blocks that names lead to.

        Returns:
            The run of the last of them, where it ends there, and how many they are.
        """
        names, runs = replica.space.names, self._tree.runs
        count = len(hashes)
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
            replica.hold_ancestors(run, position)
            replica.hold(replica.gpu, run, position, hashes[done : done + same])
            if replica.seed is None:
                replica.use(run.seed_of(hashes[done]))
            if count > 1 and run.doubts:
                self._tree.trust(run, position, same)
            done += same
            at = position + same
        return run, at, done

    def _store_slower(self, replica: Replica, event: BlockStored) -> None:
        """Blocks that this replica has in a slower medium as well, as far as they are known."""
        if replica.has_group and event.group is not None and event.group != replica.group:
            self._counts.ignored += len(event.hashes)
            return
        if not replica.slower:
            replica.slower = True
            self._holders.groups.clear()
        for wire in event.hashes:
            found = self._tree.find(replica.space, wire)
            if found is None:
                self._counts.ignored += 1
            else:
                self._counts.announced += 1
                replica.hold(replica.gpu + 1, *found, [wire])

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
            tokens = tokens[: plain_blocks(event) * size]
        if done:
            tokens = tokens[done * size :]
        texts = joined(space.words, tokens, size)
        if len(event.hashes) > 1:
            return texts, None
        return texts, _Doubt(
            array("I", tokens).tobytes() if self._counts.doubted < self._max_doubts else None
        )

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
        room = max(
            min(self._max_blocks - self._tree.stored, replica.max_blocks - replica.blocks, len(texts)), 0
        )
        if room < len(texts):
            self._counts.refused += len(texts) - room
            texts = texts[:room]
        seed = replica.seed or replica.use(Seed())
        news = _News(hashes, texts, doubt)
        done, count = 0, len(texts)
        while done < count:
            if doubt is None:
                same = _same_text(replica, run, at, news, done)
                if same is not None:
                    run, start = same
                    at = self._alias(replica, seed, run, start, news, done)
                    done += at - start
                    continue
            if at < len(run.ends):
                run.strip(self._holders.gone)
                run = self._tree.split(run, at)
            stop = min(count, done + RUN_BLOCKS)
            parent: Run | None = None
            if not replica.may_extend(run, RUN_BLOCKS - stop + done):
                if not may_link(run, len(texts[done]), news.digests[done]):
                    self._counts.refused += count - done
                    break
                parent, run = run, self._tree.new(replica.space, seed)
            self._extend(replica, run, news, done, stop)
            if parent is not None:
                link(parent, run)
            at = len(run.ends)
            done = stop
        self._tree.trim(run)

    def _extend(self, replica: Replica, run: Run, news: _News, done: int, stop: int) -> None:
        """Put new blocks from `done` to `stop` at the end of `run`, which `replica` alone holds."""
        if news.doubt is not None:
            run.doubts = run.doubts or {}
            run.doubts[len(run.ends)] = news.doubt.tokens
            self._counts.doubted += 1
        run.append(news.hashes[done:stop], news.texts[done:stop], news.digests[done:stop])
        run.full = 1 << replica.gpu
        replica.blocks += stop - done
        self._tree.stored += stop - done

    def _append(self, replica: Replica, run: Run, wire: int, text: bytes, doubt: _Doubt) -> None:
        """As `_add`, of the one block that a sequence has grown by: most events of a busy engine."""
        tree = self._tree
        if tree.stored >= self._max_blocks or replica.blocks >= replica.max_blocks:
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
        tree.stored += 1

    def _alias(self, replica: Replica, seed: Seed, run: Run, position: int, news: _News, done: int) -> int:
        """Give blocks of `run` a further name, as far as the text is the same; returns where it ends."""
        stop = position
        last = min(len(run.ends), position + len(news.texts) - done)
        while stop < last and _is_same(replica, run, stop, news, done + stop - position):
            stop += 1
        wires = news.hashes[done : done + stop - position]
        run.aliases = run.aliases or {}
        if seed not in run.aliases:
            run.aliases[seed] = array("Q", bytes(8 * len(run.ends)))
        run.aliases[seed][position:stop] = array("Q", wires)
        names = replica.space.names
        for wire in wires:
            names[wire & FOLD] = run.id
        self._tree.stored += stop - position
        replica.hold(replica.gpu, run, position, wires)
        return stop


def _same_text(replica: Replica, run: Run, at: int, news: _News, done: int) -> tuple[Run, int] | None:
    """The stored block, behind the first `at` of `run`, that is new block `done` under another name."""
    if at < len(run.ends):
        return (run, at) if _is_same(replica, run, at, news, done) else None
    for other in continuing(run, news.digests[done]):
        if _is_same(replica, other, 0, news, done):
            return other, 0
    return None


def _is_same(replica: Replica, run: Run, position: int, news: _News, done: int) -> bool:
    """True if a block has this text, beyond doubt, and no name yet from engines of `replica`'s seed."""
    if (
        run.digests[position] != news.digests[done]
        or run.block_bytes(position) != len(news.texts[done])
        or run.space is not replica.space
        or run.seed is replica.seed
        or (run.doubts is not None and position in run.doubts)
    ):
        return False
    alias = None if run.aliases is None or replica.seed is None else run.aliases.get(replica.seed)
    return alias is None or not alias[position]
