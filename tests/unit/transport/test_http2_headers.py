"""Header blocks: what they mean, whether remembered or not."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from extproc.transport.http2 import headers
from extproc.transport.http2.faults import ConnectionFault
from extproc.transport.http2.headers import READ_FIELDS, HeaderReader, HeadersTooLargeError, cuts, encode
from tests.builds import replaces_code

NAMES = st.one_of(
    st.sampled_from(sorted(READ_FIELDS)), st.binary(min_size=1, max_size=20), st.just(b"user-agent")
)
FIELDS = st.lists(st.tuples(NAMES, st.binary(max_size=200)), max_size=12)


def stateless() -> HeaderReader:
    """A reader whose peer uses no table."""
    reader = HeaderReader()
    reader.table_is_gone()
    return reader


@given(FIELDS, st.booleans())
def test_a_block_without_table_means_what_hpack_says(
    fields: list[tuple[bytes, bytes]], huffman: bool
) -> None:
    """Names are those of the library, and so are the values that are read, the first time and again."""
    encoder = Encoder()
    encoder.header_table_size = 0
    block = encoder.encode(fields, huffman=huffman)
    expected = [(name, value if name in READ_FIELDS else b"") for name, value in fields]
    reader = stateless()
    for _ in range(2):
        read = reader.read(block)
        assert [(name, value if name in READ_FIELDS else b"") for name, value in read] == expected


@given(FIELDS)
def test_what_we_write_is_what_hpack_reads(fields: list[tuple[bytes, bytes]]) -> None:
    """Literal fields without a table, of any length."""
    decoded = Decoder(max_header_list_size=1 << 20).decode(encode(tuple(fields)), raw=True)
    assert [tuple(field) for field in decoded] == fields


@pytest.mark.parametrize("size", [0, 126, 127, 128, 254, 255, 16_000])
def test_lengths_of_every_form(size: int) -> None:
    """Integers of one byte and of several."""
    ((name, value),) = Decoder().decode(encode(((b"x", b"v" * size),)), raw=True)
    assert (name, value) == (b"x", b"v" * size)


def test_blocks_before_the_acknowledgement_may_use_the_table() -> None:
    """The peer's first calls come before it has seen our settings."""
    encoder, reader = Encoder(), HeaderReader()
    fields = [(b":path", b"/a/b"), (b"grpc-timeout", b"1S")]
    first, second = encoder.encode(fields), encoder.encode(fields)
    assert len(second) == 2
    assert reader.read(first) == reader.read(second) == fields
    reader.table_is_gone()
    with pytest.raises(ConnectionFault):
        reader.read(second)


def test_a_peer_that_never_used_a_table_need_not_resize_it() -> None:
    """And one that does so is understood."""
    fields = ((b":path", b"/a/b"),)
    assert stateless().read(encode(fields)) == stateless().read(b"\x20" + encode(fields)) == list(fields)


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xbe",  # index 62: a table that is not there
        b"\x7e\x01a",  # a name of it
        b"\x3f\x01",  # a table of 32 bytes
        b"\x84\x20",  # a size behind a field
        b"\x00",
        b"\x00\x05ab",
        b"\x00\x01a\x05b",
        b"\x00\x01a",
        b"\x7f",
        b"\xff\xff\xff\xff\xff\xff\x01",
        b"\x00\x84\xff\xff\xff\xff\x00",  # Huffman's end of string as a name
    ],
)
def test_blocks_that_cannot_be_decoded(block: bytes) -> None:
    """The connection ends: no later block would mean anything."""
    with pytest.raises(ConnectionFault):
        stateless().read(block)


@pytest.mark.parametrize(
    "block", [b"\x84" * (headers.MAX_FIELDS + 1), encode(((b"a", b"b" * headers.MAX_LIST_BYTES),))]
)
def test_blocks_that_say_too_much(block: bytes) -> None:
    """One byte may stand for a long field, so fields are counted as well; the stream alone ends."""
    reader = stateless()
    with pytest.raises(HeadersTooLargeError):
        reader.read(block)
    assert reader.read(b"\x83") == [(b":method", b"POST")]


@replaces_code
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose fields all differ is read all the same, and what came first is forgotten."""
    monkeypatch.setattr(headers, "_MAX_MEMO", 4)
    reader = stateless()
    for number in range(100):
        assert reader.read(encode(((b"grpc-timeout", b"%dS" % number), (b"x-%d" % number, b"v")))) == [
            (b"grpc-timeout", b"%dS" % number),
            (b"x-%d" % number, b""),
        ]
    assert len(reader._fields) == len(reader._names) == 4


@given(st.binary(max_size=60))
def test_cuts_never_run_over(block: bytes) -> None:
    """Any bytes are cut into consecutive fields, or refused."""
    at = 0
    try:
        for start, value_start, stop in cuts(block):
            assert at <= start <= value_start <= stop <= len(block)
            assert start < stop
            at = stop
    except ConnectionFault:
        return
    assert at == len(block) or block[at:].startswith(b"\x20") or not block
