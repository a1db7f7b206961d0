"""KV cache events as values, whatever engine and encoding they came in.

Rules:
    1. A hash is an unsigned 64-bit integer. It names a block of one publisher and means nothing to another:
       engines hash differently, and a restart may change the seed.
    2. One `BlockRemoved` takes away one physical copy of each hash it names; a hash stored twice must be
       removed twice before the block is gone.
    3. Token ids stay encoded until asked for: they are most of a batch, and a block that is already known
       needs none of them. They keep the payload they came in alive.

Source: vLLM 0.32, captured; SGLang's `kv_events.py`, which is vLLM's of 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from metadata_center.kv_events.errors import DecodeError

_TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
_TOKENS: Final = msgspec.msgpack.Decoder(list[_TokenId], strict=False)

MAX_EVENTS: Final = 65_536
"""In one batch. SGLang with pages of one token names each evicted token in an event of its own."""

Hash = Annotated[int, msgspec.Meta(ge=0)]
"""Unsigned 64-bit; msgpack has no larger integers."""

BlockSize = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
"""Tokens per block; hybrid models were seen with thousands."""


GPU: Final = frozenset({None, "GPU"})
"""Values of `medium` that mean the device's own memory, of whatever kind; all others are slower."""

ANYWHERE: Final = "?"
"""`medium` of a removed event that has something unreadable there: a copy is gone, of any kind of memory."""


class BlockStored(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="BlockStored"):
    """Consecutive blocks of one sequence are now in the cache.

    Attributes:
        hashes: One per block, in order.
        parent: Hash of the block before the first, or None at the start of a sequence.
        raw_token_ids: Token ids of all blocks, encoded; see `token_ids`.
        block_size: Tokens per block.
        lora_id: The engine's number of the adapter; `lora_name` is what identifies it.
        medium: Where they lie ("GPU" for the device's own memory, of whatever kind), or None if not said.
        lora_name: Adapter, or None for the base model.
        extra_keys: For each block what else its hash covers (adapter, cache salt on block 0, media), or None.
        group: Index of the KV cache group of a hybrid model, or None.
        kind: Attention kind of that group ("full_attention"), or None.
    """

    hashes: list[Hash] = msgspec.field(name="block_hashes")
    parent: Hash | None = msgspec.field(name="parent_block_hash")
    raw_token_ids: msgspec.Raw = msgspec.field(name="token_ids")
    block_size: BlockSize
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group: int | None = msgspec.field(name="group_idx", default=None)
    kind: str | None = msgspec.field(name="kv_cache_spec_kind", default=None)

    def token_ids(self) -> list[int]:
        """Decode the token ids, anew at each call.

        Returns:
            `len(hashes) * block_size` ids below 2**32, or none at all: an engine that moves a block to
            another medium names it by its hash alone.

        Raises:
            DecodeError: There are more or fewer, or they are not token ids (SGLang's bigrams).
        """
        try:
            tokens = _TOKENS.decode(self.raw_token_ids)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DecodeError(f"token ids: {error}"[:200]) from None
        if tokens and len(tokens) != len(self.hashes) * self.block_size:
            raise DecodeError(f"{len(tokens)} token ids for {len(self.hashes)} blocks of {self.block_size}")
        return tokens


class BlockRemoved(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="BlockRemoved"):
    """One physical copy of each named block is gone.

    Attributes:
        hashes: Of the blocks.
        medium: Where they lay, or None if not said; `ANYWHERE` if it cannot be read.
        group: Index of the KV cache group, or None.
    """

    hashes: list[Hash] = msgspec.field(name="block_hashes")
    medium: str | None = None
    group: int | None = msgspec.field(name="group_idx", default=None)


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="AllBlocksCleared"):
    """The whole cache is empty, before the events that follow in the same batch."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one engine step did to the cache; events in the order in which they must be applied.

    Attributes:
        ts_s: Unix seconds on the engine's clock, finite; 0 if it cannot be read, since nothing needs it.
        events: Known events; those of unknown types are left out.
        rank: Data-parallel rank, or None if not said.
    """

    ts_s: float
    events: Annotated[list[Event], msgspec.Meta(max_length=MAX_EVENTS)]
    rank: int | None = None


def encoded_token_ids(token_ids: Sequence[int]) -> msgspec.Raw:
    """What `BlockStored.raw_token_ids` holds for these ids."""
    return msgspec.Raw(msgspec.msgpack.encode(token_ids))
