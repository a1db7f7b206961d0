"""Messages of the access log with something in them that is no text: nothing of the others is lost."""

from __future__ import annotations

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from extproc.accesslog.entries import LINE_TAG, translate
from extproc.accesslog.salvage import salvaged
from extproc.values.endings import RequestEnd
from tests.unit.log_lines import line

MARK = "@@@@"
USAGE = '{"prompt_tokens":5,"completion_tokens":2,"x":"%s"}'
NO_TEXT = (b"\xff\xfe\xff\xfe", b"\xe2\x82\xe2\x82", b"\xed\xa0\x80a", b"\xf8\x88\x80\x80")


def message(*texts: str, content_type: str = "application/json") -> als_pb2.StreamAccessLogsMessage:
    """An entry for each, whose usage has the text in it."""
    made = als_pb2.StreamAccessLogsMessage()
    made.identifier.log_name = "downstream"
    for number, text in enumerate(texts):
        entry = made.http_logs.log_entry.add()
        entry.common_properties.access_log_type = accesslog_pb2.DownstreamEnd
        entry.common_properties.start_time.seconds = 1_700_000_000
        entry.common_properties.custom_tags["rid"] = f"r{number}"
        entry.common_properties.custom_tags[LINE_TAG] = line(rid=f"r{number}", top=USAGE % text)
        entry.response.response_code.value = 200
        entry.response.response_headers["content-type"] = content_type
    return made


@pytest.mark.parametrize("bad", NO_TEXT)
def test_one_entry_that_is_no_text_costs_no_other(bad: bytes) -> None:
    """It costs itself the one text: its usage counts, and all else of it."""
    raw = message("fine", MARK, "fine as well").SerializeToString().replace(MARK.encode(), bad)
    with pytest.raises(DecodeError):
        als_pb2.StreamAccessLogsMessage.FromString(raw)
    entries = salvaged(memoryview(raw))
    assert [entry.common_properties.start_time.seconds for entry in entries] == [1_700_000_000] * 3
    assert [entry.response.response_code.value for entry in entries] == [200] * 3
    ends = [translate(entry) for entry in entries]
    for number, end in enumerate(ends):
        assert isinstance(end, RequestEnd)
        assert (end.request_id, end.status, end.prompt_tokens) == (f"r{number}", 200, 5)
        assert end.content_type == "application/json"


def test_another_field_that_is_no_text_is_left_out() -> None:
    """The rest of its entry stays."""
    raw = message("fine", content_type=MARK).SerializeToString().replace(MARK.encode(), NO_TEXT[0])
    (entry,) = salvaged(raw)
    end = translate(entry)
    assert isinstance(end, RequestEnd)
    assert (end.request_id, end.prompt_tokens, end.content_type) == ("r0", 5, None)


def test_what_protobuf_reads_is_the_same() -> None:
    """Entry by entry."""
    whole = message("a", "b")
    assert salvaged(whole.SerializeToString()) == list(whole.http_logs.log_entry)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_give_entries(noise: bytes, at: int) -> None:
    """Cut anywhere, or with anything in them."""
    raw = message("a").SerializeToString()
    for some in (noise, raw[:at] + noise + raw[at:], raw[:at]):
        assert isinstance(salvaged(some), list)
