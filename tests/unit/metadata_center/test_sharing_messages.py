"""The bytes members exchange."""

from array import array
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata_center.load.counters import KEY_BYTES, MAX_ENDPOINTS
from metadata_center.sharing.messages import (
    MAX_AMOUNT,
    MAX_MESSAGE_BYTES,
    MAX_SHARED_BLOCKS,
    Chain,
    MessageError,
    Row,
    Update,
    decode,
    encode,
    gateway_of,
    member_id,
)
from metadata_center.types import EndpointKey

A = EndpointKey("10.0.0.1:8000")
MEMBER = member_id("gw-1", 2, "c0ffee")

amounts = st.integers(0, MAX_AMOUNT)
endpoints = st.text("0123456789.:[]abcdef", min_size=1, max_size=KEY_BYTES).map(EndpointKey)
rows = st.lists(
    st.builds(Row, endpoints, amounts, amounts, amounts, amounts, amounts),
    max_size=5,
    unique_by=lambda row: row.endpoint,
).map(tuple)
chains = st.lists(
    st.builds(Chain.of, endpoints, st.lists(st.integers(0, 2**64 - 1), max_size=9)), max_size=3
).map(tuple)
updates = st.builds(
    Update,
    st.just(MEMBER),
    st.integers(1, MAX_AMOUNT),
    rows,
    st.booleans(),
    st.floats(0.001, 3600.0),
    chains,
    st.booleans(),
)


@given(updates)
def test_what_is_encoded_is_decoded(update: Update) -> None:
    """A valid update survives the wire unchanged."""
    assert decode(encode(update)) == update


@given(st.lists(st.integers(0, 2**64 - 1), max_size=9))
def test_a_chain_in_an_array_is_sent_as_that_in_a_list(blocks: list[int]) -> None:
    """8 bytes a hash, the least significant first, whatever the chain comes in; it arrives in an array."""
    chain = Chain.of(A, array("Q", blocks))
    assert chain == Chain.of(A, blocks)
    assert chain.packed == b"".join(block.to_bytes(8, "little") for block in blocks)
    assert chain.blocks() == array("Q", blocks)


@settings(max_examples=200)
@given(
    st.binary(max_size=60)
    | st.tuples(updates.map(encode), st.integers(0, 300)).map(lambda cut: cut[0][: cut[1]])
)
def test_bad_bytes_are_a_message_error(data: bytes) -> None:
    """Whatever comes, it is an update or a `MessageError`."""
    with suppress(MessageError):
        assert isinstance(decode(data), Update)


BAD = {
    "member": (["gw/1", 1], ["gw/1/x/y", 1], ["gw/1/\n", 1], ["gw/1/x\n", 1], [f"{'g' * 129}/1/x", 1]),
    "sequence": ([MEMBER, 0], [MEMBER, -1], [MEMBER, 2**53], [MEMBER, 1.5]),
    "rows": (
        [MEMBER, 1, [["", 1]]],
        [MEMBER, 1, [["a b", 1]]],
        [MEMBER, 1, [[A, -1]]],
        [MEMBER, 1, [[A], [A]]],
    ),
    "lease": ([MEMBER, 1, [], False, 0.0], [MEMBER, 1, [], False, float("nan")], [MEMBER, 1, [], False, 1e9]),
    "blocks": ([MEMBER, 1, [], False, 5.0, [[A, b"123"]]],),
}


@pytest.mark.parametrize("fields", [fields for group in BAD.values() for fields in group])
def test_values_out_of_their_range_are_refused(fields: list[object]) -> None:
    """Ids, sequences, counts, leases and chains of another form are refused whole."""
    with pytest.raises(MessageError):
        decode(msgspec.msgpack.encode([1, *fields]))


def test_a_number_beyond_any_encoding_is_no_message() -> None:
    """As another program may have left one where ours are read."""
    for update in (Update(MEMBER, 1, (Row(A, 2**64),)), Update(MEMBER, 2**64)):
        with pytest.raises(MessageError):
            encode(update)


def test_items_of_later_versions_are_ignored_and_other_versions_refused() -> None:
    """A message may grow at its end; a changed meaning gets another version number."""
    assert decode(msgspec.msgpack.encode([1, MEMBER, 7, [[A, 1, 2, 3, 4, 5, 6]]])).rows == (
        Row(A, 1, 2, 3, 4, 5),
    )
    assert decode(encode(Update(MEMBER, 3))[:-1].replace(b"\x99", b"\x98", 1)) == Update(MEMBER, 3)
    with pytest.raises(MessageError):
        decode(msgspec.msgpack.encode([2, MEMBER, 7]))


def test_the_largest_message_fits_and_a_larger_one_is_refused() -> None:
    """All endpoints and all blocks at their longest stay within the bound."""
    keys = [EndpointKey(f"{number:064d}") for number in range(MAX_ENDPOINTS)]
    most = tuple(Row(key, *[MAX_AMOUNT] * 5) for key in keys)
    update = Update(MEMBER, MAX_AMOUNT, most, True, 5.0, (Chain.of(A, [2**64 - 1] * MAX_SHARED_BLOCKS),))
    assert decode(encode(update)) == update

    with pytest.raises(MessageError):
        encode(Update(MEMBER, 1, most, True, 5.0, (Chain(A, bytes(MAX_MESSAGE_BYTES)),)))
    with pytest.raises(MessageError):
        decode(bytes(MAX_MESSAGE_BYTES + 1))
    two = (Chain.of(A, [1] * MAX_SHARED_BLOCKS), Chain.of(A, [1]))
    with pytest.raises(MessageError):
        decode(encode(Update(MEMBER, 1, blocks=two)))


def test_a_chain_keeps_its_head() -> None:
    """Too long a chain is cut at its end, whose blocks an engine evicts first; no hash is bent to fit."""
    chain = Chain.of(A, list(range(MAX_SHARED_BLOCKS + 5)))
    assert chain.num_blocks == MAX_SHARED_BLOCKS
    assert chain.blocks()[-1] == MAX_SHARED_BLOCKS - 1
    with pytest.raises(MessageError):
        Chain.of(A, [2**64])


@pytest.mark.parametrize("gateway", ["", "a/b", "a b", "ä", "x" * 129, "a\n"])
def test_names_that_cannot_be_in_a_member_id_are_refused(gateway: str) -> None:
    """A gateway's name is 1..128 letters, digits and a few signs."""
    with pytest.raises(MessageError):
        member_id(gateway, 0, "x")


def test_a_member_belongs_to_its_gateway() -> None:
    """The first part of its id."""
    assert gateway_of(MEMBER) == "gw-1"
