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
