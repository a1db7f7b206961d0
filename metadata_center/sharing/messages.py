"""What members of the shared metadata center send each other, and its bytes.

Rules:
    1. A row holds absolute values of its member, so a message that is lost, late or repeated is made good
       by any newer one; nothing is ever added up from messages.
    2. `sequence` grows with every message of a member and never repeats: newer means greater.
    3. The bytes are one MessagePack array, first item the version; items after the known ones are ignored,
       so that gateways of the next version may be distinguished from those of this one field by field.
    4. Whatever bytes come, `decode` returns a valid `Update` or raises `MessageError`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from struct import pack
from typing import Annotated, Final, NewType

import msgspec

from metadata_center.errors import MetadataError
from metadata_center.load.counters import KEY_BYTES, MAX_ENDPOINTS
from metadata_center.load.kinds import Amounts
from metadata_center.types import EndpointKey

MemberId = NewType("MemberId", str)
"""`gateway/worker/incarnation`: one worker process of one gateway, from its start to its end."""

MAX_NAME_CHARS: Final = 128
"""Of each of the three parts of a member's id."""

MAX_SHARED_BLOCKS: Final = 32_768
"""Block hashes in one message: 16 MiB of prompt in blocks of 512 bytes, 256 KiB on the wire."""

RESPONSES_MARK: Final = 2**64 - 1
"""First hash of a chain that is no prompt: those after it stand for stored responses that live there.

A chain like any other to transports and rendezvous, and to gateways that know nothing of responses."""

MAX_LINE_BYTES: Final = 1024
MAX_LINES: Final = 64
"""Endpoints that a member's requests wait for, of which it tells the first 64."""

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Holds `MAX_ENDPOINTS` rows of at most 115 bytes and `MAX_SHARED_BLOCKS` hashes with their keys."""

MAX_AMOUNT: Final = 2**53 - 1
"""Largest count: what Redis' Lua, which calculates in doubles, still counts exactly."""

MAX_LEASE_S: Final = 3600.0

MAX_CANDIDATES: Final = 16
"""Endpoints a reservation may name; a decision orders three of them."""

MAX_RESERVATIONS: Final = 256
"""Reservations of one round trip; the rest of a larger burst takes the next one."""


class MessageError(MetadataError):
    """Bytes that are no message of ours; the text quotes nothing of them."""


_PART: Final = rf"[0-9A-Za-z_.\-]{{1,{MAX_NAME_CHARS}}}"

_Amount = Annotated[int, msgspec.Meta(ge=0, le=MAX_AMOUNT)]
_Endpoint = Annotated[EndpointKey, msgspec.Meta(pattern=rf"\A[!-~]{{1,{KEY_BYTES}}}\Z")]
_Member = Annotated[MemberId, msgspec.Meta(pattern=rf"\A{_PART}/{_PART}/{_PART}\Z")]


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one member has in flight on one endpoint.

    After `endpoint`, one attribute per kind of `metadata_center.load.kinds`, in that order, of which each
    says what it means.
    """

    endpoint: _Endpoint
    requests: _Amount = 0
    prefill_requests: _Amount = 0
    prefill_tokens: _Amount = 0
    context_tokens: _Amount = 0
    generated_tokens: _Amount = 0

    @property
    def amounts(self) -> Amounts:
        """One number per kind."""
        return (
            self.requests,
            self.prefill_requests,
            self.prefill_tokens,
            self.context_tokens,
            self.generated_tokens,
        )


class Chain(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks that one endpoint is now believed to hold.

    Attributes:
        endpoint: Where.
        packed: The chain's hashes, head first, 8 bytes each, little-endian.
    """

    endpoint: _Endpoint
    packed: Annotated[bytes, msgspec.Meta(max_length=8 * MAX_SHARED_BLOCKS)]

    @classmethod
    def of(cls, endpoint: EndpointKey, blocks: Sequence[int]) -> Chain:
        """Pack `blocks`, unsigned integers of 64 bits, of which the head alone is kept if they are too many.

        Raises:
            MessageError: A hash does not fit.
        """
        kept = blocks[:MAX_SHARED_BLOCKS]
        if isinstance(kept, array) and kept.typecode == "Q" and sys.byteorder == "little":
            return cls(endpoint, kept.tobytes())
        try:
            return cls(endpoint, pack(f"<{len(kept)}Q", *kept))
        except Exception as exc:  # struct.error is no subclass of ValueError
            raise MessageError("a block hash is no unsigned integer of 64 bits") from exc

    @property
    def num_blocks(self) -> int:
        """How many hashes."""
        return len(self.packed) // 8

    def blocks(self) -> array[int]:
        """The hashes, head first."""
        blocks = array("Q", self.packed)
        if sys.byteorder == "big":
            blocks.byteswap()
        return blocks


class Line(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Requests that wait at one member for one endpoint; `metadata_center.sharing.lines` makes and reads it.

    Attributes:
        endpoint: Which.
        packed: Per request its place in the order and its work, 16 bytes.
    """

    endpoint: _Endpoint
    packed: Annotated[bytes, msgspec.Meta(max_length=MAX_LINE_BYTES)]


class Update(msgspec.Struct, frozen=True, array_like=True, tag_field="version", tag=1, gc=False):
    """One message of one member.

    Attributes:
        member: Whose.
        sequence: Rule 2; >= 1.
        rows: Absolute values; each endpoint once.
        full: Endpoints without a row are zero. Otherwise they are as they were.
        lease_s: Without a newer message for this long the member's share is void.
        blocks: Chains newly cached; no part of the share, a lost one is not missed for long.
        leaving: The member's share is void now; it says nothing more.
        line: Who waits at the member, nobody if it is empty; None if it does not say. No part of the share:
            it counts for a moment, and a lost one is made good by the next.
    """

    member: _Member
    sequence: Annotated[int, msgspec.Meta(ge=1, le=MAX_AMOUNT)]
    rows: Annotated[tuple[Row, ...], msgspec.Meta(max_length=MAX_ENDPOINTS)] = ()
    full: bool = False
    lease_s: Annotated[float, msgspec.Meta(gt=0.0, le=MAX_LEASE_S)] = 5.0
    blocks: Annotated[tuple[Chain, ...], msgspec.Meta(max_length=MAX_ENDPOINTS)] = ()
    leaving: bool = False
    line: Annotated[tuple[Line, ...], msgspec.Meta(max_length=MAX_LINES)] | None = None


class Candidate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An endpoint that would do for a request.

    Attributes:
        endpoint: Where.
        believed_requests: Requests the member counts there over all members, those of its own included.
        prefill_tokens: What the request would add there.
        context_tokens: Likewise.
    """

    endpoint: _Endpoint
    believed_requests: _Amount
    prefill_tokens: _Amount
    context_tokens: _Amount


class Reservation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that asks for a place.

    Attributes:
        candidates: Best first, 1..`MAX_CANDIDATES`, distinct.
    """

    candidates: Annotated[tuple[Candidate, ...], msgspec.Meta(min_length=1, max_length=MAX_CANDIDATES)]


class Reserved(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The place a request got.

    Attributes:
        index: Row of the candidate that is charged.
        totals: Requests over all live members per candidate, before this charge.
    """

    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CANDIDATES)]
    totals: Annotated[tuple[_Amount, ...], msgspec.Meta(max_length=MAX_CANDIDATES)]


def member_id(gateway: str, worker: int, incarnation: str) -> MemberId:
    """The id of one worker process.

    Args:
        gateway: Name of the gateway, 1..128 of letters, digits, `_`, `.`, `-`; no two gateways share one.
        worker: Which worker of it.
        incarnation: Another one at each start, of the same alphabet.

    Raises:
        MessageError: A part has another form.
    """
    try:
        return msgspec.convert(f"{gateway}/{worker}/{incarnation}", _Member)
    except msgspec.ValidationError as exc:
        raise MessageError("a member's id is three names of 1..128 letters, digits, `_`, `.` or `-`") from exc


def gateway_of(member: MemberId) -> str:
    """The gateway a member belongs to."""
    return member.partition("/")[0]


def encode(update: Update) -> bytes:
    """The bytes of an update.

    Raises:
        MessageError: They are more than `MAX_MESSAGE_BYTES`, or a number is larger than any of ours.
    """
    try:
        data = _ENCODER.encode(update)
    except OverflowError as exc:
        raise MessageError("a number of more than 64 bits") from exc
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {len(data)} bytes; accepted: {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Update:
    """The update in `data`.

    Raises:
        MessageError: It holds none.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {len(data)} bytes; accepted: {MAX_MESSAGE_BYTES}")
    try:
        update = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MessageError("no message of this version") from exc
    if any(len(chain.packed) % 8 for chain in update.blocks):
        raise MessageError("block hashes are cut short")
    if sum(chain.num_blocks for chain in update.blocks) > MAX_SHARED_BLOCKS:
        raise MessageError(f"more than {MAX_SHARED_BLOCKS} block hashes")
    if len({row.endpoint for row in update.rows}) != len(update.rows):
        raise MessageError("an endpoint has two rows")
    return update


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Update)
