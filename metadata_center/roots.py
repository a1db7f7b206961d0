"""Where the chains of blocks of one (model, adapter, salt) start, in routing history and in the cache map."""

from __future__ import annotations

from functools import lru_cache

import orjson
from xxhash import xxh3_64_intdigest


def root(model: str, lora: str | None, cache_salt: str | None) -> int:
    """Seed of a chain: prompts under different roots share no block.

    Engines keep one cache per (weights, adapter, salt), and so do we. JSON keeps the triple unambiguous: no
    quoting of one value can imitate two, and an absent value differs from an empty one.

    Args:
        model: The served model's name, after any rewriting, so that aliases share their cache; in the cache
            map the name given to `CacheMap.attach`.
        lora: The adapter as the engine names it, None for the base model.
        cache_salt: The client's cache namespace, None for the shared one.

    Returns:
        Unsigned 64-bit integer.
    """
    return _unsalted(model, lora) if cache_salt is None else _root(model, lora, cache_salt)


def _root(model: str, lora: str | None, cache_salt: str | None) -> int:
    return xxh3_64_intdigest(orjson.dumps((model, lora, cache_salt)))


@lru_cache(maxsize=1024)
def _unsalted(model: str, lora: str | None) -> int:
    return _root(model, lora, None)
