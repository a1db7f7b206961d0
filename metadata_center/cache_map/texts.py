"""What an announced event says about the text of its blocks."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Final

from metadata_center.kv_events.events import BlockStored

_WIDE: Final = 1024  # tokens per block from which slices beat as many iterators


def _rest(extra: list[Any], lora: str | None) -> list[Any]:
    """What a block's hash covers besides its tokens and its adapter."""
    rest = list(extra)
    if lora is not None and lora in rest:
        rest.remove(lora)
    return rest


def salt_of(event: BlockStored) -> str | None:
    """The cache salt of a chain's first event; None if it has none."""
    extra = event.extra_keys[0] if event.extra_keys else None
    rest = _rest(extra, event.lora_name) if extra else []
    return rest[0] if rest else None


def plain_blocks(event: BlockStored) -> int:
    """How many leading blocks depend on nothing but tokens, a named adapter, and a salt at the very start."""
    if event.lora_id is not None and event.lora_name is None:
        return 0
    for block, extra in enumerate(event.extra_keys or ()):
        rest = _rest(extra or [], event.lora_name)
        salted = not block and event.parent is None and len(rest) == 1 and isinstance(rest[0], str)
        if rest and not salted:
            return min(block, len(event.hashes))
    return len(event.hashes)


def joined(words: list[bytes | None], tokens: list[int], size: int) -> list[bytes]:
    """The text of each block of tokens, up to the first block that has a token without one."""
    if 2 <= size <= _WIDE and tokens:
        try:
            if len(tokens) == size:
                return [b"".join(itemgetter(*tokens)(words))]
            pieces = iter(itemgetter(*tokens)(words))
            return list(map(b"".join, zip(*[pieces] * size, strict=True)))
        except (IndexError, TypeError):
            pass
    texts: list[bytes] = []
    for start in range(0, len(tokens), size):
        block = [words[token] for token in tokens[start : start + size] if token < len(words)]
        if len(block) < size or None in block:
            break
        texts.append(b"".join(word for word in block if word))
    return texts
