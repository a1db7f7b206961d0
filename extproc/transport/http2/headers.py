"""Header blocks: bytes to the fields that gRPC needs, each block and each field decoded once.

We announce a dynamic table of size 0. Once the peer has acknowledged that, a block means the same wherever
it comes, so what it means is remembered by its bytes: proxies send one and the same block for every call. A
block that differs in one field (a `traceparent`) is cut into its fields, and those are remembered alike;
values of fields that are not read here are passed over.

Source: RFC 7541; RFC 9113, 8.2 and 8.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

from hpack import Decoder, HPACKError, OversizedHeaderListError

from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason

Field = tuple[bytes, bytes]
"""Name and value."""

_V = TypeVar("_V", Field, bytes)

MAX_BLOCK_BYTES: Final = 65_536
"""Of one header block with its CONTINUATION frames; more ends the connection."""

MAX_LIST_BYTES: Final = 16_384
"""Of the fields as RFC 9113, 6.5.2 counts them, which we announce; more ends the stream."""

MAX_FIELDS: Final = 256
"""Of one block. An indexed field is one byte on the wire and up to a hundred in the list."""

READ_FIELDS: Final = frozenset(
    (b":method", b":path", b":scheme", b"content-type", b"te", b"grpc-timeout", b"grpc-encoding")
)
"""Names whose values are read."""

_MAX_MEMO: Final = 1_024
_MAX_MEMO_BYTES: Final = 512
"""A memo holds so many entries of at most so many bytes: half a megabyte a connection."""

_STATIC_FIELDS: Final = 61
_EMPTY_VALUE: Final = b"\x00"


class HeadersTooLargeError(Exception):
    """A block has more or longer fields than we said we take. The decoder's state is whole."""


def encode(fields: tuple[Field, ...]) -> bytes:
    """A block of literal fields that no table is needed for, names in lower case."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: bytes) -> bytes:
    """RFC 7541, 5.2, without Huffman coding."""
    size = len(text)
    if size < 0x7F:
        return bytes((size,)) + text
    size -= 0x7F
    out = bytearray((0x7F,))
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out) + text


class HeaderReader:
    """Reads the header blocks of one connection, each of them and in their order."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_LIST_BYTES)
        self._is_stateless = False
        self._fields: dict[bytes, Field] = {}
        self._names: dict[bytes, bytes] = {}

    @property
    def is_stateless(self) -> bool:
        """The peer uses no table any more: equal blocks are equal headers."""
        return self._is_stateless

    def table_is_gone(self) -> None:
        """The peer has acknowledged a table of size 0.

        It need not say so again in its next block if it never used one.
        """
        self._is_stateless = True
        self._decoder.max_allowed_table_size = 0
        self._decoder.header_table_size = 0

    def read(self, block: bytes) -> list[Field]:
        """The fields of a block in their order; with `is_stateless`, values that are not read are empty.

        Raises:
            ConnectionFault: It cannot be decoded: neither can any later one.
            HeadersTooLargeError: It says more than we take.
        """
        if self._is_stateless:
            return self._read_stateless(block)
        return self._decode(block)

    def _read_stateless(self, block: bytes) -> list[Field]:
        if len(block) > MAX_LIST_BYTES:
            raise HeadersTooLargeError
        fields: list[Field] = []
        known = self._fields
        for start, value_start, stop in cuts(block):
            part = block[start:stop]
            field = known.get(part)
            if field is None:
                field = self._field(part, value_start - start)
            fields.append(field)
            if len(fields) > MAX_FIELDS:
                raise HeadersTooLargeError
        return fields

    def _field(self, part: bytes, name_bytes: int) -> Field:
        """One field; `name_bytes` is 0 if both name and value are from the static table."""
        if name_bytes:
            head = part[:name_bytes]
            name = self._names.get(head)
            if name is None:
                ((name, _),) = self._decode(head + _EMPTY_VALUE)
                _remember(self._names, head, name)
            if name not in READ_FIELDS:
                return name, b""
        (field,) = self._decode(part)
        _remember(self._fields, part, field)
        return field

    def _decode(self, block: bytes) -> list[Field]:
        try:
            return [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            if self._is_stateless:
                raise HeadersTooLargeError from error
            raise ConnectionFault(  # the decoder stopped in the middle: its table is no longer the peer's
                FaultReason.HEADERS_SIZE, ErrorCode.ENHANCE_YOUR_CALM, "headers are too large"
            ) from error
        except HPACKError as error:
            raise _undecodable() from error


def _remember(memo: dict[bytes, _V], key: bytes, value: _V) -> None:
    """Keep `memo` within its bounds; what came first leaves first."""
    if len(key) <= _MAX_MEMO_BYTES:
        if len(memo) >= _MAX_MEMO:
            del memo[next(iter(memo))]
        memo[key] = value


def cuts(block: bytes) -> Iterator[tuple[int, int, int]]:
    """Where the fields of a block begin, where their values begin, and where they end.

    The value of a field that is wholly from the static table begins where the field does.

    Raises:
        ConnectionFault: The block refers to a dynamic table, sizes one, or ends within a field.
    """
    at, size = 0, len(block)
    is_first = True
    while at < size:
        start = at
        first = block[at]
        if first & 0x80:
            index, at = _integer(block, at, 0x7F)
            if not 0 < index <= _STATIC_FIELDS:
                raise _undecodable()
            yield start, start, at
        elif first & 0xE0 == 0x20:
            index, at = _integer(block, at, 0x1F)
            if index or not is_first:
                raise _undecodable()
            continue
        else:
            index, at = _integer(block, at, 0x3F if first & 0x40 else 0x0F)
            if index > _STATIC_FIELDS:
                raise _undecodable()
            if not index:
                at = _past_string(block, at)
            value_start = at
            at = _past_string(block, at)
            yield start, value_start, at
        is_first = False


def _past_string(block: bytes, at: int) -> int:
    length, at = _integer(block, at, 0x7F)
    at += length
    if at > len(block):
        raise _undecodable()
    return at


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """RFC 7541, 5.1: the value, and where what follows begins."""
    if at >= len(block):
        raise _undecodable()
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in (0, 7, 14, 21):
        if at >= len(block):
            raise _undecodable()
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _undecodable()


def _undecodable() -> ConnectionFault:
    return ConnectionFault(
        FaultReason.COMPRESSION, ErrorCode.COMPRESSION_ERROR, "header block cannot be decoded"
    )
