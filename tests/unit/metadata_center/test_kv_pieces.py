"""Large payloads in pieces: what applying them comes to, how large they are, and what is refused."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.kv_events import pieces as module
from metadata_center.kv_events.decoding import MAX_PAYLOAD_BYTES, decode
from metadata_center.kv_events.errors import DecodeError
from metadata_center.kv_events.events import MAX_EVENTS, AllBlocksCleared, Batch, BlockRemoved, BlockStored
from metadata_center.kv_events.pieces import (
    MAX_EVENT_HASHES,
    MAX_EVENT_TOKENS,
    MAX_EXTRA_BYTES,
    MAX_VOIDS,
    SMALL_BYTES,
    STEP_EVENTS,
    STEP_HASHES,
    Unreadable,
    pieces,
)
from metadata_center.roots import root
from metadata_center.types import EndpointKey

A = EndpointKey("10.0.0.1:1")
BYTES = [bytes([number]) for number in range(256)]
pack = msgspec.msgpack.encode


def stored(hashes: Sequence[Any], parent: Any = None, size: int = 1, **more: Any) -> dict[str, Any]:
    """A map whose blocks are made of tokens 0..255 in turn."""
    tokens = [number % 256 for number in range(len(hashes) * size)]
    event = {"type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent}
    return event | {"token_ids": tokens, "block_size": size, **more}


def as_array(event: dict[str, Any]) -> list[Any]:
    """The same event by position."""
    return list(event.values())


def batch(*events: Any) -> bytes:
    """A payload."""
    return pack([1.5, list(events), 3])


def parts(payload: bytes) -> list[Batch]:
    """Its pieces; all of it can be read."""
    found = [part for part in pieces(payload) if part is not None]
    assert not any(isinstance(part, Unreadable) for part in found)
    return [part for part in found if isinstance(part, Batch)]


def told(payload: bytes) -> list[Any]:
    """The events of all pieces, and what cannot be read, in order."""
    found: list[Any] = []
    for part in pieces(payload):
        found += part.events if isinstance(part, Batch) else [] if part is None else [part]
    return found


def weight(part: Batch) -> int:
    """Blocks named in a piece."""
    return sum(len(event.hashes) for event in part.events if not isinstance(event, AllBlocksCleared))


def test_a_small_payload_is_one_piece() -> None:
    """What engines send at each step is decoded as ever."""
    payload = batch(stored(range(1, 65), size=16), {"type": "BlockRemoved", "block_hashes": [1, 2]})
    assert parts(payload) == [decode(payload)]


@pytest.mark.parametrize("form", [dict, as_array])
def test_a_large_event_comes_in_parts_that_continue_each_other(form: Any) -> None:
    """Every block is there once, in order, behind the one before it; the last part is no block alone."""
    count = 3 * STEP_HASHES + 1
    extra = [["salt"], *[None] * (count - 1)]
    event = stored(range(10**9, 10**9 + count), 7, 2)
    payload = batch(form(event | {"lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": extra}))
    found = parts(payload)
    events = [event for part in found for event in part.events if isinstance(event, BlockStored)]
    assert len(events) == sum(len(part.events) for part in found)
    assert [len(event.hashes) for event in events] == [STEP_HASHES, STEP_HASHES, STEP_HASHES + 1]
    before = 7
    for stored_part in events:
        assert stored_part.parent == before
        assert len(stored_part.token_ids()) == 2 * len(stored_part.hashes)
        assert len(stored_part.extra_keys or ()) == len(stored_part.hashes)
        before = stored_part.hashes[-1]
    assert [name for stored_part in events for name in stored_part.hashes] == list(
        range(10**9, 10**9 + count)
    )
    assert {(part.ts_s, part.rank) for part in found} == {(1.5, 3)}


@pytest.mark.parametrize(
    "payload",
    [
        batch(stored(range(1, MAX_EVENT_HASHES + 1))),
        batch(stored([number.to_bytes(8, "big") for number in range(30_000)])),
        batch(*[{"type": "BlockRemoved", "block_hashes": [1]}] * 40_000),
        batch(*[["BlockRemoved", [number], None] for number in range(MAX_EVENTS)]),
        batch({"type": "BlockRemoved", "block_hashes": list(range(30_000))}),
        batch(*[["AllBlocksCleared"]] * 5_000),
        batch(*[["Unknown", [1] * 20]] * 30_000),
        batch(stored([-number for number in range(1, 30_000)])),
    ],
    ids=["blocks", "bytes", "events", "arrays", "removed", "cleared", "unknown", "signed"],
)
def test_no_piece_is_larger_than_a_step(payload: bytes) -> None:
    """However the blocks are spread over events, and nothing is lost between pieces."""
    found = parts(payload)
    assert all(weight(part) < 2 * STEP_HASHES and len(part.events) <= STEP_EVENTS for part in found)
    assert sum(map(weight, found)) == weight(decode(payload))


def test_an_engine_that_clears_goes_on_in_another_piece() -> None:
    """What is swept at each piece keeps pace with what is cleared."""
    events = [["AllBlocksCleared"], stored([1, 2]), ["AllBlocksCleared"], stored([3, 4])]
    found = parts(
        batch(
            *[as_array(event) if isinstance(event, dict) else event for event in events],
            *[["X", b"x" * 999]] * 20,
        )
    )
    assert [len(part.events) for part in found] == [1, 2, 1]


@pytest.mark.parametrize(
    ("event", "voids"),
    [
        (stored(range(1, MAX_EVENT_HASHES + 2)), False),
        (stored(range(20_000), parent="no hash"), False),
        ({"type": "BlockStored", "block_hashes": [1] * 20_000}, False),
        ({"type": "BlockRemoved", "block_hashes": [1] * (MAX_EVENT_HASHES + 1)}, True),
        ("x" * 20_000, True),
        ({"block_hashes": [1] * 20_000}, True),
    ],
)
def test_events_beyond_any_engine_are_left_out(event: Any, voids: bool) -> None:
    """By their heads, before they are decoded; and those that are none."""
    (found,) = [part for part in told(batch(event)) if isinstance(part, Unreadable)]
    assert (found.count, found.voids) == (1, voids)


STORED_ODDITIES: list[dict[str, Any]] = [
    {"block_hashes": None},
    {"block_hashes": [1, "one"]},
    {"parent_block_hash": [1]},
    {"block_size": "two"},
    {"block_size": -1},
    {"medium": 1},
]
REMOVED_ODDITIES: list[Any] = [
    {"type": "BlockRemoved"},
    {"type": "BlockRemoved", "block_hashes": [1, "one"]},
    ["BlockRemoved", 7],
    {"type": 3},
    {},
    [],
    None,
    5,
]


@pytest.mark.parametrize("form", [dict, as_array])
@pytest.mark.parametrize("size", [1, SMALL_BYTES])
@pytest.mark.parametrize("odd", STORED_ODDITIES, ids=repr)
def test_an_unreadable_store_costs_its_own_blocks(odd: dict[str, Any], size: int, form: Any) -> None:
    """What stands beside it counts, and nothing that was known is lost; in small and large payloads."""
    plain = stored([1, 2]) | {"lora_id": None, "medium": "GPU", "lora_name": None}
    before, after = stored([8, 9]), ["BlockRemoved", [8]]
    found = told(batch(before, form(plain | odd), ["X", b"x" * size], after))
    assert [type(part) for part in found] == [BlockStored, BlockRemoved, Unreadable]
    assert (found[-1].count, found[-1].voids) == (1, False)


@pytest.mark.parametrize("field", ["group_idx", "kv_cache_spec_kind", "lora_name", "extra_keys"])
def test_a_store_whose_group_or_adapter_is_unreadable_is_left_out(field: str) -> None:
    """Taken for the base model's, or for the group that is followed, its blocks would be made up."""
    (found,) = told(batch(stored([1, 2]) | {field: {"a": 1}}))
    assert (found.count, found.voids) == (1, False)


@pytest.mark.parametrize("size", [1, SMALL_BYTES])
@pytest.mark.parametrize("odd", REMOVED_ODDITIES, ids=repr)
def test_an_unreadable_removal_voids_what_was_before_it_and_no_more(odd: Any, size: int) -> None:
    """Events behind it in the same payload count."""
    found = told(batch(stored([8, 9]), odd, ["X", b"x" * size], stored([5, 6])))
    assert [type(part) for part in found] == [Unreadable, BlockStored]
    assert (found[0].count, found[0].voids, found[1].hashes) == (1, True, [5, 6])


def test_many_unreadable_events_cost_little() -> None:
    """Stores are told of once; more removals than any engine's batch has end it."""
    (found,) = told(batch(*[["BlockStored"]] * 1_000))
    assert (found.count, found.voids) == (1_000, False)
    assert len(told(batch(*[None] * MAX_VOIDS))) == MAX_VOIDS
    with pytest.raises(DecodeError):
        told(batch(*[None] * (MAX_VOIDS + 1)))


@pytest.mark.parametrize(
    "noise", [b"", b"\xc1", b"x" * 20_000, b"\x93" * 20_000, bytes(MAX_PAYLOAD_BYTES + 1)]
)
def test_what_is_no_payload_is_refused(noise: bytes) -> None:
    """Nothing but `DecodeError` is raised."""
    with pytest.raises(DecodeError):
        parts(noise)


def test_a_fault_after_some_pieces_voids_them() -> None:
    """A reader that applied those has to forget them."""
    found = told(batch(stored(range(1, 5_000)), {"type": "BlockRemoved", "block_hashes": "x"}))
    assert isinstance(found[0], BlockStored)
    assert isinstance(found[-1], Unreadable)
    assert found[-1].voids


@pytest.mark.parametrize(
    "event",
    [
        stored([1, 2], 7, MAX_EVENT_TOKENS // 2 + 1, medium="GPU", group_idx=3),
        stored([1, 2], 7, extra_keys=[["x" * MAX_EXTRA_BYTES], None], group_idx=3, medium="GPU"),
        [*as_array(stored([1, 2], 7)), None, "GPU", None, [[[]] * MAX_EXTRA_BYTES], 3],
    ],
    ids=["tokens", "extra", "array"],
)
def test_too_many_tokens_or_extra_keys_are_no_text(event: Any) -> None:
    """The blocks are named all the same, so that what removes them later is understood."""
    (part,) = parts(batch(event))
    (event,) = part.events
    assert isinstance(event, BlockStored)
    assert (event.hashes, event.parent, event.medium, event.group) == ([1, 2], 7, "GPU", 3)
    with pytest.raises(DecodeError):
        event.token_ids()


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("stored"), st.integers(0, 40), st.integers(1, 40)),
        st.tuples(st.just("removed"), st.integers(0, 60), st.integers(1, 60)),
        st.tuples(st.just("cleared"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@given(events=EVENTS)
def test_applied_in_pieces_is_applied(events: list[tuple[str, int, int]]) -> None:
    """A map that gets the pieces answers as one that gets the batch whole, with steps of a few blocks."""
    made: list[Any] = []
    for kind, first, count in events:
        if kind == "stored":
            tokens = [number % 256 for number in range(first, first + count)]
            event = stored(range(first + 1, first + count + 1), first or None)
            made.append(event | {"token_ids": tokens})
        elif kind == "removed":
            made.append({"type": "BlockRemoved", "block_hashes": list(range(first + count, first, -1))})
        else:
            made.append({"type": "AllBlocksCleared"})
    payload = batch(*made, {"type": "Padding", "bytes": b"x" * SMALL_BYTES})
    matches = []
    for step in (3, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "STEP_HASHES", step)
            cache_map = CacheMap()
            replica = cache_map.attach(A, 0, "m", BYTES)
            for part in parts(payload):
                cache_map.apply(replica, part)
        text = bytes(range(100))
        found = cache_map.match(root("m", None, None), text, (A,))
        matches.append((found.blocks, found.tokens, cache_map.stats.held, cache_map.stats.removed))
    assert matches[0] == matches[1]
