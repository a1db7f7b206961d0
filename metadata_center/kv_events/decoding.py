"""Payload frames of KV cache events to values.

Rules:
    1. A batch is a msgpack array `[ts, events, rank]`; `rank` may be absent, and what follows is ignored.
    2. An event is a map with `type`, or an array that starts with it (vLLM before mid-2026, SGLang).
       Unknown types and unknown fields are ignored, so a newer engine is still understood; so is whatever
       stands in a field that nothing here reads, the time and the rank among them. Numbers may be text.
    3. Whatever the bytes, the result is a `Batch` or `DecodeError`. A payload and its number of events
       are bounded before anything is allocated for them.
    4. A field that is read and cannot be spoils its event (`pieces` says what that costs), unless there is a
       value that makes nothing up: an adapter that is not named, a copy that is gone from any memory.

One pass of a typed decoder does all of the work for what vLLM sends by default; the rest (arrays, hashes as
bytes or signed, unknown types) costs one more pass and a few Python operations for each event.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import structs

from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import (
    ANYWHERE,
    MAX_EVENTS,
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockSize,
    BlockStored,
)

MAX_PAYLOAD_BYTES: Final = 2 * 1024 * 1024
"""A step of 65,536 tokens of 5 bytes in 16-token blocks that evicts as many measures 0.7 MB, and one of
16,384 tokens in events of one token each 1.2 MB. One pass over 2 MiB takes
16 ms at most, and cannot be cut."""

_MASK: Final = (1 << 64) - 1
_NOTHING: Final = msgspec.Raw(b"\xc0")
_Hash = int | bytes


class _StoredMap(msgspec.Struct, gc=False, tag_field="type", tag="BlockStored"):
    """A stored event whose hashes may be bytes or negative."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: msgspec.Raw
    block_size: BlockSize
    lora_id: Any = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None

    def event(self) -> BlockStored:
        """The value."""
        return BlockStored(
            _all_unsigned(self.block_hashes),
            None if self.parent_block_hash is None else _unsigned(self.parent_block_hash),
            self.token_ids,
            self.block_size,
            _adapter(self.lora_id),
            self.medium,
            self.lora_name,
            self.extra_keys,
            self.group_idx,
            self.kv_cache_spec_kind,
        )


class _RemovedMap(msgspec.Struct, gc=False, tag_field="type", tag="BlockRemoved"):
    """A removed event whose hashes may be bytes or negative."""

    block_hashes: list[_Hash]
    medium: Any = None
    group_idx: Any = None

    def event(self) -> BlockRemoved:
        """The value. Where the rest cannot be read, it is gone from wherever it may have been."""
        medium, group = self.medium, self.group_idx
        where = medium if medium is None or type(medium) is str else ANYWHERE
        return BlockRemoved(_all_unsigned(self.block_hashes), where, group if type(group) is int else None)


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
            _all_unsigned(self.block_hashes),
            None if self.parent_block_hash is None else _unsigned(self.parent_block_hash),
            self.token_ids,
            self.block_size,
            _adapter(self.lora_id),
            self.medium,
            self.lora_name if type(self.lora_name) is str else None,
            extra_keys,
            self.group_idx if type(self.group_idx) is int else None,
            self.kind if type(self.kind) is str else None,
        )


class _RemovedArray(_RemovedMap, array_like=True):
    """A removed event by position."""


class _ClearedArray(_ClearedMap, array_like=True):
    """A cleared event by position."""


_MapEvent = _StoredMap | _RemovedMap | _ClearedMap
_ArrayEvent = _StoredArray | _RemovedArray | _ClearedArray


class _Arrays(msgspec.Struct, gc=False, array_like=True):
    ts: float
    events: Annotated[list[_ArrayEvent], msgspec.Meta(max_length=MAX_EVENTS)]
    rank: int | None = None


class _Any(msgspec.Struct, gc=False, array_like=True):
    ts: Any
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]
    rank: Any = None

    @property
    def ts_s(self) -> float:
        """The time; 0 if there is none."""
        return _time_s(self.ts)

    @property
    def checked_rank(self) -> int | None:
        """The rank; None if there is none."""
        return self.rank if type(self.rank) is int else None


class _BareMap(msgspec.Struct, gc=False):
    """A stored event but for its token ids and extra keys."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    block_size: BlockSize
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _BareArray(msgspec.Struct, gc=False, array_like=True):
    """The same by position."""

    type: str
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: msgspec.Raw
    block_size: BlockSize
    lora_id: Any = None
    medium: str | None = None
    lora_name: Any = None
    extra_keys: msgspec.Raw = _NOTHING
    group_idx: Any = None
    kv_cache_spec_kind: Any = None


class _MapHeads(msgspec.Struct, gc=False):
    type: str
    block_hashes: msgspec.Raw = _NOTHING
    token_ids: msgspec.Raw = _NOTHING
    extra_keys: msgspec.Raw = _NOTHING


class _ArrayHeads(msgspec.Struct, gc=False, array_like=True):
    type: str
    block_hashes: msgspec.Raw = _NOTHING
    parent_block_hash: msgspec.Raw = _NOTHING
    token_ids: msgspec.Raw = _NOTHING
    block_size: msgspec.Raw = _NOTHING
    lora_id: msgspec.Raw = _NOTHING
    medium: msgspec.Raw = _NOTHING
    lora_name: msgspec.Raw = _NOTHING
    extra_keys: msgspec.Raw = _NOTHING


class Heads(NamedTuple):
    """How much an event holds, read off its heads.

    Attributes:
        num_hashes: Blocks.
        num_tokens: Token ids.
        extra_bytes: Encoded size of the extra keys.
    """

    num_hashes: int
    num_tokens: int
    extra_bytes: int


class _MapTag(msgspec.Struct, gc=False):
    type: str


class _ArrayTag(msgspec.Struct, gc=False, array_like=True):
    type: str


_TYPED: Final = msgspec.msgpack.Decoder(Batch)
_ARRAYS: Final = msgspec.msgpack.Decoder(_Arrays)
_ANY: Final = msgspec.msgpack.Decoder(_Any)
_MAP_EVENT: Final = msgspec.msgpack.Decoder(_MapEvent, strict=False)
_ARRAY_EVENT: Final = msgspec.msgpack.Decoder(_ArrayEvent, strict=False)
_PLAIN_EVENT: Final = msgspec.msgpack.Decoder(BlockStored | BlockRemoved | AllBlocksCleared)
_BARE_MAP: Final = msgspec.msgpack.Decoder(_BareMap, strict=False)
_BARE_ARRAY: Final = msgspec.msgpack.Decoder(_BareArray, strict=False)
_MAP_HEADS: Final = msgspec.msgpack.Decoder(_MapHeads)
_ARRAY_HEADS_OF: Final = msgspec.msgpack.Decoder(_ArrayHeads)
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
    return batch if isfinite(batch.ts_s) else structs.replace(batch, ts_s=0.0)


def scan(payload: bytes) -> tuple[float, list[msgspec.Raw], int | None]:
    """Time, events and rank of a batch whose events are not decoded yet; see `event_of`.

    Raises:
        DecodeError: As `decode`, but for what is inside events.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise DecodeError(f"{len(payload)} bytes")
    try:
        batch = _ANY.decode(payload)
    except _MALFORMED as error:
        raise DecodeError(str(error)[:200]) from None
    return batch.ts_s, batch.events, batch.checked_rank


def is_stored(raw: msgspec.Raw) -> bool:
    """True if an event is about stored blocks, whatever else is in it: it takes nothing away."""
    is_array = memoryview(raw)[0] in _ARRAY_HEADS
    try:
        return (_ARRAY_TAG if is_array else _MAP_TAG).decode(raw).type == "BlockStored"
    except _MALFORMED:
        return False


def heads_of(raw: msgspec.Raw) -> Heads:
    """How much an event holds, without decoding it.

    Raises:
        DecodeError: It is no event.
    """
    is_array = memoryview(raw)[0] in _ARRAY_HEADS
    try:
        heads = (_ARRAY_HEADS_OF if is_array else _MAP_HEADS).decode(raw)
    except _MALFORMED as error:
        raise DecodeError(str(error)[:200]) from None
    if heads.type != "BlockStored":
        return Heads(_length(heads.block_hashes), 0, 0)
    extra_bytes = len(memoryview(heads.extra_keys))
    return Heads(_length(heads.block_hashes), _length(heads.token_ids), extra_bytes)


def stored_without_text(raw: msgspec.Raw) -> BlockStored:
    """Decode a stored event but for what its text is made of: its blocks are named, and opaque.

    Raises:
        DecodeError: It is malformed.
    """
    is_array = memoryview(raw)[0] in _ARRAY_HEADS
    try:
        bare: _BareMap | _BareArray = (_BARE_ARRAY if is_array else _BARE_MAP).decode(raw)
    except _MALFORMED as error:
        raise DecodeError(str(error)[:200]) from None
    return BlockStored(
        _all_unsigned(bare.block_hashes),
        None if bare.parent_block_hash is None else _unsigned(bare.parent_block_hash),
        _NOTHING,
        bare.block_size,
        medium=bare.medium,
        group=bare.group_idx if type(bare.group_idx) is int else None,
        kind=bare.kv_cache_spec_kind if type(bare.kv_cache_spec_kind) is str else None,
    )


def event_of(raw: msgspec.Raw) -> BlockStored | BlockRemoved | AllBlocksCleared | None:
    """Decode one event of `scan`; None if its type is unknown.

    Raises:
        DecodeError: It is malformed.
    """
    try:
        if memoryview(raw)[0] not in _ARRAY_HEADS:
            try:
                plain: BlockStored | BlockRemoved | AllBlocksCleared = _PLAIN_EVENT.decode(raw)
                return plain
            except msgspec.ValidationError:
                pass
        return _any_event(raw)
    except _MALFORMED as error:
        raise DecodeError(str(error)[:200]) from None


def _length(raw: msgspec.Raw) -> int:
    """Items of an encoded array by its head; 0 if it is none."""
    head = bytes(memoryview(raw)[:5])
    if 0x90 <= head[0] < 0xA0:
        return head[0] & 0x0F
    if head[0] == 0xDC:
        return int.from_bytes(head[1:3], "big")
    return int.from_bytes(head[1:5], "big") if head[0] == 0xDD else 0


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
        event = _any_event(raw)
        if event is not None:
            events.append(event)
    return Batch(batch.ts_s, events, batch.checked_rank)


def _any_event(raw: msgspec.Raw) -> BlockStored | BlockRemoved | AllBlocksCleared | None:
    is_array = memoryview(raw)[0] in _ARRAY_HEADS
    try:
        item: _MapEvent | _ArrayEvent = (_ARRAY_EVENT if is_array else _MAP_EVENT).decode(raw)
    except msgspec.ValidationError:
        if (_ARRAY_TAG if is_array else _MAP_TAG).decode(raw).type in _KNOWN:
            raise
        return None
    return item.event()


def _all_unsigned(hashes: list[_Hash]) -> list[int]:
    """As `_unsigned` says, without a call for each."""
    return [int.from_bytes(item[-8:], "big") if isinstance(item, bytes) else item & _MASK for item in hashes]


def _adapter(lora_id: Any) -> int | None:
    """The number of an adapter, of which only whether there is one is ever asked."""
    return lora_id if lora_id is None or type(lora_id) is int else 0


def _time_s(ts: Any) -> float:
    if type(ts) not in (float, int) or not -1e300 < ts < 1e300:
        return 0.0
    return float(ts)


def _unsigned(block_hash: _Hash) -> int:
    """A hash as vLLM writes it by default: the last 64 bits of the digest, unsigned."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash & _MASK
