"""A payload in pieces: however much an engine says at once, others get their turn in between.

Rules:
    1. The pieces in order are the batch: applying them one after the other applies it. A stored event
       is cut between blocks, its later parts continuing the earlier ones; no part of several blocks is one
       block alone, which would mean something else.
    2. Between two steps of the iterator lie some milliseconds: `STEP_HASHES` blocks, or a pass over an event.
    3. What is larger than any engine's is refused before it is decoded, an event by its number of blocks. Of
       one with too many tokens or extra keys the text is unknown, and nothing else.
    4. An event that cannot be read costs no more than what it may have meant. One of stored blocks is left
       out: they are unknown, and nothing that is known is made up. Any other may have taken blocks away: what
       was known until there is void, and what comes after it counts.
    5. `DecodeError` is for a payload that is no batch: what was missed is unknown, so all of it is void.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import msgspec
from msgspec import structs

from metadata_center.kv_events.decoding import (
    decode,
    event_of,
    heads_of,
    is_stored,
    scan,
    stored_without_text,
)
from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    Event,
    encoded_token_ids,
)

SMALL_BYTES: Final = 16 * 1024
"""A payload that is decoded as it is: a step of 1,000 new blocks, or 16,384 hashes of one byte in 4 ms."""

STEP_HASHES: Final = 2_048
"""Blocks per piece: about 2 ms."""

STEP_EVENTS: Final = 512

MAX_EVENT_HASHES: Final = 32_768
"""Of one event: blocks of one token of a long step. As numbers they take 5 ms to decode, as bytes 20 ms."""

MAX_EVENT_TOKENS: Final = 65_536
"""A whole step of vLLM's largest setting; decoding them takes 5 ms."""

STEP_TOKENS: Final = 16_384
"""Tokens per piece, of two blocks at least."""

MAX_EXTRA_BYTES: Final = 64 * 1024
"""900 blocks of a picture's hash each, some 15,000 tokens of pictures; decoding takes at most 10 ms."""

MAX_VOIDS: Final = 16
"""Of one payload: what has more of them that may have taken blocks away is no batch of any engine's."""

_NO_TOKENS: Final = msgspec.Raw(b"\xc0")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Events that cannot be read.

    Attributes:
        why: What is wrong with the last of them, in 200 characters at most.
        count: How many they are, >= 1.
        voids: All that was known before is void: one of them may have taken some of that away.
    """

    why: str
    count: int
    voids: bool


def pieces(payload: bytes) -> Iterator[Batch | Unreadable | None]:
    """Decode the last frame of a message, step by step.

    Args:
        payload: As received.

    Yields:
        The next piece, or None where only time has passed, or an event that is left out (Rule 4).

    Raises:
        DecodeError: The payload is no batch, see `scan` and `MAX_VOIDS`. Nothing else is ever raised.
    """
    if len(payload) <= SMALL_BYTES:
        with suppress(DecodeError):
            yield decode(payload)
            return
    ts_s, events, rank = scan(payload)
    yield None
    parts: list[Event] = []
    left_out: Unreadable | None = None
    num_hashes = voids = 0
    for number, raw in enumerate(events):
        if not number % STEP_EVENTS:  # events of unknown types give no part
            yield None
        for part in _readable_parts(raw):
            if part is None:
                yield None
                continue
            if isinstance(part, Unreadable):
                if not part.voids:
                    left_out = replace(part, count=part.count + (left_out.count if left_out else 0))
                    continue
                voids += 1
                if voids > MAX_VOIDS:
                    raise DecodeError(part.why)
                parts, num_hashes = [], 0  # what they say is void with all before
                yield part
                continue
            parts.append(part)
            cleared = isinstance(part, AllBlocksCleared)
            num_hashes += 0 if isinstance(part, AllBlocksCleared) else len(part.hashes)
            if cleared or num_hashes >= STEP_HASHES or len(parts) >= STEP_EVENTS:
                yield Batch(ts_s, parts, rank)
                parts, num_hashes = [], 0
    yield Batch(ts_s, parts, rank)
    if left_out is not None:
        yield left_out


def _readable_parts(raw: msgspec.Raw) -> Iterator[Event | Unreadable | None]:
    try:
        yield from _parts(raw)
    except DecodeError as error:
        yield Unreadable(str(error), 1, voids=not is_stored(raw))


def _parts(raw: msgspec.Raw) -> Iterator[Event | None]:
    """One event in parts of bounded size, and None where time has passed; nothing if its type is unknown."""
    too_long = False
    if len(memoryview(raw)) > SMALL_BYTES:
        heads = heads_of(raw)
        if heads.num_hashes > MAX_EVENT_HASHES:
            raise DecodeError(f"an event of {heads.num_hashes} blocks")
        too_long = heads.num_tokens > MAX_EVENT_TOKENS or heads.extra_bytes > MAX_EXTRA_BYTES
        yield None
    event = stored_without_text(raw) if too_long else event_of(raw)
    if isinstance(event, BlockStored):
        yield from _stored_parts(event)
    elif isinstance(event, BlockRemoved):
        for start in range(0, max(1, len(event.hashes)), STEP_HASHES):
            yield structs.replace(event, hashes=event.hashes[start : start + STEP_HASHES])
    elif event is not None:
        yield event


def _stored_parts(event: BlockStored) -> Iterator[BlockStored | None]:
    count, size = len(event.hashes), event.block_size
    step = max(2, min(STEP_HASHES, STEP_TOKENS // max(1, size)))
    if count <= step:
        yield event
        return
    try:
        tokens: list[int] | None = event.token_ids()
    except DecodeError:
        tokens = None
    yield None
    start, parent = 0, event.parent
    while start < count:
        stop = start + step if count - start > step + 1 else count
        raw = _NO_TOKENS if tokens is None else encoded_token_ids(tokens[start * size : stop * size])
        yield structs.replace(
            event,
            hashes=event.hashes[start:stop],
            parent=parent,
            raw_token_ids=raw,
            extra_keys=event.extra_keys and event.extra_keys[start:stop],
        )
        start, parent = stop, event.hashes[stop - 1]
