"""Access-log messages that protobuf refuses because of one text: what is left of their entries.

Envoy puts into an entry what it found in an answer, byte for byte, and does not look whether it is UTF-8, as
protobuf wants it. Read as a whole, one such text of one engine loses the endings of everybody else that came
with it.

Rules:
    1. Any bytes give entries. One that protobuf reads is what it reads; of another one all is kept that can
       be, its tags with a mark of replacement (U+FFFD) for what is no text.
    2. Nothing is looked at here while messages are read as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from envoy.data.accesslog.v3 import accesslog_pb2 as pb
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.message import DecodeError, Message

from extproc.protobuf_fields import NoFieldError, fields
from extproc.transport.seam import Received


def _number(message: Any, field: str) -> int:
    number: int = message.DESCRIPTOR.fields_by_name[field].number
    return number


_HTTP_LOGS: Final = _number(als_pb2.StreamAccessLogsMessage, "http_logs")
_LOG_ENTRY: Final = _number(als_pb2.StreamAccessLogsMessage.HTTPAccessLogEntries, "log_entry")
_COMMON: Final = _number(pb.HTTPAccessLogEntry, "common_properties")
_TAGS: Final = _number(pb.AccessLogCommon, "custom_tags")
_KEY, _VALUE = 1, 2
"""Of an entry of a map."""


def salvaged(raw: Received) -> list[pb.HTTPAccessLogEntry]:
    """The HTTP entries of a `StreamAccessLogsMessage` that does not decode."""
    return [
        _entry(entry)
        for number, logs, _ in _fields(bytes(raw))
        if number == _HTTP_LOGS
        for within, entry, _ in _fields(logs)
        if within == _LOG_ENTRY
    ]


def _entry(raw: bytes) -> pb.HTTPAccessLogEntry:
    entry = pb.HTTPAccessLogEntry()
    if _merged(entry, raw):
        return entry
    entry.Clear()
    for number, content, field in _fields(raw):
        if number == _COMMON:
            _add_common(entry.common_properties, content)
        else:
            _merged(entry, field)
    return entry


def _add_common(common: pb.AccessLogCommon, raw: bytes) -> None:
    for number, content, field in _fields(raw):
        if number == _TAGS:
            pair = {of: text.decode("utf-8", "replace") for of, text, _ in _fields(content)}
            common.custom_tags[pair.get(_KEY, "")] = pair.get(_VALUE, "")
        else:
            _merged(common, field)


def _merged(message: Message, raw: bytes) -> bool:
    """Whether `raw` could be added to `message`; else none of it is."""
    try:
        found = type(message).FromString(raw)
    except DecodeError:
        return False
    message.MergeFrom(found)
    return True


def _fields(raw: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, content and whole of each field, up to what is none."""
    with suppress(NoFieldError):
        for tag, whole, content, stop in fields(raw):
            yield tag >> 3, raw[content:stop], raw[whole:stop]
