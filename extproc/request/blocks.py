"""Canonical prompt bytes → chained block hashes, the keys of the prefix index.

Rules:
    1. A hash names a whole prefix: it depends on every byte before its block's end and on the root,
       and on nothing after. Two prompts share their first n hashes iff they share root and n blocks
       (up to 64-bit collisions, which cost a worse choice of replica, never a wrong answer).
    2. Full blocks only. An engine reuses whole KV blocks, and a partial tail would be a new key on
       every turn of a conversation: an entry that cannot match again.
    3. Hashes are the same in every process and on every machine; no per-process seed.
    4. They are in arrays, 8 bytes each. A list would take 56, since an integer of 64 bits takes 48, and
       what prompts in flight took of Python's memory stays with it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from struct import Struct

from xxhash import xxh3_64_intdigest

BLOCK_BYTES = 512
"""AIGW hashes in steps of 512 bytes (`cache_hash.go`): about 128 tokens of English, eight vLLM blocks."""

MAX_BLOCKS = 8192
"""4 MiB of prompt, about a million tokens: beyond the longest context vLLM serves today."""


def block_hashes(
    prompt: bytes,
    root: int,
    block_bytes: int = BLOCK_BYTES,
    max_blocks: int = MAX_BLOCKS,
    widths: Sequence[tuple[int, int]] = (),
) -> array[int]:
    """Hash every full block of `prompt`, each hash seeded with its predecessor.

    Args:
        prompt: Canonical prompt bytes.
        root: From `root`, or the last hash of the blocks that precede `prompt`.
        block_bytes: Bytes per block, > 0.
        max_blocks: Upper bound on the result; later blocks are ignored.
        widths: (offset, bytes) where the prompt counts for so many bytes more than it has, offsets rising:
            blocks are as if there were that many, and each is hashed by what it has of the prompt.

    Returns:
        min(num_bytes // block_bytes, max_blocks) unsigned 64-bit integers, in prompt order, where `num_bytes`
        is the length of the prompt with all widths.
    """
    if widths:
        return _wide_block_hashes(prompt, root, block_bytes, max_blocks, widths)
    hashes: list[int] = []
    previous = root
    stop = min(len(prompt) // block_bytes, max_blocks) * block_bytes
    # Cut by C: three quarters of what slices take.
    for (block,) in _cutter(block_bytes).iter_unpack(memoryview(prompt)[:stop]):
        previous = xxh3_64_intdigest(block, previous)
        hashes.append(previous)
    return array("Q", hashes)  # an array that grows by each hash takes three times as much more


@lru_cache(maxsize=8)
def _cutter(block_bytes: int) -> Struct:
    return Struct(f"{block_bytes}s")


def _wide_block_hashes(
    prompt: bytes, root: int, block_bytes: int, max_blocks: int, widths: Sequence[tuple[int, int]]
) -> array[int]:
    hashes: list[int] = []
    previous, begun = root, 0
    counted = 0  # bytes of all widths before
    next_end = block_bytes  # of the block under way, in counted bytes
    for offset, width in (*widths, (len(prompt), 0)):
        while next_end <= offset + counted + width:
            if len(hashes) == max_blocks:
                return array("Q", hashes)
            end = min(next_end - counted, offset)  # a block that ends in a width ends where that begins
            previous = xxh3_64_intdigest(prompt[begun:end], previous)
            hashes.append(previous)
            begun = end
            next_end += block_bytes
        counted += width
    return array("Q", hashes)
