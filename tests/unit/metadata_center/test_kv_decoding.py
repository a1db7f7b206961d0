"""Payload frames to values, against captures of vLLM 0.32 and the older encodings."""

from __future__ import annotations

import json
import random
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.kv_events.decoding import MAX_PAYLOAD_BYTES, decode
from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import (
    ANYWHERE,
    MAX_EVENTS,
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    encoded_token_ids,
)

DATA = Path(__file__).parents[2] / "data" / "kv_events"
EXPECTED = [
    json.loads(line) for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text().splitlines()
]
CAPTURES = [(DATA / item["file"]).read_bytes() for item in EXPECTED]


def pack(*events: Any, ts: Any = 1.5, rest: tuple[Any, ...] = (0,)) -> bytes:
    """A batch on the wire."""
    return msgspec.msgpack.encode([ts, list(events), *rest])


def stored(**fields: Any) -> dict[str, Any]:
    """The fields that vLLM always sends."""
    event: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": [1, 2],
        "parent_block_hash": None,
        "token_ids": [5, 6, 7, 8],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return event | fields


def only(payload: bytes) -> Any:
    """The one event of a batch."""
    (event,) = decode(payload).events
    return event


def described(batch: Batch) -> list[Any]:
    """A batch in the form of the expected ones."""
    events: list[dict[str, Any]] = []
    for event in batch.events:
        match event:
            case BlockStored():
                events.append(
                    {
                        "type": "BlockStored",
                        "block_hashes": event.hashes,
                        "parent_block_hash": event.parent,
                        "token_ids": event.token_ids(),
                        "block_size": event.block_size,
                        "lora_id": event.lora_id,
                        "medium": event.medium,
                        "lora_name": event.lora_name,
                        "extra_keys": event.extra_keys,
                        "group_idx": event.group,
                        "kv_cache_spec_kind": event.kind,
                    }
                )
            case BlockRemoved():
                events.append(
                    {
                        "type": "BlockRemoved",
                        "block_hashes": event.hashes,
                        "medium": event.medium,
                        "group_idx": event.group,
                    }
                )
            case AllBlocksCleared():
                events.append({"type": "AllBlocksCleared"})
    return [batch.ts_s, events, batch.rank]


def read(decoded: list[Any]) -> list[Any]:
    """A captured batch without the field that nothing here reads."""
    ts, events, rank = as_ints(decoded)
    return [ts, [{key: event[key] for key in event if key != "session_id"} for event in events], rank]


def as_ints(value: Any) -> Any:
    """Expected values with each digest replaced by its last 64 bits."""
    if isinstance(value, dict):
        digest = value.get("__bytes_hex__")
        return int(digest[-16:], 16) if digest else {key: as_ints(item) for key, item in value.items()}
    return [as_ints(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("payload", "expected"), [*zip(CAPTURES, EXPECTED, strict=True)], ids=[item["file"] for item in EXPECTED]
)
def test_a_capture_decodes_to_what_was_captured(payload: bytes, expected: dict[str, Any]) -> None:
    """Plain, evicting, cleared, salted, LoRA, session, digest and data-parallel batches."""
    assert described(decode(payload)) == read(expected["decoded"])


def test_the_captures_cover_what_they_should() -> None:
    """Each feature of the wire appears in at least one capture."""
    events = [event for payload in CAPTURES for event in decode(payload).events]
    blocks = [event for event in events if isinstance(event, BlockStored)]
    removed = [item for event in events if isinstance(event, BlockRemoved) for item in event.hashes]
    assert len(removed) > len(set(removed)), "one hash is removed twice"
    assert any(isinstance(event, AllBlocksCleared) for event in events)
    assert "sess-42" in json.dumps(EXPECTED), "some name a session"
    assert {"ad1", "ad2"} < {event.lora_name for event in blocks}
    assert [["ad1", "s-9"], ["ad1"]] in [event.extra_keys for event in blocks]
    assert {decode(payload).rank for payload in CAPTURES} == {0, 1}
    assert "__bytes_hex__" in json.dumps(EXPECTED), "some hashes are digests"


def test_events_as_arrays_mean_the_same() -> None:
    """The encoding of vLLM before mid-2026, with what each version appended."""
    full = ["BlockStored", [1, 2], 3, [5, 6, 7, 8], 2, None, "GPU", "ad1", [["s"], None], 1, "mamba", 9, "?"]
    batch = decode(pack(full, ["BlockRemoved", [4], "CPU", 1], ["AllBlocksCleared"]))
    first, second, third = batch.events
    assert isinstance(first, BlockStored)
    assert (first.hashes, first.parent, first.token_ids(), first.block_size) == ([1, 2], 3, [5, 6, 7, 8], 2)
    assert (first.medium, first.lora_name, first.extra_keys) == ("GPU", "ad1", [["s"], None])
    assert (first.group, first.kind) == (1, "mamba")
    assert second == BlockRemoved([4], "CPU", 1)
    assert isinstance(third, AllBlocksCleared)
    for length in range(5, 12):
        short = only(pack(full[:length]))
        assert (short.hashes, short.token_ids()) == ([1, 2], [5, 6, 7, 8])


def test_sglang_is_understood() -> None:
    """Signed hashes become unsigned; what it puts after the medium is not taken for something else."""
    payload = pack(
        ["BlockStored", [-1], -2, [7], 1, None, "CPU_PINNED", {"namespace": 3}, 4],
        ["BlockRemoved", [-1]],
        rest=(),
    )
    batch = decode(payload)
    first, second = batch.events
    assert isinstance(first, BlockStored)
    assert (first.hashes, first.parent, first.token_ids()) == ([2**64 - 1], 2**64 - 2, [7])
    assert (first.medium, first.lora_name, first.extra_keys) == ("CPU_PINNED", None, None)
    assert second == BlockRemoved([2**64 - 1])
    assert batch.rank is None


def test_all_encodings_of_a_hash_agree() -> None:
    """Digest, signed and unsigned forms of one hash are the same number, also as a parent."""
    digest = bytes(24) + b"\x80" + bytes(7)
    forms = (digest, 2**63, -(2**63))
    for form in forms:
        for event in (
            stored(block_hashes=[form, 1], parent_block_hash=form),
            ["BlockStored", [form, 1], form, [5, 6, 7, 8], 2],
        ):
            found = only(pack(event))
            assert (found.hashes, found.parent) == ([2**63, 1], 2**63)
        assert only(pack({"type": "BlockRemoved", "block_hashes": [form]})).hashes == [2**63]
        assert only(pack(["BlockRemoved", [form]])).hashes == [2**63]


def test_unknown_events_are_left_out_and_order_is_kept() -> None:
    """A newer engine's events, as maps or arrays, cost nothing but themselves."""
    batch = decode(
        pack(
            {"type": "BlockMoved", "to": [1]},
            stored(),
            ["BlockMoved", 1],
            {"type": "AllBlocksCleared"},
            ["AllBlocksCleared", "why"],
            ["BlockRemoved", [8], "GPU"],
            ["X", *range(20)],
        )
    )
    assert [type(event).__name__ for event in batch.events] == [
        "BlockStored",
        "AllBlocksCleared",
        "AllBlocksCleared",
        "BlockRemoved",
    ]


def test_unknown_fields_are_ignored() -> None:
    """In events of both kinds and behind the rank."""
    removed = {"type": "BlockRemoved", "block_hashes": [3], "medium": None, "remaining_copy_counts": [1]}
    batch = decode(pack(stored(locality={"a": [1]}, ownership=2), removed, rest=(1, "later")))
    assert [type(event) for event in batch.events] == [BlockStored, BlockRemoved]
    assert batch.rank == 1


ODD: list[Any] = ["x", 1.5, -1, 2**63, True, [], [[1]], {}, {"a": {"b": None}}, b"\xff", None]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_what_stands_in_a_field_that_nothing_reads_does_no_harm(odd: Any) -> None:
    """The time, the rank and what newer engines say of a block, in both layouts."""
    fields = dict.fromkeys(("session_id", "kv_cache_spec_sliding_window", "locality", "ownership"), odd)
    plain = stored(extra_keys=None, group_idx=0, kv_cache_spec_kind="full_attention")
    for event in (plain | fields, [*plain.values(), odd, odd, odd]):
        batch = decode(pack(event, {"type": "AllBlocksCleared", "why": odd}, ts=odd, rest=(odd, odd)))
        assert batch.events == [only(pack(plain)), AllBlocksCleared()]
        assert batch.rank == (odd if type(odd) is int and odd is not True else None)
        assert isfinite(batch.ts_s)


@pytest.mark.parametrize("ts", [float("nan"), float("inf"), -float("inf"), 2**64 - 1, "now"])
def test_a_time_that_is_none_does_no_harm(ts: Any) -> None:
    """In both layouts; what is given is a number."""
    for event in (stored(), list(stored().values())):
        batch = decode(pack(event, ts=ts))
        assert len(batch.events) == 1
        assert isfinite(batch.ts_s)


def test_numbers_may_be_text() -> None:
    """As what cannot write 64 bits as a number writes them."""
    texts = stored(
        block_hashes=["1", "18446744073709551615"],
        parent_block_hash="-2",
        token_ids=["5", "6", "7", "8"],
        block_size="2",
        lora_id="3",
        group_idx="1",
    )
    for event in (texts, [*list(texts.values())[:-1], None, "1"]):
        found = only(pack(event))
        assert (found.hashes, found.parent, found.block_size) == ([1, 2**64 - 1], 2**64 - 2, 2)
        assert found.token_ids() == [5, 6, 7, 8]
        assert found.lora_id is not None
    assert only(pack(texts)).group == 1
    for removed in ({"type": "BlockRemoved", "block_hashes": ["7"]}, ["BlockRemoved", ["7"]]):
        assert only(pack(removed)) == BlockRemoved([7])


@pytest.mark.parametrize("odd", ["x", [1], {}, True])
def test_what_makes_nothing_up_is_assumed(odd: Any) -> None:
    """An adapter of whatever number is one; a removed block of whatever memory and group is gone."""
    for event in (stored(lora_id=odd), [*list(stored().values())[:5], odd]):
        assert only(pack(event)).lora_id is not None
    for removed in (
        {"type": "BlockRemoved", "block_hashes": [3], "medium": [odd], "group_idx": [odd]},
        ["BlockRemoved", [3], [odd], [odd]],
    ):
        assert only(pack(removed)) == BlockRemoved([3], ANYWHERE)


def test_optional_fields_may_be_absent() -> None:
    """A stored event needs hashes, parent, tokens and block size; a batch needs no rank and no events."""
    event = stored()
    for name in ("lora_id", "medium", "lora_name"):
        del event[name]
    found = only(pack(event, rest=()))
    assert (found.medium, found.lora_name, found.extra_keys) == (None, None, None)
    assert decode(pack(ts=3)) == Batch(3.0, [], 0)
    assert decode(pack(rest=(None,))).rank is None


def test_token_ids_are_decoded_on_demand() -> None:
    """Bad token ids spoil nothing but themselves: they are only looked at when asked for."""
    assert only(pack(stored(token_ids=[]))).token_ids() == []
    bad: tuple[Any, ...] = (
        [5, 6, 7],
        [5, 6, 7, -8],
        [5, 6, 7, 2**32],
        [[5, 6], [7, 8]],
        "5678",
        None,
        [[[]]] * 4,
    )
    for token_ids in bad:
        event = only(pack(stored(token_ids=token_ids)))
        assert event.hashes == [1, 2]
        with pytest.raises(DecodeError):
            event.token_ids()


def test_values_can_be_made_by_hand() -> None:
    """What a test of a consumer builds is what a decoder gives."""
    event = BlockStored([1, 2], None, encoded_token_ids([5, 6, 7, 8]), 2, medium="GPU")
    found = only(pack(stored()))
    assert event.token_ids() == found.token_ids()
    assert (event.hashes, event.medium) == (found.hashes, found.medium)
    assert BlockStored([1], None, encoded_token_ids([]), 2).token_ids() == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        pack(None),
        pack(5),
        pack([]),
        pack({}),
        pack({"type": 3}),
        pack({"type": "BlockStored"}),
        pack({"type": "BlockRemoved", "block_hashes": ["a"]}),
        pack({"type": "New"}, {"type": "BlockRemoved", "block_hashes": None}),
        pack(["BlockStored", [1]]),
        pack(stored(block_hashes=None)),
        pack(stored(block_size=-1)),
        pack(stored(block_size="two")),
        pack(stored(parent_block_hash=1.5)),
        pack(stored(extra_keys=[3])),
        pack(stored()) + b"\xc0",
        msgspec.msgpack.encode([1.5, {}, 0]),
        msgspec.msgpack.encode({"ts": 1.5}),
        b"\x92\xcb\x3f\xf8\0\0\0\0\0\0\x91\x81\xa4type\xa2\xff\xff",
        b"\x92\xcb\x3f\xf8\0\0\0\0\0\0\x91\x91\xa2\xff\xff",
        b"\x92\xcb\x3f\xf8\0\0\0\0\0\0\x91\x82\xa1x" + b"\x91" * 100_000,
        msgspec.msgpack.encode([1.5, [None] * (MAX_EVENTS + 1)]),
        msgspec.msgpack.encode([1.5, [["AllBlocksCleared"]] * (MAX_EVENTS + 1)]),
        pack(stored(token_ids=[70_000] * (MAX_PAYLOAD_BYTES // 5))),
    ],
    ids=lambda payload: repr(payload[:24]),
)
def test_anything_else_is_a_decode_error(payload: bytes) -> None:
    """Wrong shapes, types, lengths, nesting and text are refused, whatever they hide in."""
    with pytest.raises(DecodeError) as caught:
        decode(payload)
    assert len(str(caught.value)) <= 200


def survives(payload: bytes) -> None:
    """Decode all there is; nothing but the documented error may come out."""
    try:
        batch = decode(payload)
        for event in batch.events:
            if not isinstance(event, AllBlocksCleared):
                assert all(0 <= item < 2**64 for item in event.hashes)
            if isinstance(event, BlockStored):
                assert event.parent is None or 0 <= event.parent < 2**64
                event.token_ids()
    except DecodeError:
        pass


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(payload: bytes) -> None:
    """From scratch and behind the head of a batch."""
    survives(payload)
    survives(b"\x93\xcb" + payload)
    survives(b"\x93\xcb\x41\xda\xc0\x40\x1a\x6f\x76\x2a\x92" + payload)


def test_mutated_captures_never_raise_anything_else() -> None:
    """Cut short, with bytes changed, inserted and removed, in both encodings."""
    rng = random.Random(20261121)
    arrays = [
        msgspec.msgpack.encode([ts, [list(event.values()) for event in events], rank])
        for ts, events, rank in (msgspec.msgpack.decode(payload) for payload in CAPTURES)
    ]
    payloads = [payload for payload in CAPTURES + arrays if len(payload) < 1000]
    for payload in payloads:
        for end in range(0, len(payload), 7):
            survives(payload[:end])
    for _ in range(10_000):
        mutated = bytearray(rng.choice(payloads))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(mutated))
            match rng.randrange(3):
                case 0:
                    mutated[at] = rng.randrange(256)
                case 1:
                    mutated.insert(at, rng.randrange(256))
                case _:
                    del mutated[at]
        survives(bytes(mutated))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["block_hashes", "parent_block_hash", "token_ids", "block_size", "medium", "extra_keys"]),
    st.booleans(),
)
def test_any_value_in_any_field_is_understood_or_refused(value: Any, name: str, as_array: bool) -> None:
    """A field of a wrong type never breaks more than its batch."""
    event = stored() | {name: value}
    survives(pack(list(event.values()) if as_array else event))


def test_an_offloaded_block_may_have_neither_tokens_nor_size() -> None:
    """Offloading connectors of vLLM name blocks by hash alone, with a block size of 0."""
    (event,) = decode(pack(stored(block_size=0, token_ids=[], medium="CPU"))).events
    assert isinstance(event, BlockStored)
    assert (event.block_size, event.token_ids()) == (0, [])
