"""From token ids to block keys.

Rules:
    1. A key names a whole prefix: equal keys mean equal tokens from the first one on, in one namespace.
    2. Only full blocks have keys.
    3. Nothing else in the engine looks at token ids; what has keys already (a trace) needs no tokens.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray


def block_keys(tokens: NDArray[np.uint32], block_size: int, namespace: str = "") -> list[int]:
    """Chain the full blocks of `tokens` into unsigned 64-bit keys.

    Each block is hashed with its parent's key as the seed, so a key depends on everything before it.

    Args:
        tokens: Token ids, shape (n,).
        block_size: Tokens per block, > 0.
        namespace: Keeps caches apart that must not share, such as LoRA adapters or cache salts.

    Returns:
        `n // block_size` keys, in order.
    """
    block_bytes = block_size * 4
    buffer = memoryview(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    key = xxhash.xxh3_64_intdigest(namespace.encode())
    keys = []
    for start in range(0, len(tokens) // block_size * block_bytes, block_bytes):
        key = xxhash.xxh3_64_intdigest(buffer[start : start + block_bytes], key)
        keys.append(key)
    return keys
