"""The cache map: what its answers mean, what it shares, forgets and refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.cache_map.holders import Replica
from metadata_center.cache_map.runs import MAX_FIRST_LENGTHS
from metadata_center.cache_map.values import Matches
from metadata_center.errors import CapacityError
from metadata_center.kv_events.decoding import decode
from metadata_center.kv_events.events import (
    ANYWHERE,
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    Event,
    encoded_token_ids,
)
from metadata_center.roots import root
from metadata_center.types import EndpointKey

A, B, C = (EndpointKey(f"10.0.0.{host}:8000") for host in (1, 2, 3))
LETTERS = [bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"]
ROOT = root("m", None, None)
CAPTURES = Path(__file__).parents[2] / "data" / "kv_events"


def names(tokens: Sequence[int], size: int, seed: int = 0, before: Sequence[int] = ()) -> list[int]:
    """What an engine calls the full blocks of a prompt behind `before`."""
    whole = [*before, *tokens]
    ends = range(len(before) + size, len(whole) + 1, size)
    return [xxh3_64_intdigest(repr(whole[:end]).encode(), seed) for end in ends]


def stored(
    tokens: Sequence[int], size: int = 2, before: Sequence[int] = (), seed: int = 0, **more: Any
) -> BlockStored:
    """The event for the blocks of `tokens`, which follow those of `before`."""
    parent = names(before, size, seed)[-1] if before else None
    more = {"medium": "GPU", "group": 0, "kind": "full_attention", **more}
    return BlockStored(names(tokens, size, seed, before), parent, encoded_token_ids(tokens), size, **more)


def removed(tokens: Sequence[int], size: int = 2, seed: int = 0, **more: Any) -> Event:
    """The event for the last block of a prompt."""
    return BlockRemoved(names(tokens, size, seed)[-1:], **{"medium": "GPU", "group": 0, **more})


def ids(text: str) -> list[int]:
    """Tokens of lower-case letters."""
    return [ord(letter) - ord("a") for letter in text]


def apply(cache_map: CacheMap, replica: Replica, *events: Event) -> None:
    """One batch."""
    cache_map.apply(replica, Batch(0.0, list(events)))


def blocks(cache_map: CacheMap, text: str, *keys: EndpointKey, start: int = ROOT) -> list[int]:
    """Depths of a match."""
    return cache_map.match(start, text.encode(), keys or (A,)).blocks


def one() -> tuple[CacheMap, Replica]:
    """A map with one replica of letters."""
    cache_map = CacheMap()
    return cache_map, cache_map.attach(A, 0, "m", LETTERS)


def test_depth_in_blocks_tokens_and_block_sizes() -> None:
    """Tokens are whole blocks; of a prompt that is cached to its end the last block is computed again."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcdef")))
    cache_map.attach(B, 0, "m", LETTERS)
    assert cache_map.match(ROOT, b"abcdefg", (B, A, C)) == Matches(
        [0, 3, 0], [0, 2, 0], [0, 6, 0], [0, 6, 0], [0, 6, 0], 6, 6
    )
    assert cache_map.match(ROOT, b"abcdef", (A,)) == Matches([3], [2], [4], [4], [4], 6, 6)
    assert cache_map.match(ROOT, b"abcdeg", (A,)).tokens == [4]
    assert cache_map.match(ROOT, b"b", (A,)).tokens == [0]
    assert cache_map.match(ROOT, b"", (A,)).tokens == [0]


def test_a_long_chain_is_followed_to_its_end() -> None:
    """Chains of many runs match to the block where the text ends or differs."""
    cache_map, replica = one()
    tokens = [n * n % 26 for n in range(2000)]
    for start in range(0, 2000, 400):
        apply(cache_map, replica, stored(tokens[start : start + 400], before=tokens[:start]))
    text = b"".join(LETTERS[token] for token in tokens)
    for length in (0, 1, 2, 127, 128, 129, 777, 1999):
        assert cache_map.match(ROOT, text[:length] + b"!!", (A,)).tokens == [length // 2 * 2]
    assert cache_map.stats.runs == 20  # 200 blocks to an event, 64 to a run: 64 + 64 + 64 + 8


def test_adapters_and_salts_do_not_cross() -> None:
    """Each (adapter, salt) has a root of its own; the adapter's name among the extra keys says nothing."""
    cache_map, replica = one()
    apply(
        cache_map,
        replica,
        stored(ids("abcd"), extra_keys=[["s"], None]),
        stored(ids("efgh"), extra_keys=[["l"], ["l"]], lora_name="l", lora_id=1),
        stored(ids("ijkl"), extra_keys=[["l", "s"], ["l"]], lora_name="l", lora_id=1),
    )
    for lora, salt, text in ((None, "s", "abcd"), ("l", None, "efgh"), ("l", "s", "ijkl")):
        for other in ("abcd", "efgh", "ijkl"):
            found = blocks(cache_map, other + "x", start=root("m", lora, salt))
            assert found == [2 if other == text else 0]
            assert blocks(cache_map, other + "x") == [0]
            assert blocks(cache_map, other + "x", start=root("n", lora, salt)) == [0]


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        ({"extra_keys": [None, [["image", 3]], None]}, 1),
        ({"extra_keys": [[["image", 0]], None, None]}, 0),
        ({"extra_keys": [["s", "t"], None, None]}, 0),
        ({"extra_keys": [None, ["s"], None]}, 1),
        ({"lora_id": 7}, 0),
    ],
)
def test_what_is_not_text_alone_matches_no_text(extra: dict[str, Any], kept: int) -> None:
    """Blocks from the first one on that depends on an image or an unnamed adapter are not stored."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcdef"), **extra))
    assert blocks(cache_map, "abcdefg") == [kept]
    assert (cache_map.stats.stored, cache_map.stats.opaque) == (kept, 3 - kept)
    apply(cache_map, replica, stored(ids("gh"), before=ids("abcdef")))
    assert cache_map.stats.orphans == 1


def test_tokens_without_text_end_the_chain() -> None:
    """Ids beyond the vocabulary or empty in it, and token ids that cannot be decoded, are counted."""
    cache_map = CacheMap()
    replica = cache_map.attach(A, 0, "m", [*LETTERS, b""])
    apply(cache_map, replica, stored([0, 1, 2, 26, 3, 4]), stored([5, 6, 7, 999]), stored([27, 1]))
    assert blocks(cache_map, "abcd") == [1]
    assert (cache_map.stats.stored, cache_map.stats.opaque) == (2, 4)
    bigrams = msgspec.Raw(msgspec.msgpack.encode([[1, 2], [3, 4]]))
    apply(cache_map, replica, BlockStored([1], None, bigrams, 2, group=0))
    assert cache_map.stats.opaque == 5


@pytest.mark.parametrize("size", [1, 3, 2000])
def test_any_block_size_will_do(size: int) -> None:
    """Blocks of one token (SGLang) and of thousands (hybrid models)."""
    cache_map, replica = one()
    tokens = [n * 7 % 26 for n in range(3 * size)]
    apply(cache_map, replica, stored(tokens, size), stored([1] * size, size, before=tokens))
    text = b"".join(LETTERS[token] for token in tokens)
    assert cache_map.match(ROOT, text + b"b" * size + b"x", (A,)).blocks == [4]
    assert cache_map.match(ROOT, text + b"x", (A,)).tokens == [3 * size]


def test_replicas_with_other_block_sizes_are_matched_by_their_own() -> None:
    """One tree per block size, one answer for all."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcdef"), 2))
    apply(cache_map, cache_map.attach(B, 0, "m", LETTERS), stored(ids("abcdef"), 3))
    found = cache_map.match(ROOT, b"abcdefg", (A, B))
    assert (found.blocks, found.block_sizes, found.tokens) == ([3, 2], [2, 3], [6, 6])
    apply(cache_map, replica, stored(ids("xyz"), 3))
    assert cache_map.stats.ignored == 1


def test_the_best_rank_counts() -> None:
    """An endpoint is as good as its best data-parallel rank."""
    cache_map, replica = one()
    other = cache_map.attach(A, 1, "m", LETTERS)
    apply(cache_map, replica, stored(ids("ab")))
    apply(cache_map, other, stored(ids("abcd")))
    assert blocks(cache_map, "abcdef") == [2]
    cache_map.clear(other)
    assert blocks(cache_map, "abcdef") == [1]


def test_only_the_first_full_attention_group_is_followed() -> None:
    """Sliding windows and further groups are ignored, in removals as well."""
    cache_map, replica = one()
    apply(
        cache_map,
        replica,
        stored(ids("xy"), group=1, kind="sliding_window"),
        stored(ids("ab"), group=0),
        stored(ids("cd"), group=2),
        removed(ids("ab"), group=1),
        removed(ids("ab"), group=2),
    )
    assert [blocks(cache_map, text) for text in ("xyz", "abc", "cde")] == [[0], [1], [0]]
    assert cache_map.stats.ignored == 4
    apply(cache_map, replica, removed(ids("ab"), group=0))
    assert blocks(cache_map, "abc") == [0]


def test_a_copy_in_a_slower_medium_counts_for_less() -> None:
    """A chain that GPU memory has lost is held where it was offloaded to, and is worth less there."""
    cache_map = CacheMap(slow_weight=0.25)
    replica = cache_map.attach(A, 0, "m", LETTERS)
    apply(cache_map, replica, stored(ids("abcdef")))
    for medium in ("CPU", "STORAGE"):
        hashes = names(ids("abcd"), 2)
        apply(cache_map, replica, BlockStored(hashes, None, encoded_token_ids([]), 2, medium=medium))
    apply(
        cache_map, replica, removed(ids("abcdef")), removed(ids("abcd")), removed(ids("abcd"), medium="CPU")
    )
    found = cache_map.match(ROOT, b"abcdefg", (A,))
    assert (found.blocks, found.tokens, found.gpu_tokens, found.worth_tokens) == ([2], [4], [2], [2.5])
    apply(cache_map, replica, removed(ids("abcd"), medium="STORAGE"))
    assert blocks(cache_map, "abcdefg") == [1]


def test_a_copy_that_is_gone_from_somewhere_is_gone_from_everywhere() -> None:
    """What cannot be read of a removal's memory makes no block up."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcd")))
    hashes = names(ids("abcd"), 2)
    apply(cache_map, replica, BlockStored(hashes, None, encoded_token_ids([]), 2, medium="CPU"))
    apply(cache_map, replica, removed(ids("abcd"), medium=ANYWHERE))
    assert blocks(cache_map, "abcdx") == [1]


def test_a_slower_medium_adds_no_blocks() -> None:
    """Its events may lack the salt and the parent: what is not known is ignored."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcd"), medium="CPU"))
    assert (cache_map.stats.stored, cache_map.stats.ignored) == (0, 2)


def test_blocks_of_unknown_parents_are_orphans() -> None:
    """We joined late: the chain cannot be placed, and its removal takes nothing away."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("cd"), before=ids("ab")), removed(ids("abcd")))
    assert (cache_map.stats.orphans, cache_map.stats.unmatched, cache_map.stats.stored) == (1, 1, 0)


def test_ancestors_known_from_another_replica_are_credited() -> None:
    """An engine that continues a chain has all of it, whether or not we saw it store that."""
    cache_map, replica = one()
    late = cache_map.attach(B, 0, "m", LETTERS)
    apply(cache_map, replica, stored(ids("abcdef")), stored(ids("xy"), before=ids("abcd")))
    apply(cache_map, late, stored(ids("gh"), before=ids("abcdef")))
    assert blocks(cache_map, "abcdefghi", A, B) == [3, 4]
    apply(cache_map, late, removed(ids("abcdefgh")), removed(ids("abcdef")))
    assert blocks(cache_map, "abcdefghi", A, B) == [3, 2]
    assert cache_map.stats.unmatched == 0


def test_engines_with_other_hashes_share_the_tree() -> None:
    """Equal text of prefill is one run under several names, which go with those that use them."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcdefgh")))
    others = [cache_map.attach(key, 0, "m", LETTERS) for key in (B, C)]
    for seed, other in enumerate(others, 1):
        apply(cache_map, other, stored(ids("abcdefgh"), seed=seed))
    assert (cache_map.stats.runs, cache_map.stats.stored, cache_map.stats.held) == (1, 12, 12)
    apply(cache_map, others[0], removed(ids("abcdefgh"), seed=1))
    assert blocks(cache_map, "abcdefghi", A, B, C) == [4, 3, 4]
    apply(cache_map, others[1], stored(ids("xyz!"[:2]), before=ids("abcd"), seed=2))
    assert blocks(cache_map, "abcdxyz", A, B, C) == [2, 2, 3]
    for _ in range(20):  # an engine that hashes anew after each start leaves nothing behind
        cache_map.clear(others[0])
        apply(cache_map, others[0], stored(ids("abcdefgh"), seed=1))
        while cache_map.sweep(10):
            pass
    assert cache_map.stats.stored == 4 + 4 + 4 + 1


def test_replicas_of_other_models_share_nothing() -> None:
    """The same token ids stand for other text, and hashes do not show it."""
    cache_map, replica = one()
    other = cache_map.attach(B, 0, "n", LETTERS[::-1])
    apply(cache_map, replica, stored(ids("abcd")))
    apply(cache_map, other, stored(ids("abcd")))
    assert blocks(cache_map, "abcde", A, B) == [2, 0]
    assert blocks(cache_map, "zyxwv", A, B, start=root("n", None, None)) == [0, 2]


def test_what_does_not_fit_is_refused_and_counted() -> None:
    """Neither bound is ever passed; nothing is evicted for what comes later."""
    cache_map = CacheMap(5, 4)
    replica, other = (cache_map.attach(key, 0, "m", LETTERS) for key in (A, B))
    apply(cache_map, replica, stored(ids("abcdefghij")))
    assert (cache_map.stats.stored, cache_map.stats.refused, blocks(cache_map, "abcdefghijk")) == (4, 1, [4])
    apply(cache_map, other, stored(ids("xyzwvu")))
    assert (cache_map.stats.stored, cache_map.stats.refused) == (5, 3)
    apply(cache_map, other, stored(ids("abcdefgh")))  # known: only credited, but for no more than fits
    assert cache_map.stats.held <= 4 + 4
    cache_map.clear(replica)
    cache_map.clear(other)
    apply(cache_map, other, stored(ids("zzzz")))
    assert blocks(cache_map, "zzzzz", B) == [2]  # room was short, so it was swept for at once


def test_clearing_forgets_at_once_and_frees_a_little_at_a_time() -> None:
    """A cleared replica matches nothing; its memory comes back as runs are swept."""
    cache_map, replica = one()
    for number in range(10):
        apply(cache_map, replica, stored([number, *([1] * 7)]))
    cache_map.clear(replica)
    assert (blocks(cache_map, "abbbbbbb"), cache_map.stats.held, cache_map.stats.stored) == ([0], 0, 40)
    assert cache_map.sweep(4)
    assert cache_map.stats.stored == 24
    while cache_map.sweep(4):
        pass
    stats = cache_map.stats
    assert (stats.stored, stats.runs, stats.sweeping) == (0, 0, 0)


def test_a_cleared_event_counts_in_its_place() -> None:
    """What a batch stores after it stays, what it stored before does not."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("ab")), AllBlocksCleared(), stored(ids("cd")))
    assert (blocks(cache_map, "abc"), blocks(cache_map, "cde")) == ([0], [1])


def test_bits_of_the_gone_are_not_inherited() -> None:
    """However often replicas come and go, a new one holds nothing, and bits stay few."""
    cache_map = CacheMap(max_replicas=2)
    for _ in range(100):
        replica = cache_map.attach(A, 0, "m", LETTERS)
        assert blocks(cache_map, "abcd") == [0]
        apply(cache_map, replica, stored(ids("ab")), stored(ids("cd"), before=ids("ab")))
        cache_map.clear(replica)
        cache_map.remove(A)
    assert cache_map._holders.taken.bit_length() <= 2 * 8 * 2


def test_old_handles_do_nothing() -> None:
    """Events of a replica that was removed or attached anew are dropped."""
    cache_map, old = one()
    cache_map.attach(A, 0, "m", LETTERS)
    apply(cache_map, old, stored(ids("ab")))
    cache_map.clear(old)
    cache_map.remove(A)
    cache_map.remove(A)
    assert (cache_map.stats.stored, cache_map.stats.replicas, old.attached) == (0, 0, False)


def test_refuses_more_replicas_than_agreed() -> None:
    """The bound on replicas holds, and one that is attached already is no further one."""
    cache_map = CacheMap(max_replicas=1)
    cache_map.attach(A, 0, "m", LETTERS)
    cache_map.attach(A, 0, "m", LETTERS)
    for key, rank in ((A, 1), (B, 0)):
        with pytest.raises(CapacityError):
            cache_map.attach(key, rank, "m", LETTERS)
    with pytest.raises(ValueError, match="slow_weight"):
        CacheMap(slow_weight=1.5)


def test_thousands_of_continuations_of_one_prompt() -> None:
    """Each is found among all; too many distinct lengths of their first blocks are refused."""
    vocabulary = [*LETTERS, *(b"<" + b"=" * n + b">" for n in range(1000))]
    cache_map = CacheMap()
    replica = cache_map.attach(A, 0, "m", vocabulary)
    prompt = ids("abcd")
    apply(cache_map, replica, stored(prompt))
    for number in range(3000):
        words = [number % 26, number // 26 % 26, number // 676, 0]
        apply(cache_map, replica, stored(words, before=prompt))
    text = b"abcd" + b"".join(LETTERS[n] for n in (2999 % 26, 2999 // 26 % 26, 2999 // 676, 0))
    assert cache_map.match(ROOT, text + b"x", (A,)).blocks == [4]
    before = cache_map.stats.refused
    for number in range(1000):
        apply(cache_map, replica, stored([26 + number, 0, 0, 0], before=prompt))
    assert cache_map.stats.refused - before == 2 * (1000 - MAX_FIRST_LENGTHS + 1)


class Greedy:
    """A tokenizer: from left to right, always the longest token. Counts what it is asked."""

    words = (b"a", b"b", b"aa", b"aba")

    def __init__(self, text: bytes) -> None:
        self.tokens: list[int] = []
        position = 0
        while position < len(text):
            token = max(
                (n for n, word in enumerate(self.words) if text.startswith(word, position)),
                key=lambda n: len(self.words[n]),
            )
            self.tokens.append(token)
            position += len(self.words[token])
        self.cuts = [0, *accumulate(len(self.words[token]) for token in self.tokens)]
        self.asked: Counter[tuple[int, int]] = Counter()

    def tokens_between(self, start_byte: int, end_byte: int, /) -> Sequence[int] | None:
        """Exact."""
        self.asked[start_byte, end_byte] += 1
        if start_byte not in self.cuts or end_byte not in self.cuts:
            return None
        return self.tokens[self.cuts.index(start_byte) : self.cuts.index(end_byte)]


texts = st.text("ab", min_size=4, max_size=24).map(str.encode)
served = st.lists(st.tuples(texts, st.lists(st.integers(0, 3), max_size=8)), min_size=1, max_size=4)


@given(served, st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=400)
def test_with_a_tokenizer_equal_text_is_equal_tokens(
    served: list[tuple[bytes, list[int]]], queries: list[bytes]
) -> None:
    """Depths are those of the token chains, whatever the engine generated in other cuts than its tokenizer's.

    A refuted block is not tried again, so prompts may be given less than they could reuse, never more.
    """
    cache_map = CacheMap()
    replica = cache_map.attach(A, 0, "m", Greedy.words)
    held: set[tuple[int, ...]] = set()
    prompts = []
    for text, generated in served:
        prompt = Greedy(text).tokens
        whole = prompt + generated
        known = 0
        while (*whole[: known + 2],) in held and known + 2 <= len(prompt):
            known += 2
        computed = len(prompt) // 2 * 2
        if computed > known:
            apply(cache_map, replica, stored(prompt[known:computed], before=prompt[:known]))
        for start in range(computed, len(whole) // 2 * 2, 2):
            if (*whole[: start + 2],) not in held:
                apply(cache_map, replica, stored(whole[start : start + 2], before=whole[:start]))
        held |= {(*whole[:end],) for end in range(2, len(whole) + 1, 2)}
        prompts.append(b"".join(Greedy.words[token] for token in whole))
    for text in [*prompts, *(prompt + query for prompt in prompts for query in queries[:2]), *queries]:
        greedy = Greedy(text)
        depth = 0
        while (*greedy.tokens[: 2 * depth + 2],) in held and 2 * depth + 2 <= len(greedy.tokens):
            depth += 1
        usable = min(depth, (len(greedy.tokens) - 1) // 2) * 2
        (found,) = cache_map.match(ROOT, text, (A,), greedy).tokens
        assert found == usable if not cache_map.stats.refuted else found <= usable


def test_what_a_tokenizer_confirmed_is_not_asked_again() -> None:
    """Generated blocks are put to it in one question, then trusted; the last boundary is asked each time."""
    cache_map, replica = one()
    prompt, answer = ids("abcd"), ids("efghij")
    apply(cache_map, replica, stored(prompt))
    for start in range(0, 6, 2):
        apply(cache_map, replica, stored(answer[start : start + 2], before=prompt + answer[:start]))
    assert cache_map.stats.doubted == 3

    class Letters:
        """One token for each byte."""

        def __init__(self, text: bytes) -> None:
            self.text = text
            self.asked: list[tuple[int, int]] = []

        def tokens_between(self, start_byte: int, end_byte: int, /) -> Sequence[int] | None:
            """Exact."""
            self.asked.append((start_byte, end_byte))
            return [byte - 97 for byte in self.text[start_byte:end_byte]]

    first, second, partly = Letters(b"abcdefghijk"), Letters(b"abcdefghijk"), Letters(b"abcdefxx")
    assert cache_map.match(ROOT, first.text, (A,), first).tokens == [10]
    assert first.asked == [(4, 10)]
    assert cache_map.match(ROOT, second.text, (A,), second).tokens == [10]
    assert second.asked == [(8, 10)]
    assert cache_map.match(ROOT, partly.text, (A,), partly).tokens == [6]
    assert partly.asked == [(4, 6)]
    assert (cache_map.stats.doubted, cache_map.stats.confirmed, cache_map.stats.asked) == (0, 3, 3)


def test_nothing_is_asked_about_what_no_endpoint_holds() -> None:
    """The tokenizer is not run for endpoints that are not among the keys, nor past what they hold."""
    cache_map, replica = one()
    apply(cache_map, replica, stored(ids("abcd")))
    apply(
        cache_map,
        cache_map.attach(B, 0, "m", LETTERS),
        stored(ids("ab")),
        stored(ids("cd"), before=ids("ab")),
    )
    apply(cache_map, replica, removed(ids("abcd")))
    greedy = Greedy(b"")
    assert cache_map.match(ROOT, b"abcdef", (A,), greedy).tokens == [2]
    assert cache_map.match(ROOT, b"abcdef", (C,), greedy).tokens == [0]
    assert not greedy.asked


@pytest.mark.parametrize("capture", ["kv1", "lora"])
def test_follows_what_a_real_engine_announced(capture: str) -> None:
    """After every captured batch, each prompt seen so far matches as deep as its blocks are held."""
    vocabulary = [b"%d," % token for token in range(1 << 16)]
    cache_map = CacheMap()
    replica = cache_map.attach(A, 0, "m", vocabulary)
    chains: dict[int, tuple[int, ...]] = {}
    starts: dict[int, int] = {}
    copies: Counter[int] = Counter()
    for path in sorted(CAPTURES.glob(f"{capture}_*.bin")):
        batch = decode(path.read_bytes())
        cache_map.apply(replica, batch)
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                copies.clear()
            elif isinstance(event, BlockRemoved):
                copies.subtract(event.hashes)
            elif event.parent is None or event.parent in chains:
                chain = chains.get(event.parent, ()) if event.parent is not None else ()
                extra = [key for key in (event.extra_keys or [[]])[0] or [] if key != event.lora_name]
                start = root("m", event.lora_name, extra[0] if extra else None)
                start = starts[event.parent] if event.parent is not None else start
                tokens = event.token_ids()
                for number, name in enumerate(event.hashes, 1):
                    chains[name] = (*chain, *tokens[: number * event.block_size])
                    starts[name] = start
                    copies[name] += 1
        by_chain = {(starts[name], chain): name for name, chain in chains.items()}
        for (start, chain), name in by_chain.items():
            text = b"".join(vocabulary[token] for token in chain) + b"and so on"
            ends = range(replica.block_size, len(chain) + 1, replica.block_size)
            held = [copies[by_chain[start, chain[:end]]] > 0 for end in ends]
            depth = held.index(False) if False in held else len(held)
            assert cache_map.match(start, text, (A,)).blocks == [depth], name
    assert chains
    assert cache_map.stats.held == sum(count > 0 for count in copies.values())


def test_a_prompt_that_ends_inside_a_run() -> None:
    """An endpoint that holds just the prompt computes its last block again, like one that holds more."""
    cache_map, replica = one()
    other = cache_map.attach(B, 0, "m", LETTERS)
    for each in (replica, other):
        apply(cache_map, each, stored(ids("abcdef")))
    apply(cache_map, other, removed(ids("abcdef")))
    found = cache_map.match(ROOT, b"abcd", (A, B))
    assert (found.blocks, found.tokens) == ([2, 2], [2, 2])


def test_two_cuts_of_one_text_are_two_blocks() -> None:
    """An engine that was given both as prompts has both, and may evict either."""
    cache_map = CacheMap()
    replica = cache_map.attach(A, 0, "m", [b"a", b"b", b"aa"])
    for tokens in ([0, 2, 1, 1], [2, 0, 1, 1]):
        apply(cache_map, replica, stored(tokens))
    assert (cache_map.stats.stored, cache_map.stats.held) == (4, 4)
    apply(cache_map, replica, removed([0, 2, 1, 1]), removed([0, 2]))
    assert blocks(cache_map, "aaabbx") == [2]
    assert cache_map.stats.unmatched == 0


def test_a_run_split_while_it_is_swept_keeps_nothing_of_the_gone() -> None:
    """A new run may take a place that this pass has already swept."""
    cache_map, replica = one()
    others = [cache_map.attach(key, 0, "m", LETTERS) for key in (B, C)]
    apply(cache_map, replica, stored(ids("zz")))  # the place that the new run will take
    for each in others:
        apply(cache_map, each, stored(ids("abcdef")))
    apply(cache_map, replica, removed(ids("zz")))
    cache_map.clear(others[0])
    assert cache_map.sweep(1)
    cache_map._storing.store(others[1], stored(ids("xy"), before=ids("abcd")))  # `apply` would sweep the rest
    assert [run is not None for run in cache_map._tree.runs] == [True, True, True]
    while cache_map.sweep(1):
        pass
    heir = cache_map.attach(EndpointKey("10.0.0.9:8000"), 0, "m", LETTERS)
    apply(cache_map, heir, stored(ids("mn")))
    assert blocks(cache_map, "abcdefg", B, C, heir.endpoint) == [0, 3, 0]
