"""Payload frames of KV cache events to values.

Rules:
    1. A batch is a msgpack array `[ts, events, rank]`; `rank` may be absent, and what follows is ignored.
    2. An event is a map with `type`, or an array that starts with it (vLLM before mid-2026, SGLang).
       Unknown types and unknown fields are ignored, so a newer engine is still understood.
    3. Whatever the bytes, the result is a `Batch` or `DecodeError`. A payload and its number of events
       are bounded before anything is allocated for them.

One pass of a typed decoder does all of the work for what vLLM sends by default; the rest (arrays, hashes as
bytes or signed, unknown types) costs one more pass and a few Python operations for each event.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Final

import msgspec

from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import (
    MAX_EVENTS,
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockSize,
    BlockStored,
)

MAX_PAYLOAD_BYTES: Final = 4 * 1024 * 1024
"""A step of 65,536 tokens of 5 bytes in 16-token blocks that evicts as many measures 0.7 MB."""

_MASK: Final = (1 << 64) - 1
_Hash = int | bytes


class _StoredMap(msgspec.Struct, gc=False, tag_field="type", tag="BlockStored"):
    """A stored event whose hashes may be bytes or negative."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: msgspec.Raw
    block_size: BlockSize
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    session_id: str | None = None

    def event(self) -> BlockStored:
        """The value."""
        return BlockStored(
            [_unsigned(block_hash) for block_hash in self.block_hashes],
            None if self.parent_block_hash is None else _unsigned(self.parent_block_hash),
            self.token_ids,
            self.block_size,
            self.lora_id,
            self.medium,
            self.lora_name,
            self.extra_keys,
            self.group_idx,
            self.kv_cache_spec_kind,
            self.kv_cache_spec_sliding_window,
            self.session_id,
        )


class _RemovedMap(msgspec.Struct, gc=False, tag_field="type", tag="BlockRemoved"):
    """A removed event whose hashes may be bytes or negative."""

    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: int | None = None

    def event(self) -> BlockRemoved:
        """The value."""
        return BlockRemoved([_unsigned(item) for item in self.block_hashes], self.medium, self.group_idx)


class _ClearedMap(msgspec.Struct, gc=False, tag_field="type", tag="AllBlocksCleared"):
    """A cleared event."""

    def event(self) -> AllBlocksCleared:
        """The value."""
        return AllBlocksCleared()


class _StoredArray(msgspec.Struct, gc=False, array_like=True, tag_field="type", tag="BlockStored"):
    """A stored event by position; after `medium` engines differ, so what does not fit there is ignored."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: msgspec.Raw
    block_size: BlockSize
    lora_id: Any = None
    medium: str | None = None
    lora_name: Any = None
    extra_keys: Any = None
    group_idx: Any = None
    kind: Any = None

    def event(self) -> BlockStored:
        """The value."""
        extra_keys = self.extra_keys
        if type(extra_keys) is not list or not all(item is None or type(item) is list for item in extra_keys):
            extra_keys = None
        return BlockStored(
            [_unsigned(block_hash) for block_hash in self.block_hashes],
            None if self.parent_block_hash is None else _unsigned(self.parent_block_hash),
            self.token_ids,
            self.block_size,
            self.lora_id if type(self.lora_id) is int else None,
            self.medium,
            self.lora_name if type(self.lora_name) is str else None,
            extra_keys,
            self.group_idx if type(self.group_idx) is int else None,
            self.kind if type(self.kind) is str else None,
        )


class _RemovedArray(msgspec.Struct, gc=False, array_like=True, tag_field="type", tag="BlockRemoved"):
    """A removed event by position."""

    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: Any = None

    def event(self) -> BlockRemoved:
        """The value."""
        return BlockRemoved(
            [_unsigned(block_hash) for block_hash in self.block_hashes],
            self.medium,
            self.group_idx if type(self.group_idx) is int else None,
        )


class _ClearedArray(msgspec.Struct, gc=False, array_like=True, tag_field="type", tag="AllBlocksCleared"):
    """A cleared event by position."""

    def event(self) -> AllBlocksCleared:
        """The value."""
        return AllBlocksCleared()


_MapEvent = _StoredMap | _RemovedMap | _ClearedMap
_ArrayEvent = _StoredArray | _RemovedArray | _ClearedArray


class _Arrays(msgspec.Struct, gc=False, array_like=True):
    ts: float
    events: Annotated[list[_ArrayEvent], msgspec.Meta(max_length=MAX_EVENTS)]
    rank: int | None = None


class _Any(msgspec.Struct, gc=False, array_like=True):
    ts: float
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]
    rank: int | None = None


class _MapTag(msgspec.Struct, gc=False):
    type: str


class _ArrayTag(msgspec.Struct, gc=False, array_like=True):
    type: str


_TYPED: Final = msgspec.msgpack.Decoder(Batch)
_ARRAYS: Final = msgspec.msgpack.Decoder(_Arrays)
_ANY: Final = msgspec.msgpack.Decoder(_Any)
_MAP_EVENT: Final = msgspec.msgpack.Decoder(_MapEvent)
_ARRAY_EVENT: Final = msgspec.msgpack.Decoder(_ArrayEvent)
_MAP_TAG: Final = msgspec.msgpack.Decoder(_MapTag)
_ARRAY_TAG: Final = msgspec.msgpack.Decoder(_ArrayTag)
_KNOWN: Final = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})

_FIRST_EVENT: Final = {**dict.fromkeys(range(0x91, 0xA0), 11), 0xDC: 13, 0xDD: 15}
"""Byte 10 of a batch (the head of `events`, after that of the batch and a float64) -> offset of an event."""

_ARRAY_HEADS: Final = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})

_MALFORMED: Final = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
"""What msgspec raises for bytes it does not like: also invalid UTF-8, unhashable map keys, deep nesting."""


def decode(payload: bytes) -> Batch:
    """Decode the last frame of a message.

    Args:
        payload: As received.

    Returns:
        Its batch; token ids stay encoded and refer to `payload`.

    Raises:
        DecodeError: The payload is larger than `MAX_PAYLOAD_BYTES`, has more than `MAX_EVENTS` events, or
            is malformed. Nothing else is ever raised.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise DecodeError(f"{len(payload)} bytes")
    try:
        batch = _decode_arrays(payload) if _starts_with_array(payload) else _decode_maps(payload)
    except _MALFORMED as error:
        raise DecodeError(str(error)[:200]) from None
    if not isfinite(batch.ts_s):
        raise DecodeError("the time is not finite")
    return batch


def _starts_with_array(payload: bytes) -> bool:
    """True if the first event surely is an array; False is always safe, only slower."""
    if len(payload) <= 16 or payload[1] != 0xCB:
        return False
    first = payload[_FIRST_EVENT.get(payload[10], 1)]
    return first in _ARRAY_HEADS


def _decode_maps(payload: bytes) -> Batch:
    try:
        return _TYPED.decode(payload)
    except msgspec.ValidationError:
        return _decode_any(payload)


def _decode_arrays(payload: bytes) -> Batch:
    try:
        arrays = _ARRAYS.decode(payload)
    except msgspec.ValidationError:
        return _decode_any(payload)
    return Batch(arrays.ts, [item.event() for item in arrays.events], arrays.rank)


def _decode_any(payload: bytes) -> Batch:
    """Event by event: one that is not understood is left out if its type is unknown."""
    batch = _ANY.decode(payload)
    events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
    for raw in batch.events:
        is_array = memoryview(raw)[0] in _ARRAY_HEADS
        try:
            item: _MapEvent | _ArrayEvent = (_ARRAY_EVENT if is_array else _MAP_EVENT).decode(raw)
        except msgspec.ValidationError:
            if (_ARRAY_TAG if is_array else _MAP_TAG).decode(raw).type in _KNOWN:
                raise
        else:
            events.append(item.event())
    return Batch(batch.ts, events, batch.rank)


def _unsigned(block_hash: _Hash) -> int:
    """A hash as vLLM writes it by default: the last 64 bits of the digest, unsigned."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash & _MASK
