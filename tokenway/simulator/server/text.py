"""A tokenizer and a language model that need no weights.

Rules:
    1. Deterministic: equal input gives equal tokens and equal output, in every process.
    2. Append-only: a longer text with the same start has the same tokens, but for a last partial piece.
    3. Output fed back as the next turn's assistant message has the token ids it was generated with, so
       generated KV blocks are found again, as they are with a real model.
    4. Output pieces are ASCII without anything JSON would escape.

Rules 2 and 3 do not hold for what a real tokenizer (`tokenizer.py`) cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

TokenArray = NDArray[np.uint32]

PIECE_BYTES = 4  # about what a byte-pair vocabulary of 100k makes of English
_HASHED_IDS = 1 << 17  # the size of Llama 3's vocabulary
_FIRST_HASHED_ID = 16
_TURN_START, _TURN_END = 1, 2
_ROLE_IDS = {"system": 3, "user": 4, "assistant": 5, "tool": 6, "developer": 7}
_OTHER_ROLE_ID = 8
_PIECES: tuple[bytes, ...] = tuple(
    f"{first}{vowel}{last} ".encode()
    for first in "bcdfghjklmnprstv"
    for vowel in "aeiou"
    for last in "bdfgklmnprstvxyz"
)
# The hidden end of a generation lies in this many tokens after the minimum: long enough that a client that
# bounds its output sees the bound, short enough that an unbounded one ends.
_MIN_OUTPUT_TOKENS = 512
_OUTPUT_SPREAD_TOKENS = 1024


def encode(text: str | bytes) -> TokenArray:
    """Token ids of a text, shape (ceil(bytes / 4),)."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return _piece_ids(np.frombuffer(data + bytes(-len(data) % PIECE_BYTES), dtype="<u4"))


def encode_chat(messages: Iterable[Mapping[str, Any]], tools: Any = None) -> TokenArray:
    """Token ids of a conversation as a chat template would lay it out, ready for the assistant's turn.

    Args:
        messages: Objects with `role` and `content` (a string, a list of parts, or None).
        tools: Put in front as a system turn if not empty.
    """
    parts: list[TokenArray] = []
    if tools:
        parts += [_marks(_TURN_START, _ROLE_IDS["system"]), encode(orjson.dumps(tools)), _marks(_TURN_END)]
    for message in messages:
        role = _ROLE_IDS.get(str(message.get("role")), _OTHER_ROLE_ID)
        parts += [_marks(_TURN_START, role), encode(content_bytes(message.get("content")))]
        if message.get("tool_calls"):
            parts.append(encode(orjson.dumps(message["tool_calls"])))
        parts.append(_marks(_TURN_END))
    parts.append(_marks(_TURN_START, _ROLE_IDS["assistant"]))
    return np.concatenate(parts)


def content_bytes(content: Any) -> bytes:
    """What a message's content contributes to the prompt; parts that are not text count as their JSON."""
    if content is None:
        return b""
    if isinstance(content, str):
        return content.encode(errors="surrogatepass")
    if not isinstance(content, list):
        return orjson.dumps(content)
    return b"".join(
        part["text"].encode(errors="surrogatepass")
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else orjson.dumps(part)
        for part in content
    )


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """What generations are made of.

    Attributes:
        pieces: ASCII pieces of one token each.
        token_ids: Their ids, shape (len(pieces),).
    """

    pieces: tuple[bytes, ...]
    token_ids: TokenArray


@dataclass(frozen=True, slots=True)
class Output:
    """A generation, known before it is computed.

    Attributes:
        words: One ASCII piece per token.
        token_ids: Their ids, shape (len(words),).
        stops: True if it ends by itself, False if the bound cut it off.
    """

    words: list[bytes]
    token_ids: TokenArray
    stops: bool


def generate(prompt: TokenArray, max_tokens: int, ignore_eos: bool, words: Words | None = None) -> Output:
    """What the model says to `prompt`.

    Args:
        prompt: Token ids, shape (n,).
        max_tokens: Most tokens, > 0.
        ignore_eos: True to go on to `max_tokens` whatever happens.
        words: What to say it in; None for those of `encode`.
    """
    words = words or _WORDS
    seed = xxhash.xxh3_64_intdigest(prompt.tobytes())
    natural_tokens = _MIN_OUTPUT_TOKENS + seed % _OUTPUT_SPREAD_TOKENS
    stops = not ignore_eos and natural_tokens <= max_tokens
    # splitmix64 (Steele, Lea, Flood 2014): one independent draw per position.
    state = np.uint64(seed) + np.arange(
        1, (natural_tokens if stops else max_tokens) + 1, dtype=np.uint64
    ) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    picks = ((state ^ (state >> np.uint64(31))) % np.uint64(len(words.pieces))).astype(np.intp)
    return Output([words.pieces[pick] for pick in picks.tolist()], words.token_ids[picks], stops)


def _piece_ids(pieces: TokenArray) -> TokenArray:
    # Fibonacci hashing (Knuth, TAOCP 3, 6.4): the top bits of a multiplication modulo 2^32.
    hashed = (pieces * np.uint32(2654435769)) >> np.uint32(15)
    return (hashed % np.uint32(_HASHED_IDS) + np.uint32(_FIRST_HASHED_ID)).astype(np.uint32)


def _marks(*ids: int) -> TokenArray:
    return np.array(ids, dtype=np.uint32)


_WORDS = Words(_PIECES, encode(b"".join(_PIECES)))
