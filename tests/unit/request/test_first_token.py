"""What is taken for the first token of a stream, and what is not."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from extproc.request.first_token import FirstTokenDetector
from extproc.values.exchange import Sight
from extproc.values.requests import Operation

NOT_YET, PASSES, PASSES_LATE = Sight.NOT_YET, Sight.PASSES, Sight.PASSES_LATE
DATA = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
OUTPUT = b'event: response.output_item.added\ndata: {"type":"response.output_item.added"}\n\n'


def looks(chunks: list[bytes], operation: Operation = Operation.CHAT) -> list[Sight]:
    """What each chunk of an answer shows that goes on behind them."""
    detector = FirstTokenDetector(operation)
    return [detector.look(chunk, end_of_stream=False) for chunk in chunks]


def test_a_token_in_a_long_line_is_seen_before_the_line_is_over() -> None:
    """Twenty bytes show that it is no ping."""
    assert looks([b'data: {"choices":[{"index":0,']) == [PASSES]


PINGS = [
    b'data: {"type":"ping"}\n\n',
    b'data: { "type" : "ping" }\n\n',
    b'event: ping\ndata: {"type": "ping"}\n\n',
    b"event: ping\ndata: {}\n\n",
    b"event:ping\ndata:{}\n\n",
    b"data:\n\n",
    b"data: \n\n",
]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("ping", PINGS)
def test_a_ping_is_no_token(ping: bytes, end: bytes) -> None:
    """Proxies send them while a request waits; wherever they are cut, the token comes later."""
    ping, data = ping.replace(b"\n", end), DATA.replace(b"\n", end)
    assert looks([ping, ping, data]) == [NOT_YET, NOT_YET, PASSES_LATE]
    assert looks([ping + data]) == [PASSES]
    for cut in range(1, len(ping)):
        assert looks([ping[:cut], ping[cut:], data]) == [NOT_YET, NOT_YET, PASSES_LATE]
    assert FirstTokenDetector(Operation.CHAT).look(ping, end_of_stream=True) is Sight.NEVER


@pytest.mark.parametrize("size", [1_000_000, 100, 7])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("token", ["content_block_delta", "message_delta"])
def test_a_message_that_begins_is_no_token(token: str, named: bool, size: int) -> None:
    """Some servers send its start, and that of a block, as soon as they have the request."""

    def event(kind: str, **more: Any) -> bytes:
        name = f"event: {kind}\n".encode() if named else b""
        return name + b"data: " + orjson.dumps({"type": kind, **more}) + b"\n\n"

    quoted = {"content": [{"type": "content_block_delta", "text": "\nevent: message_delta\n"}]}
    begin = event("message_start", message={"id": "m", **quoted}) + event(
        "content_block_start", index=0, content_block={"type": "text", "text": ""}
    )
    begin += event("ping")
    chunks = [begin[at : at + size] for at in range(0, len(begin), size)]
    expected = [NOT_YET] * len(chunks) + [PASSES_LATE]
    assert looks([*chunks, event(token, index=0)], Operation.MESSAGES) == expected
    assert looks([begin + event(token, index=0)], Operation.MESSAGES) == [PASSES]


def test_an_error_of_the_messages_api_is_no_token() -> None:
    """It ends the look, at once or behind the start."""
    error = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'
    start = b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
    assert looks([error], Operation.MESSAGES) == [Sight.NEVER]
    assert looks([start, error], Operation.MESSAGES) == [NOT_YET, Sight.NEVER]


NO_CHOICES = [
    b'data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}\n\n',
    b'data: {"id":"c","object":"chat.completion.chunk","choices": [ ],"usage":{"prompt_tokens":9}}\n\n',
    b"data: [DONE]\n\n",
]


@pytest.mark.parametrize("event", NO_CHOICES)
def test_what_has_no_choice_is_no_token(event: bytes) -> None:
    """What a filter thinks of the prompt, usage alone, the end."""
    assert looks([event, DATA]) == [NOT_YET, PASSES_LATE]
    assert FirstTokenDetector(Operation.CHAT).look(event, end_of_stream=True) is Sight.NEVER


def test_the_role_alone_is_the_first_token() -> None:
    """It is said with the first result of the engine: by vLLM, by SGLang."""
    assert looks([b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n']) == [
        PASSES
    ]


ERRORS = [
    b'data: {"error":{"code":500}}\n\n',
    b'data: {"errors":[{"code":500}]}\n\n',
    b'data: {"errors": "gone for now"}\n\n',
    b'data: {"status":"error","message":"x"}\n\n',
]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_no_token(error: bytes) -> None:
    """It teaches nothing; an empty one is none."""
    assert looks([error]) == [Sight.NEVER]
    assert looks([b'data: {"errors": [], "choices": [{"delta": {"content": "a"}}]}\n\n']) == [PASSES]


@pytest.mark.parametrize("size", [1_000_000, 100, 7])
@pytest.mark.parametrize(
    "quoted",
    [
        {"instructions": "event: response.output_text.delta, data: {}"},
        {"instructions": '"type":"response.output_text.delta"'},
        {"instructions": "\nevent: response.output_text.delta\n"},
        {"metadata": {"type": "response.output_item.added"}},
        {"instructions": "x" * 5_000},
    ],
)
def test_what_a_response_quotes_of_its_request_is_no_token(quoted: dict[str, Any], size: int) -> None:
    """Engines repeat instructions and metadata in `response.created`, long before there is a token."""
    said = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", **quoted}}
    created = b"event: response.created\ndata: " + orjson.dumps(said) + b"\n\n"
    chunks = [created[at : at + size] for at in range(0, len(created), size)]
    assert looks([*chunks, OUTPUT], Operation.RESPONSES) == [NOT_YET] * len(chunks) + [PASSES_LATE]
    unnamed = b'data: {"sequence_number":1,"type":"response.output_item.added","item":{}}\n\n'
    assert looks([*chunks, unnamed], Operation.RESPONSES) == [NOT_YET] * len(chunks) + [PASSES_LATE]
