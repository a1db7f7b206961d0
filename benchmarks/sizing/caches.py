"""What a gateway takes for others' shares, for history, and for what engines announce."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Final

import msgspec

from benchmarks.sizing.members import PROMPT_BLOCKS, keys, update
from benchmarks.sizing.model import BLOCK_TOKENS
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.cache_map.holders import Replica
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.kv_events.decoding import decode as decode_batch
from metadata_center.sharing.messages import decode, encode
from metadata_center.sharing.peers import Peers

SAMPLE_BLOCKS: Final = 64_000


def allocated(make: Callable[[], object]) -> float:
    """Bytes that Python and numpy allocate for what `make` returns."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        after = tracemalloc.get_traced_memory()[0]
        del made
    finally:
        tracemalloc.stop()
    return float(after - before)


def peer_rows() -> Peers:
    """Shares of fifteen members on 1,000 endpoints."""
    peers = Peers("me")
    for worker in range(15):
        peers.apply(decode(encode(update(1, 1_000, 0, full=True, worker=worker))), 0.0)
    return peers


def history() -> PrefixIndex:
    """Prompts of which no two endpoints know the same."""
    index = PrefixIndex(SAMPLE_BLOCKS, SAMPLE_BLOCKS)
    rng = random.Random(1)
    for number in range(SAMPLE_BLOCKS // PROMPT_BLOCKS):
        index.record(keys(100)[number % 100], [rng.getrandbits(64) for _ in range(PROMPT_BLOCKS)])
    return index


def block_events() -> tuple[list[bytes], list[bytes]]:
    """Batches of 64 stored blocks, of prompts of 256 that share nothing; and batches that remove them."""
    rng = random.Random(1)
    stored, removed, parent = [], [], None
    for number in range(SAMPLE_BLOCKS // 64):
        if number % 4 == 0:
            parent = None
        hashes = [rng.getrandbits(64) for _ in range(64)]
        event = {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": [rng.randrange(50_000) for _ in range(64 * BLOCK_TOKENS)],
            "block_size": BLOCK_TOKENS,
            "medium": "GPU",
        }
        gone = [{"type": "BlockRemoved", "block_hashes": [one], "medium": "GPU"} for one in reversed(hashes)]
        stored.append(msgspec.msgpack.encode([0.0, [event], 0]))
        removed.append(msgspec.msgpack.encode([0.0, gone, 0]))
        parent = hashes[-1]
    return stored, removed


def announced(batches: list[bytes], pieces: list[bytes]) -> tuple[CacheMap, list[Replica]]:
    """What a hundred engines announced."""
    caches = CacheMap()
    replicas = [caches.attach(key, 0, "m", pieces) for key in keys(100)]
    for number, batch in enumerate(batches):
        caches.apply(replicas[number // 4 % 100], decode_batch(batch))
    return caches, replicas


def announced_block() -> tuple[float, float]:
    """Of a block that one engine announced: bytes, and CPU seconds to take it in and, later, its removal."""
    stored, removed = block_events()
    pieces = [b"%04d" % (n % 10_000) for n in range(50_000)]  # four bytes a token, as English has
    began_s = time.process_time()
    caches, replicas = announced(stored, pieces)
    held = caches.stats.held
    for number, batch in reversed(list(enumerate(removed))):  # tails first, as engines evict
        caches.apply(replicas[number // 4 % 100], decode_batch(batch))
    spent_s = time.process_time() - began_s
    return allocated(lambda: announced(stored, pieces)) / held, spent_s / held
