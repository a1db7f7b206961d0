"""The block pool: references, hits, eviction order and events."""

from __future__ import annotations

import pytest

from tokenway.simulator.engine.prefix_cache import BlocksRemoved, BlocksStored, CacheCleared, PrefixCache


def _stored(cache: PrefixCache, keys: list[int]) -> list[int]:
    blocks = cache.allocate(len(keys))
    cache.store(blocks, keys, 0, len(keys), None)
    return blocks


def test_a_hit_is_the_longest_stored_prefix_within_the_limit() -> None:
    """Matching stops at the first key that is not stored and at the limit, and changes nothing."""
    cache = PrefixCache(8)
    blocks = _stored(cache, [1, 2, 3])
    assert cache.match([1, 2, 9, 3], 4) == blocks[:2]
    assert cache.match([1, 2, 3], 2) == blocks[:2]
    assert cache.match([9, 1], 2) == []
    assert cache.num_unreferenced == 5


def test_released_blocks_stay_findable_until_reused_tail_first() -> None:
    """Eviction takes the least recently released sequence first and its tail before its head."""
    cache = PrefixCache(4)
    old, new = _stored(cache, [1, 2]), _stored(cache, [3, 4])
    cache.release(old)
    cache.release(new)
    cache.drain_events()
    assert cache.allocate(3) == [old[1], old[0], new[1]]
    assert cache.drain_events() == (BlocksRemoved((2, 1, 4)),)
    assert cache.match([3, 4], 2) == new[:1]


def test_a_shared_block_is_reusable_only_after_its_last_reference() -> None:
    """Two references need two releases."""
    cache = PrefixCache(2)
    blocks = _stored(cache, [1])
    cache.acquire(blocks)
    cache.release(blocks)
    assert cache.num_unreferenced == 1
    cache.release(blocks)
    assert (cache.num_unreferenced, cache.num_idle(blocks)) == (2, 1)


def test_every_physical_copy_of_a_key_is_announced_and_removed() -> None:
    """A key stored twice is removed twice, and stays findable while one copy is left."""
    cache = PrefixCache(2)
    first, second = _stored(cache, [7]), _stored(cache, [7])
    assert cache.match([7], 1) == first
    cache.release(first)
    cache.allocate(1)
    assert cache.match([7], 1) == second
    cache.release(second)
    cache.allocate(1)
    assert cache.match([7], 1) == []
    store = BlocksStored((7,), None, 0, None)
    assert cache.drain_events() == (store, store, BlocksRemoved((7,)), BlocksRemoved((7,)))


def test_storing_later_blocks_names_their_parent() -> None:
    """A chain that grows announces the new blocks with the key before them and their place."""
    cache = PrefixCache(4)
    blocks = _stored(cache, [1, 2])
    blocks += cache.allocate(1)
    cache.store(blocks, [1, 2, 3], 2, 3, "tokens")
    assert cache.drain_events()[-1] == BlocksStored((3,), 2, 2, "tokens")


def test_asking_for_too_many_blocks_changes_nothing() -> None:
    """A failed allocation leaves the pool as it was."""
    cache = PrefixCache(2)
    cache.allocate(1)
    with pytest.raises(ValueError, match="unreferenced"):
        cache.allocate(2)
    assert cache.num_unreferenced == 1


def test_clearing_needs_an_idle_pool() -> None:
    """A clear is refused while a block is in use and forgets everything afterwards."""
    cache = PrefixCache(2)
    blocks = _stored(cache, [1])
    assert not cache.clear()
    cache.release(blocks)
    assert cache.clear()
    assert (cache.match([1], 1), cache.num_keys) == ([], 0)
    assert cache.drain_events()[-1] == CacheCleared()
    cache.allocate(2)
    assert cache.drain_events() == ()
