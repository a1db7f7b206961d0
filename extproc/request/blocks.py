"""Canonical prompt bytes → chained block hashes, the keys of the prefix index.

Rules:
    1. A hash names a whole prefix: it depends on every byte before its block's end and on the root,
       and on nothing after. Two prompts share their first n hashes iff they share root and n blocks
       (up to 64-bit collisions, which cost a worse choice of replica, never a wrong answer).
    2. Full blocks only. An engine reuses whole KV blocks, and a partial tail would be a new key on
       every turn of a conversation: an entry nobody can match again.
    3. Hashes are the same in every process and on every machine; no per-process seed.
"""

from __future__ import annotations

import orjson
from xxhash import xxh3_64_intdigest

BLOCK_BYTES = 512
"""AIGW hashes in steps of 512 bytes (`cache_hash.go`): about 128 tokens of English, eight vLLM blocks."""

MAX_BLOCKS = 8192
"""4 MiB of prompt, about a million tokens: beyond the longest context vLLM serves today."""


def root(model: str, lora: str | None, cache_salt: str | None) -> int:
    """Seed of the chain: prompts under different roots share no hash.

    Engines keep one cache per (weights, adapter, salt), and so does the index. JSON keeps the triple
    unambiguous: no quoting of one value can imitate two, and an absent value differs from an empty one.

    Args:
        model: The served model's name, after any rewriting, so that aliases share their cache.
        lora: The adapter's name, None for the base model.
        cache_salt: The client's cache namespace, None for the shared one.

    Returns:
        Unsigned 64-bit integer.
    """
    return xxh3_64_intdigest(orjson.dumps((model, lora, cache_salt)))


def block_hashes(
    prompt: bytes, root: int, block_bytes: int = BLOCK_BYTES, max_blocks: int = MAX_BLOCKS
) -> list[int]:
    """Hash every full block of `prompt`, each hash seeded with its predecessor.

    Args:
        prompt: Canonical prompt bytes.
        root: From `root`, or the last hash of the blocks that precede `prompt`.
        block_bytes: Bytes per block, > 0.
        max_blocks: Upper bound on the result; later blocks are ignored.

    Returns:
        min(len(prompt) // block_bytes, max_blocks) unsigned 64-bit integers, in prompt order.
    """
    hashes: list[int] = []
    previous = root
    stop = min(len(prompt) // block_bytes, max_blocks) * block_bytes
    for start in range(0, stop, block_bytes):
        previous = xxh3_64_intdigest(prompt[start : start + block_bytes], previous)
        hashes.append(previous)
    return hashes
