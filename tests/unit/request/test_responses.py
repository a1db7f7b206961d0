"""What names a stored response: paths, bodies, and the heads of answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.request.answer_head import HEAD_BYTES, HeadCollector
from extproc.request.responses import (
    MAX_ID_CHARS,
    Follows,
    conversation_key,
    follows,
    id_in,
    named_in,
    response_key,
)

WHOLE = {"id": "resp_1", "object": "response", "output": [{"id": "msg_1", "type": "message"}]}
CREATED = {"type": "response.created", "sequence_number": 0, "response": WHOLE}


def sse(*events: dict[str, Any]) -> bytes:
    """Server-sent events."""
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n" for event in events
    )


def indented(stream: bytes) -> bytes:
    """Each event's object over several `data:` lines."""
    return stream.replace(b",", b",\ndata: ")


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "lines ended by CR LF": lambda stream: stream.replace(b"\n", b"\r\n"),
    "lines ended by CR": lambda stream: stream.replace(b"\n", b"\r"),
    "a mark before": lambda stream: b"\xef\xbb\xbf" + stream,
    "no blanks": lambda stream: stream.replace(b": ", b":"),
    "a ping before": lambda stream: b'event: ping\ndata: {"type":"ping"}\n\n' + stream,
    "empty data before": lambda stream: b"data:\n\n" + stream,
    "an event without one before": lambda stream: sse({"type": "response.queued"}) + stream,
    "data on several lines": indented,
}
"""How a stream of events may be written."""


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_head_of_a_stream_is_the_event_that_names_its_response(
    way: Callable[[bytes], bytes], size: int
) -> None:
    """However it is written, after keep-alives of more bytes than a head has, wherever chunks are cut."""
    waiting = b": keep-alive\n\n" + b'data: {"type":"ping"}\n\n'
    stream = way(waiting * HEAD_BYTES + sse(CREATED, {"type": "response.output_text.delta"}))
    collector = HeadCollector()
    cuts = range(0, len(stream), size)
    seen = [collector.add(stream[at : at + size]) for at in cuts]
    assert True in seen
    assert id_in(collector.head) == "resp_1"


@pytest.mark.parametrize(
    "head",
    [
        orjson.dumps(WHOLE),
        orjson.dumps(WHOLE, option=orjson.OPT_INDENT_2),
        b'\n{"id" : "resp_1"',
        orjson.dumps(
            {"object": "response", "metadata": {"id": "other"}, "output": [{"id": "x"}], "id": "resp_1"}
        ),
        orjson.dumps({"instructions": '"id":"other" {"id":"other"} [', "id": "resp_1"}),
        orjson.dumps({"previous_response_id": "other", "error": None, "n": 1.5, "id": "resp_1"}),
        sse(CREATED),
        b": keep-alive\n\n" + sse(CREATED),
        sse({"response": WHOLE, "sequence_number": 0, "type": "response.created"}),
        b"data:" + orjson.dumps(CREATED) + b"\r\n\r\n",
        b"\xef\xbb\xbf" + orjson.dumps(WHOLE),
        *(way(sse(CREATED)) for way in WAYS.values()),
    ],
    ids=[*range(11), *WAYS],
)
def test_the_id_of_an_answer(head: bytes) -> None:
    """Of the response object itself, wherever it stands among the fields, whole or in the first event."""
    assert id_in(head) == "resp_1"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{",
        b'{"id":"resp_',
        b'{"id":7}',
        b'{"id":""}',
        b'{"id":["resp_1"]}',
        b'{"id":{"id":"resp_1"}}',
        b'{"id":null,"x":"resp_1"}',
        b'[{"id":"resp_1"}]',
        b'{"error":{"id":"resp_1","message":"no"}}',
        b'{"metadata":{"id":"resp_1"}}',
        b'{"output":[{"id":"resp_1"}]}',
        b'{"text":"{\\"id\\":\\"resp_1\\"}"}',
        b'{"a":"id","b":"resp_1"}',
        b'{"id":"resp\\u005f1"}',
        b'{"id":"' + b"x" * (MAX_ID_CHARS + 1) + b'"}',
        b'{"a":{}}{"id":"resp_1"}',
        b"Internal Server Error",
        b": keep-alive\n\n",
        sse({"type": "error", "id": "resp_1"}),
        sse({"type": "response.created", "response": {"metadata": {"id": "resp_1"}}}),
        b"\xff\xfe{",
    ],
    ids=range(22),
)
def test_what_is_no_id_of_an_answer(head: bytes) -> None:
    """Deeper, quoted, cut short, too long or of another type; an error has none."""
    assert id_in(head) is None


def test_only_the_head_is_looked_at() -> None:
    """An id behind it is not found, however long the answer."""
    assert id_in(b'{"a":"' + b"x" * HEAD_BYTES + b'","id":"resp_1"}') is None


@given(st.binary(max_size=200), st.sampled_from([b"", b"{", b"data: {", b'{"id":']))
def test_any_bytes_have_an_id_or_none(tail: bytes, start: bytes) -> None:
    """Nothing an engine sends raises."""
    found = id_in(start + tail)
    assert found is None or 0 < len(found) <= MAX_ID_CHARS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(alphabet='id"\\{}[]:, \n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet='id"{[\\', max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(alphabet='id"{[\\', max_size=4), JSON, max_size=5))
def test_the_scan_agrees_with_a_parser(answer: dict[str, Any]) -> None:
    """On any object, but for ids with escapes, which no engine makes and which are left unknown."""
    given_id = answer.get("id")
    expected = given_id if isinstance(given_id, str) and given_id else None
    if expected is not None and any(char in expected for char in '"\\\n'):
        expected = None
    assert id_in(orjson.dumps(answer)) == expected


def test_what_a_body_builds_on() -> None:
    """Ids by their keys; both forms of a conversation; all else is the engine's to refuse."""
    response, conversation = response_key("resp_1"), conversation_key("conv_1")
    assert follows({"previous_response_id": "resp_1"}) == Follows(response, None)
    assert follows({"conversation": "conv_1"}) == Follows(None, conversation)
    assert follows({"conversation": {"id": "conv_1"}}) == Follows(None, conversation)
    assert follows({"previous_response_id": "resp_1", "conversation": "conv_1"}) == (response, conversation)
    others: list[Any] = [None, 7, "", [], {}, "x" * (MAX_ID_CHARS + 1)]
    for other in others:
        assert follows({"previous_response_id": other, "conversation": other}) == Follows(None, None)


def test_keys_are_64_bits_and_apart() -> None:
    """A conversation is never taken for the response of the same name, nor one id for another."""
    keys = [
        key(name) for key, name in itertools.product((response_key, conversation_key), ("a", "b", "\ud800"))
    ]
    assert len(set(keys)) == 6
    assert all(0 <= key < 2**64 for key in keys)


@given(st.text(max_size=40))
def test_every_path_names_a_response_or_none(tail: str) -> None:
    """No path a client can think of raises, and an id is never empty or too long."""
    named = named_in("/v1/responses/" + tail)
    assert named is None or 0 < len(named.response_id) <= MAX_ID_CHARS
