"""Compressed request bodies: each coding decoded, damaged ones and bombs refused, nothing made unbounded."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
import zlib
from collections.abc import Callable

import brotli  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.compression import (
    ALWAYS_BYTES,
    MAX_RATIO,
    MAX_STREAMS,
    codings_of,
    decode,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 32 << 20
TEXT = b'{"model": "m", "input": "' + b"Say hello. " * 3000 + b'"}'


def raw_deflate(data: bytes) -> bytes:
    """Without zlib's wrapping, as some clients send it."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw_deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "br": ("br", brotli.compress),
}
each_coding = pytest.mark.parametrize(("coding", "pack"), PACKERS.values(), ids=PACKERS.keys())


def refused(body: bytes, *codings: str, max_bytes: int = LIMIT) -> Reason:
    """Why a body is refused."""
    with pytest.raises(RouterError) as caught:
        decode(body, codings, max_bytes)
    return caught.value.reason


@each_coding
def test_a_body_comes_out_as_it_went_in(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """Small and larger than a step of the decoder, compressible or not."""
    noise = b"".join(i.to_bytes(4, "big") for i in range(0, 2**31, 8191))
    for data in (b"{}", TEXT, noise):
        assert decode(pack(data), (coding,), LIMIT) == data


@given(st.binary(max_size=2000), st.lists(st.sampled_from(list(PACKERS)), max_size=2))
def test_codings_are_undone_in_reverse(data: bytes, names: list[str]) -> None:
    """The header names them in the order they were applied."""
    body = data
    for name in names:
        body = PACKERS[name][1](body)
    assert decode(body, [PACKERS[name][0] for name in names], LIMIT) == data


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        ("gzip", ("gzip",)),
        ("GZip", ("gzip",)),
        ("x-gzip", ("gzip",)),
        ("identity", ()),
        ("", ()),
        (" , identity ,", ()),
        ("gzip, zstd", ("gzip", "zstd")),
        ("deflate,\tbr", ("deflate", "br")),
        ("identity, br", ("br",)),
    ],
)
def test_the_header_is_read_as_a_list(header: str, codings: tuple[str, ...]) -> None:
    """Names are case-insensitive, `identity` and empty members are none."""
    assert codings_of(header) == codings


@pytest.mark.parametrize(
    "header",
    ["compress", "aws-chunked", "gzip, lzma", "zstd;q=1", "gzip gzip", "gzip,gzip,gzip", "\x1b[2J\x9b"],
)
def test_what_is_not_decoded_here_is_named(header: str) -> None:
    """An unknown coding, or too many: the message says what is accepted, in plain text."""
    with pytest.raises(RouterError) as caught:
        codings_of(header)
    assert caught.value.reason is Reason.UNSUPPORTED_ENCODING
    assert caught.value.status == 415
    assert "accepted: " in caught.value.message
    assert caught.value.message.isprintable()


@each_coding
def test_damaged_bodies_are_refused(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """Cut anywhere, followed by something else, or another thing altogether."""
    whole = pack(TEXT)
    for cut in (1, 2, 5, len(whole) // 2, len(whole) - 1):
        assert refused(whole[:cut], coding) is Reason.INVALID_REQUEST
    for damaged in (b"", whole + b"!", b"!" + whole, TEXT):
        assert refused(damaged, coding) is Reason.INVALID_REQUEST


@each_coding
@given(st.binary(max_size=300))
def test_any_bytes_give_a_body_or_a_refusal(coding: str, pack: Callable[[bytes], bytes], data: bytes) -> None:
    """Nothing else escapes, for junk and for junk behind a good beginning."""
    for body in (data, pack(TEXT)[:40] + data):
        reason = None
        try:
            assert len(decode(body, (coding,), LIMIT)) <= LIMIT
        except RouterError as error:
            reason = error.reason
        assert reason in (None, Reason.INVALID_REQUEST, Reason.BODY_TOO_LARGE)


@each_coding
def test_a_bomb_is_stopped_while_it_goes_off(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """64 MiB of zeros are refused, and never more made of them than is allowed, twice for the joining."""
    body = pack(bytes(64 << 20))
    allowed = max(ALWAYS_BYTES, MAX_RATIO * len(body))
    tracemalloc.start()
    try:
        assert refused(body, coding) is Reason.BODY_TOO_LARGE
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * allowed + (1 << 20)


def test_a_bomb_in_a_bomb() -> None:
    """The allowance is that of the bytes that were sent, not of what the first decoding made of them."""
    assert (
        refused(gzip.compress(gzip.compress(bytes(256 << 20), 9), 9), "gzip", "gzip") is Reason.BODY_TOO_LARGE
    )


@each_coding
def test_the_largest_body_is_allowed_and_not_a_byte_more(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """The bound on bodies holds for what comes out."""
    assert decode(pack(bytes(5000)), (coding,), 5000) == bytes(5000)
    assert refused(pack(bytes(5001)), coding, max_bytes=5000) is Reason.BODY_TOO_LARGE


def test_a_body_too_large_as_it_comes_is_not_decoded() -> None:
    """What is larger than allowed before it is decoded is refused at once."""
    assert refused(bytes(5001), "gzip", max_bytes=5000) is Reason.BODY_TOO_LARGE


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("zstd", zstd.compress)])
def test_streams_in_a_row(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """Parallel compressors write several; so many that decoders cost more than bytes are refused."""
    assert decode(pack(b"ab") + pack(b"") + pack(b"c"), (coding,), LIMIT) == b"abc"
    assert decode(pack(b"a") * MAX_STREAMS, (coding,), LIMIT) == b"a" * MAX_STREAMS
    assert refused(pack(b"a") * (MAX_STREAMS + 1), coding) is Reason.INVALID_REQUEST


def test_a_zstd_window_beyond_what_http_allows_is_refused() -> None:
    """A decoder would set memory aside by what the header says."""
    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    packer = zstd.ZstdCompressor(options=options)
    body = packer.compress(TEXT) + packer.flush()
    assert refused(body, "zstd") is Reason.INVALID_REQUEST
